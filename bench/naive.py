"""What the loader is compared with: the usual pipeline, everything on the CPU, as mmsegmentation defines it.

    decode -> resize the whole image and mask -> crop (cat_max_ratio) -> flip -> photometric distortion
           -> normalize -> pad -> float32 planes, int64 labels

Written with OpenCV, on 8 bits as long as the original is. `from_files` reads single files, images by OpenCV
and masks by Pillow (mmsegmentation's defaults). `from_webdataset` reads the shards of the loader through
stock webdataset (its tar reader, shuffle buffer and .decode() by Pillow) and augments in the same way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from segformer.data.loading.crop import AugmentConfig

Sample = tuple[Tensor, Tensor]
"""image float32 (3, h, w), normalized; mask int64 (h, w)"""


def augment(
    image: np.ndarray, mask: np.ndarray, cfg: AugmentConfig, rng: np.random.Generator, *, bgr: bool
) -> Sample:
    """One sample; image uint8 (H, W, 3), BGR or RGB, mask uint8 (H, W)."""
    scale = rng.uniform(cfg.scale[0], cfg.scale[1])
    bounds = [int(bound * scale) for bound in (cfg.resize or mask.shape)]
    factor = min(max(bounds) / max(mask.shape), min(bounds) / min(mask.shape))
    size = (int(mask.shape[1] * factor + 0.5), int(mask.shape[0] * factor + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(10):
        top = rng.integers(0, max(mask.shape[0] - cfg.crop[0], 0) + 1)
        left = rng.integers(0, max(mask.shape[1] - cfg.crop[1], 0) + 1)
        window = np.s_[top : top + cfg.crop[0], left : left + cfg.crop[1]]
        labels, counts = np.unique(mask[window], return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < cfg.cat_max_ratio:
            break
    image, mask = image[window], mask[window]
    if rng.random() < cfg.hflip:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    if cfg.photometric:
        image = photometric(image, rng, bgr)
    pixels = image.astype(np.float32)
    if bgr:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)
    cv2.subtract(pixels, np.array([*cfg.mean, 0], np.float64), pixels)
    cv2.multiply(pixels, 1 / np.array([*cfg.std, 1], np.float64), pixels)
    below, right = cfg.crop[0] - mask.shape[0], cfg.crop[1] - mask.shape[1]
    pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    mask = cv2.copyMakeBorder(mask, 0, below, 0, right, cv2.BORDER_CONSTANT, value=255)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes), torch.from_numpy(mask.astype(np.int64))


def photometric(image: np.ndarray, rng: np.random.Generator, bgr: bool) -> np.ndarray:
    """Brightness, contrast, saturation and hue on uint8, each with probability 0.5."""
    to_hsv, back = (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR) if bgr else (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
    first = bool(rng.integers(2))
    if rng.integers(2):
        image = _linear(image, 1, rng.uniform(-32, 32))
    if first and rng.integers(2):
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    if rng.integers(2):
        hsv = cv2.cvtColor(image, to_hsv)
        hsv[..., 1] = _linear(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
        image = cv2.cvtColor(hsv, back)
    if rng.integers(2):
        hsv = cv2.cvtColor(image, to_hsv)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, back)
    if not first and rng.integers(2):
        image = _linear(image, rng.uniform(0.5, 1.5), 0)
    return image


def _linear(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def from_files(folder: Path, cfg: AugmentConfig, seed: int) -> Iterator[Sample]:
    """Training samples of a folder in a random order, without end."""
    rng = np.random.default_rng(seed)
    images = sorted((folder / "images/train").iterdir())
    while True:
        for index in rng.permutation(len(images)):
            data = np.frombuffer(images[index].read_bytes(), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            assert image is not None
            mask_file = folder / "masks/train" / f"{images[index].stem}.png"
            with Image.open(mask_file) as picture:
                mask = np.array(picture)
            yield augment(image, mask, cfg, rng, bgr=True)


def from_webdataset(tars: list[str], cfg: AugmentConfig, seed: int) -> Iterator[Sample]:
    """The same samples from tars by stock webdataset, without end; decoded by Pillow."""
    rng = np.random.default_rng(seed)
    decoders = [webdataset.imagehandler("rgb8", ["jpg"]), webdataset.imagehandler("l8", ["png"])]
    while True:
        pipeline = webdataset.WebDataset(tars, shardshuffle=False).shuffle(64)
        for sample in pipeline.decode(*decoders):
            yield augment(sample["jpg"], sample["png"], cfg, rng, bgr=False)


class _Batches(IterableDataset[Sample]):
    """Stacked samples: float32 (B, 3, h, w), int64 (B, h, w)."""

    def __init__(self, source: Callable[[], Iterator[Sample]], size: int) -> None:
        self.source = source
        self.size = size

    def __iter__(self) -> Iterator[Sample]:
        rest = self.source()
        while True:
            images, masks = zip(*(next(rest) for _ in range(self.size)), strict=True)
            yield torch.stack(images), torch.stack(masks)


def naive_loader(source: Callable[[], Iterator[Sample]], size: int, workers: int) -> Iterator[Sample]:
    """Batches of `size` from a DataLoader with `workers` processes of one thread."""
    options: dict[str, Any] = (
        {"multiprocessing_context": "forkserver", "prefetch_factor": 2} if workers else {}
    )
    loader = DataLoader(
        _Batches(source, size), batch_size=None, num_workers=workers, worker_init_fn=_one_thread, **options
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
