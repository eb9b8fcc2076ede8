"""Exports of classifiers: what transformers and a segmentation run make of them, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from checkpoints import write_checkpoint
from PIL import Image

from segformer.checkpoint.format import TrainState
from segformer.errors import CheckpointError, ConfigError
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.export import ExportConfig, export, open_checkpoint, read_export, write_export
from segformer.inference.predict import PredictConfig, predict
from segformer.models.segformer import MiTClassifier, build_classifier, build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig, compose, save_config

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 61.0, 62.0]


def random_classifier(num_classes: int = 3, **settings: str) -> tuple[MiTClassifier, ModelConfig]:
    """MiT-B0 whose every parameter is random."""
    torch.manual_seed(0)
    config = ModelConfig(variant="b0", **settings)
    model = build_classifier(config, num_classes).eval()
    for tensor in model.state_dict().values():
        tensor.add_(0.05 * torch.randn(tensor.shape))
    return model, config


def write(model: MiTClassifier, config: ModelConfig, out: Path) -> Path:
    return write_export(
        model.state_dict(),
        config,
        num_classes=model.num_classes,
        classes=[f"kind {k}" for k in range(model.num_classes)],
        palette=[[k % 256, 0, 0] for k in range(model.num_classes)],
        mean=MEAN,
        std=STD,
        out=out,
        extra={"view": [96, 112], "step": 7},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(*random_classifier(), tmp_path_factory.mktemp("export") / "export")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_set(tmp_path_factory.mktemp("shapes"), {"train": 3, "val": 6})


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    """A run of a classifier that leaves its classes to the shards, with one checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    place = ["data=folder", "data.task=classification", f"data.shards={shards}", f"run_dir={folder}"]
    sizes = ["classification.size=48", "classification.eval_resize=56", "classification.mean=[1,2,3]"]
    save_config(compose(RunConfig, "config", [*place, *sizes]), folder / "config.yaml")
    moments = {"exp_avg.x": torch.zeros(1), "exp_avg_sq.x": torch.zeros(1)}
    state = TrainState(step=20, data_digest="d")
    model = random_classifier()[0].state_dict()
    write_checkpoint(model, moments, state, folder / "checkpoints")
    row = {"kind": "final", "step": 20, "top1": 0.5, "top5": 1.0, "macc": 0.4, "acc": [0.5, 0.3, None]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_transformers_gives_the_same_scores_with_profile_hf(tmp_path: Path, num_classes: int) -> None:
    transformers = pytest.importorskip("transformers")
    model, config = random_classifier(num_classes, norm_profile="hf")
    out = write(model, config, tmp_path / "export")
    theirs, info = transformers.SegformerForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert (model(images) - theirs.eval()(images).logits).abs().max() < 1e-4
    assert theirs.config.id2label[2] == "kind 2"


def test_an_export_comes_back_as_it_was_written(exported: Path) -> None:
    model, _ = random_classifier()
    trained = read_export(exported)
    assert (trained.task, trained.view, trained.step) == ("classification", [96, 112], 7)
    assert (trained.mean, trained.std) == (MEAN, STD)
    assert trained.classes == ["kind 0", "kind 1", "kind 2"]
    built = trained.build()
    assert not built.training
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built(images), model(images))


def test_what_save_pretrained_wrote_is_an_export_of_the_usual_view(tmp_path: Path) -> None:
    random_classifier(1000)[0].save_pretrained(tmp_path / "model")
    trained = read_export(tmp_path / "model")
    assert trained.view == [224, 256]
    assert len(trained.classes) == len(trained.palette) == 1000


def test_a_segmentation_run_starts_from_the_encoder_of_the_export(exported: Path) -> None:
    encoder = {
        name: tensor for name, tensor in random_classifier()[0].state_dict().items() if "backbone" in name
    }
    torch.manual_seed(4)
    fresh = build_model(ModelConfig(), 2).state_dict()
    torch.manual_seed(4)
    model = build_model(ModelConfig(pretrained=str(exported)), 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (encoder if name in encoder else fresh)[name]), name
    assert len(encoder) > 100
    assert model.pretrained.endswith("encoder; the head is new, for 2 classes")


def test_a_classifier_starts_from_another_with_its_head_where_the_classes_are_as_many(exported: Path) -> None:
    state = random_classifier()[0].state_dict()
    same = build_classifier(ModelConfig(pretrained=str(exported)), 3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert same.pretrained.endswith("encoder and head")
    other = build_classifier(ModelConfig(pretrained=str(exported)), 5)
    assert torch.equal(other.state_dict()["backbone.norm1.weight"], state["backbone.norm1.weight"])
    assert other.pretrained.endswith("the head, which has 3 classes there, is new, for 5 classes")


def test_a_run_exports_its_classes_view_and_scores(run: Path) -> None:
    trained = read_export(export(ExportConfig(checkpoint=str(run))))
    assert trained.classes == shapes.CLASSES
    assert trained.view == [48, 56]
    assert trained.mean == [1, 2, 3]
    assert trained.scores == {"top1": 0.5, "top5": 1.0, "macc": 0.4}
    assert open_checkpoint(run).view == [48, 56]


def test_converting_a_run_keeps_its_view(run: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(checkpoint=str(run), output=str(tmp_path / "out"), to="ours"))
    assert read_export(tmp_path / "out").view == [48, 56]


def test_predict_refuses_a_classifier_in_one_sentence(exported: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    cfg = PredictConfig(checkpoint=str(exported), input=str(tmp_path / "a.png"), output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"is a classifier of 3 classes.*launch/evaluate.py"):
        predict(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("view", ["all", [96], [96, 50], [0, 10], [None, 1]])
def test_a_damaged_view_is_refused(exported: Path, tmp_path: Path, view: object) -> None:
    config = json.loads((exported / "config.json").read_text())
    config["segformer"]["view"] = view
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is damaged.*view="):
        read_export(tmp_path)


def test_an_encoder_alone_predicts_nothing(exported: Path, tmp_path: Path) -> None:
    convert(
        ConvertConfig(checkpoint=str(exported), output=str(tmp_path / "out"), to="ours", encoder_only=True)
    )
    with pytest.raises(CheckpointError, match="holds an encoder without a head"):
        read_export(tmp_path / "out")
