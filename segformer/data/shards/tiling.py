"""Tiles of large images: the grid that they are cut by, and the whole images of a split that is scored.

The grid is that of the sliding windows of published scores: from the top left in steps of the stride, the
last row and column moved inwards to end at the border. So a tile is one window, and the tiles of a split that
is scored, which lie together in the grid's order, are scored as their whole images would be with these
windows (evaluation/stitching.py). An image that is not larger than a tile is one tile of its own size.

    key             <key of the image>_r<top>_c<left>
    dataset.json    in the entry of a split that is scored
                    "tiled": {"tile": [height, width], "stride": [down, right],
                              "images": [[key, height, width, sample id of its first tile], ...]}
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from segformer.data.sources.dataset import MAX_PIXELS, MAX_TILED_PIXELS
from segformer.errors import ConfigError, within

Size = tuple[int, int]
LEAST_TILE = 32  # pixels of a side; the least that the network takes


def windows(size: Size, window: Size, stride: Size) -> list[tuple[slice, slice]]:
    """Rows and columns of each window; the last ones are moved inwards to end at the border."""
    lines = []
    for side, length, step in zip(size, window, stride, strict=True):
        count = _count(side, length, step)
        ends = [min(index * step + length, side) for index in range(count)]
        lines.append([slice(max(end - length, 0), end) for end in ends])
    return [(rows, columns) for rows in lines[0] for columns in lines[1]]


def _count(side: int, length: int, step: int) -> int:
    return max(side - length + step - 1, 0) // step + 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images are cut into tiles, and which tiles of training images are kept."""

    tile: Size
    "Height and width, pixels."
    stride: Size
    "Pixels down and right from tile to tile."
    labeled: float = 0.0
    "Least share of the pixels of a training tile whose label is not ignored."

    def __post_init__(self) -> None:
        within(self, "tile_", labeled=(0, 1))

    @classmethod
    def of(cls, tile: list[int], overlap: int | None, labeled: float) -> "Tiling | None":
        """The tiling of settings; None without a tile. overlap: None = a quarter of each side."""
        if not tile:
            if overlap is not None or labeled:
                raise ConfigError("tile_overlap and tile_labeled are of tiles; give tile=[<height>,<width>]")
            return None
        if len(tile) != 2 or min(tile) < LEAST_TILE or tile[0] * tile[1] > MAX_PIXELS:
            raise ConfigError(
                f"tile={tile} must be [height,width], each {LEAST_TILE} or more and {MAX_PIXELS} pixels in "
                "all; use tile=[1024,1024]"
            )
        if overlap is not None and not 0 <= overlap < min(tile):
            raise ConfigError(f"tile_overlap={overlap}; use 0 to below {min(tile)}, the side of a tile")
        down, right = (side * 3 // 4 if overlap is None else side - overlap for side in tile)
        return cls((tile[0], tile[1]), (down, right), labeled)

    def described(self) -> dict[str, Any]:
        """What dataset.json says of it among the settings."""
        return {"tile": list(self.tile), "stride": list(self.stride), "tile_labeled": self.labeled}

    def entry(self, images: Iterable["Whole"]) -> dict[str, Any]:
        """`tiled` of a split."""
        return {"tile": list(self.tile), "stride": list(self.stride), "images": [list(one) for one in images]}

    def windows(self, size: Size) -> list[tuple[slice, slice]]:
        """Rows and columns of each tile of an image of (height, width) `size`."""
        return windows(size, self.tile, self.stride)


def tile_key(key: str, rows: slice, columns: slice) -> str:
    """The key of a tile of the image `key`."""
    return f"{key}_r{rows.start}_c{columns.start}"


class Whole(NamedTuple):
    """An image whose tiles are samples, from `first` on."""

    key: str
    height: int
    width: int
    first: int


@dataclass(frozen=True, slots=True)
class TiledSplit:
    """The whole images of a split that is scored, in the order of their tiles."""

    tiling: Tiling
    images: list[Whole]
    ends: np.ndarray = field(repr=False)
    "The sample id after the last tile of each image, int64."

    @classmethod
    def parse(cls, entry: Mapping[str, Any], heights: np.ndarray, widths: np.ndarray) -> "TiledSplit":
        """From `tiled` of dataset.json; ValueError and the like unless it fits the sizes of the samples."""
        (height, width), (down, right) = (map(int, entry[key]) for key in ("tile", "stride"))
        images = [Whole(str(key), *map(int, numbers)) for key, *numbers in entry["images"]]
        if not (0 < down <= height and 0 < right <= width):
            raise ValueError("stride")
        first = 0
        for image in images:
            if not 0 < image.height * image.width <= MAX_TILED_PIXELS or min(image.height, image.width) < 1:
                raise ValueError("size")
            count = _count(image.height, height, down) * _count(image.width, width, right)
            own = slice(first, first + count)
            fits = (heights[own] == min(height, image.height)) & (widths[own] == min(width, image.width))
            if image.first != first or len(fits) != count or not fits.all():
                raise ValueError("images")
            first += count
        if first != len(heights):
            raise ValueError("samples")
        ends = np.array([*(image.first for image in images[1:]), first], np.int64)
        return cls(Tiling((height, width), (down, right)), images, ends)

    def image_of(self, sample_id: int) -> int:
        """The number of the image that a tile is of."""
        return int(np.searchsorted(self.ends, sample_id, side="right"))

    def owners(self, ranks: int) -> np.ndarray:
        """The rank that each tile goes to, int64 (samples,): an image to one, all to about as many tiles."""
        counts = np.diff(self.ends, prepend=0)
        load, owner = np.zeros(ranks, np.int64), np.zeros(len(counts), np.int64)
        for image in np.argsort(-counts, kind="stable"):
            owner[image] = load.argmin()
            load[owner[image]] += counts[image]
        return np.repeat(owner, counts)
