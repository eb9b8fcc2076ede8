"""Exports: what transformers and this project read back from them, and what is refused."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file

from segformer.checkpoint.format import TrainState
from segformer.errors import CheckpointError, ConfigError
from segformer.inference.export import (
    ExportConfig,
    Trained,
    export,
    open_checkpoint,
    read_export,
    write_export,
)
from segformer.inference.predict import PredictConfig, Predictor
from segformer.inference.score import EvaluateConfig, _open
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig, compose, save_config

CLASSES = ["background", "leaf", "stem"]
PALETTE = [[0, 0, 0], [10, 200, 30], [200, 60, 0]]
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def random_model(**settings: str) -> tuple[SegFormer, ModelConfig]:
    """MiT-B0 whose every parameter and buffer is random, so that no two paths agree by chance."""
    torch.manual_seed(0)
    config = ModelConfig(variant="b0", **settings)
    model = build_model(config, len(CLASSES)).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn(tensor.shape))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model, config


def write(model: SegFormer, config: ModelConfig, out: Path, **extra: object) -> Path:
    return write_export(
        model.state_dict(),
        config,
        num_classes=len(CLASSES),
        classes=CLASSES,
        palette=PALETTE,
        mean=MEAN,
        std=STD,
        out=out,
        extra={"step": 7, "digest": "d", "scores": None, **extra},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(*random_model(), tmp_path_factory.mktemp("export") / "export")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with two checkpoints and the metrics of one evaluation."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(compose(RunConfig, "config", ["data=sample", f"run_dir={folder}"]), folder / "config.yaml")
    for step in (10, 20):
        model = build_model(ModelConfig(), 2)
        moments = {"exp_avg.x": torch.zeros(1), "exp_avg_sq.x": torch.zeros(1)}
        state = TrainState(step=step, data_digest="d")
        write_checkpoint(model.state_dict(), moments, state, folder / "checkpoints")
    row = {"kind": "eval", "step": 20, "miou": 0.5, "macc": 0.6, "aacc": 0.7, "iou": [0.5, None]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + '\n{"kind": "ev')
    return folder


def transformers_logits(out: Path, images: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.SegformerForSemanticSegmentation.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    with torch.no_grad():
        return model.eval()(images).logits


def test_transformers_gives_the_same_logits_with_profile_hf(tmp_path: Path) -> None:
    model, config = random_model(norm_profile="hf")
    images = torch.randn(1, 3, 96, 128)
    theirs = transformers_logits(write(model, config, tmp_path / "export"), images)
    with torch.no_grad():
        assert (model(images) - theirs).abs().max() < 1e-4


def test_transformers_loads_profile_original_with_slightly_other_logits(exported: Path) -> None:
    images = torch.randn(1, 3, 96, 128)
    theirs = transformers_logits(exported, images)
    with torch.no_grad():
        difference = (read_export(exported).build()(images) - theirs).abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(("profile", "exact"), [("original", False), ("hf", True), ("mmseg", False)])
def test_config_json_says_whether_transformers_is_exact(tmp_path: Path, profile: str, exact: bool) -> None:
    config = json.loads(
        (write(*random_model(norm_profile=profile), tmp_path / "e") / "config.json").read_text()
    )
    section = config["segformer"]
    assert section["norm_profile"] == profile
    assert section["exact_in_transformers"] is exact
    assert section["note"].startswith(
        "transformers computes the same" if exact else "exact in segformer only"
    )


@pytest.mark.parametrize("profile", ["original", "hf", "mmseg"])
def test_the_predictor_of_an_export_is_the_model_bit_for_bit(tmp_path: Path, profile: str) -> None:
    model, config = random_model(norm_profile=profile)
    predictor = Predictor.from_export(write(model, config, tmp_path / "export"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    normal = (torch.from_numpy(image).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    images = normal.permute(2, 0, 1)[None]
    with torch.no_grad():
        assert torch.equal(predictor.model(images), model(images))
        wanted = torch.nn.functional.interpolate(model(images), (61, 83), mode="bilinear").argmax(1)[0]
    assert (torch.from_numpy(predictor(image)) == wanted).float().mean() > 0.999  # ties may round apart


def test_an_export_comes_back_as_it_was_written(exported: Path) -> None:
    model, config = random_model()
    trained = read_export(exported)
    assert trained.state.keys() == model.state_dict().keys()
    assert all(torch.equal(trained.state[name], tensor) for name, tensor in model.state_dict().items())
    assert (trained.classes, trained.palette, trained.mean, trained.std) == (CLASSES, PALETTE, MEAN, STD)
    assert (trained.step, trained.digest) == (7, "d")
    assert trained.model.norm_profile == config.norm_profile


def test_the_weights_are_stored_under_the_names_of_hugging_face(exported: Path) -> None:
    names = load_file(exported / "model.safetensors").keys()
    assert "segformer.encoder.block.0.0.attention.self.key.weight" in names
    assert "decode_head.batch_norm.running_var" in names
    assert all(name.startswith(("segformer.encoder.", "decode_head.")) for name in names)


def test_a_run_exports_its_newest_checkpoint_with_its_scores(run: Path) -> None:
    trained = read_export(export(ExportConfig(checkpoint=str(run))))
    assert trained.step == 20
    assert trained.classes == ["background", "nucleus"]
    assert trained.scores == {"miou": 0.5, "macc": 0.6, "aacc": 0.7, "iou": [0.5, None]}
    assert open_checkpoint(run, step="10").scores is None


def test_a_run_exports_the_step_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    out = export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "out"), step="10"))
    assert read_export(out).step == 10


def test_exporting_again_replaces_the_old_export(run: Path) -> None:
    out = export(ExportConfig(checkpoint=str(run), step="10"))
    assert read_export(export(ExportConfig(checkpoint=str(run), output=str(out)))).step == 20
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_missing_step_is_refused_with_the_steps_there_are(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"15.*10, 20"):
        export(ExportConfig(checkpoint=str(run), step="15"))


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
    assert wanted.step == expected
    exported = export(ExportConfig(checkpoint=str(best_run), output=str(tmp_path / "out"), step=step))
    assert read_export(exported).step == expected
    scored = EvaluateConfig(checkpoint=str(best_run), shards=str(tiny_shards), step=step)
    assert _open(scored)[0].step == expected
    state = Predictor.from_export(best_run, "cpu", step).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state.items())


def test_a_number_on_the_command_line_is_a_step() -> None:
    needs = {ExportConfig: ["checkpoint=a"], EvaluateConfig: ["checkpoint=a"]}
    needs[PredictConfig] = ["checkpoint=a", "input=b", "output=c"]
    for (schema, given), name in zip(needs.items(), ("export", "evaluate", "predict"), strict=True):
        assert compose(schema, name, [*given, "step=16000"]).step == "16000"
        assert compose(schema, name, given).step == "newest"


def test_the_folder_of_a_checkpoint_is_that_step_of_its_run(best_run: Path) -> None:
    folder = best_run / "checkpoints/step-00000020"
    assert open_checkpoint(folder).step == open_checkpoint(f"{folder}/", step="20").step == 20
    assert read_export(export(ExportConfig(checkpoint=str(folder)))).step == 20
    assert (best_run / "export/config.json").is_file()
    with pytest.raises(ConfigError, match=r"step=best is another checkpoint than .*step-00000020"):
        open_checkpoint(folder, step="best")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 99; it has \[10, 20, 30\]"):
        open_checkpoint(best_run / "checkpoints/step-00000099")


def test_the_best_checkpoint_of_a_run_without_an_evaluation_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no best checkpoint, .*use step=newest"):
        open_checkpoint(run, step="best")


@pytest.mark.parametrize("step", ["last", "-1", "1.5", ""])
def test_a_step_that_is_none_is_refused(run: Path, step: str) -> None:
    with pytest.raises(ConfigError, match=r"use newest, best or the number of a step"):
        open_checkpoint(run, step=step)


@pytest.mark.parametrize("step", ["best", "7"])
def test_a_step_of_an_export_is_refused(exported: Path, step: str) -> None:
    with pytest.raises(ConfigError, match=rf"step={step} .* is an export, .*leave step out"):
        open_checkpoint(exported, step=step)


def test_an_output_folder_with_other_files_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    with pytest.raises(ConfigError, match=r"other files \(cat.jpg\)"):
        export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "photos")))


@pytest.mark.parametrize(("out", "message"), [("file", "is a file"), ("file/below", "can't be written")])
def test_an_output_that_cannot_be_a_folder_is_refused(
    run: Path, tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        export(ExportConfig(checkpoint=str(run), output=str(tmp_path / out)))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model, _ = random_model()
    with pytest.raises(CheckpointError, match="does not fit"):
        write(model, ModelConfig(variant="b1"), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_changed_byte_of_the_weights_is_found(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((exported / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    (copy / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="damaged or of another export"):
        read_export(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "b9"),
        ("variant", None),
        ("classes", "all"),
        ("palette", [[0, 0, 300]] * 3),
        ("palette", [[0, 0, 0]]),
        ("mean", [1.0]),
        ("std", ["a", "b", "c"]),
    ],
)
def test_a_damaged_section_is_refused(exported: Path, tmp_path: Path, key: str, value: object) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["segformer"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is damaged"):
        read_export(tmp_path)


def test_a_hugging_face_model_without_our_section_is_refused(exported: Path, tmp_path: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    del config["segformer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"no section .*model.pretrained"):
        open_checkpoint(tmp_path)


def test_what_is_neither_run_nor_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_an_export_records_the_digest_of_its_weights(exported: Path) -> None:
    section = json.loads((exported / "config.json").read_text())["segformer"]
    assert (
        section["weights_sha256"] == hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    )


def test_the_command_line_ends_with_one_line_and_code_2(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch/export.py", f"checkpoint={tmp_path}"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("CheckpointError: ")
    assert ended.stderr.count("\n") == 1


def test_trained_builds_in_evaluation_mode() -> None:
    model, config = random_model()
    trained = Trained(
        state=model.state_dict(), model=config, classes=CLASSES, palette=PALETTE, mean=MEAN, std=STD
    )
    assert not trained.build().training
