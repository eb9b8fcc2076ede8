"""What could not be read back is never written, and the good export that was there stays as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segformer.errors import CheckpointError, ConfigError
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.card import IMAGENET_STD, Card
from segformer.models.weights.convert import Weights, read_weights
from segformer.models.weights.save import write_hf, write_pth

COLOURS = [[0, 0, 0], [1, 2, 3]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "export"
    build_model(ModelConfig(), 2).save_pretrained(path)
    return path


@pytest.fixture
def unchanged(good: Path) -> Callable[[], bool]:
    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in good.parent.rglob("*") if path.is_file()}

    before = contents()
    return lambda: contents() == before


BAD_CARDS: list[tuple[dict[str, Any], str]] = [
    ({"palette": [[0, 0, 0], [0, 0, 300]]}, "palette: 300 is not a whole number from 0 to 255"),
    ({"palette": [[0, 0, 0], [0, 0]]}, r"palette: \[0, 0\] is not a list of 3"),
    ({"palette": np.full((2, 3), 0.5)}, "palette: 0.5 is not a whole number"),
    ({"palette": 7}, "can't be saved: object of type 'int' has no len"),
    ({"classes": "ab"}, "classes: 'ab' is not a list"),
    ({"mean": [1.0]}, r"mean: \[1\.0\] is not a list of 3"),
    ({"mean": []}, r"mean: \[\] is not a list of 3"),
    ({"mean": np.zeros((3, 1))}, "mean: "),
    ({"mean": 0.5}, "mean: 0.5 is not a list of 3"),
    ({"mean": [1.0, 2.0, float("nan")]}, "mean: nan is not finite"),
    ({"mean": map(float, range(3))}, "can't be saved: map is no list or number"),
    ({"std": [1.0, 0.0, 1.0]}, "std: 0.0 is not above 0"),
]


@pytest.mark.parametrize(("entries", "message"), BAD_CARDS, ids=[message for _, message in BAD_CARDS])
def test_a_card_that_could_not_be_read_back_is_refused(
    good: Path, unchanged: Callable[[], bool], entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(ModelConfig(), 2).save_pretrained(good, Card(**entries))
    assert str(caught.value).startswith("the card of the model can't be saved: ")
    assert "\n" not in str(caught.value)
    assert unchanged()


def spoilt(how: str, kind: str) -> SegFormer | MiTClassifier:
    device = "meta" if how == "meta" else "cpu"
    with torch.device(device):
        model = (
            MiTClassifier(build_encoder(ModelConfig()), 3)
            if kind == "classifier"
            else build_model(ModelConfig(), 2)
        )
    with torch.no_grad():
        if how in ("nan", "inf"):
            model.backbone.norm3.bias[7] = float(how)
    return model.double() if how == "float64" else model


@pytest.mark.parametrize("kind", ["segmentation", "classifier"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"1 tensors hold NaN or infinity: backbone\.norm3\.bias; use weights from before"),
        ("inf", "1 tensors hold NaN or infinity"),
        ("meta", r"\d+ tensors are on the meta device, without data: .*; load or initialize"),
        ("float64", r"\d+ tensors are float64 and would be cut to float32: .*model\.float\(\)"),
    ],
)
def test_weights_that_could_not_be_read_back_are_refused(
    good: Path, unchanged: Callable[[], bool], kind: str, how: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^the model can't be saved: {message}") as caught:
        spoilt(how, kind).save_pretrained(good)
    assert "\n" not in str(caught.value)
    assert unchanged()


def test_half_precision_is_saved_exactly_as_float32(tmp_path: Path) -> None:
    model = build_model(ModelConfig(), 2).bfloat16()
    model.save_pretrained(tmp_path / "model")
    back = SegFormer.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(back[name], t.to(back[name].dtype)) for name, t in model.state_dict().items())


def test_arrays_and_tuples_in_a_card_are_saved_as_the_lists_that_come_back(tmp_path: Path) -> None:
    card = Card(
        classes=("a", "b"),  # type: ignore[arg-type]
        palette=np.array(COLOURS, np.uint8),  # type: ignore[arg-type]
        mean=np.array([1, 2, 3.5]),  # type: ignore[arg-type]
        std=torch.tensor([4.0, 5.0, 6.0]),  # type: ignore[arg-type]
    )
    build_model(ModelConfig(), 2).save_pretrained(tmp_path / "model", card)
    expected = Card(classes=["a", "b"], palette=COLOURS, mean=[1.0, 2.0, 3.5], std=[4.0, 5.0, 6.0])
    assert read_weights(tmp_path / "model").card == expected
    mean = np.array([0.0, 0.0, 0.0])  # false, all of it
    build_model(ModelConfig(), 2).save_pretrained(tmp_path / "zero", Card(mean=mean))  # type: ignore[arg-type]
    zero = read_weights(tmp_path / "zero").card
    assert (zero.mean, zero.std) == ([0.0, 0.0, 0.0], IMAGENET_STD)


@pytest.mark.parametrize("target", ["ours", "hf", "nvlabs", "mmseg", "smp"])
def test_every_writer_refuses_what_is_not_finite(good: Path, tmp_path: Path, target: str) -> None:
    weights = read_weights(good).encoder()
    weights.state["backbone.norm1.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"export can't be saved: 1 tensors hold NaN"):
        write(weights, tmp_path / "new.pth", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["ours", "hf", "nvlabs"])
def test_every_writer_refuses_a_card_that_could_not_be_read_back(
    good: Path, tmp_path: Path, target: str
) -> None:
    weights = replace(read_weights(good), card=Card(mean=[0.0]))
    with pytest.raises(ConfigError, match=r"the card of \S+ can't be saved: mean"):
        write(weights, tmp_path / "new.pth", target)
    assert not list(tmp_path.iterdir())


def write(weights: Weights, out: Path, target: str) -> None:
    if target in ("ours", "hf"):
        write_hf(weights, out, section={} if target == "ours" else None)
    else:
        write_pth(weights, out, target)
