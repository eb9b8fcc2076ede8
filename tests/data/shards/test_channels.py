"""Sets of other than 3 x uint8: from TIFFs to shards to batches, against numpy on the originals."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import webdataset
from PIL import Image

from segformer.data.loading.crop import AugmentConfig, RandomCrop
from segformer.data.loading.photometric import Normalize, blur
from segformer.data.loading.samples import Samples
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.verify import find_defects
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, encode_array
from segformer.errors import ConfigError, DataError
from segformer.evaluation.drawing import displayed

CFG = DatasetConfig(classes=["a", "b"], channels=5)


def make(root: Path, dtype: str = "uint16") -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(3)
    images: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for split, count in (("train", 5), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = (rng.random((40 + number, 52, 5)) * [9, 900, 9000, 60000, 7]).astype(dtype)
            pixels[..., 4] = 7  # a channel of one value
            images[split].append(pixels)
            file = root / f"images/{split}/{number}.tif"
            tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")
            mask = rng.integers(0, 2, pixels.shape[:2], np.uint8)
            Image.fromarray(mask).save(root / f"masks/{split}/{number}.png")
    return images


def write(root: Path, out: Path, **options: int) -> ShardSet:
    arguments = {"seed": 0, "samples_per_shard": 2, "workers": 1} | options
    write_shards(CFG, root, out, **arguments)  # type: ignore[arg-type]
    return ShardSet.open(out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_shards_hold_the_pixels_and_their_mean_and_std(tmp_path: Path, dtype: str) -> None:
    images = make(tmp_path / "set", dtype)
    shards = write(tmp_path / "set", tmp_path / "out")
    assert (shards.channels, shards.dtype) == (5, dtype)
    train = np.concatenate([image.reshape(-1, 5) for image in images["train"]]).astype(np.float64)
    np.testing.assert_allclose(shards.mean, train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(shards.std, [*train.std(0)[:4], 1], rtol=1e-9)
    other = write(tmp_path / "set", tmp_path / "two", workers=2)
    assert other.digest == shards.digest
    read = Samples(shards.split("val"), None).batch([(0, 0)]).images
    assert read.dtype == getattr(torch, dtype)
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), images["val"][0])
    stock, *_ = webdataset.WebDataset(str(tmp_path / "out/val-000000.tar"), shardshuffle=False).decode()
    assert np.array_equal(stock["npy"], images["val"][0])
    assert find_defects(tmp_path / "out") == []
    smaller = write(tmp_path / "set", tmp_path / "small", long_side=26).split("train")
    assert set(smaller.widths.tolist()) == {26}


def test_what_shards_can_t_hold_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"quality=90 makes JPEGs, which hold 3 x uint8, and"):
        write(tmp_path / "set", tmp_path / "out", quality=90)
    content = json.loads((write(tmp_path / "set", tmp_path / "out").root / Path("dataset.json")).read_text())
    for key, value in (("channels", 33), ("dtype", "int64"), ("std", [0] * 5), ("mean", None), ("mean", [1])):
        path = tmp_path / "out/dataset.json"
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(DataError):
            ShardSet.open(tmp_path / "out")


def test_members_that_are_no_image_are_refused() -> None:
    pixels = np.arange(4 * 6 * 5, dtype=np.uint16).reshape(4, 6, 5)
    data = encode_array(pixels)
    assert np.array_equal(decode_image(data), pixels)
    for length in range(len(data)):
        with pytest.raises(DataError):
            decode_image(data[:length])
    for old, new in ((b"<u2", b"|O8"), (b"False", b"True "), (b"(4, 6, 5)", b"(9, 9, 9)"), (b"<u2", b">u2")):
        with pytest.raises(DataError):
            decode_image(data.replace(old, new))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_crop_of_many_channels_is_that_of_each(dtype: str) -> None:
    rng = np.random.default_rng(5)
    image, mask = (rng.random((70, 90, 9)) * 200).astype(dtype), rng.integers(0, 3, (70, 90), np.uint8)
    for options in ({"rotate": 30.0, "rotate_prob": 1.0}, {"rot90": 1.0, "vflip": 1.0}, {"crop": [200, 64]}):
        crop = RandomCrop(AugmentConfig(resize=[], **{"crop": [48, 64]} | options))  # type: ignore[arg-type]
        found, labels, valid = crop(image, mask, np.random.default_rng(1))
        blur(found, valid, 1.5)
        assert (found.dtype, found.shape[2]) == (image.dtype, 9)
        for first in range(0, 9, 3):
            part = np.ascontiguousarray(image[..., first : first + 3])
            alone, same, _ = crop(part, mask, np.random.default_rng(1))
            blur(alone, valid, 1.5)
            np.testing.assert_allclose(found[..., first : first + 3], alone, atol=1)
            assert np.array_equal(labels, same)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_normalize_takes_any_channels_and_dtype(dtype: torch.dtype) -> None:
    images = torch.randint(0, 200, (2, 5, 4, 6)).to(dtype)
    mean, std = torch.arange(5) * 20.0, torch.arange(1, 6) * 3.0
    expected = (images.double() - mean.view(1, 5, 1, 1)) / std.view(1, 5, 1, 1)
    normalize = Normalize(mean.tolist(), std.tolist())
    torch.testing.assert_close(normalize(images).double(), expected, rtol=1e-6, atol=1e-6)
    distortion = torch.tensor([[28.5, 1.5, 0.3, 9, 1.0], [0, 1, 1, 0, 1]])
    distorted = normalize(images, distortion).double()
    torch.testing.assert_close(distorted[0], (expected[0] + 0.5) * 1.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distorted[1], expected[1], rtol=1e-6, atol=1e-6)


def test_any_image_can_be_shown() -> None:
    image = np.random.default_rng(0).random((8, 9, 5), np.float32) * 1e4
    assert (displayed(image).shape, displayed(image).dtype) == ((8, 9, 3), np.uint8)
    assert displayed(image[..., :1]).shape == (8, 9, 3)
    colors = np.zeros((2, 2, 3), np.uint8)
    assert displayed(colors) is colors
