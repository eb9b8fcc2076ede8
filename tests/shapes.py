"""A small classification set: noisy pictures of a disc, of stripes or of a chequerboard, a folder each."""

from pathlib import Path

import cv2
import numpy as np

from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig

CLASSES = ["checks", "disc", "stripes"]


def picture(name: str, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 (H, W, 3), 56 to 72 pixels a side; colours, place and size are random."""
    height, width = (int(side) for side in rng.integers(56, 73, 2))
    rows, columns = np.mgrid[:height, :width]
    period = int(rng.integers(5, 8))
    inside = {
        "checks": (rows // period + columns // period) % 2 == 0,
        "disc": np.hypot(rows - height * rng.uniform(0.4, 0.6), columns - width * rng.uniform(0.4, 0.6)) < 16,
        "stripes": rows // period % 2 == 0,
    }[name]
    dark, bright = rng.integers(30, 90, 3), rng.integers(160, 220, 3)
    image = np.where(inside[..., None], bright, dark) + rng.normal(0, 12, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    """Write root/<split>/<class>/<number>.png, the classes in turn."""
    rng = np.random.default_rng(5)
    for split, count in counts.items():
        for number in range(count):
            name = CLASSES[number % len(CLASSES)]
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"{number:03d}.png"), picture(name, rng))
    return root


def config() -> DatasetConfig:
    """The data set of `write_folders`."""
    return DatasetConfig(name="shapes", task="classification", image_dir="{split}", image_suffix=".png")


def write_set(folder: Path, counts: dict[str, int]) -> Path:
    """The data set as shards; returns their folder."""
    root = write_folders(folder / "images", counts)
    write_shards(config(), root, folder / "shards", seed=0, samples_per_shard=16, workers=1)
    return folder / "shards"
