"""Images and masks that are too large for one sample, rows by rows: what sharding cuts into tiles.

    TIFF     the strips or tiles that the rows lie in are decoded (tiff.py)
    PNG      inflated from top to bottom (png.py), but for interlaced ones
    others   decoded whole, once; so are masks of run lengths or segments. Other shapes are drawn on the rows

What rows give is kept until others are asked for, and is not to be written to. Refused is what is refused of
other samples, but an image may have MAX_TILED_PIXELS, and a file that is decoded whole MAX_TILED_BYTES."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from segformer.data.sources.dataset import FORMATS, DatasetConfig
from segformer.data.sources.decode import PNG_MAGIC, FileBytes, larger, read_file
from segformer.data.sources.masks import mask_ids
from segformer.data.sources.picture import image_orientation, size_of, unless_whole, whole_image
from segformer.data.sources.png import PngRows
from segformer.data.sources.sample import LoadedSample, Sample, check_size, sample_ids
from segformer.data.sources.shapes import GRID
from segformer.data.sources.tiff import is_tiff, tiff_header, tiff_rows
from segformer.errors import DataError, reraise_as

Rows = Callable[[int, int], np.ndarray]
"(top, bottom) -> these rows, (bottom - top, width, ...)."

_HEADER = 2**18  # bytes that hold most headers


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header."""
    what = f"{str(path)!r} is not a whole {FORMATS}"
    with larger(), reraise_as(DataError, what, "replace, shrink or remove it", on=ValueError):
        if is_tiff(data := FileBytes(path)):
            return (header := tiff_header(data)).height, header.width
        try:
            return size_of(data[:_HEADER])
        except ValueError:
            return size_of(read_file(path))


def _by_rows(path: Path, finish: Callable[..., np.ndarray], *, mask: bool = False) -> Rows | None:
    """The rows of a TIFF or PNG, `finish`ed from pixels or a PNG of them; None for other files."""
    data = FileBytes(path)
    read: Callable[[int, int], np.ndarray | bytes]
    with unless_whole(path):
        if is_tiff(data):
            read = tiff_rows(data, indexed=mask)
        elif data[:8] == PNG_MAGIC and data[28:29] == b"\0":
            read = PngRows(data)
        else:
            return None

    @lru_cache(maxsize=1)
    def rows(top: int, bottom: int) -> np.ndarray:
        with larger():
            with unless_whole(path):
                found = read(top, bottom)
            return finish(found, top=top)

    return rows


def image_rows(cfg: DatasetConfig, path: Path) -> Rows:
    """The rows of an image, (rows, W, C) as its tiles are stored."""
    finish = partial(whole_image, path, image_range=cfg.image_range, pixels=cfg.pixels)
    with larger():
        if (rows := _by_rows(path, finish)) is not None:
            return rows
        image = finish(read_file(path))
    return lambda top, bottom: image[top:bottom]


def label_rows(cfg: DatasetConfig, sample: Sample, size: tuple[int, int]) -> Rows:
    """The raw ids of the rows of a sample whose image has this size, uint16 (rows, W)."""
    height, width = size
    loaded = LoadedSample(height=height, width=width)
    if sample.size is not None:
        check_size(sample, loaded, sample.size)
    if sample.shapes is not None and all(shape.rle is None for shape in sample.shapes):
        shapes = [shape for shape in sample.shapes if shape.rings]
        reach = [np.concatenate([ring[:, 1] for ring in shape.rings]) for shape in shapes]
        drawn = [*zip(shapes, [(y.min() // GRID, y.max() // GRID) for y in reach], strict=True)]

        def draw(top: int, bottom: int) -> np.ndarray:
            up = np.array([0, top * GRID], np.int32)
            here = [shape for shape, (first, last) in drawn if first < bottom and last >= top]
            moved = tuple(replace(shape, rings=tuple(ring - up for ring in shape.rings)) for shape in here)
            return sample_ids(cfg, replace(sample, shapes=moved), (bottom - top, width))

        return lru_cache(maxsize=1)(draw)
    with larger():
        mask, rows = sample.mask, None
        if mask is not None and sample.segments is None:
            rows = _by_rows(mask, partial(mask_ids, cfg, mask), mask=True)
        if mask is None or rows is None:
            found = (ids := sample_ids(cfg, sample, size)).shape
        else:
            found = image_size(mask)
        if found != size:
            loaded.orientation = image_orientation(FileBytes(sample.image))
        check_size(sample, loaded, found)
    return rows or (lambda top, bottom: ids[top:bottom])
