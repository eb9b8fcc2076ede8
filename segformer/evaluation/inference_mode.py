"""Inference modes of published scores: resized images, sliding windows, test-time augmentation.

What evaluation and prediction send through a network goes through here:

    image -> reduced as sharding does (long_side alone; null: as the images of the model's training)
          -> resized (short_side, long_side, scales, size_divisor) -> perhaps flipped
          -> logits, of the whole or of windows, enlarged to the resized image
          -> resized to the original image -> softmax -> flipped back -> mean over all of these -> argmax

These are the steps of mmsegmentation, in its order, with both resizes of the logits; all resizing is
bilinear, align_corners=False, without antialiasing. Of one view (no flip, one scale) the logits leave at the
size of the resized image, and the evaluation resizes them to the label's; of several, the mean of the
probabilities leaves at the original size. One difference: mmsegmentation resizes before it normalizes, and
so rounds the resized image to whole gray levels. Its versions differ in `scales`: with short_side they are
those of 0.x (short_side and long_side times the factor), without it those of 1.x (own size times the factor).

Memory: K floats for each pixel of the largest resized image of a batch; of several views, also for each pixel
of the originals, and twice that for the image that is being added.

A side of less than 32 pixels is padded for the network with the last row or column, and the logits of the
padding are cut off again. Refuses settings that contradict each other, and images that lose all their pixels.

Shapes: B batch, K classes, H W original image, h w resized image.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.data.shards.packing import reduced_size
from segformer.data.shards.tiling import Size, Tiling, windows
from segformer.errors import ConfigError, at_least
from segformer.models.variants import LEAST_SIDE


@dataclass(kw_only=True, slots=True)
class InferenceModeConfig:
    """How segmentation images go through the network; the defaults: whole, at their own size."""

    short_side: int = 0
    "The image is resized so that its short side has so many pixels; 0 = own size."
    long_side: int | None = None
    """Larger images are reduced to so many pixels of their long side, as by shard.py; with short_side: most
    that it may make of the long side. 0 = no limit; null = as in training, or no limit with short_side."""
    size_divisor: int = 0
    "Each side is then stretched up to a multiple of this (NVlabs: AlignedResize, 32); 0 = as it is."
    window: list[int] = field(default_factory=list)
    "[height, width] of windows that slide over the resized image; empty = whole."
    stride: list[int] = field(default_factory=list)
    "[down, right] from window to window; empty = three quarters of the window."
    flip: bool = False
    "Average over the image and its mirror image."
    scales: list[float] = field(default_factory=list)
    "Average over these factors of the size, 1 only where it is among them; empty = [1]."
    protocol: str = ""
    """Sets the keys above to those of published scores: ade20k, ade20k_ms, ade20k_mmseg, ade20k_mmseg_ms,
    cityscapes, cityscapes_ms or cityscapes_mmseg_ms; keys that are given stay."""

    def __post_init__(self) -> None:
        if self.protocol:
            self._take(self.protocol)
        at_least(self, "", short_side=0, long_side=0, size_divisor=0)
        if 0 < self.short_side < LEAST_SIDE:
            raise ConfigError(f"short_side={self.short_side} is too small; use 0 or {LEAST_SIDE} or more")
        if self.long_side and self.long_side < max(self.short_side, LEAST_SIDE):
            raise ConfigError(
                f"long_side={self.long_side} is too small; use 0, or {LEAST_SIDE} and short_side="
                f"{self.short_side} or more"
            )
        wrong = [factor for factor in self.scales if not 0 < factor < math.inf]
        if wrong:
            raise ConfigError(f"scales={self.scales}: {wrong[0]} is no factor; use numbers above 0")
        if self.window and (len(self.window) != 2 or min(self.window) < LEAST_SIDE):
            raise ConfigError(
                f"window={self.window} must be [height, width] of {LEAST_SIDE} or more, or empty"
            )
        fits = len(self.stride) == len(self.window) == 2 and all(
            1 <= step <= side for step, side in zip(self.stride, self.window, strict=True)
        )
        if self.stride and not fits:
            raise ConfigError(
                f"stride={self.stride} must be [down, right], each from 1 to the side of "
                f"window={self.window}: a larger one leaves pixels out"
            )

    def _take(self, name: str) -> None:
        known = {key.lower(): mode for key, mode in PROTOCOLS.items()}
        if name.lower() not in known:
            raise ConfigError(f"protocol={name} is not known; use one of {', '.join(known)}")
        for key in fields(InferenceModeConfig):
            if not getattr(self, key.name):
                setattr(self, key.name, getattr(known[name.lower()], key.name))
        self.protocol = ""  # from here on these are keys like any

    @property
    def reduced_to(self) -> int:
        """Long side that larger images are reduced to before everything else; 0 = none."""
        return 0 if self.short_side else self.long_side or 0

    @property
    def steps(self) -> Size:
        """The stride in effect, of a window."""
        down, right = self.stride or [side * 3 // 4 for side in self.window]
        return down, right


_ADE20K = InferenceModeConfig(short_side=512, long_side=2048)
_SLIDE = InferenceModeConfig(window=[1024, 1024], stride=[768, 768])
_SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
PROTOCOLS = {
    "ADE20K": replace(_ADE20K, size_divisor=32),
    "ADE20K_ms": replace(_ADE20K, size_divisor=32, flip=True, scales=[0.75, 0.875, 1.0, 1.125, 1.25]),
    "ADE20K_mmseg": _ADE20K,
    "ADE20K_mmseg_ms": replace(_ADE20K, flip=True, scales=_SCALES),
    "Cityscapes": _SLIDE,
    "Cityscapes_ms": replace(_SLIDE, flip=True, scales=[*_SCALES, 2.0]),
    "Cityscapes_mmseg_ms": replace(_SLIDE, flip=True, scales=_SCALES),
}
"Modes of published scores (docs/recipes.md): the authors' repository and, where it differs, mmsegmentation."


_Mode = TypeVar("_Mode", bound=InferenceModeConfig)


def trained_at(cfg: _Mode, long_side: int) -> _Mode:
    """The settings of a model that was trained on images of at most `long_side` (0 = of any size)."""
    given = cfg.short_side or cfg.long_side is not None
    return cfg if given or not long_side else replace(cfg, long_side=long_side)


def settings(cfg: InferenceModeConfig) -> list[str]:
    """Settings that are not at their default, as key=value ready to be given again; empty: whole images at
    their own size.
    """
    given = {key.name: getattr(cfg, key.name) for key in fields(InferenceModeConfig)}
    return [f"{name}={value}" for name, value in given.items() if value]


def protocol(cfg: InferenceModeConfig) -> str:
    """The settings as they are said beside a score: "windows 1024 stride 768, flip"; see PROTOCOLS."""
    parts = [] if cfg.short_side or cfg.window else ["whole images"]
    if cfg.short_side:
        parts.append(f"short side {cfg.short_side}")
    if cfg.long_side:
        parts.append(f"long side <= {cfg.long_side}")
    if cfg.size_divisor:
        parts.append(f"sides multiples of {cfg.size_divisor}")
    if cfg.window:
        parts.append(f"windows {_square(cfg.window)} stride {_square(cfg.steps)}")
    if cfg.flip:
        parts.append("flip")
    if cfg.scales:
        parts.append("scales " + "/".join(f"{factor:g}" for factor in cfg.scales))
    published = [name for name, mode in PROTOCOLS.items() if _effect(mode) == _effect(cfg)]
    return ", ".join(parts) + (f" ({published[0]} protocol)" if published else "")


def of_tiles(cfg: InferenceModeConfig, tiling: Tiling) -> InferenceModeConfig:
    """The settings of a split that was cut into tiles: these are its windows. ConfigError for others."""
    tiles = InferenceModeConfig(window=list(tiling.tile), stride=list(tiling.stride))
    if (given := settings(cfg)) and _effect(cfg) != _effect(tiles):
        raise ConfigError(
            f"{', '.join(given)}: the split was cut into tiles, which are its {protocol(tiles)}; leave this "
            "out, or score shards of whole images"
        )
    return tiles


def _effect(cfg: InferenceModeConfig) -> list[object]:
    """The values of all settings, defaults written out."""
    values = {key.name: getattr(cfg, key.name) or 0 for key in fields(InferenceModeConfig)}
    return list((values | {"stride": list(cfg.steps) if cfg.window else 0}).values())


def _square(sides: Sequence[int]) -> str:
    """One number for two that are equal."""
    return "x".join(map(str, dict.fromkeys(sides)))


def resized(cfg: InferenceModeConfig, size: Size, factor: float = 1.0) -> tuple[Size, Size]:
    """Sizes (height, width) of an image of `size` at one scale: resized, then stretched to the divisor."""
    ratio = factor
    if cfg.short_side:
        ratio = int(cfg.short_side * factor) / min(size)
        if cfg.long_side:
            ratio = min(ratio, int(cfg.long_side * factor) / max(size))
    height, width = (int(side * ratio + 0.5) for side in size)
    divisor = cfg.size_divisor or 1
    return (height, width), (math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor)


def check_images(cfg: InferenceModeConfig, sizes: Iterable[Size]) -> None:
    """ConfigError where nothing would be left of an image of one of `sizes`."""
    for size in sorted(set(sizes)):
        for factor in cfg.scales or [1.0]:
            (height, width), _ = resized(cfg, reduced_size(size, cfg.reduced_to), factor)
            if min(height, width) < 1:
                raise ConfigError(
                    f"{', '.join(settings(cfg))}: an image of {size[0]} x {size[1]} (height x width) becomes "
                    f"{height} x {width}; use a larger short_side or larger scales"
                )


def _reduce(images: Tensor, size: Size) -> Tensor:
    """Means over the areas that the pixels of a smaller `size` have in images, as OpenCV's INTER_AREA."""
    if tuple(images.shape[2:]) == size:
        return images
    with torch.autocast(images.device.type, enabled=False):
        rows, columns = (_shares(images.shape[2 + axis], size[axis]).to(images) for axis in (0, 1))
        return rows @ images @ columns.T


