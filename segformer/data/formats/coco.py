"""COCO's instances: one JSON file with images, categories and annotations.

    images        id, file_name, height, width
    categories    id, name
    annotations   image_id, category_id, iscrowd, and as segmentation one of
                      [[x, y, x, y, ...], ...]           parts of an object, each filled for itself
                      {size: [h, w], counts: [n, ...]}   run lengths down the columns
                      {size: [h, w], counts: "..."}      the same, compressed

Annotations cover those that stand before them in the file; a crowd (iscrowd 1) lies below all others. An
annotation without a segmentation (a box only) is counted, an image without annotations is all uncovered. A
category that only groups others, as the first one of Roboflow's, is no class."""

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from segformer.data.formats.base import Found, Labeled, Outline, inside, key_of, need, read_entries
from segformer.data.sources.dataset import IMAGE_SUFFIXES, DatasetConfig
from segformer.data.sources.folder import files_below
from segformer.data.sources.masks import Defect
from segformer.data.sources.shapes import ring
from segformer.errors import DataError, printable, reraise_as

SURE = tuple(f"annotations/instances_{{split}}{year}.json" for year in ("", "2017", "2014"))
USUAL = (
    *(*SURE, "{split}/_annotations.coco.json", "annotations/{split}.json", "{split}.json"),
    *("annotations/instances_default.json", "annotations/instances.json", "annotations/annotations.json"),
    *("_annotations.coco.json", "instances.json", "annotations.json", "labels.json", "result.json"),
)
"""Of COCO itself, Roboflow, and of one file for all splits: CVAT, FiftyOne, Label Studio."""
IMAGES = (
    "{split}",
    "{split}2017",
    "{split}2014",
    "images/{split}2017",
    "images/default",
    "images",
    "data",
    "",
)
_LOOKED_AT = 32  # names that say which folder is meant

_T = TypeVar("_T")
Id = int | str


@dataclass(slots=True)
class Content(Generic[_T]):
    """What a file holds, by the ids of its images and categories."""

    images: dict[Id, tuple[str, tuple[int, int] | None]] = field(default_factory=dict)
    """Path and size (height, width)."""
    categories: dict[Id, str] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)
    """Supercategories of others."""
    annotations: dict[Id, list[_T]] = field(default_factory=dict)
    again: dict[str, list[str]] = field(default_factory=dict)
    """Ids that come more than once, of images, categories and annotations."""


@dataclass(frozen=True, slots=True)
class _Object:
    category: Id
    crowd: bool
    outlines: tuple[Outline, ...]
    size: tuple[int, int] | None
    """That of run lengths."""


def detect(found: Found) -> bool:
    """A file of one of the usual names is there that says what COCO's say first."""
    for split in found.cfg.splits:
        one = Found(found.cfg, found.root, split)
        if not one.cfg.labels and one.first(*SURE):
            return True
        name = one.label_name(*USUAL)
        if name.endswith(".json") and "panoptic" not in name and _is_coco(one.root / name):
            return True
    return False


def _is_coco(path: Path) -> bool:
    with suppress(DataError):
        for key, entry in islice(read_entries(path), 100):
            if key in ("images", "annotations") and isinstance(entry, dict):
                return ("file_name" if key == "images" else "image_id") in entry
    return False


def read(found: Found) -> None:
    """The images of a split with the shapes of their annotations."""
    path = found.labels(*USUAL)
    content = contents(path, _object)
    wanted = located(found, path, content)
    unknown: list[str] = []
    bare: list[str] = []
    for number, one in wanted.items():
        objects = sorted(content.annotations.get(number, ()), key=lambda entry: not entry.crowd)
        shapes = []
        for entry in objects:
            if entry.category not in content.categories:
                unknown.append(str(entry.category))
            bare += [one.key] * (not entry.outlines)
            shapes += [(content.categories.get(entry.category, ""), outline) for outline in entry.outlines]
            if (one.size or entry.size) != (entry.size or one.size):
                text = f"{str(path)!r} has run lengths of {entry.size} pixels for {one.image_file!r}"
                found.defects.append(Defect("size", f"{text} of {one.size}; export it again"))
            one.size = one.size or entry.size
        one.shapes = tuple(shapes)
    used = {name for one in found.labeled for name, _ in one.shapes or ()}
    found.categories = [name for name in found.categories if name in used or name not in content.groups]
    text = f"category ids of annotations are not in the categories of {str(path)!r}"
    found.note(text, "export it again, with its categories", unknown)
    found.skip(os.path.relpath(path, found.root), "annotation without a segmentation", *bare)


def located(found: Found, path: Path, content: Content[Any]) -> dict[Id, Labeled]:
    """The images that are there, without labels yet, by their ids too; categories and defects.

    Labels of a missing image are a defect; images without labels and other files are counted.
    """
    for key, numbers in content.again.items():
        text = f"ids of {key} come more than once in {str(path)!r}"
        found.note(text, "give each an id of its own", numbers)
    found.categories = [*dict.fromkeys(content.categories.values())]
    shown = _images_place(found, [name for name, _ in content.images.values()])
    folder = str(found.root / shown)
    there = {*files_below(folder)}
    labeled = {}
    names, missing = set(), set()
    for number, (file, size) in content.images.items():
        name = inside(folder, file)
        labeled[number] = one = Labeled(key_of(name), f"{folder}/{name}", size=size)
        names.add(name)
        if name in there:
            found.labeled.append(one)
        else:
            missing.add(name)
    do = "add them, set data.image_dir, or take them out of the labels"
    found.note(f"images are not in {folder!r}, but have labels", do, missing)
    others = there - names - {os.path.relpath(path, folder)}
    images = {name for name in others if name.lower().endswith(IMAGE_SUFFIXES)}
    found.skip_files(shown, others - images)
    found.unlabeled(shown, images)
    strangers = content.annotations.keys() - content.images.keys()
    text = f"image ids of annotations are not in the images of {str(path)!r}"
    found.note(text, "export it again, with its images", map(str, strangers))
    return labeled


