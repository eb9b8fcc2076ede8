"""The training crop of segmentation: every option, the draw of its place, and the cut in one resampling.

    place   quarter turns -> scaled size -> rotation -> corner -> flips: all that is drawn, of the mask alone
    cut     turned, scaled, rotated, cut and flipped by one resampling of image and mask, then padded right
            and below, image 0 and mask 255

A scaled image that is not much larger than the crop is resized whole and cut, which is faster; of others,
and of rotated ones, only the crop is computed, by one warp. The two agree within one grey level.

    image   bilinear with half-pixel centers and repeated edges, what cv2.resize gives before the crop
    mask    nearest, source index floor(i * source / scaled), what cv2.resize INTER_NEAREST gives
    rotated about the center of the scaled image, on its canvas: the edge of the image is repeated where
            nothing of it falls, and the mask is 255 there; the mask is nearest with half-pixel centers

A rotation that is off draws no random number. Shapes: H W image, h w crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from segformer.data.loading.photometric import MOST_SIDE, check_lists
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.data.sources.picture import by_four
from segformer.errors import ConfigError, within

CROP_TRIES = 10
# cv2.resize takes 0.7 ns a pixel of the whole scaled image, cv2.warpAffine 3.2 ns a pixel of the crop alone.
MOST_CROP, MOST_SCALE = 8192, 1000  # above them stands a slip of the hand: no device takes such a crop

_WHOLE_UP_TO = 4
_SHARE_GRID = 64  # the class share of a crop is judged on about 64 x 64 of its pixels
_TURN = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of segmentation, between decoding and the model; the defaults are the official recipe."""

    crop: list[int] = field(default_factory=lambda: [512, 512])
    """Height and width of the training crop, pixels."""
    resize: list[int] = field(default_factory=lambda: [2048, 512])
    """Bounds of the long and short side at scale 1, pixels, ratio kept; [] = the image's own size."""
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the random scale."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again (10 tries) while one class has this share of its labeled pixels; 1 = never."""
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
        check_lists(self, "augment.", "scale", "blur_sigma")
        if len(self.crop) != 2 or not all(0 < side <= MOST_CROP for side in self.crop):
            raise ConfigError(f"augment.crop={list(self.crop)}; use [height, width] above 0, to {MOST_CROP}")
        for name in ("scale", "blur_sigma"):
            if (highest := getattr(self, name)[1]) > MOST_SCALE:
                raise ConfigError(f"augment.{name} goes to {highest}; use up to {MOST_SCALE}")
        if len(self.resize) not in (0, 2) or not all(0 < side <= MOST_SIDE for side in self.resize):
            raise ConfigError(
                f"augment.resize={list(self.resize)}; use [long side, short side] of 1 to {MOST_SIDE}, or []"
            )
        shares = ("cat_max_ratio", "class_balanced_crop", "hflip", "vflip", "rot90", "rotate_prob", "mosaic")
        within(self, "augment.", **dict.fromkeys((*shares, "copy_paste", "blur"), (0, 1)))
        within(self, "augment.", rotate=(0, 180), photometric_strength=(0, 2))


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of an image that becomes the crop: turned, scaled, rotated, cut and flipped, in this order."""

    turns: int
    """Quarter turns against the clock, as np.rot90 counts them."""
    size: tuple[int, int]
    """Height and width of the turned image after scaling."""
    angle: float
    """Rotation about the center of the scaled image, degrees against the clock; the canvas stays."""
    top: int
    left: int
    valid: tuple[int, int]
    """Height and width that are cut out, at most those of the crop."""
    flip_y: bool = False
    flip_x: bool = False


class RandomCrop:
    """Random crops of one configuration: full image and mask in, crop out.

    class_pixels: pixels of each class in the split (K,), for class_balanced_crop; None = all count alike.
    """

    def __init__(self, cfg: AugmentConfig, class_pixels: np.ndarray | None = None) -> None:
        self.cfg = cfg
        self.size = (int(cfg.crop[0]), int(cfg.crop[1]))
        self.weights = np.ones(IGNORE_INDEX) if class_pixels is None else rarity(class_pixels)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """image (H, W, C), mask uint8 (H, W) -> the same of the crop, and its valid (height, width)."""
        placement = self.place(mask, rng, self.size)
        image, mask = cut(image, mask, placement)
        below, right = self.size[0] - placement.valid[0], self.size[1] - placement.valid[1]
        if below or right:
            border = (0, below, 0, right, cv2.BORDER_CONSTANT)
            image = by_four(lambda part: cv2.copyMakeBorder(part, *border, value=(0, 0, 0)), image)
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
        mask = _turned(mask, turns)
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
        placement = self._corner(mask, placement, held, rng)
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

    def _corner(
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


def scaled_size(shape: Sequence[int], resize: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) inside both bounds times `scale`, ratio kept; rounded as mmcv's rescale_size does."""
    height, width = shape[0], shape[1]
    factor = scale
    if resize:
        bounds = int(resize[0] * scale), int(resize[1] * scale)
        factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def cut(image: np.ndarray, mask: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The placed part of image (H, W, C) and mask uint8 (H, W): new arrays of placement.valid."""
    patch, mask = by_four(lambda part: _cut_image(part, placement), image), _turned(mask, placement.turns)
    if _is_warped(placement):
        labels = cut_mask(mask, placement)
    else:
        columns, rows = placement.size[1], placement.size[0]
        labels = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_NEAREST)[_window(placement)]
    return patch, _flipped(labels, placement)


def _is_warped(placement: Placement) -> bool:
    """Only the crop is computed, not the whole scaled image."""
    (height, width), (rows, columns) = placement.valid, placement.size
    return bool(placement.angle) or rows * columns > _WHOLE_UP_TO * height * width


def _cut_image(image: np.ndarray, placement: Placement) -> np.ndarray:
    """The placed part of an image of up to four channels."""
    image = _turned(image, placement.turns)
    (height, width), (rows, columns) = placement.valid, placement.size
    if _is_warped(placement):
        patch = cv2.warpAffine(
            image,
            _source_matrix(image.shape, placement),
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    else:
        patch = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)[_window(placement)]
    return _flipped(patch, placement)


def _window(placement: Placement) -> tuple[slice, slice]:
    """Rows and columns of the crop in the scaled image."""
    (height, width), top, left = placement.valid, placement.top, placement.left
    return slice(top, top + height), slice(left, left + width)


def _flipped(pixels: np.ndarray, placement: Placement) -> np.ndarray:
    if not (placement.flip_x or placement.flip_y):
        return pixels
    code = int(placement.flip_x) - int(placement.flip_x and placement.flip_y) * 2
    return np.asarray(cv2.flip(pixels, code))


def cut_mask(mask: np.ndarray, placement: Placement, steps: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Every steps-th row and column of the crop of an already turned mask, before the flips."""
    (height, width), (top, left) = placement.valid, (placement.top, placement.left)
    if not placement.angle:
        rows = nearest_indices(mask.shape[0], placement.size[0], top, top + height, steps[0])
        columns = nearest_indices(mask.shape[1], placement.size[1], left, left + width, steps[1])
        # Copying whole rows twice is 14 times as fast as mask[rows[:, None], columns].
        by_column = cv2.transpose(mask.take(rows, 0)).take(columns, 0)
        return np.asarray(cv2.transpose(by_column))
    matrix = _source_matrix(mask.shape, placement) * [steps[1], steps[0], 1]
    shape = (-(-width // steps[1]), -(-height // steps[0]))
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(mask, matrix, shape, flags=flags, borderValue=IGNORE_INDEX))


def nearest_indices(
    source: int, scaled: int, start: int = 0, stop: int | None = None, step: int = 1
) -> np.ndarray:
    """Source index of the pixels start, start + step, ... of a row resized by cv2.INTER_NEAREST, int64."""
    pixels = np.arange(start, scaled if stop is None else stop, step)
    indices: np.ndarray = np.floor(pixels * (1.0 / (scaled / source))).astype(np.int64)
    return indices.clip(max=source - 1)


def _turned(pixels: np.ndarray, turns: int) -> np.ndarray:
    """np.rot90 as a new array; the array itself for no turns."""
    return np.asarray(cv2.rotate(pixels, _TURN[turns - 1])) if turns else pixels


def _source_matrix(shape: Sequence[int], placement: Placement) -> np.ndarray:
    """The map of pixel centers (x, y), unflipped crop -> turned image of this shape; float64 (2, 3)."""
    rows, columns = placement.size
    scale_y, scale_x = shape[0] / rows, shape[1] / columns
    center_x, center_y = (columns - 1) / 2, (rows - 1) / 2
    cos, sin = np.cos(np.deg2rad(placement.angle)), np.sin(np.deg2rad(placement.angle))
    x, y = placement.left - center_x, placement.top - center_y
    return np.array(
        [
            [scale_x * cos, -scale_x * sin, scale_x * (cos * x - sin * y + center_x + 0.5) - 0.5],
            [scale_y * sin, scale_y * cos, scale_y * (sin * x + cos * y + center_y + 0.5) - 0.5],
        ]
    )