def _shares(old: int, new: int) -> Tensor:
    """Share of each of `old` pixels of a line in each of `new` ones, (new, old) float64."""
    edges, pixels = torch.linspace(0, old, new + 1, dtype=torch.float64)[:, None], torch.arange(old)
    overlap = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return overlap.clamp(min=0) * new / old


def _resize(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


class InferenceMode(nn.Module):
    """A network with padding, resizing, windows and test-time augmentation around it; used in its place."""

    def __init__(self, model: nn.Module, cfg: InferenceModeConfig) -> None:
        """For a network (B, C, h, w) -> logits (B, K, h/4, w/4); it is in the mode of the network."""
        super().__init__()
        self.model, self.cfg = model, cfg
        self._whole = not settings(replace(cfg, long_side=0))
        self._views = max(1, len(cfg.scales)) * (1 + cfg.flip)
        self.training = model.training

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalized -> logits (B, K, h, w); of several views, shares (B, K, H, W).

        Whole images, of their own size or reduced, leave as the network's own result. Without gradients.
        """
        size = (images.shape[2], images.shape[3])
        images = _reduce(images, reduced_size(size, self.cfg.reduced_to))
        if self._whole and min(images.shape[2:]) >= LEAST_SIDE:
            return self.model(images)
        scales, views = self.cfg.scales or [1.0], self._views
        if views == 1:
            return self._logits(self._resized(images, scales[0]))
        mean: Tensor | None = None
        for factor in scales:
            image = self._resized(images, factor)
            for flipped in (False, True)[: 1 + self.cfg.flip]:
                logits = self._logits(image.flip(3) if flipped else image)
                if mean is None:
                    mean = logits.new_zeros(*logits.shape[:2], *size)
                for total, one in zip(mean, logits, strict=True):  # one enlarged image at a time
                    share = _resize(one[None], size)[0].softmax(0).div_(views)
                    total += share.flip(2) if flipped else share
        assert mean is not None
        return mean

    def probabilities(self, out: Tensor, size: Size) -> Tensor:
        """What `forward` gave of images of `size` as probabilities (B, K, *size) float32."""
        return out if self._views > 1 else _resize(out.float(), size).softmax(1)

    def _resized(self, images: Tensor, factor: float) -> Tensor:
        first, last = resized(self.cfg, (images.shape[2], images.shape[3]), factor)
        return _resize(_resize(images, first), last)

    def _logits(self, images: Tensor) -> Tensor:
        """Images (B, C, h, w) -> logits (B, K, h, w), float32 at least."""
        size = (images.shape[2], images.shape[3])
        if not self.cfg.window:
            return self._enlarged(images)
        height, width = self.cfg.window
        total: Tensor | None = None
        count = torch.zeros(size, device=images.device)
        for rows, columns in windows(size, (height, width), self.cfg.steps):
            logits = self._enlarged(images[:, :, rows, columns])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[:, :, rows, columns] += logits
            count[rows, columns] += 1
        assert total is not None
        return total.div_(count)

    def _enlarged(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        missing = (0, max(0, LEAST_SIDE - width), 0, max(0, LEAST_SIDE - height))
        if any(missing):
            images = F.pad(images, missing, mode="replicate")
        logits = self.model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _resize(logits, (images.shape[2], images.shape[3]))[:, :, :height, :width]
