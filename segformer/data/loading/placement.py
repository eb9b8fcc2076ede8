"""Where a crop comes from, and taking it in one resampling.

A scaled image that is not much larger than the crop is resized whole and cut, which is faster; of others,
and of rotated ones, only the crop is computed, by one warp. The two agree within one grey level.

    image   bilinear with half-pixel centres and repeated edges, what cv2.resize gives before the crop
    mask    nearest, source index floor(i * source / scaled), what cv2.resize INTER_NEAREST gives
    rotated about the centre of the scaled image, on its canvas: the edge of the image is repeated where
            nothing of it falls, and the mask is 255 there; the mask is nearest with half-pixel centres

Shapes: H W image, h w crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX

# cv2.resize takes 0.7 ns a pixel of the whole scaled image, cv2.warpAffine 3.2 ns a pixel of the crop alone.
_WHOLE_UP_TO = 4
_TURN = (cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which part of an image becomes the crop: turned, scaled, rotated, cut and flipped, in this order."""

    turns: int
    """Quarter turns against the clock, as np.rot90 counts them."""
    size: tuple[int, int]
    """Height and width of the turned image after scaling."""
    angle: float
    """Rotation about the centre of the scaled image, degrees against the clock; the canvas stays."""
    top: int
    left: int
    valid: tuple[int, int]
    """Height and width that are cut out, at most those of the crop."""
    flip_y: bool = False
    flip_x: bool = False


def scaled_size(shape: Sequence[int], resize: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) inside both bounds times `scale`, ratio kept; rounded as mmcv's rescale_size does."""
    height, width = shape[0], shape[1]
    if resize:
        bounds = int(resize[0] * scale), int(resize[1] * scale)
        factor = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    else:
        factor = scale
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest_indices(
    source: int, scaled: int, start: int = 0, stop: int | None = None, step: int = 1
) -> np.ndarray:
    """Source index of the pixels start, start + step, ... of a row resized by cv2.INTER_NEAREST, int64."""
    pixels = np.arange(start, scaled if stop is None else stop, step)
    indices: np.ndarray = np.floor(pixels * (1.0 / (scaled / source))).astype(np.int64)
    return indices.clip(max=source - 1)


def turned(pixels: np.ndarray, turns: int) -> np.ndarray:
    """np.rot90 as a new array; the array itself for no turns."""
    return np.asarray(cv2.rotate(pixels, _TURN[turns - 1])) if turns else pixels


def _source_matrix(shape: Sequence[int], placement: Placement) -> np.ndarray:
    """The map of pixel centres (x, y), unflipped crop -> turned image of this shape; float64 (2, 3)."""
    rows, columns = placement.size
    scale_y, scale_x = shape[0] / rows, shape[1] / columns
    centre_x, centre_y = (columns - 1) / 2, (rows - 1) / 2
    cos, sin = np.cos(np.deg2rad(placement.angle)), np.sin(np.deg2rad(placement.angle))
    x, y = placement.left - centre_x, placement.top - centre_y
    return np.array(
        [
            [scale_x * cos, -scale_x * sin, scale_x * (cos * x - sin * y + centre_x + 0.5) - 0.5],
            [scale_y * sin, scale_y * cos, scale_y * (sin * x + cos * y + centre_y + 0.5) - 0.5],
        ]
    )


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


def resample(image: np.ndarray, mask: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The placed part of image uint8 (H, W, 3) and mask uint8 (H, W): new arrays of placement.valid."""
    image, mask = turned(image, placement.turns), turned(mask, placement.turns)
    (height, width), (rows, columns) = placement.valid, placement.size
    if placement.angle or rows * columns > _WHOLE_UP_TO * height * width:
        patch = cv2.warpAffine(
            image,
            _source_matrix(mask.shape, placement),
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        labels = cut_mask(mask, placement)
    else:
        part = np.s_[placement.top : placement.top + height, placement.left : placement.left + width]
        patch = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)[part]
        labels = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_NEAREST)[part]
    if placement.flip_x or placement.flip_y:
        code = int(placement.flip_x) - int(placement.flip_x and placement.flip_y) * 2
        patch, labels = cv2.flip(patch, code), cv2.flip(labels, code)
    return patch, labels
