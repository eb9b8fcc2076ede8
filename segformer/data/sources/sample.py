"""One sample of a data set: where its files lie, what they hold, and the defects of both.

    image   the file's bytes as they are, decoded as training does, to make sure that it is whole; its pixels
            as the set holds them, `data.channels` of `data.dtype`
    mask    PNG, TIFF: grey of 1 to 16 bits or indices (not colors) -> raw ids; or, with `data.mask_colours`,
            colors of 8 bits (RGB, RGBA without its alpha, indexed, grey) -> raw ids; then -> train ids
    shapes  drawn at the size of the image -> raw ids (shapes.py); then -> train ids

`inspect_sample` gives defects (the kinds stand at `Defect`) beside what can be used: the doctor lists them
all; `load_sample`, which sharding calls, raises the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sources.decode import read_file
from segformer.data.sources.masks import Defect, mask_ids, segment_ids, unknown_ids
from segformer.data.sources.picture import image_orientation, orientation_text, value_range, whole_image
from segformer.data.sources.shapes import Shape, draw
from segformer.data.sources.similar import perceptual_hash
from segformer.errors import DataError, listed, reraise_as


@contextmanager
def noting(defects: list[Defect], kind: str) -> Iterator[None]:
    """End the block at its first defect and add that; `kind` is that of a DataError which has none."""
    try:
        yield
    except DataError as error:
        defects.append(error if isinstance(error, Defect) else Defect(kind, str(error)))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its mask (segmentation) or class id (classification) on disk."""

    key: str
    """Path below the split's folder without the suffix."""
    image_file: str
    """Path of the image; a string, because a set has millions."""
    mask_file: str | None = None
    """Path of the mask."""
    label: int | None = None
    """Class id."""
    shapes: tuple[Shape, ...] | None = None
    """What is drawn on the image in the place of a mask; later shapes cover earlier ones."""
    uncovered: int = IGNORE_INDEX
    """Raw id of the pixels that no shape covers."""
    size: tuple[int, int] | None = None
    """Height and width of the image that the labels are meant for, where they say so."""
    segments: tuple[tuple[int, int], ...] | None = None
    """Of a mask of segments in colors: (R + 256 G + 65536 B, raw id) of each."""
    window: tuple[int, int, int, int] | None = None
    """Of a tile of the image: top, left, bottom, right."""

    @property
    def image(self) -> Path:
        return Path(self.image_file)

    @property
    def mask(self) -> Path | None:
        return None if self.mask_file is None else Path(self.mask_file)

    @property
    def files(self) -> Iterator[Path]:
        """All that it is read from."""
        masks = (shape.file for shape in self.shapes or ())
        return map(Path, filter(None, (self.image_file, self.mask_file, *masks)))


@dataclass(slots=True)
class LoadedSample:
    """Contents of one sample, as far as its files can be used."""

    image: bytes = b""
    height: int = 0
    width: int = 0
    pixels: np.ndarray | None = None
    """The image as the set holds it, (H, W, C)."""
    levels: tuple[int, int] | None = None
    """Lowest and highest value of an image of 16 bits."""
    orientation: int = 1
    """EXIF orientation of the image, which is not applied."""
    alike: int = 0
    """Perceptual hash of the image."""
    ids: np.ndarray | None = None
    """Raw ids of the mask, uint16 (H, W); None in classification."""
    mask: np.ndarray | None = None
    """Train ids and IGNORE_INDEX, uint8 (H, W), from `load_sample`; None in classification."""
    raw_ids: dict[int, int] = field(default_factory=dict)
    """Raw id -> pixels, before the label map; empty in classification."""


def load_sample(cfg: DatasetConfig, sample: Sample) -> LoadedSample:
    """One sample, whole and checked; DataError names the file and what was found."""
    loaded, defects = inspect_sample(cfg, sample)
    if defects:
        raise defects[0]
    map_ids(cfg, sample, loaded)
    return loaded


def map_ids(cfg: DatasetConfig, sample: Sample, loaded: LoadedSample) -> None:
    """Fill in `mask` from `ids`; DataError for ids that no class has."""
    if loaded.ids is not None:
        table = label_table(cfg)
        if unknown := unknown_ids(cfg, list(loaded.raw_ids)):
            known = "the keys of data.label_map" if cfg.label_map else f"0 to {len(cfg.classes) - 1}"
            raise Defect(
                "ids",
                f"mask {str(sample.mask)!r} holds the ids {listed(map(str, unknown), 8)}, outside {known} "
                "and 255; add them to data.classes or map them in data.label_map (255 = ignore)",
            )
        loaded.mask = table.astype(np.uint8)[loaded.ids]


def count_ids(ids: np.ndarray) -> dict[int, int]:
    """Raw id -> pixels."""
    counts = np.bincount(ids.reshape(-1))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def inspect_sample(cfg: DatasetConfig, sample: Sample) -> tuple[LoadedSample, list[Defect]]:
    """The usable contents of a sample, before the label map, and the defects of its files."""
    loaded = LoadedSample()
    defects: list[Defect] = []
    with noting(defects, "unreadable"):
        loaded.image = read_file(sample.image)
        loaded.pixels = whole_image(sample.image, loaded.image, cfg.image_range, cfg.pixels)
        loaded.height, loaded.width = loaded.pixels.shape[:2]
        loaded.alike = perceptual_hash(loaded.pixels)
        if cfg.pixels.dtype == "uint8":
            loaded.levels = value_range(loaded.image)
        loaded.orientation = image_orientation(loaded.image)
    if (sample.mask_file is None and sample.shapes is None) or not (loaded.height or sample.mask_file):
        return loaded, defects
    with noting(defects, "unreadable"):
        if sample.size is not None:
            check_size(sample, loaded, sample.size)
        loaded.ids = sample_ids(cfg, sample, (loaded.height, loaded.width))
        loaded.raw_ids = count_ids(loaded.ids)
        check_size(sample, loaded, loaded.ids.shape)
    return loaded, defects


def sample_ids(cfg: DatasetConfig, sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Raw ids of the pixels before the label map, uint16 (H, W). size: of the image, for shapes.

    Raises:
        DataError: the mask can't be read, or the shapes can't be drawn at this size.
    """
    if sample.shapes is not None:
        do = "export them again"
        with reraise_as(DataError, f"the labels of {sample.image_file!r}", do, on=ValueError):
            return draw(sample.shapes, size, sample.uncovered)
    path = Path(sample.mask_file or "")
    return mask_ids(cfg, path) if sample.segments is None else segment_ids(path, dict(sample.segments))


def check_size(sample: Sample, loaded: LoadedSample, size: tuple[int, ...]) -> None:
    """Defect where labels of (height, width) `size` are not of the size of their image."""
    if loaded.height and size != (loaded.height, loaded.width):
        what = f"the labels of {sample.image_file!r} are for"
        if sample.mask_file is not None:
            what = f"mask {sample.mask_file!r} is"
        raise Defect(
            "size",
            f"{what} {size[1]} x {size[0]} pixels, its image {loaded.width} x {loaded.height}; "
            f"they must agree{orientation_text(loaded.orientation)}",
        )
