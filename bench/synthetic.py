"""Data sets to measure on where no real one is at hand: pictures and masks that cost what real ones cost.

A photograph's power spectrum falls as 1 / f^2, so noise with that spectrum has edges and gradients at every
scale; the JPEG quality is then chosen so that a file has as many bytes as one of the real set. Masks are
Voronoi cells with bent borders, written as Pillow writes them unless told otherwise."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

COARSE = 4  # the cells are found on every 4th pixel


@dataclass(frozen=True, slots=True)
class Kind:
    """What the pictures of a set are like: (height, width), bytes of the JPEG, regions of the mask."""

    size: tuple[int, int]
    bytes: int
    regions: int
    classes: int


# Bytes: CamVid at 480 x 360 as JPEG of quality 92, mean of its 701 images; ADE20K: about 45 KB at this size.
# Regions are an estimate.
KINDS = {
    "camvid": Kind((360, 480), 63_000, 60, 11),
    "ade": Kind((512, 683), 45_000, 40, 150),
}


def write_folder(root: Path, kind: Kind, count: int, seed: int = 0) -> Path:
    """Write `count` training pairs and one validation pair in the layout of conf/data/folder.yaml."""
    rng = np.random.default_rng(seed)
    quality = 0
    for split, number in (("train", count), ("val", 1)):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for index in range(number):
            image = natural_image(kind.size, rng)
            quality = quality or fitting_quality(image, kind.bytes)
            stem = f"{index:05d}"
            cv2.imwrite(str(root / f"images/{split}/{stem}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            Image.fromarray(cells(kind, rng)).save(root / f"masks/{split}/{stem}.png")
    return root


def natural_image(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise of amplitude 1 / f, mostly grey as photographs are; uint8 (H, W, 3)."""
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None] * size[0], np.fft.rfftfreq(size[1])[None] * size[1])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(4):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phase / frequency, size)
        planes.append(plane / plane.std())
    colors = [110 + 50 * (0.93 * planes[0] + 0.37 * plane) for plane in planes[1:]]
    return np.stack(colors, axis=-1).clip(0, 255).astype(np.uint8)


def fitting_quality(image: np.ndarray, size: int) -> int:
    """The JPEG quality of 20 to 95 at which the file is closest to `size` bytes."""

    def length(quality: int) -> int:
        return len(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])

    return min(range(20, 96), key=lambda quality: abs(length(quality) - size))


def cells(kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """A mask of classes and a few ignored pixels, uint8 (H, W)."""
    height, width = kind.size
    grid = np.moveaxis(np.mgrid[0:height:COARSE, 0:width:COARSE], 0, -1).astype(np.float32)
    bend = cv2.resize(rng.normal(0, 12, (9, 12, 2)).astype(np.float32), grid.shape[1::-1])
    seeds = rng.random((kind.regions, 2)).astype(np.float32) * (height, width)
    distance = (((grid + bend)[:, :, None] - seeds) ** 2).sum(-1)
    labels = rng.integers(0, kind.classes, kind.regions).astype(np.uint8)
    labels[rng.random(kind.regions) < 0.05] = 255
    return cv2.resize(labels[distance.argmin(-1)], (width, height), interpolation=cv2.INTER_NEAREST)
