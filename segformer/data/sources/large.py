"""Images and masks that are too large for one sample, rows by rows: what sharding cuts into tiles.

Files are decoded whole, once: of 20,000 x 20,000 pixels an image takes 1.6 GB, its mask 1.2 GB. Shapes
are drawn on the rows alone, but for run lengths.

Refused is what is refused of other samples, with limits of its own (MAX_TILED_PIXELS, MAX_TILED_BYTES)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from segformer.data.sources.dataset import FORMATS, RGB, DatasetConfig
from segformer.data.sources.decode import PNG_MAGIC, check_parts, is_deep, larger, read_file
from segformer.data.sources.picture import image_orientation, size_of, unless_whole, whole_image
from segformer.data.sources.sample import LoadedSample, Sample, check_size, sample_ids
from segformer.data.sources.shapes import GRID
from segformer.errors import DataError, reraise_as

Rows = Callable[[int, int], np.ndarray]
"(top, bottom) -> these rows, (bottom - top, width, ...)."

_HEADER = 2**18  # bytes that hold most headers


def image_size(path: Path) -> tuple[int, int]:
    """Height and width, from the header."""
    what = f"{str(path)!r} is not a whole {FORMATS}"
    with larger(), reraise_as(DataError, what, "replace, shrink or remove it", on=ValueError):
        try:
            return size_of(read_file(path, _HEADER))
        except ValueError:
            return size_of(read_file(path))


def image_rows(cfg: DatasetConfig, path: Path) -> Rows:
    """The rows of an image, (rows, W, C) as its tiles are stored."""
    with larger():
        data = read_file(path)
        if cfg.pixels == RGB and data[:8] == PNG_MAGIC and not is_deep(data):
            with unless_whole(path):
                check_parts(data)
                del data
                return _png_rows(path)
        image = whole_image(path, data, cfg.image_range, cfg.pixels)
    return lambda top, bottom: image[top:bottom]


def _png_rows(path: Path) -> Rows:
    """The rows of a PNG of 8 bits. Pillow takes 4 bytes a pixel, OpenCV 3 and all bytes of the file twice."""
    from PIL import Image  # heavy, and only preparing data needs it

    with Image.open(path, formats=("PNG",)) as picture:
        picture.load()
    width = picture.width
    return lambda top, bottom: np.asarray(picture.crop((0, top, width, bottom)).convert("RGB"))


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

        return draw
    with larger():
        ids = sample_ids(cfg, sample, size)
        if ids.shape != size:
            loaded.orientation = image_orientation(read_file(sample.image))
        check_size(sample, loaded, ids.shape)
    return lambda top, bottom: ids[top:bottom]
