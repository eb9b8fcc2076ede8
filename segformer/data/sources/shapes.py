"""Shapes of a label file -> pixels, by one rule for all formats.

Pixel (0, 0) covers [0, 1) x [0, 1), x to the right and y down; coordinates are rounded to 1/256 pixel. A
pixel belongs to a shape where its center is inside by even-odd over all rings of the shape: of the edges that
cross the center's row (y0 <= center < y1), an odd number does so at or left of the center. This is arithmetic
of whole numbers, so a center on an edge has one answer on every machine: left and upper edges belong to a
shape, right and lower ones to its neighbor, and two shapes with a common border neither overlap nor leave a
gap. Winding means nothing, a ring inside another is a hole, and what a ring encloses twice is outside. The
picture's border cuts off what lies beyond. Later shapes cover earlier ones.

    rings   int32 (n, 2) each: x, y in 1/256 pixel; the last point is joined to the first
    rle     uint32 run lengths down the columns, left to right; the first run is outside (COCO)
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.sources.masks import binary_mask

GRID = 256  # steps in one pixel
FARTHEST = 2**21  # pixels from the picture's corner: beyond, 64 bits would not hold the products below
MAX_CROSSINGS = 2**22  # of the edges of one shape with rows of pixels: 270 MB for a moment


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A region of one class: rings, run lengths or a mask."""

    raw_id: int
    rings: tuple[np.ndarray, ...] = ()
    rle: np.ndarray | None = None
    file: str = ""
    """A mask in the place of both; what is 0 in it is outside."""


def ring(points: Any) -> np.ndarray:
    """Numbers x, y, x, y, ... or pairs of them, in pixels -> int32 (n, 2) in 1/256 pixel (ties to even).

    Raises:
        ValueError: something else, a number that is not finite, or one that is far away.
    """
    try:
        scaled = np.rint(np.asarray(points, np.float64) * GRID)
        pairs = scaled.reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its points are no pairs of numbers") from error
    if not np.abs(pairs).max(initial=0) <= FARTHEST * GRID:  # of NaN, too
        raise ValueError(f"a point is not finite, or more than {FARTHEST} pixels away")
    return pairs.astype(np.int32)


def draw(shapes: Iterable[Shape], size: tuple[int, int], uncovered: int) -> np.ndarray:
    """Raw ids of a picture of `size` (H, W), uint16 (H, W); `uncovered` where no shape is.

    Raises:
        ValueError: run lengths that don't fit the size, or rings that are far too winding.
        DataError: a mask that can't be read, is of another size or has more than two values.
    """
    canvas = np.full(size, uncovered, np.uint16)
    flat = canvas.reshape(-1)
    for shape in shapes:
        if shape.rle is not None:
            canvas[_run_mask(shape.rle, size)] = shape.raw_id
        elif shape.file:
            canvas[binary_mask(Path(shape.file), size)] = shape.raw_id
        elif shape.rings:
            for start, stop in _spans(shape.rings, size):
                flat[start:stop] = shape.raw_id
    return canvas


def _run_mask(rle: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """True inside, bool (H, W)."""
    height, width = size
    if (total := int(rle.sum(dtype=np.uint64))) != height * width:
        raise ValueError(f"its runs are of {total} pixels, the picture of {height * width}")
    inside = np.arange(len(rle)) % 2 == 1
    mask: np.ndarray = np.repeat(inside, rle).reshape(width, height).T
    return mask


def _spans(rings: Sequence[np.ndarray], size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pixels inside, counted along the rows from the first pixel of the picture."""
    height, width = size
    here = np.concatenate(rings).astype(np.int64)
    there = np.concatenate([part for own in rings for part in (own[1:], own[:1])]).astype(np.int64)
    down = (here[:, 1] <= there[:, 1])[:, None]
    upper, lower = np.where(down, here, there), np.where(down, there, here)
    # The rows whose centers GRID * row + GRID / 2 lie in [y of upper, y of lower).
    first = (-((GRID // 2 - upper[:, 1]) // GRID)).clip(0, height)
    count = (-((GRID // 2 - lower[:, 1]) // GRID)).clip(0, height) - first
    if (total := int(count.sum())) > MAX_CROSSINGS:
        raise ValueError(f"its outline crosses {total} rows of pixels; the limit is {MAX_CROSSINGS}")
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(total) + (first - np.cumsum(count) + count)[edge]
    (x, y), (wide, high) = upper[edge].T, (lower - upper)[edge].T
    # The first column whose center is at the crossing or right of it: a quotient, rounded up.
    column = -(-((x - GRID // 2) * high + (GRID * row + GRID // 2 - y) * wide) // (GRID * high))
    # A row is crossed an even number of times, so that pairs never reach into the next one.
    ends = np.sort(row * width + column.clip(0, width)).reshape(-1, 2)
    yield from ends[ends[:, 0] < ends[:, 1]].tolist()


def packed(shapes: Iterable[Shape]) -> Iterator[bytes]:
    """All that `draw` depends on, as bytes to hash."""
    for shape in shapes:
        parts = shape.rings if shape.rle is None else (shape.rle,)
        yield struct.pack("<?HI", shape.rle is None, shape.raw_id, len(parts))
        for part in parts:
            yield struct.pack("<Q", part.nbytes)
            yield part.tobytes()