def _images_place(found: Found, names: list[str]) -> str:
    """The folder of the images, below root: `data.image_dir`, or, where that is as it comes, the first of it
    and the usual places that holds one of the named images; DataError where there is none."""
    default = found.cfg.image_dir == DatasetConfig().image_dir
    places = found.places(found.cfg.image_dir, *(IMAGES if default else ()))
    there = [place for place in places if os.path.isdir(found.root / place)]
    if not there:
        do = "set data.image_dir, with {split} where the split's name stands"
        raise DataError(f"image folder {str(found.root / places[0])!r} is not a folder; {do}")
    some = names[:: -(-len(names) // _LOOKED_AT) or 1]
    holds = (place for place in there if any(os.path.isfile(found.root / place / name) for name in some))
    return next(holds, there[0])


def contents(path: Path, annotation: Callable[[Any, str], _T]) -> Content[_T]:
    """The content of a file, which is read once as long as it rests: that of COCO takes half a minute.

    annotation: reads one, and is told where it stands.
    """
    known = path.stat()
    return _contents(path, annotation, known.st_size, known.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _contents(path: Path, annotation: Callable[[Any, str], _T], *_: int) -> Content[_T]:
    content: Content[_T] = Content()
    seen: dict[str, set[Id]] = {"images": set(), "categories": set(), "annotations": set()}
    for key, entry in read_entries(path):
        if key not in seen:
            continue
        if not isinstance(entry, dict):
            raise DataError(f"{str(path)!r}: an entry of {key} is no object; export it again, as COCO JSON")
        where = f"{str(path)!r}, {key} id {printable(repr(entry.get('id')))[:40]}"
        number: Id = ""  # of annotations, where nothing refers to it, some have none
        if key != "annotations" or "id" in entry:
            number = id_of(entry, "id", where)
            if number in seen[key]:
                content.again.setdefault(key, []).append(str(number))
            seen[key].add(number)
        if key == "images":
            content.images[number] = need(entry, "file_name", str, where), _size(entry)
        elif key == "categories":
            content.categories[number] = name = need(entry, "name", str, where)
            content.groups |= {str(entry.get("supercategory"))} - {name}
        else:
            image = id_of(entry, "image_id", where)
            content.annotations.setdefault(image, []).append(annotation(entry, where))
    if not content.images:
        raise DataError(f"the labels {str(path)!r} have no images; export them again, as COCO JSON")
    return content


def id_of(entry: Any, key: str, where: str) -> Id:
    """`entry[key]`, which names an image or category: a number, in some files a text."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str) else need(entry, key, int, where)


def _size(entry: Any) -> tuple[int, int] | None:
    height, width = entry.get("height"), entry.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _object(entry: Any, where: str) -> _Object:
    category, crowd = id_of(entry, "category_id", where), bool(entry.get("iscrowd"))
    shape = entry.get("segmentation")
    with reraise_as(DataError, where, "export it again", on=ValueError):
        if isinstance(shape, dict):
            size, runs = _runs(shape)
            return _Object(category, crowd, (runs,), size)
        if shape and not isinstance(shape, list):
            raise ValueError(f"its segmentation is {type(shape).__name__}, not polygons or runs")
        return _Object(category, crowd, tuple((ring(part),) for part in shape or ()), None)


def _runs(shape: dict[str, Any]) -> tuple[tuple[int, int], np.ndarray]:
    """Height and width, and the run lengths, uint32."""
    size, counts = shape.get("size"), shape.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise ValueError(f"the size of its runs is {printable(repr(size))[:40]}, not [height, width]")
    if isinstance(counts, str):
        runs = decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**32 for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError("its counts are neither text nor a list of whole numbers")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"its runs don't fill {size[0]} x {size[1]} pixels")
    return (size[0], size[1]), runs.astype(np.uint32)


def decompressed(text: str) -> np.ndarray:
    """Compressed counts -> run lengths, int64.

    A number is written in signs from "0" on, 5 bits each, the lowest first, with a bit that says whether
    another one follows; the highest bit of the last is its sign. From the fourth run on it is the difference
    to the run two before it.
    """
    signs = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")
    if not len(signs) or signs.min() < 0 or signs.max() > 63 or signs[-1] & 32:
        raise ValueError("its compressed counts are damaged")
    ends = np.flatnonzero(signs & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(signs)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 7:
        raise ValueError("its compressed counts are damaged")
    runs: np.ndarray = np.add.reduceat((signs & 31) << 5 * place, starts)
    runs -= np.where(signs[ends] & 16, 1 << 5 * (place[ends] + 1), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
