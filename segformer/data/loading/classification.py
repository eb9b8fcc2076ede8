"""Augmentation of classification: random resized crop, flip, RandAugment; mixup and cutmix on the device.

In the worker, on uint8 (ClassificationGeometry): a region of random area and ratio, resized at once to the
crop (the average of an area where it shrinks, bilinear where it grows) -> horizontal flip -> RandAugment
(Cubuk et al. 2020: of 14 operations each sample draws `ops`, with replacement, all at one magnitude), where
magnitude 10 means

    shear 0.3, shift 0.45 of the side, rotation 30 degrees    about the center, bilinear, the mean outside
    brightness, contrast, saturation, sharpness               factor 1 +- 0.9, Pillow's ImageEnhance
    posterize to 4 bits, solarize from 0                      Pillow's ImageOps, as autocontrast and equalize

and less is proportionally less; signs are drawn. Autocontrast and equalize know no magnitude.

On the device, batched (mix): mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of each image with the one
before it in the micro batch, and label smoothing. Its random numbers are Philox(seed, position).

Shapes: B batch, H W image, h w crop, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor

from segformer.data.loading.photometric import MOST_SIDE, check_lists
from segformer.data.sources.picture import by_four
from segformer.errors import ConfigError, within

CROP_TRIES = 10
_GREY = np.array([[0.299, 0.587, 0.114]])  # luma of ITU-R BT.601


@dataclass(kw_only=True, slots=True)
class ClassificationAugment:
    """Augmentation of classification, between decoding and the model."""

    size: int = 224
    """Side of the square crop, pixels."""
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Range of the share of the image's area that a training crop covers."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Range of the width / height of that region, drawn on a logarithmic scale."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    ops: int = 2
    """Operations of RandAugment on each image."""
    magnitude: float = 0.0
    """Strength of these operations, 0 to 10; 0 = no RandAugment."""
    mixup: float = 0.0
    """alpha of mixup: images are blended with weight Beta(alpha, alpha); 0 = no mixup."""
    cutmix: float = 0.0
    """alpha of cutmix: a box of area 1 - Beta(alpha, alpha) comes from another image; 0 = no cutmix."""
    mix_prob: float = 1.0
    """Probability that a micro batch is mixed; where both are on, each of the two half of the time."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes, 0 to below 1."""
    eval_resize: int = 256
    """Short side of an image in evaluation before its center is cut out, pixels, at least `size`."""
    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    """Mean of red, green, blue that is subtracted, 0-255."""
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    """Standard deviation of red, green, blue to divide by, 0-255."""

    def __post_init__(self) -> None:
        check_lists(self, "classification.", "scale", "ratio")
        if self.scale[1] > 1:
            raise ConfigError(f"classification.scale={list(self.scale)}; an area share is at most 1")
        within(self, "classification.", size=(1, MOST_SIDE), eval_resize=(self.size, MOST_SIDE))
        within(self, "classification.", mixup=(0, 1000), cutmix=(0, 1000))
        within(self, "classification.", hflip=(0, 1), mix_prob=(0, 1), label_smoothing=(0, 0.999))
        within(self, "classification.", magnitude=(0, 10), ops=(0, 14))


