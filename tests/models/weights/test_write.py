"""Writing: what could not be read back is never written, and nothing that is there is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import State, bundle
from safetensors.torch import load_file, save_file

from segformer.errors import CheckpointError, ConfigError
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.bundle import Metadata, Weights
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import IMAGENET_STD, write_export, write_hf, write_pth

COLORS = [[0, 0, 0], [1, 2, 3]]
TARGETS = ["ours", "hf", "nvlabs", "mmseg", "smp"]


def write(weights: Weights, out: Path, target: str) -> None:
    if target in ("ours", "hf"):
        (write_export if target == "ours" else write_hf)(weights, out)
    else:
        write_pth(weights, out.with_suffix(".pth"), target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def weights(state: State) -> Weights:
    return bundle({name: tensor.clone() for name, tensor in state.items()})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "export"
    build_model(ModelConfig(), 2).save_pretrained(path)
    return path


@pytest.fixture
def unchanged(good: Path) -> Callable[[], bool]:
    before = contents(good.parent)
    return lambda: contents(good.parent) == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({"palette": [[0, 0, 0], [0, 0, 300]]}, "palette: 300 is not a whole number from 0 to 255"),
    ({"palette": [[0, 0, 0], [0, 0]]}, r"palette: \[0, 0\] is not a list of 3"),
    ({"palette": np.full((2, 3), 0.5)}, "palette: 'float' object cannot be interpreted as an integer"),
    ({"palette": [[0, 0, 0]] * 3}, "2 classes, but the metadata has 3 colors"),
    ({"classes": "ab"}, "classes: 'ab' is not a list"),
    ({"classes": ["a"]}, "2 classes, but the metadata has 1 names"),
    ({"mean": [1.0]}, r"3 channels, but the metadata has 1 values of mean"),
    ({"mean": [1.0, 2.0, float("nan")]}, "mean: nan is not finite"),
    ({"std": [1.0, 0.0, 1.0]}, "std: 0.0 is not above 0"),
]


@pytest.mark.parametrize(("entries", "message"), BAD, ids=[message for _, message in BAD])
def test_metadata_that_could_not_be_read_back_is_refused(
    good: Path, unchanged: Callable[[], bool], entries: dict[str, Any], message: str
) -> None:
    model = build_model(ModelConfig(), 2)
    with pytest.raises(ConfigError, match=message) as caught:
        model.save_pretrained(good, Metadata(**entries))
    assert "\n" not in str(caught.value)
    for key, value in entries.items():  # past the check of its making
        setattr(model.metadata, key, value)
    with pytest.raises(ConfigError, match="metadata"):
        model.save_pretrained(good)
    assert unchanged()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("meta", r"\d+ tensors have no data, or less than their shapes say: .*; load or initialize"),
        ("float64", r"\d+ tensors are float64 and would be cut to float32: .*model\.float\(\)"),
    ],
)
def test_weights_that_could_not_be_read_back_are_refused(
    good: Path, unchanged: Callable[[], bool], how: str, message: str
) -> None:
    with torch.device("meta" if how == "meta" else "cpu"):
        model = build_model(ModelConfig(), 2)
    if how == "float64":
        model.double()
    with pytest.raises(CheckpointError, match=rf"^the model can't be saved: {message}") as caught:
        model.save_pretrained(good)
    assert "\n" not in str(caught.value)
    assert unchanged()


@pytest.mark.parametrize("target", TARGETS)
def test_every_writer_refuses_what_is_not_finite(weights: Weights, tmp_path: Path, target: str) -> None:
    weights = weights.encoder()
    weights.state["backbone.norm1.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"the model can't be saved: 1 tensors hold NaN.*from before"):
        write(weights, tmp_path / "new", target)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_saved_exactly_as_float32(tmp_path: Path) -> None:
    model = build_model(ModelConfig(), 2).bfloat16()
    model.save_pretrained(tmp_path / "model")
    back = SegFormer.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(back[name], t.to(back[name].dtype)) for name, t in model.state_dict().items())


def test_arrays_and_tuples_are_saved_as_the_lists_that_come_back(tmp_path: Path) -> None:
    metadata = Metadata(
        classes=("a", "b"),  # type: ignore[arg-type]
        palette=np.array(COLORS, np.uint8),  # type: ignore[arg-type]
        mean=np.zeros(3),  # type: ignore[arg-type]
    )
    build_model(ModelConfig(), 2).save_pretrained(tmp_path / "model", card=metadata)  # the older name
    expected = Metadata(classes=["a", "b"], palette=COLORS, mean=[0.0, 0.0, 0.0], std=IMAGENET_STD)
    assert read_weights(tmp_path / "model").metadata == expected


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("segmentation", "mmseg", "can't hold the head of this model.*encoder_only=true"),
        ("classification", "mmseg", "can't hold the head"),
        ("classification", "smp", "its models segment"),
        ("b6", "smp", "has no encoder of b6"),
    ],
)
def test_a_target_that_cannot_hold_the_model_refuses_it(
    tmp_path: Path, kind: str, target: str, message: str
) -> None:
    with torch.device("meta"):
        classifier = MiTClassifier(build_encoder(ModelConfig()), 3)
        variant = kind if kind in VARIANTS else "b0"
        model = classifier if kind == "classification" else build_model(ModelConfig(variant=variant), 3)
    with pytest.raises(ConfigError, match=message):
        write_pth(bundle(model.state_dict()), tmp_path / "out.pth", target)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_parts_of_one_storage_are_written_once(state: State, tmp_path: Path) -> None:
    flat = torch.cat([t.flatten().float() for t in state.values()])
    parts = flat.split([t.numel() for t in state.values()])
    views = bundle({name: part.view(t.shape) for (name, t), part in zip(state.items(), parts, strict=True)})
    write_pth(views, tmp_path / "x.pth", "smp")
    write_hf(views, tmp_path / "x")
    assert (tmp_path / "x.pth").stat().st_size < 1.1 * flat.nbytes
    assert (tmp_path / "x/model.safetensors").stat().st_size < 1.1 * flat.nbytes


def test_a_pth_is_never_written_over_and_needs_its_suffix(weights: Weights, tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.pth exists"):
        write_pth(weights, tmp_path / "mine.pth", "nvlabs")
    with pytest.raises(ConfigError, match=r"must be the name of a \.pth file"):
        write_pth(weights, tmp_path / "folder", "nvlabs")
    assert contents(tmp_path) == {"mine.pth": b"precious"}


def test_a_full_disk_leaves_the_older_model_as_it_was(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(weights, tmp_path)
    before = contents(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    weights.state["decode_head.linear_pred.bias"] += 1
    monkeypatch.setattr(Path, "write_text", full)  # after the weights
    with pytest.raises(ConfigError, match="can't be written: No space left on device"):
        write_export(weights, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}/x"])
def test_a_place_that_no_file_can_have_is_one_line(weights: Weights, tmp_path: Path, name: str) -> None:
    for target in ("ours", "nvlabs"):
        with pytest.raises(ConfigError, match="can't be written: File name too long") as caught:
            write(weights, tmp_path / name, target)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for out, message in (("file", "is a file; give a folder"), ("file/below", "can't be written")):
        with pytest.raises(ConfigError, match=message):
            write(weights, tmp_path / out, "ours")


def test_the_model_of_another_is_never_replaced(weights: Weights, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    before = contents(tmp_path)
    for target in ("ours", "hf"):
        with pytest.raises(ConfigError, match=r"that this project has not written \(config\.json, model"):
            write(weights, tmp_path, target)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"other files \(notes\.txt\)"):
        write(weights, tmp_path, "ours")
    assert contents(tmp_path) == before | {"notes.txt": b""}


def test_our_own_directories_are_replaced_but_not_what_transformers_saved_over_them(
    weights: Weights, tmp_path: Path
) -> None:
    for target in ("hf", "ours", "hf"):
        write(weights, tmp_path, target)
    (tmp_path / "config.json").unlink()  # a crash while it was replaced
    write(weights, tmp_path, "ours")
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    (tmp_path / ".plain").touch()
    assert modes == {(tmp_path / ".plain").stat().st_mode & 0o777}  # as the umask says
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    write(weights, tmp_path, "ours")  # an export of an older version, by its section
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0"}))
    with pytest.raises(ConfigError, match="has not written"):
        write(weights, tmp_path, "ours")
