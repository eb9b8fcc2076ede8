"""Images of 16 bits with content of fewer: found over the whole set, refused, scaled as a setting says."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image
from segformer.doctor.doctor import DoctorConfig, look
from segformer.doctor.scan import scan_folder
from segformer.errors import ConfigError, DataError
from segformer.inference.photograph import read_image
from segformer.training.config import RunConfig, compose
from segformer.training.run import _check


@pytest.fixture
def deep(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[[int, int], Path]:
    """(lowest, highest) -> a set whose images are grey PNGs of 16 bits with values in between."""

    def make(low: int, high: int) -> Path:
        root = make_folder(tmp_path / "set", {"train": 4, "val": 2}, suffix=".png")
        rng = np.random.default_rng(0)
        for path in sorted(root.glob("images/*/*.png")):
            shape = cv2.imread(str(path)).shape[:2]
            image = rng.integers(low, high, shape, np.uint16, endpoint=True)
            image[0, :2] = low, high
            cv2.imwrite(str(path), image)
        return root

    return make


def write(cfg: DatasetConfig, root: Path) -> ShardSet:
    out = root.with_name("out")
    write_shards(cfg, root, out, seed=0, samples_per_shard=8, workers=1)
    return ShardSet.open(out)


@pytest.mark.parametrize(
    ("low", "high", "kept", "proposed"),
    [
        (0, 4095, 16, [0, 4095]),
        (3, 1000, 4, [0, 1023]),
        (30000, 34000, 16, [30000, 34000]),
        (0, 255, 1, [0, 255]),
    ],
)
def test_a_crush_is_refused_and_the_range_that_is_named_gives_its_grey_levels(
    low: int, high: int, kept: int, proposed: list[int], deep: Callable[..., Path], config: DatasetConfig
) -> None:
    root = deep(low, high)
    cfg = replace(config, image_suffix=".png")
    with pytest.raises(
        DataError, match=rf"values of {low} to {high}, of which {kept} of 256 levels"
    ) as refused:
        write(cfg, root)
    given = ["data=folder", f"root={root}", "data.image_suffix=.png", "augment.crop=[32,32]", "pictures=0"]
    report = look(compose(DoctorConfig, "doctor", [*given, "data.classes=[sky,road,tree]"]))
    assert [finding.text for finding in report.findings if finding.about == "depth"] == [str(refused.value)]
    found = re.search(r"data\.image_range=\[(\d+),(\d+)\]", str(refused.value))
    assert found is not None
    assert [int(value) for value in found.groups()] == proposed
    shards = write(replace(cfg, image_range=proposed), root)
    assert (shards.content["image_range"], shards.content["splits"]["train"]["levels"]) == (
        proposed,
        [low, high],
    )
    reader = ShardReader(shards.split("train"))
    for sample_id in range(4):
        raw = reader.read(sample_id)
        path = root / f"images/train/{raw.key}.png"
        source = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float64)
        expected = (source - proposed[0]) * 255 / (proposed[1] - proposed[0])
        image = decode_image(raw.image)
        assert np.abs(image - expected[..., None]).max() <= 0.51
        assert len(np.unique(image)) > 100
        np.testing.assert_array_equal(read_image(path, proposed), image)  # as predict sees it
    scan = scan_folder(replace(cfg, image_range=proposed), root, "train", num_classes=3)
    sheet = dict(map(scan.load, scan.choose(4)))
    np.testing.assert_array_equal(sheet[raw.key][0], image)  # as the contact sheet shows it


def test_a_hot_pixel_hides_no_crush_and_the_first_shard_tells(
    deep: Callable[..., Path], config: DatasetConfig
) -> None:
    root = deep(0, 4095)
    path = root / "images/train/001.png"
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    image[3, 3] = 65535
    cv2.imwrite(str(path), image)
    with pytest.raises(DataError, match=r"values of 0 to 4095, of which 16 of 256 .*range=\[0,4095\]"):
        write(replace(config, image_suffix=".png"), root)
    assert not [*root.parent.rglob("train-000000.tar")]
    for split in ("train", "val"):
        for path in (root / "images" / split).iterdir():
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if path.stem < "003":
                image[3, 3] = 65535
            cv2.imwrite(str(path), image)
    write(replace(config, image_suffix=".png"), root)  # a dark one among others


def test_a_run_carries_the_range_of_its_shards(deep: Callable[..., Path], config: DatasetConfig) -> None:
    shards = write(replace(config, image_suffix=".png", image_range=[0, 4095]), deep(0, 4095))
    given = ["data=folder", f"data.shards={shards.root}", "global_batch=2", "augment.crop=[32,32]"]
    with pytest.raises(ConfigError, match=r"another data\.image_range; give 'data\.image_range=\[0,4095\]'"):
        _check(compose(RunConfig, "config", given), 1)
    _check(compose(RunConfig, "config", [*given, "data.image_range=[0,4095]"]), 1)


def test_images_that_use_their_16_bits_and_an_explicit_setting_pass(
    deep: Callable[..., Path], config: DatasetConfig
) -> None:
    root, cfg = deep(100, 60000), replace(config, image_suffix=".png")
    raw = ShardReader(write(cfg, root).split("train")).read(0)
    assert raw.image == (root / f"images/train/{raw.key}.png").read_bytes()
    with pytest.raises(ConfigError, match=r"image_range=\[5, 5\]; give \[lowest,highest\]"):
        replace(cfg, image_range=[5, 5])


def test_twelve_bits_are_kept_as_they_are_where_that_is_said(
    deep: Callable[..., Path], config: DatasetConfig
) -> None:
    cfg = replace(config, image_suffix=".png", image_range=[0, 65535])
    raw = ShardReader(write(cfg, deep(0, 4095)).split("train")).read(0)
    assert decode_image(raw.image).max() == round(4095 / 257)
