"""Blended tiles: what a loop over all tiles and pixels gives, by rows, within bounded memory."""

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from segformer.errors import ConfigError, DataError, Incomplete
from segformer.inference.predict import PredictConfig, predict
from segformer.inference.predicting import tiled
from segformer.inference.predicting.tiles import Blending
from segformer.inference.predictor import Predictor
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.bundle import Metadata
from tests.nano import SIZE

CLASSES = ["sky", "sea", "sand", "stone", "shell"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("model") / "export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, *SIZE)
        model = build_model(ModelConfig(variant="nano"), len(CLASSES)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(out, Metadata(classes=CLASSES))
        yield out


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu", long_side=0)


def picture(height, width, seed=0):
    """Colored blobs of many sizes."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def naive(predictor, image, tile, overlap):
    """Probabilities (K, H, W): every tile's logits added at their place, divided by the weights, enlarged."""
    height, width = image.shape[:2]
    padded = [-(-max(side, 32) // 4) * 4 for side in (height, width)]
    image = np.pad(image, ((0, padded[0] - height), (0, padded[1] - width), (0, 0)), mode="edge")
    sides = [min(tile, side) for side in padded]
    places = []
    for side, length in zip(padded, sides, strict=True):
        starts, at = [], 0
        while at + length < side:
            starts.append(at)
            at += tile - overlap
        places.append([*starts, side - length])
    total = np.zeros((len(CLASSES), padded[0] // 4, padded[1] // 4))
    weights = np.zeros_like(total[0])
    ramp = [
        [
            min(1, (min(i, length // 4 - 1 - i) + 0.5) / max(min(overlap // 4, length // 4 - 1), 1))
            for i in range(length // 4)
        ]
        for length in sides
    ]
    for top in places[0]:
        for left in places[1]:
            part = torch.from_numpy(image[top : top + sides[0], left : left + sides[1]].copy())
            with torch.inference_mode():
                logits = predictor.logits(part.permute(2, 0, 1)[None])[0].numpy()
            for i in range(sides[0] // 4):
                for j in range(sides[1] // 4):
                    weight = ramp[0][i] * ramp[1][j]
                    total[:, top // 4 + i, left // 4 + j] += weight * logits[:, i, j]
                    weights[top // 4 + i, left // 4 + j] += weight
    small = torch.from_numpy(total / weights)[None]
    whole = F.interpolate(small, tuple(padded), mode="bilinear", align_corners=False)
    return whole[0, :, :height, :width].softmax(0).numpy()


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((100, 131), 64, 16),
        ((203, 90), 64, 0),
        ((97, 20), 64, 60),
        ((65, 64), 64, 32),
        ((10, 150), 64, 20),
        ((130, 200), 96, 48),
    ],
)
def test_tiles_are_what_a_naive_loop_gives_at_every_pixel(predictor, size, tile, overlap):
    image = picture(*size)
    keep = ("probabilities", "confidence", "entropy")
    blending = Blending(
        predictor, lambda top, bottom: image[top:bottom], size, tile=tile, overlap=overlap, keep=keep
    )
    strips = list(blending.strips())
    found = {name: np.concatenate([strip[name] for strip in strips], axis=-2) for name in strips[0]}
    expected = naive(predictor, image, tile, overlap)
    assert found["mask"].shape == size
    np.testing.assert_allclose(found["probabilities"], expected, atol=2e-5)
    np.testing.assert_allclose(found["confidence"], expected.max(0), atol=2e-5)
    entropy = -(expected * np.log(expected)).sum(0) / np.log(len(CLASSES))
    np.testing.assert_allclose(found["entropy"], entropy, atol=2e-5)
    chosen = np.take_along_axis(expected, found["mask"][None].astype(int), 0)[0]
    assert (chosen >= expected.max(0) - 2e-5).all()  # the class, but for ties of rounding
    assert len(np.unique(found["mask"])) > 1


def config(checkpoint, source, output, **settings):
    return PredictConfig(
        checkpoint=str(checkpoint), input=str(source), output=str(output), device="cpu", **settings
    )


def opened(path):
    """Pixels and colors of a picture."""
    with Image.open(path) as found:
        return np.array(found), (found.getpalette() or [])[: 3 * len(CLASSES)]


def test_a_picture_above_the_limit_is_written_by_rows_as_one_below_it_is(
    checkpoint, tmp_path, monkeypatch, capsys
):
    tifffile.imwrite(tmp_path / "big.tif", picture(700, 610), rowsperstrip=16)
    save = ["mask", "overlay", "areas"]
    (whole,) = predict(config(checkpoint, tmp_path / "big.tif", tmp_path / "a", tile=128, save=save))
    monkeypatch.setattr(tiled, "MAX_PIXELS", 400_000)
    monkeypatch.setattr(tiled, "LONGEST", 350)
    (by_rows,) = predict(config(checkpoint, tmp_path / "big.tif", tmp_path / "b", tile=128, save=save))
    assert (whole.name, by_rows.name) == ("big.png", "big.tif")
    mask = opened(whole)[0]
    assert len(np.unique(mask)) > 2
    np.testing.assert_array_equal(tifffile.imread(by_rows), mask)
    assert opened(by_rows)[1] == opened(whole)[1]
    assert (tmp_path / "a/areas.csv").read_text() == (tmp_path / "b/areas.csv").read_text()
    assert opened(tmp_path / "b/big_overlay.jpg")[0].shape == (350, 305, 3)
    with pytest.raises(DataError, match=r"has 610 x 700 pixels, above the 400000 .*; give tile=1024"):
        predict(config(checkpoint, tmp_path / "big.tif", tmp_path / "c"))
    with pytest.raises(DataError, match=r"there is no entropy of it; give save=\[mask,overlay,areas\]"):
        predict(config(checkpoint, tmp_path / "big.tif", tmp_path / "c", tile=128, save=["entropy"]))


def test_a_picture_no_larger_than_a_tile_is_predicted_whole(checkpoint, tmp_path):
    Image.fromarray(picture(90, 120)).save(tmp_path / "a.png")
    (tiles,) = predict(config(checkpoint, tmp_path / "a.png", tmp_path / "tiles", tile=128))
    (whole,) = predict(config(checkpoint, tmp_path / "a.png", tmp_path / "whole"))
    assert tiles.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 1000}, "tile=1000 must be a multiple of 32, 64 to 8192; use tile=992"),
        ({"tile": 32}, "use tile=64"),
        ({"tile": 64, "overlap": 64}, "overlap=64 must be a multiple of 4 below tile=64; use 16"),
        ({"overlap": 8}, "overlap=8 is that of tiles; give tile=1024"),
        ({"tile": 64, "flip": True}, "flip=True and tile=64 exclude each other"),
        ({"save": ["masks"]}, "must be some of mask, overlay, probabilities"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message):
        config("x", "y", "z", **settings)


def test_damage_below_the_first_rows_is_named_and_the_others_are_done(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_PIXELS", 40_000)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(picture(300, 200)).save(folder / "b.png")
    data = (folder / "b.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(Incomplete, match=r"1 of 2 pictures can't be used"):
        predict(config(checkpoint, folder, tmp_path / "out", tile=64, save=["mask"]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.tif"]
