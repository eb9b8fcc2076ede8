"""Exports and the opening of trained models: what comes back, what transformers reads, what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from checkpoints import make_run, write_checkpoint
from model_files import randomize
from PIL import Image
from safetensors.torch import load_file

from segformer.checkpoint.format import TrainState
from segformer.data.loading.classification import ClassificationAugment, ClassificationGeometry
from segformer.errors import CheckpointError, ConfigError
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.evaluated import EvaluateConfig, open_scored
from segformer.inference.export import ExportConfig, build, check_network, export, open_checkpoint
from segformer.inference.predictor import Predictor
from segformer.models.segformer import MiTClassifier, SegFormer, build_classifier, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata
from segformer.models.weights.load import weights_of
from segformer.models.weights.write import write_export
from segformer.training.config import compose

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 61.0, 62.0]
COMMON = {"palette": [[0, 0, 0], [10, 200, 30], [200, 60, 0]], "mean": MEAN, "std": STD}
METADATA = {
    "segmentation": Metadata(classes=["background", "leaf", "stem"], **COMMON),
    "classification": Metadata(classes=["cat", "dog", "cow"], view=[96, 112], **COMMON),
}
KINDS = list(METADATA)


def random_model(kind: str = "segmentation", **settings: str) -> SegFormer | MiTClassifier:
    """MiT-B0 whose every parameter and buffer is random, so that no two paths agree by chance."""
    torch.manual_seed(0)
    build_kind = build_model if kind == "segmentation" else build_classifier
    model = build_kind(ModelConfig(variant="b0", **settings), 3).eval()
    randomize(model.state_dict())
    return model


def write(model: SegFormer | MiTClassifier, out: Path) -> Path:
    kind = "segmentation" if isinstance(model, SegFormer) else "classification"
    write_export(weights_of(model, model.backbone, METADATA[kind]), out, step=7, digest="d")
    return out


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write(random_model(kind), folder / kind) for kind in KINDS}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two checkpoints and the metrics of one evaluation."""
    state = build_model(ModelConfig(), 2).state_dict()
    folder = make_run(tmp_path / "run", {10: state, 20: state}, "data=sample")
    row = {"kind": "eval", "step": 20, "miou": 0.5, "macc": 0.6, "aacc": 0.7, "iou": [0.5, None]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"kind": "ev')
    return folder


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a classifier that leaves its classes to the shards, with one checkpoint."""
    shards = shapes.write_set(tmp_path_factory.mktemp("shapes"), {"train": 3, "val": 6})
    overrides = ["data=folder", "data.task=classification", f"data.shards={shards}"]
    sizes = ["classification.size=48", "classification.eval_resize=56", "classification.mean=[1,2,3]"]
    place = tmp_path_factory.mktemp("classifier") / "run"
    folder = make_run(place, {20: random_model("classification").state_dict()}, *overrides, *sizes)
    row = {"kind": "final", "step": 20, "top1": 0.5, "top5": 1.0, "macc": 0.4, "acc": [0.5, 0.3, None]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(("profile", "kind"), [("hf", KINDS[0]), ("hf", KINDS[1]), ("original", KINDS[0])])
def test_transformers_loads_an_export_and_is_exact_with_profile_hf(
    tmp_path: Path, profile: str, kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    name = {"segmentation": "ForSemanticSegmentation", "classification": "ForImageClassification"}[kind]
    model = random_model(kind, norm_profile=profile)
    out = write(model, tmp_path / "export")
    theirs, info = getattr(transformers, f"Segformer{name}").from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    assert theirs.config.id2label[2] == METADATA[kind].classes[2]
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        difference = (model(images) - theirs.eval()(images).logits).abs().max()
    assert difference < 1e-4 if profile == "hf" else 0 < difference < 0.1
    section = json.loads((out / "config.json").read_text())["segformer"]
    assert section["exact_in_transformers"] is (profile == "hf")
    assert section["weights_sha256"] == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def photograph(path: Path) -> np.ndarray:
    """A smooth picture, written as PNG, (130, 200, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((200, 130), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(path)
    return pixels


def test_the_pipeline_of_transformers_segments_as_the_predictor_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = write(random_model(norm_profile="hf"), tmp_path / "export")
    pixels, names = photograph(tmp_path / "a.png"), METADATA["segmentation"].classes
    ours = Predictor(out, device="cpu")(pixels).mask
    theirs = np.full(ours.shape, 255, np.uint8)
    for found in transformers.pipeline("image-segmentation", str(out))(str(tmp_path / "a.png")):
        theirs[np.asarray(found["mask"]) > 0] = names.index(found["label"])
    assert len(np.unique(ours)) > 1
    assert (theirs == ours).mean() >= 0.999


def test_the_pipeline_of_transformers_classifies_the_view_of_an_evaluation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model("classification", norm_profile="hf")
    out = write(model, tmp_path / "export")
    pixels, metadata = photograph(tmp_path / "a.png"), METADATA["classification"]
    size, short = metadata.view
    view = ClassificationGeometry(ClassificationAugment(size=size, eval_resize=short)).eval_view(pixels)
    with torch.no_grad():
        images = (torch.tensor(view, dtype=torch.float32) - torch.tensor(MEAN)) / torch.tensor(STD)
        expected = model(images.permute(2, 0, 1)[None]).softmax(1)[0]
    found = transformers.pipeline("image-classification", str(out))(str(tmp_path / "a.png"))
    shares = {entry["label"]: entry["score"] for entry in found}
    assert [shares[name] for name in metadata.classes] == pytest.approx(expected.tolist(), abs=0.02)
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"]["height"] == size


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_comes_back_as_it_was_written(exports: dict[str, Path], kind: str) -> None:
    model = random_model(kind)
    opened = open_checkpoint(exports[kind])
    assert opened.arch.kind == kind
    assert opened.metadata == METADATA[kind]
    assert opened.provenance == {"step": 7, "digest": "d"}
    built = build(opened)
    assert not built.training
    assert built.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(built.state_dict()[name], t) for name, t in model.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built(images), model(images))
    names = load_file(exports[kind] / "model.safetensors").keys()
    assert "segformer.encoder.block.0.0.attention.self.key.weight" in names


@pytest.mark.parametrize("profile", ["original", "hf", "mmseg"])
def test_the_predictor_of_an_export_is_the_model_bit_for_bit(tmp_path: Path, profile: str) -> None:
    model = random_model(norm_profile=profile)
    predictor = Predictor(write(model, tmp_path / "export"), device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    normal = (torch.from_numpy(image).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    images = normal.permute(2, 0, 1)[None]
    with torch.no_grad():
        assert torch.equal(predictor.model(images), model(images))
        wanted = torch.nn.functional.interpolate(model(images), (61, 83), mode="bilinear").argmax(1)[0]
    assert (torch.from_numpy(predictor(image).mask) == wanted).float().mean() > 0.999  # ties may round apart


def test_a_run_exports_a_checkpoint_with_its_scores_over_an_older_export(run: Path) -> None:
    out = export(ExportConfig(checkpoint=str(run), step="10"))
    assert open_checkpoint(out).provenance["step"] == 10
    opened = open_checkpoint(export(ExportConfig(checkpoint=str(run), output=str(out))))
    assert opened.provenance["step"] == 20
    assert opened.metadata.classes == ["background", "nucleus"]
    assert opened.provenance["scores"] == {"miou": 0.5, "macc": 0.6, "aacc": 0.7, "iou": [0.5, None]}
    assert open_checkpoint(run, step="10").provenance["scores"] is None
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in out.iterdir()) == files


@pytest.mark.parametrize("name", ["m.onnx", "deep/M.ONNX", "m.pth", "m.safetensors", "m.engine", "mine"])
def test_a_file_as_output_is_refused_before_the_run_is_read(tmp_path: Path, name: str) -> None:
    if name == "mine":
        (tmp_path / name).write_text("a file")
    message = rf"output=\S*{name} is the name of a file, but an export is a folder"
    for given in ([], ["step=best"]):
        with pytest.raises(ConfigError, match=message) as caught:
            compose(ExportConfig, "export", [f"checkpoint={tmp_path}", f"output={tmp_path / name}", *given])
    assert ("export.py checkpoint=" in str(caught.value)) == (
        Path(name).suffix.lower() in (".onnx", ".engine")
    )
    assert ("convert.py checkpoint=" in str(caught.value)) == name.endswith(".pth")
    ExportConfig(checkpoint="x", output="exports/b2.v1.5")
    ConvertConfig(checkpoint="x", output="m.pth", to="nvlabs")


def test_an_export_does_not_go_among_the_checkpoints_of_a_run(run: Path, tmp_path: Path) -> None:
    for place in (run / "checkpoints", run / "checkpoints/x", run / "checkpoints/step-00000010"):
        with pytest.raises(ConfigError, match="lies among the checkpoints of a run"):
            export(ExportConfig(checkpoint=str(run), output=str(place)))
    (tmp_path / "checkpoints").mkdir()  # no run's
    export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "checkpoints/mine")))


