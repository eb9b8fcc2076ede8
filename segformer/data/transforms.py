"""Augmentation of the official recipe, split where it is cheapest.

In the worker, on uint8 (TrainGeometry): scale U(0.5, 2) of the size bound with the ratio kept -> random
crop with cat_max_ratio -> flips, composed to one resampling of just the crop:

    image   bilinear with half-pixel centres and repeated edges, what cv2.resize gives before the crop
    mask    nearest, source index floor(i * source / scaled), what cv2.resize INTER_NEAREST gives
    padding right and below, image 0 and mask 255

On the device, batched (Normalize): photometric distortion -> normalise -> padded pixels to exactly 0, the
mean colour. Which pixels are padding travels in the two last photometric parameters, the valid height and
width; no colour or label stands for it.

Photometric: brightness +-32, contrast 0.5-1.5 before or after, saturation 0.5-1.5, hue +-18 of 180, each
with probability 0.5, in the 8-bit HSV of OpenCV with its rounding (the order and the casts of
PhotoMetricDistortion in mmsegmentation). Random numbers come from Philox(seed, epoch, sample id): ranks and
workers cannot change them.

Shapes: B batch, H W image, h w crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segformer.data.dataset import IGNORE_INDEX
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
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    rot90: float = 0.0
    """Probability of a turn by 90, 180 or 270 degrees, for images without an upright direction."""
    photometric: bool = True
    """Photometric distortion on or off."""
    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    """Mean of red, green, blue that is subtracted, 0-255."""
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    """Standard deviation of red, green, blue to divide by, 0-255."""

    def __post_init__(self) -> None:
        for name, length in (("crop", 2), ("scale", 2), ("mean", 3), ("std", 3)):
            values = getattr(self, name)
            if len(values) != length:
                raise ConfigError(f"augment.{name}={list(values)} needs {length} values")
            if name != "mean" and min(values) <= 0:
                raise ConfigError(f"augment.{name}={list(values)}; every value must be above 0")
        if len(self.resize) not in (0, 2) or (self.resize and min(self.resize) < 1):
            raise ConfigError(f"augment.resize={list(self.resize)}; use [long side, short side] or []")
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"augment.scale={list(self.scale)}; use [smallest, largest]")
        for name in ("cat_max_ratio", "hflip", "vflip", "rot90"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name}={getattr(self, name)}; use 0 to 1")


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever computes it."""
    key, counter = np.array([seed, 1], np.uint64), np.array([0, sample_id, epoch, 1], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class TrainGeometry:
    """Scale, crop, flip and pad as one resampling: full image and mask in, crop out."""

    def __init__(self, cfg: AugmentConfig) -> None:
        self.cfg = cfg
        self.crop = (int(cfg.crop[0]), int(cfg.crop[1]))

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """image uint8 (H, W, 3), mask uint8 (H, W) -> the same of the crop, and its valid (height, width)."""
        cfg = self.cfg
        turns = int(rng.integers(1, 4)) if rng.random() < cfg.rot90 else 0
        mask = np.rot90(mask, turns)
        size = scaled_size(mask.shape, cfg.resize, rng.uniform(cfg.scale[0], cfg.scale[1]))
        valid = (min(self.crop[0], size[0]), min(self.crop[1], size[1]))
        top, left = self._corner(mask, size, valid, rng)
        rows = nearest_indices(mask.shape[0], size[0])[top : top + valid[0]]
        columns = nearest_indices(mask.shape[1], size[1])[left : left + valid[1]]
        flip_x, flip_y = rng.random() < cfg.hflip, rng.random() < cfg.vflip
        rows, columns = rows[:: -1 if flip_y else 1], columns[:: -1 if flip_x else 1]

        scale_y, scale_x = mask.shape[0] / size[0], mask.shape[1] / size[1]
        matrix = np.array(
            [[scale_x, 0, (left + 0.5) * scale_x - 0.5], [0, scale_y, (top + 0.5) * scale_y - 0.5]]
        )
        if flip_x:
            matrix[0] = [-scale_x, 0, matrix[0, 2] + scale_x * (valid[1] - 1)]
        if flip_y:
            matrix[1] = [0, -scale_y, matrix[1, 2] + scale_y * (valid[0] - 1)]
        patch = cv2.warpAffine(
            image,
            _unturned(matrix, turns, image.shape[:2]),
            (valid[1], valid[0]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return self._padded(patch, 0), self._padded(mask[rows[:, None], columns], IGNORE_INDEX), valid

    def _corner(
        self, mask: np.ndarray, size: Sequence[int], valid: Sequence[int], rng: np.random.Generator
    ) -> tuple[int, int]:
        """Top left corner of the crop in the scaled image; the last drawn when no try meets cat_max_ratio."""
        rows, columns = nearest_indices(mask.shape[0], size[0]), nearest_indices(mask.shape[1], size[1])
        step_y, step_x = max(1, valid[0] // _SHARE_GRID), max(1, valid[1] // _SHARE_GRID)
        top = left = 0
        for _ in range(CROP_TRIES + 1):
            top = int(rng.integers(0, size[0] - valid[0] + 1))
            left = int(rng.integers(0, size[1] - valid[1] + 1))
            if self.cfg.cat_max_ratio >= 1:
                break
            grid = mask[rows[top : top + valid[0] : step_y, None], columns[left : left + valid[1] : step_x]]
            counts = np.bincount(grid.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
            if 0 < counts.max() < self.cfg.cat_max_ratio * counts.sum():
                break
        return top, left

    def _padded(self, patch: np.ndarray, value: int) -> np.ndarray:
        below, right = self.crop[0] - patch.shape[0], self.crop[1] - patch.shape[1]
        if not below and not right:
            return patch
        return np.pad(patch, [(0, below), (0, right)] + [(0, 0)] * (patch.ndim - 2), constant_values=value)


def scaled_size(shape: Sequence[int], resize: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) inside both bounds times `scale`, ratio kept; rounded as mmcv's rescale_size does."""
    height, width = shape[0], shape[1]
    if resize:
        bounds = int(resize[0] * scale), int(resize[1] * scale)
        factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    else:
        factor = scale
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest_indices(source: int, scaled: int) -> np.ndarray:
    """Source index of every pixel of a row resized by cv2.INTER_NEAREST, int64 (scaled,)."""
    indices: np.ndarray = np.floor(np.arange(scaled) * (1.0 / (scaled / source))).astype(np.int64)
    return indices.clip(max=source - 1)


def _unturned(matrix: np.ndarray, turns: int, shape: tuple[int, ...]) -> np.ndarray:
    """The map crop -> turned image, followed by turned image -> image, for np.rot90(image, turns)."""
    height, width = shape
    x, y = matrix
    if turns == 0:
        return matrix
    if turns == 1:  # turned[i, j] = image[j, width - 1 - i]
        return np.stack([[0, 0, width - 1] - y, x])
    if turns == 2:
        return np.stack([[0, 0, width - 1] - x, [0, 0, height - 1] - y])
    return np.stack([y, [0, 0, height - 1] - x])


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
    draws = (rng.uniform(-32, 32), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5), int(rng.integers(-18, 18)))
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
        pixels = images.float()
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
    sector = torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(1, 3, 1, 1)
    position = (sector + shifted[:, None] / 30) % 6
    weight = torch.minimum(position, 4 - position).clamp(0, 1)
    return (value[:, None] * (1 - strength[:, None] / 255 * weight) + 0.5).floor()
