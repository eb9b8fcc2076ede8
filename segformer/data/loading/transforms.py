"""Augmentation of the official recipe, split where it is cheapest.

In the worker, on uint8 (TrainGeometry): scale U(0.5, 2) of the size bound with the ratio kept -> rotation
(off by default) -> random crop with cat_max_ratio -> flips, as one resampling (placement.py) -> padding right
and below, image 0 and mask 255.

On the device, batched (Normalize): photometric distortion -> normalise -> padded pixels to exactly 0, the
mean colour. Which pixels are padding travels in the two last photometric parameters, the valid height and
width; no colour or label stands for it.

Photometric: brightness +-32, contrast 0.5-1.5 before or after, saturation 0.5-1.5, hue +-18 of 180, each
with probability 0.5, in the 8-bit HSV of OpenCV with its rounding (the order and the casts of
PhotoMetricDistortion in mmsegmentation). Random numbers come from Philox(seed, epoch, sample id): ranks and
workers cannot change them. An option that is off draws none.

Shapes: B batch, H W image, h w crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segformer.data.loading.placement import Placement, cut_mask, resample, scaled_size, turned
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import ConfigError

BRIGHTNESS, CONTRAST_BEFORE, SATURATION, HUE, CONTRAST_AFTER, VALID_HEIGHT, VALID_WIDTH = range(7)
NUM_PHOTOMETRIC = 7
CROP_TRIES = 10
_SHARE_GRID = 64  # the class share of a crop is judged on about 64 x 64 of its pixels


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """What happens to a sample between decoding and the model; the defaults are the official recipe."""

    crop: list[int] = field(default_factory=lambda: [512, 512])
    """Height and width of the training crop, pixels."""
    resize: list[int] = field(default_factory=lambda: [2048, 512])
    """Bounds of the long and short side at scale 1, pixels, ratio kept; [] = the image's own size."""
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the random scale."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again (10 tries) while one class has this share of its labelled pixels; 1 = never."""
    class_balanced_crop: float = 0.0
    """Probability that a crop must hold a pixel of one class of the image, drawn with weight 1 / (the pixels
    of the class in the split): rare classes are seen more often."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    rot90: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, for images without an upright direction."""
    rotate: float = 0.0
    """Largest angle of a free rotation, degrees either way, 0 = none; corners that come from outside the
    image are ignored (255)."""
    rotate_prob: float = 0.5
    """Probability of that rotation where `rotate` is above 0."""
    mosaic: float = 0.0
    """Probability that the crop is put together from four images of one shard around a random point."""
    copy_paste: float = 0.0
    """Probability that the pixels of one class, drawn as in class_balanced_crop, are pasted from another
    image of the split that holds it."""
    blur: float = 0.0
    """Probability of a Gaussian blur of the crop."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Range of the blur's standard deviation, pixels of the crop."""
    photometric: bool = True
    """Photometric distortion on or off."""
    photometric_strength: float = 1.0
    """Factor on the ranges of brightness, contrast, saturation and hue, 0 to 2; 1 = the official ones."""
    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    """Mean of red, green, blue that is subtracted, 0-255."""
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    """Standard deviation of red, green, blue to divide by, 0-255."""

    def __post_init__(self) -> None:
        for name, length in (("crop", 2), ("scale", 2), ("blur_sigma", 2), ("mean", 3), ("std", 3)):
            values = getattr(self, name)
            if len(values) != length:
                raise ConfigError(f"augment.{name}={list(values)} needs {length} values")
            if name != "mean" and min(values) <= 0:
                raise ConfigError(f"augment.{name}={list(values)}; every value must be above 0")
        if len(self.resize) not in (0, 2) or (self.resize and min(self.resize) < 1):
            raise ConfigError(f"augment.resize={list(self.resize)}; use [long side, short side] or []")
        for name in ("scale", "blur_sigma"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                raise ConfigError(f"augment.{name}={list(getattr(self, name))}; use [smallest, largest]")
        largest = dict.fromkeys(("cat_max_ratio", "class_balanced_crop", "hflip", "vflip", "rot90"), 1)
        largest |= dict.fromkeys(("rotate_prob", "mosaic", "copy_paste", "blur"), 1)
        for name, limit in (largest | {"rotate": 180, "photometric_strength": 2}).items():
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"augment.{name}={getattr(self, name)}; use 0 to {limit}")


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever computes it."""
    key, counter = np.array([seed, 1], np.uint64), np.array([0, sample_id, epoch, 1], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class TrainGeometry:
    """Scale, rotate, crop, flip and pad as one resampling: full image and mask in, crop out.

    class_pixels: pixels of each class in the split (K,), for class_balanced_crop; None = all count alike.
    """

    def __init__(self, cfg: AugmentConfig, class_pixels: np.ndarray | None = None) -> None:
        self.cfg = cfg
        self.crop = (int(cfg.crop[0]), int(cfg.crop[1]))
        self.weights = np.ones(IGNORE_INDEX) if class_pixels is None else rarity(class_pixels)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """image uint8 (H, W, 3), mask uint8 (H, W) -> the same of the crop, and its valid (height, width)."""
        placement = self.place(mask, rng, self.crop)
        image, mask = resample(image, mask, placement)
        below, right = self.crop[0] - placement.valid[0], self.crop[1] - placement.valid[1]
        if below or right:
            border = (0, below, 0, right, cv2.BORDER_CONSTANT)
            image = cv2.copyMakeBorder(image, *border, value=(0, 0, 0))
            mask = cv2.copyMakeBorder(mask, *border, value=IGNORE_INDEX)
        return image, mask, placement.valid

    def place(
        self,
        mask: np.ndarray,
        rng: np.random.Generator,
        crop: tuple[int, int],
        *,
        label: int | None = None,
        fill: bool = False,
    ) -> Placement:
        """Draw where a crop of this size comes from.

        label: the class that the crop must hold, where the scaled image has it; None = as the config says.
        fill: scale up as far as it takes to fill the crop, so that nothing is padded.
        """
        cfg = self.cfg
        turns = int(rng.integers(1, 4)) if rng.random() < cfg.rot90 else 0
        mask = turned(mask, turns)
        size = scaled_size(mask.shape, cfg.resize, rng.uniform(cfg.scale[0], cfg.scale[1]))
        if fill and (size[0] < crop[0] or size[1] < crop[1]):
            factor = max(crop[0] / mask.shape[0], crop[1] / mask.shape[1])
            size = scaled_size(mask.shape, [], factor)
            size = max(crop[0], size[0]), max(crop[1], size[1])
        angle = 0.0
        if cfg.rotate and rng.random() < cfg.rotate_prob:
            angle = float(rng.uniform(-cfg.rotate, cfg.rotate))
        valid = (min(crop[0], size[0]), min(crop[1], size[1]))
        placement = Placement(turns, size, angle, 0, 0, valid)
        balanced = label is None and cfg.class_balanced_crop and rng.random() < cfg.class_balanced_crop
        held = self._held_pixel(mask, placement, label, rng) if balanced or label is not None else None
        placement = self._cut(mask, placement, held, rng)
        flip_x, flip_y = bool(rng.random() < cfg.hflip), bool(rng.random() < cfg.vflip)
        return replace(placement, flip_y=flip_y, flip_x=flip_x)

    def _held_pixel(
        self, mask: np.ndarray, placement: Placement, label: int | None, rng: np.random.Generator
    ) -> tuple[int, int] | None:
        """(row, column) in the scaled image of a random pixel of `label`, or of a class that is drawn."""
        canvas = cut_mask(mask, replace(placement, valid=placement.size))
        if label is None:
            counts = cv2.calcHist([canvas], [0], None, [IGNORE_INDEX], [0, IGNORE_INDEX]).reshape(-1)
            weights = self.weights * (counts[: len(self.weights)] > 0)
            if not weights.any():
                return None
            label = draw_index(weights, rng)
        places = np.flatnonzero(canvas.reshape(-1) == label)
        if not len(places):
            return None
        row, column = divmod(int(places[rng.integers(len(places))]), canvas.shape[1])
        return row, column

    def _cut(
        self, mask: np.ndarray, placement: Placement, held: tuple[int, int] | None, rng: np.random.Generator
    ) -> Placement:
        """Draw the corner, with `held` inside; the last one drawn when no try meets cat_max_ratio."""
        height, width = placement.valid
        lowest, highest = (0, 0), (placement.size[0] - height, placement.size[1] - width)
        if held is not None:
            lowest = max(0, held[0] - height + 1), max(0, held[1] - width + 1)
            highest = min(held[0], highest[0]), min(held[1], highest[1])
        steps = max(1, height // _SHARE_GRID), max(1, width // _SHARE_GRID)
        for _ in range(CROP_TRIES + 1):
            top = int(rng.integers(lowest[0], highest[0] + 1))
            left = int(rng.integers(lowest[1], highest[1] + 1))
            placement = replace(placement, top=top, left=left)
            if self.cfg.cat_max_ratio >= 1:
                break
            grid = cut_mask(mask, placement, steps)
            counts = np.bincount(grid.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
            if 0 < counts.max() < self.cfg.cat_max_ratio * counts.sum():
                break
        return placement


def rarity(class_pixels: np.ndarray) -> np.ndarray:
    """Weight of each class where one is drawn, float64 (K,): 1 / its pixels; 0 for a class without any."""
    pixels = np.asarray(class_pixels, np.float64)
    return np.divide(1.0, pixels, out=np.zeros_like(pixels), where=pixels > 0)


def draw_index(weights: np.ndarray, rng: np.random.Generator) -> int:
    """A random index with probability weights / sum of weights; at least one weight is above 0."""
    steps = np.cumsum(weights)
    return int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))


def blur(image: np.ndarray, valid: Sequence[int], cfg: AugmentConfig, rng: np.random.Generator) -> None:
    """Where one is drawn, a Gaussian blur of the valid part of a crop, in place; edges are mirrored."""
    if cfg.blur and rng.random() < cfg.blur:
        part = image[: valid[0], : valid[1]]
        part[:] = cv2.GaussianBlur(part, (0, 0), rng.uniform(cfg.blur_sigma[0], cfg.blur_sigma[1]))


def draw_photometric(
    cfg: AugmentConfig, rng: np.random.Generator, valid: Sequence[int] | None = None
) -> np.ndarray:
    """One sample's parameters for Normalize, float32 (NUM_PHOTOMETRIC,); identity where nothing is drawn.

    valid: (height, width) that is not padding; None = everything.
    """
    values = np.array([0, 1, 1, 0, 1, np.inf, np.inf], np.float32)
    if valid is not None:
        values[VALID_HEIGHT], values[VALID_WIDTH] = valid
    if not cfg.photometric:
        return values
    chosen = rng.random(4) < 0.5
    after = bool(rng.random() < 0.5)
    low, high = 1 - 0.5 * cfg.photometric_strength, 1 + 0.5 * cfg.photometric_strength
    light, turn = 32 * cfg.photometric_strength, round(18 * cfg.photometric_strength)
    draws = (
        rng.uniform(-light, light), rng.uniform(low, high), rng.uniform(low, high),
        int(rng.integers(-turn, max(turn, 1)))
    )  # fmt: skip
    places = (BRIGHTNESS, CONTRAST_AFTER if after else CONTRAST_BEFORE, SATURATION, HUE)
    for use, place, draw in zip(chosen, places, draws, strict=True):
        if use:
            values[place] = draw
    return values


class Normalize(nn.Module):
    """uint8 batch -> distorted, normalised float32 batch, on its device. Nothing to train or save."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: AugmentConfig) -> None:
        super().__init__()
        self.photometric = cfg.photometric
        self.register_buffer("mean", torch.tensor(list(cfg.mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(cfg.std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, photometric: Tensor | None = None) -> Tensor:
        """images uint8 (B, 3, H, W), photometric float32 (B, NUM_PHOTOMETRIC) or None -> float32."""
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        if photometric is None:
            return (pixels - self.mean) / self.std
        if self.photometric:
            pixels = distort(pixels, photometric)
        rows = torch.arange(pixels.shape[2], device=pixels.device).view(1, 1, -1, 1)
        columns = torch.arange(pixels.shape[3], device=pixels.device).view(1, 1, 1, -1)
        limits = photometric.view(-1, NUM_PHOTOMETRIC, 1, 1)
        valid = (rows < limits[:, VALID_HEIGHT, None]) & (columns < limits[:, VALID_WIDTH, None])
        return torch.where(valid, (pixels - self.mean) / self.std, 0.0)


def distort(pixels: Tensor, photometric: Tensor) -> Tensor:
    """Photometric distortion of RGB 0-255 as float (B, 3, H, W); every step ends on whole grey levels."""
    values = photometric.view(-1, NUM_PHOTOMETRIC, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
    pixels = (pixels + values[BRIGHTNESS]).clamp(0, 255).floor()
    pixels = (pixels * values[CONTRAST_BEFORE]).clamp(0, 255).floor()
    coloured = (values[SATURATION] != 1) | (values[HUE] != 0)
    pixels = torch.where(coloured, _shift_hsv(pixels, values[SATURATION], values[HUE]), pixels)
    return (pixels * values[CONTRAST_AFTER]).clamp(0, 255).floor()


def _shift_hsv(pixels: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale S and shift H in OpenCV's 8-bit HSV: H whole 0-179 (2 degrees each), S and V whole 0-255."""
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    spread = value - pixels.amin(1)
    safe = spread.clamp(min=1)
    angle = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    shifted = ((angle * 30 + 0.5).floor() + hue[:, 0]) % 180
    strength = (spread * 255 / value.clamp(min=1) + 0.5).floor()
    strength = (strength * saturation[:, 0]).clamp(0, 255).floor()
    # Sectors 5, 3 and 1 for R, G and B, made on the device: a copy to it would wait for what runs there.
    sector = torch.arange(5, 0, -2, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
    position = (sector + shifted[:, None] / 30) % 6
    weight = torch.minimum(position, 4 - position).clamp(0, 1)
    return (value[:, None] * (1 - strength[:, None] / 255 * weight) + 0.5).floor()