def test_run_and_export_remember_the_size_of_the_training_images(run: Path, tmp_path: Path) -> None:
    assert open_checkpoint(run).metadata.long_side == 0  # nothing says it
    state = TrainState(step=30, data_digest="d", long_side=320)
    write_checkpoint(build_model(ModelConfig(), 2).state_dict(), {}, state, run / "checkpoints")
    out = export(ExportConfig(checkpoint=str(run)))
    convert(ConvertConfig(checkpoint=str(out), output=str(tmp_path / "converted")))
    for place in (run, out, tmp_path / "converted"):
        assert open_checkpoint(place).metadata.long_side == 320
    described = json.loads((out / "config.json").read_text())
    described["segformer"]["long_side"] = "wide"
    (out / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"damaged: metadata is wrong: long_side"):
        open_checkpoint(out)


def test_a_classifier_exports_its_classes_view_and_scores(classifier_run: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(checkpoint=str(classifier_run), output=str(tmp_path / "converted")))
    exported = export(ExportConfig(checkpoint=str(classifier_run), output=str(tmp_path / "exported")))
    for place in (classifier_run, exported, tmp_path / "converted"):
        opened = open_checkpoint(place)
        assert opened.metadata.classes == shapes.CLASSES
        assert (opened.metadata.view, opened.metadata.mean) == ([48, 56], [1, 2, 3])
        assert opened.provenance["scores"] == {"top1": 0.5, "top5": 1.0, "macc": 0.4}


