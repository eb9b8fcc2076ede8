"""Images alike over splits: found as by comparing all pairs, and parted by the line that says so."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from segformer.data.shards.sharding import find_alike, write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.similar import NEAR, nearest, perceptual_hash
from segformer.doctor.judge import judge_alike
from segformer.doctor.scan import scan_folder
from segformer.training.config import RunConfig, compose

SAMPLE = Path(__file__).resolve().parents[3] / "data_prep/sample/images"


def saved(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saved again": lambda image: saved(image, 30),
    "smaller": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "larger": lambda image: cv2.resize(image, None, fx=1.37, fy=1.37),
    "brighter": lambda image: cv2.add(image, np.full_like(image, 40)),
    "contrast": lambda image: np.clip(image * 1.3, 0, 255).astype(np.uint8),
    "16 bits": lambda image: image.astype(np.uint16) * 257,
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None],
}


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """Every third image of the sample."""
    files = sorted(SAMPLE.glob("*/*.jpg")) or sorted(SAMPLE.glob("*/*.png"))
    return [cv2.imread(str(file)) for file in files[::3]]


def bits(hashes: list[int], others: list[int]) -> np.ndarray:
    """The bits in which each two differ, counted in text."""
    return np.array([[bin(a ^ b).count("1") for b in others] for a in hashes])


def test_photographs_differ_and_their_copies_do_not(photographs: list[np.ndarray]) -> None:
    hashes = [perceptual_hash(image) for image in photographs]
    assert len(hashes) > 100
    apart = bits(hashes, hashes)[np.triu_indices(len(hashes), 1)]
    assert apart.min() > NEAR
    for name, copied in COPIES.items():
        differ = np.diag(bits(hashes, [perceptual_hash(copied(image)) for image in photographs]))
        assert (differ <= NEAR).mean() >= 0.99, name


def test_a_flat_image_is_like_no_other() -> None:
    assert perceptual_hash(np.zeros((64, 64, 3), np.uint8)) == 0
    assert perceptual_hash(np.full((64, 48, 5), 700, np.uint16)) == 0
    assert perceptual_hash(np.full((64, 48, 1), np.nan, np.float32)) == 0


def test_the_nearest_is_that_of_comparing_all_pairs() -> None:
    rng = np.random.default_rng(5)
    first = rng.integers(0, 2**64, 3000, np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, k % 14, replace=False)) for k in range(700)]
    second = first[rng.integers(0, 3000, 700)] ^ np.array(flips, np.uint64)
    groups = rng.integers(0, 3, 3000).astype(np.uint64), rng.integers(0, 3, 700).astype(np.uint64)
    found = nearest(np.stack([first, groups[0]], 1), np.stack([second, groups[1]], 1))
    differ = np.bitwise_count(first[None] ^ second[:, None]).astype(int)
    differ[groups[0][None] == groups[1][:, None]] = 65
    best = differ.min(1)
    assert 200 < (best <= NEAR).sum() < 600
    np.testing.assert_array_equal(found >= 0, best <= NEAR)
    near = np.flatnonzero(found >= 0)
    np.testing.assert_array_equal(differ[near, found[near]], best[near])


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Six films of seven frames that differ by noise and light, each in both splits."""
    rng = np.random.default_rng(1)
    scenes = [cv2.resize(rng.integers(0, 200, (9, 9, 3), np.uint8), (96, 64)) for _ in range(6)]
    for film, scene in enumerate(scenes):
        for frame in range(7):
            split = "val" if frame % 3 == 1 else "train"
            image = cv2.add(scene, rng.integers(0, 8, scene.shape, np.uint8) + np.uint8(4 * frame))
            mask = (cv2.cvtColor(scene, cv2.COLOR_BGR2GRAY) // 70).astype(np.uint8)
            for kind, picture in (("images", image), ("masks", mask)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / kind / split / f"film{film}_{frame:03d}.png"), picture)
    return tmp_path


def test_films_in_both_splits_are_named_and_the_line_parts_them(
    films: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_shards(config, films, out, seed=0, samples_per_shard=16, workers=1)
    (text,) = find_alike(out)
    assert text.startswith("12 images of val look like images of train (film0_001 ~ film0_00")
    scans = [scan_folder(config, films, split, num_classes=3, threads=1) for split in config.splits]
    assert [finding.text for finding in judge_alike(config, scans, ", and shard again")] == [text]
    remedy = text.partition("belongs together: ")[2].partition(", and shard again")[0]
    given = ["data=folder", "data.classes=[sky,road,tree]", *shlex.split(remedy)]
    cfg = compose(RunConfig, "config", given).data
    write_shards(cfg, films, tmp_path / "again", seed=0, samples_per_shard=16, workers=1)
    assert find_alike(tmp_path / "again") == []
    meant = replace(config, allow_duplicates=["val"])
    assert list(judge_alike(meant, scans)) == []
