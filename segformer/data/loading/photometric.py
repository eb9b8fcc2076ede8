"""Colors of a training crop: blur, photometric distortion, normalization.

In the worker: blur, and drawing the distortion of each sample. On the device, batched (Normalize):
photometric distortion -> normalize -> padded pixels to exactly 0, the mean color; the valid height and width
tell which pixels are padding, no color or label stands for it.

Distortion: brightness +-32, contrast 0.5-1.5 before or after, saturation 0.5-1.5, hue +-18 of 180, each with
probability 0.5, in the 8-bit HSV of OpenCV with its rounding (the order and the casts of
PhotoMetricDistortion in mmsegmentation). Channels that are not 3 x uint8 have brightness and contrast only,
after normalization.

Shapes: B batch, H W image.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segformer.data.sources.picture import by_four
from segformer.errors import ConfigError

_T = TypeVar("_T")


class Distortion(NamedTuple, Generic[_T]):
    """Parameters of the distortion: floats of one sample, or the columns (B,) of a batch of them (B, 5)."""

    brightness: _T
    contrast_before: _T
    saturation: _T
    hue: _T
    contrast_after: _T


GREY_STD = 57.0  # of ImageNet's colors: what brightness is measured by where channels are no colors
MOST_SIDE = 2**15 - 1  # pixels; OpenCV resamples no larger picture


def check_lists(config: object, prefix: str, *ranges: str) -> None:
    """Refuse `mean` and `std` of different lengths, and ranges other than [smallest, largest] above 0."""
    channels = max(1, len(config.mean))  # type: ignore[attr-defined]
    for name, length in {**dict.fromkeys(ranges, 2), "mean": channels, "std": channels}.items():
        values = list(getattr(config, name))
        if len(values) != length or (name != "mean" and min(values) <= 0):
            raise ConfigError(f"{prefix}{name}={values}; use {length} values above 0")
        if name in ranges and values[0] > values[1]:
            raise ConfigError(f"{prefix}{name}={values}; use [smallest, largest]")


def draw_distortion(strength: float, rng: np.random.Generator) -> Distortion[float]:
    """One sample's parameters; strength: factor on the four ranges."""
    bright, contrasted, saturated, shifted = rng.random(4) < 0.5
    after = rng.random() < 0.5
    low, high, light, turn = 1 - 0.5 * strength, 1 + 0.5 * strength, 32 * strength, round(18 * strength)
    brightness, contrast = rng.uniform(-light, light), rng.uniform(low, high)
    saturation, hue = rng.uniform(low, high), float(rng.integers(-turn, max(turn, 1)))
    return Distortion(
        brightness=brightness if bright else 0.0,
        contrast_before=contrast if contrasted and not after else 1.0,
        saturation=saturation if saturated else 1.0,
        hue=hue if shifted else 0.0,
        contrast_after=contrast if contrasted and after else 1.0,
    )


def blur(image: np.ndarray, valid: Sequence[int], sigma: float) -> None:
    """Gaussian blur of the valid part of a crop, in place; edges are mirrored."""
    part = image[: valid[0], : valid[1]]
    part[:] = by_four(lambda channels: cv2.GaussianBlur(channels, (0, 0), sigma), part)


class Normalize(nn.Module):
    """Batch of pixels -> distorted, normalized float32 batch, on its device. Nothing to train or save.

    mean, std: of each of the C channels, in the units of the pixels (red, green, blue: 0-255).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, photometric: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """images uint8, uint16 or float32 (B, C, H, W) -> float32.

        photometric: float32 (B, 5), the fields of Distortion. valid: int64 (B, 2), height and width that are
        not padding. None = no distortion, no padding.
        """
        pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
        colors = images.dtype == torch.uint8 and images.shape[1] == 3
        if photometric is not None and colors:
            pixels = distort(pixels, photometric)
        pixels = (pixels - self.mean) / self.std
        if photometric is not None and not colors:
            pixels = distort_normalized(pixels, photometric)
        if valid is None:
            return pixels
        rows = torch.arange(pixels.shape[2], device=pixels.device).view(1, 1, -1, 1)
        columns = torch.arange(pixels.shape[3], device=pixels.device).view(1, 1, 1, -1)
        height, width = valid.view(-1, 2, 1, 1, 1).unbind(1)  # each (B, 1, 1, 1)
        return torch.where((rows < height) & (columns < width), pixels, 0.0)


def distort(pixels: Tensor, photometric: Tensor) -> Tensor:
    """Photometric distortion of RGB 0-255 as float (B, 3, H, W); every step ends on whole grey levels."""
    by = Distortion(*photometric.view(-1, len(Distortion._fields), 1, 1, 1).unbind(1))  # each (B, 1, 1, 1)
    pixels = (pixels + by.brightness).clamp(0, 255).floor()
    pixels = (pixels * by.contrast_before).clamp(0, 255).floor()
    colored = (by.saturation != 1) | (by.hue != 0)
    pixels = torch.where(colored, _shift_hsv(pixels, by.saturation, by.hue), pixels)
    return (pixels * by.contrast_after).clamp(0, 255).floor()


def distort_normalized(pixels: Tensor, photometric: Tensor) -> Tensor:
    """Brightness and contrast about the mean, of normalized channels (B, C, H, W) that are no colors of 8
    bits: one value for all channels, in units of their standard deviation. Saturation and hue mean nothing.
    """
    by = Distortion(*photometric.view(-1, len(Distortion._fields), 1, 1, 1).unbind(1))  # each (B, 1, 1, 1)
    return (pixels + by.brightness / GREY_STD) * by.contrast_before * by.contrast_after


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