@pytest.fixture
def best_run(run: Path) -> Path:
    """`run` after a step 30, whose best score was that of step 10."""
    model = build_model(ModelConfig(), 2)
    state = TrainState(step=30, data_digest="d", best_score=0.5, best_step=10)
    write_checkpoint(model.state_dict(), {}, state, run / "checkpoints")
    return run


@pytest.mark.parametrize(("step", "expected"), [("newest", 30), ("best", 10), ("20", 20), ("00020", 20)])
def test_a_step_names_the_checkpoint_of_every_command(
    best_run: Path, tiny_shards: Path, tmp_path: Path, step: str, expected: int
) -> None:
    wanted = open_checkpoint(best_run, step)
    given = [f"checkpoint={best_run}", f"output={tmp_path}/out", f"step={step}"]  # a number is a text here
    out = export(compose(ExportConfig, "export", given))
    scored = EvaluateConfig(checkpoint=str(best_run), shards=str(tiny_shards), step=step)
    for opened in (wanted, open_checkpoint(out), open_scored(scored)[0]):
        assert opened.provenance["step"] == expected
    state = Predictor(best_run, step=step, device="cpu").model.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state.items())


def test_what_save_pretrained_wrote_has_the_usual_names_colors_and_view(tmp_path: Path) -> None:
    random_model("classification").save_pretrained(tmp_path / "a")
    build_model(ModelConfig(), 4).save_pretrained(tmp_path / "b")
    assert open_checkpoint(tmp_path / "a").metadata.view == [224, 256]
    opened = open_checkpoint(tmp_path / "b").metadata
    assert opened.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert opened.palette[:3] == [[0, 0, 0], [230, 159, 0], [86, 180, 233]]
    assert opened.mean == [123.675, 116.28, 103.53]


def test_a_classifier_starts_from_an_exported_one(exports: dict[str, Path]) -> None:
    path, state = str(exports["classification"]), random_model("classification").state_dict()
    same = build_classifier(ModelConfig(pretrained=path), 3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert same.pretrained.endswith("encoder and head")
    other = build_classifier(ModelConfig(pretrained=path), 5)
    assert torch.equal(other.state_dict()["backbone.norm1.weight"], state["backbone.norm1.weight"])
    assert other.pretrained.endswith("the head, which has 3 classes there, is new, for 5 classes")


@pytest.mark.parametrize(
    ("place", "step", "message"),
    [
        ("run", "15", r"no checkpoint of step 15; it has \[10, 20\]"),
        ("run/checkpoints/step-00000099", "newest", r"no checkpoint of step 99; it has \[10, 20\]"),
        ("run/checkpoints/step-00000020", "best", r"step=best is another checkpoint than .*step-00000020"),
        ("run", "best", "has no best checkpoint, .*use step=newest"),
        ("run", "last", "use newest, best or the number of a step"),
        ("run", "-1", "use newest, best or the number of a step"),
        ("export", "7", "step=7 asks for a checkpoint.*leave step out"),
        ("hf", "newest", "has no section .*model.pretrained"),
        ("encoder", "newest", "holds an encoder without a head"),
        ("empty", "newest", "is neither a run .* nor an export"),
        ("nowhere", "newest", "does not exist"),
        ("other", "newest", "does not fit"),
    ],
)
def test_what_can_not_be_opened_is_one_line(
    run: Path, exports: dict[str, Path], tmp_path: Path, place: str, step: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "export").symlink_to(exports["segmentation"])
    if place == "other":
        state = build_model(ModelConfig(), 2).state_dict()
        make_run(tmp_path / place, {10: state}, "data=sample", "model.variant=b1")
    if place in ("hf", "encoder"):
        options = {"to": "hf"} if place == "hf" else {"encoder_only": True}
        convert(ConvertConfig(checkpoint=str(tmp_path / "export"), output=str(tmp_path / place), **options))
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        check_network(open_checkpoint(tmp_path / place, step))
    assert "\n" not in str(caught.value)


def test_predict_refuses_a_classifier(exports: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"is a classifier of 3 classes.*launch/evaluate.py"):
        Predictor(exports["classification"], device="cpu")


@pytest.mark.parametrize("view", ["all", [96], [96, 50], [None, 1]])
def test_a_damaged_view_is_refused(exports: dict[str, Path], tmp_path: Path, view: object) -> None:
    source = exports["classification"]
    config = json.loads((source / "config.json").read_text())
    config["segformer"]["view"] = view
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is damaged.*view"):
        open_checkpoint(tmp_path)
