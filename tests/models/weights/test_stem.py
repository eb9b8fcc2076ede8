"""Weights for RGB under other channels, and weights of other channels in every format."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from segformer.errors import CheckpointError, ConfigError
from segformer.models.macs import macs_per_image
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import STEMS, ModelConfig
from segformer.models.weights.bundle import Metadata, Weights
from segformer.models.weights.load import weights_of
from segformer.models.weights.read import read_weights
from segformer.models.weights.stem import adapt_stem
from segformer.models.weights.write import write_hf, write_pth
from tests.model_files import bundle, randomize

BANDS = 5
STEM = "backbone.patch_embed1.proj.weight"
CFG = ModelConfig(norm_profile="hf", in_channels=BANDS)
METADATA = Metadata(mean=[900.0, 800, 700, 2100, 5], std=[300.0, 310, 320, 600, 2], dtype="uint16")


def network(cfg: ModelConfig) -> SegFormer:
    torch.manual_seed(0)
    model = build_model(cfg, 3)
    randomize(model.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def rgb() -> SegFormer:
    return network(ModelConfig())


@pytest.fixture(scope="module")
def bands() -> SegFormer:
    return network(CFG)


def of(model: SegFormer, metadata: Metadata | None = None) -> Weights:
    return weights_of(model, model.backbone, metadata or Metadata())


def rebuilt(weights: Weights) -> SegFormer:
    return build_model(weights.config(), 3).load(weights)


@torch.no_grad()
def test_zero_gives_the_logits_of_rgb_whatever_the_new_channels_hold(rgb: SegFormer) -> None:
    images = 3 * torch.randn(2, BANDS, 64, 96)
    adapted = rebuilt(adapt_stem(of(rgb), BANDS, "zero"))
    torch.testing.assert_close(adapted(images), rgb(images[:, :3]), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("rule", STEMS)
def test_one_channel_sees_a_gray_image_as_rgb_does(rgb: SegFormer, rule: str) -> None:
    gray = torch.randn(1, 1, 64, 64)
    adapted = rebuilt(adapt_stem(of(rgb), 1, rule))
    torch.testing.assert_close(adapted(gray), rgb(gray.expand(-1, 3, -1, -1)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", [2, 4, 5, 32])
def test_the_rules_are_what_they_say(rgb: SegFormer, channels: int) -> None:
    kernels = rgb.state_dict()[STEM]
    found = {rule: adapt_stem(of(rgb), channels, rule).state[STEM] for rule in STEMS}
    for channel in range(channels):
        zero = kernels[:, channel] if channel < 3 else torch.zeros_like(kernels[:, 0])
        mean, repeated = (3 / channels * k for k in (kernels.mean(1), kernels[:, channel % 3]))
        for rule, expected in (("zero", zero), ("mean", mean), ("repeat", repeated)):
            torch.testing.assert_close(found[rule][:, channel], expected)
    assert all(tensor.shape == (32, channels, 7, 7) for tensor in found.values())


def test_pretrained_weights_are_adapted_and_it_is_said(rgb: SegFormer, tmp_path: Path) -> None:
    rgb.save_pretrained(tmp_path)
    cfg = ModelConfig(in_channels=BANDS, stem="mean", pretrained=str(tmp_path))
    model = build_model(cfg, 3)
    assert torch.equal(model.state_dict()[STEM], adapt_stem(of(rgb), BANDS, "mean").state[STEM])
    assert "encoder and head; its kernels for RGB are adapted to 5 channels (mean)" in model.pretrained
    loaded = SegFormer.from_pretrained(tmp_path, in_channels=BANDS, stem="mean")
    assert torch.equal(loaded.state_dict()[STEM], model.state_dict()[STEM])
    assert loaded.metadata.mean == []  # ImageNet's is of other channels
    with pytest.raises(ConfigError, match=r"does not say mean and std of its images of 5 channels of uint8"):
        loaded.save_pretrained(tmp_path / "again")


def test_equal_channels_load_as_they_are_and_others_than_rgb_are_refused(
    bands: SegFormer, tmp_path: Path
) -> None:
    bands.save_pretrained(tmp_path, METADATA)
    model = build_model(replace(CFG, pretrained=str(tmp_path)), 3)
    assert torch.equal(model.state_dict()[STEM], bands.state_dict()[STEM])
    assert "adapted" not in model.pretrained
    for channels in (3, 4):
        with pytest.raises(CheckpointError, match=rf"takes images of 5 channels, and {channels} are asked"):
            build_model(replace(CFG, in_channels=channels, pretrained=str(tmp_path)), 3)


@torch.no_grad()
def test_transformers_loads_an_export_of_five_channels_and_agrees(bands: SegFormer, tmp_path: Path) -> None:
    bands.save_pretrained(tmp_path, METADATA)
    theirs = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    images = torch.randn(1, BANDS, 64, 64)
    assert theirs.config.num_channels == BANDS
    torch.testing.assert_close(theirs(images).logits, bands(images), rtol=0, atol=2e-4)
    assert not (tmp_path / "preprocessor_config.json").exists()  # theirs shows 8-bit RGB alone
    assert (
        "transformers can't show it images of 5 channels of uint16" in (tmp_path / "config.json").read_text()
    )
    again = SegFormer.from_pretrained(tmp_path)
    assert (again.metadata, again.backbone.config.in_channels) == (METADATA, BANDS)
    assert torch.equal(again(images), bands(images))


@pytest.mark.parametrize("format_", ["hf", "nvlabs", "mmseg"])
def test_five_channels_survive_every_format(bands: SegFormer, tmp_path: Path, format_: str) -> None:
    weights = of(bands, METADATA)
    weights = weights.encoder() if format_ == "mmseg" else weights
    written = write_hf(weights, tmp_path / "x") if format_ == "hf" else None
    written = written or write_pth(weights, tmp_path / "x.pth", format_)
    found = read_weights(written[0] if format_ != "hf" else tmp_path / "x")
    assert (found.arch.in_channels, found.config().in_channels) == (BANDS, BANDS)
    assert torch.equal(found.state[STEM], bands.state_dict()[STEM])


def test_smp_has_no_place_for_them(bands: SegFormer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no mit encoder of 5 channels"):
        write_pth(of(bands), tmp_path / "x.pth", "smp")


def test_a_config_of_other_channels_is_refused(rgb: SegFormer, tmp_path: Path) -> None:
    write_hf(bundle(rgb.state_dict()), tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"num_channels": 3', '"num_channels": 5')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"num_channels=5, but b0, which the weights are, has 3"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"mean": [1.0, 2, 3]}, "5 channels, but the metadata has 3 values of mean"),
        ({"mean": [1.0] * 5, "std": [0.0] * 5}, "std"),
        ({"dtype": "int8"}, "'int8' is none of uint16, float32"),
    ],
)
def test_metadata_of_other_channels_is_refused(
    bands: SegFormer, tmp_path: Path, metadata: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bands.save_pretrained(tmp_path / "x", Metadata(**metadata))  # type: ignore[arg-type]


def test_operations_count_the_channels() -> None:
    """One more channel costs a product of the 7x7 kernels at a quarter of each side."""
    three, four = (macs_per_image(ModelConfig(in_channels=c), (64, 64), 3) for c in (3, 4))
    assert four - three == 49 * 32 * 16 * 16


def test_images_of_other_channels_are_refused_by_number(bands: SegFormer) -> None:
    images: Tensor = torch.zeros(1, 3, 64, 64)
    with pytest.raises(Exception, match=r"give \(B, 5, H, W\) in floating point"):
        bands(images)


def test_the_draws_of_three_channels_are_those_of_before() -> None:
    """in_channels=3 is what null stands for: the same random numbers in the same order."""
    torch.manual_seed(7)
    first = build_model(ModelConfig(), 3).state_dict()
    torch.manual_seed(7)
    second = build_model(ModelConfig(in_channels=3), 3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