class ClassificationGeometry:
    """Image -> training crop, or the view of evaluation."""

    def __init__(self, cfg: ClassificationAugment) -> None:
        self.cfg = cfg
        self.fill = np.round(np.clip(cfg.mean, 0, 255)).astype(np.uint8)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """image (H, W, C) -> a new array (size, size, C); RandAugment is of 3 x uint8."""
        top, left, height, width = self.region(image.shape[0], image.shape[1], rng)
        size = (self.cfg.size, self.cfg.size)
        crop = _resized(image[top : top + height, left : left + width], size)
        if rng.random() < self.cfg.hflip:
            crop = np.ascontiguousarray(crop[:, ::-1])
        if self.cfg.magnitude:
            operations = list(OPERATIONS.values())
            for _ in range(self.cfg.ops):
                operation = operations[int(rng.integers(len(operations)))]
                sign = 1 if rng.random() < 0.5 else -1
                crop = operation(crop, sign * self.cfg.magnitude / 10, self.fill)
        return crop

    def region(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a training crop in an image of this size.

        Area and ratio are drawn again (10 tries) while the region does not fit; after that it is the center,
        cut to the nearest ratio that is allowed.
        """
        low, high = self.cfg.ratio
        for _ in range(CROP_TRIES):
            area = height * width * rng.uniform(self.cfg.scale[0], self.cfg.scale[1])
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        h, w = min(height, round(width / low)), min(width, round(height * high))
        h, w = max(1, h), max(1, w)
        return (height - h) // 2, (width - w) // 2, h, w

    def eval_view(self, image: np.ndarray) -> np.ndarray:
        """image (H, W, C) -> short side to eval_resize, then the center, (size, size, C)."""
        height, width = image.shape[:2]
        factor = self.cfg.eval_resize / min(height, width)
        shape = max(self.cfg.size, round(height * factor)), max(self.cfg.size, round(width * factor))
        top, left = (shape[0] - self.cfg.size) // 2, (shape[1] - self.cfg.size) // 2
        view = _resized(image, shape)[top : top + self.cfg.size, left : left + self.cfg.size]
        return np.ascontiguousarray(view)


def _resized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    shrinks = image.shape[0] >= shape[0] and image.shape[1] >= shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return by_four(lambda part: cv2.resize(part, (shape[1], shape[0]), interpolation=method), image)


def _warped(image: np.ndarray, matrix: list[list[float]], fill: np.ndarray) -> np.ndarray:
    """Warp by a linear map and shift (x, y) of the pixels of the result, about the center."""
    height, width = image.shape[:2]
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    full = np.array(matrix, np.float64)
    full[:, 2] += center - full[:, :2] @ center
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(image, full, (width, height), flags=flags, borderValue=[int(value) for value in fill])
    )


def _rotated(image: np.ndarray, level: float, fill: np.ndarray) -> np.ndarray:
    cos, sin = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    return _warped(image, [[cos, -sin, 0], [sin, cos, 0]], fill)


def _blend(base: np.ndarray | float, image: np.ndarray, level: float) -> np.ndarray:
    """base + (1 + 0.9 level) (image - base), cut to 0-255 and rounded down as Pillow does."""
    base, image = np.asarray(base, np.float32), image.astype(np.float32)
    return np.asarray((base + (1 + 0.9 * level) * (image - base)).clip(0, 255).astype(np.uint8))


def _grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.transform(image, _GREY))[..., None]


def _smooth(image: np.ndarray) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()  # the edge stays as it is
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return smooth


def _autocontrast(image: np.ndarray) -> np.ndarray:
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T
    spread = np.where(high > low, high - low, 255)
    low = np.where(high > low, low, 0)
    table = ((np.arange(256)[:, None] - low) * (255 / spread)).clip(0, 255).astype(np.uint8)  # (256, 3)
    return np.asarray(cv2.LUT(image, table[None]))


def _equalize(image: np.ndarray) -> np.ndarray:
    table = np.empty((256, 3), np.uint8)
    for channel in range(3):
        counts = np.bincount(image[..., channel].reshape(-1), minlength=256)
        step = int(counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.cumsum(counts) - counts
        table[:, channel] = ((step // 2 + below) // step).clip(0, 255) if step else np.arange(256)
    return np.asarray(cv2.LUT(image, table[None]))


# RandAugment: (image uint8 (h, w, 3), level -1 to 1, fill uint8 (3,)) -> image. Level 0 is the identity
# wherever an operation has a level at all. The draws of a sample depend on the order.
OPERATIONS: dict[str, Callable[[np.ndarray, float, np.ndarray], np.ndarray]] = {
    "identity": lambda image, level, fill: image,
    "autocontrast": lambda image, level, fill: _autocontrast(image),
    "equalize": lambda image, level, fill: _equalize(image),
    "rotate": _rotated,
    "solarize": lambda image, level, fill: np.where(image < 256 * (1 - abs(level)), image, 255 - image),
    "saturation": lambda image, level, fill: _blend(_grey(image), image, level),
    "posterize": lambda image, level, fill: image & np.uint8(256 - 2 ** round(4 * abs(level))),
    "contrast": lambda image, level, fill: _blend(math.floor(_grey(image).mean() + 0.5), image, level),
    "brightness": lambda image, level, fill: _blend(0, image, level),
    "sharpness": lambda image, level, fill: _blend(_smooth(image), image, level),
    "shear_x": lambda image, level, fill: _warped(image, [[1, 0.3 * level, 0], [0, 1, 0]], fill),
    "shear_y": lambda image, level, fill: _warped(image, [[1, 0, 0], [0.3 * level, 1, 0]], fill),
    "shift_x": lambda image, level, fill: _warped(
        image, [[1, 0, round(0.45 * level * image.shape[1])], [0, 1, 0]], fill
    ),
    "shift_y": lambda image, level, fill: _warped(
        image, [[1, 0, 0], [0, 1, round(0.45 * level * image.shape[0])]], fill
    ),
}


def mix(
    images: Tensor, labels: Tensor, num_classes: int, cfg: ClassificationAugment, seed: int, position: int
) -> tuple[Tensor, Tensor]:
    """Mixup, cutmix and label smoothing of one micro batch.

    images float (B, 3, h, w), labels int64 (B,) -> mixed images, targets float32 (B, K) whose rows sum to 1.
    position: number of the micro batch, counted over all ranks and steps. Every image is mixed with the one
    before it in the batch (the first with the last), all with one weight or box.
    """
    off = cfg.label_smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - cfg.label_smoothing + off)
    key, counter = np.array([seed, 2], np.uint64), np.array([0, position, 0, 2], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
    alphas = {name: alpha for name, alpha in (("mixup", cfg.mixup), ("cutmix", cfg.cutmix)) if alpha}
    if not alphas or rng.random() >= cfg.mix_prob:
        return images, targets
    kind = list(alphas)[int(rng.integers(len(alphas)))]
    kept = float(rng.beta(alphas[kind], alphas[kind]))
    others = images.roll(1, 0)
    if kind == "mixup":
        images = images * kept + others * (1 - kept)
    else:
        top, bottom, left, right = cutmix_box(images.shape[2], images.shape[3], kept, rng)
        images = images.clone()
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return images, targets * kept + targets.roll(1, 0) * (1 - kept)


def cutmix_box(height: int, width: int, kept: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of 1 - kept of the area, at a random center, cut at the border."""
    row, column = int(rng.integers(height)), int(rng.integers(width))
    half_h, half_w = (round(side * math.sqrt(1 - kept)) / 2 for side in (height, width))
    top, bottom = max(0, math.ceil(row - half_h)), min(height, math.ceil(row + half_h))
    left, right = max(0, math.ceil(column - half_w)), min(width, math.ceil(column + half_w))
    return top, bottom, left, right
