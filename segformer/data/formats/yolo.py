"""YOLO segmentation: a text file of polygons for every image, and data.yaml with the names of the classes.

    data.yaml              names: {0: leaf, 1: stem} or [leaf, stem]; train: images/train; val: images/val
    images/train/a.jpg     labels/train/a.txt, a line for each object: <class> x1 y1 x2 y2 ..., as shares of
                           the width and height

A split is what data.yaml names: a folder, a list of them, or a .txt of image paths; from `path` or from
data.yaml on (`../train/images` of Roboflow is train/images). The labels lie where the last `images` of a path
reads `labels`, or beside the image. Without data.yaml: classes.txt, images/ and labels/ (Label Studio). An
image without a text file has no objects; it is used, and counted. Boxes and keypoints are refused."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.formats.base import (
    MAX_LIST_BYTES,
    Found,
    Labeled,
    Outline,
    inside,
    key_of,
    label_lines,
    label_text,
    reading,
)
from segformer.data.formats.outlines import numbers, rings
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import larger, read_file
from segformer.data.sources.folder import by_key, files_below
from segformer.data.sources.large import image_size
from segformer.data.sources.picture import image_orientation
from segformer.errors import DataError, listed
from segformer.files import parse_yaml

CLASSES = "classes.txt"
_HEAD = 2**18  # bytes of an image in which EXIF stands
_FARTHEST = 16  # shares; beyond, they are pixels
_SPLITS = ("train", "val", "valid", "validation", "test")


def detect(found: Found) -> bool:
    """A YAML file names classes and images, or there are classes.txt and folders of images and labels."""
    root = found.root
    if (root / CLASSES).is_file():
        return (root / "images").is_dir() and (root / "labels").is_dir()
    path, text = _file(found.cfg, root), ""
    if path and path.suffix in (".yaml", ".yml"):
        with suppress(DataError):
            text = label_text(path)
    return all(
        re.search(rf"^['\"]?{key}['\"]?\s*:", text, re.MULTILINE) for key in ("names", "(train|val|test)")
    )


def _file(cfg: DatasetConfig, root: Path) -> Path | None:
    if cfg.labels:
        return root / cfg.labels
    found = [root / "data.yaml"] if (root / "data.yaml").is_file() else sorted(root.glob("*.y*ml"))
    return found[0] if len(found) == 1 else None


def read(found: Found) -> None:
    """The images that data.yaml names for a split, and their polygons."""
    root = found.root
    names, places = _content(found)
    found.categories = [*names.values()]
    images = sorted(image for place in places for image in _images(found, place))
    start = f"{places[0]}/" if len(places) == 1 and not places[0].endswith(".txt") else ""
    for image in images:
        path = _label_file(image)
        with found.refusing(repr(f"{root}/{path}"), "correct it, or export it again"):
            lines: list[str] = []
            if os.path.lexists(root / path):
                lines = label_lines(root / path)
            else:
                found.skip("labels", "image without a text file, which has no objects", image)
            size = _size(root / image)
            rows = ((number, line.split()) for number, line in enumerate(lines, 1))
            shapes = tuple(_shape(number, words, names, size) for number, words in rows if words)
            key = key_of(image.removeprefix(start))
            found.labeled.append(Labeled(key, f"{root}/{image}", shapes, size=size))


def _content(found: Found) -> tuple[dict[int, str], list[str]]:
    """The names of the classes, and the folders and lists of the images of a split, below root."""
    cfg, root = found.cfg, found.root
    path = _file(cfg, root)
    if path is None:
        return dict(enumerate(filter(None, label_lines(root / CLASSES)))), ["images"]
    with reading(path):
        content = parse_yaml(label_text(path))
        if isinstance(content, dict) and "kpt_shape" in content:
            raise ValueError("its labels are keypoints (kpt_shape), which are no areas")
        names = content.get("names") if isinstance(content, dict) else None
        names = dict(enumerate(names)) if isinstance(names, list) else names
        if not isinstance(names, dict) or not all(isinstance(number, int) for number in names):
            raise ValueError("its 'names' are neither a list of classes nor <number>: <class>")
    there = [key for key in _SPLITS if content.get(key)]
    own = there if cfg.is_divided else found.places("{split}")
    keys = [key for key in own if content.get(key)]
    if not keys:
        do = "set data.split_dirs, or divide what there is: data.val_share=0.2"
        raise DataError(
            f"{str(path)!r} names no images of {found.split!r}, but of {listed(there) or 'none'}; {do}"
        )
    start = content.get("path") if isinstance(content.get("path"), str) else ""
    given = [content[key] for key in keys]
    entries = [one for value in given for one in (value if isinstance(value, list) else [value])]
    places = [_place(root, start, entry, path) for entry in entries]
    return {number: str(name) for number, name in names.items()}, places


def _place(root: Path, start: str, entry: Any, path: Path) -> str:
    """Where the images of an entry lie below root; they may have moved since it was written."""
    for name in (f"{start}/{entry}", str(entry), str(entry).removeprefix("../")):
        with suppress(DataError):
            if (root / (place := inside(str(root), name))).exists():
                return place
    raise DataError(f"{str(path)!r} names the images {entry!r}; they are not below {str(root)!r}; correct it")


def _images(found: Found, place: str) -> Iterator[str]:
    """The paths of the images below root; what else is there is noted."""
    root = found.root
    if place.endswith(".txt"):
        missing = []
        for line in filter(None, label_lines(root / place, MAX_LIST_BYTES)):
            for start in (os.path.dirname(place), ""):
                if (root / (image := inside(str(root), line.removeprefix("data/"), start))).is_file():
                    yield image
                    break
            else:
                missing.append(line)
        found.note(f"images of {place!r} are missing", "add them, or remove their lines", missing)
        return
    folder = f"{root}/{place}"
    images, further, others = by_key(folder, files_below(folder), found.cfg.ends("image"))
    names = [*images.values(), *further.values()]
    yield from (f"{place}/{name}" for name in names)
    labels = os.path.dirname(_label_file(f"{place}/x"))
    if labels == place:
        others = [name for name in others if not name.endswith(".txt")]
    else:
        with_image = {_label_file(f"{place}/{name}") for name in names}
        there = {f"{labels}/{name}" for name in files_below(f"{root}/{labels}") if name.endswith(".txt")}
        alone = {name for name in there - with_image if os.path.basename(name) != CLASSES}
        found.note("text files have no image", "add their images, or remove them", alone)
    found.skip_files(place, others)


def _label_file(image: str) -> str:
    """images/train/a.jpg -> labels/train/a.txt"""
    folders = f"/{key_of(image)}".split("/")
    if "images" in folders[:-1]:
        folders[len(folders) - 2 - folders[-2::-1].index("images")] = "labels"
    return "/".join(folders)[1:] + ".txt"


def _size(path: Path) -> tuple[int, int]:
    """Height and width as one sees the image, which is what shares are of."""
    height, width = image_size(path)
    with larger():
        turned = image_orientation(read_file(path, _HEAD)) >= 5
    return (width, height) if turned else (height, width)


def _shape(
    number: int, words: list[str], names: dict[int, str], size: tuple[int, int]
) -> tuple[str, Outline]:
    where = f"line {number}"
    if not words[0].isdecimal() or int(words[0]) not in names:
        raise ValueError(f"{where} is of class {words[0]!r}, which data.yaml doesn't name")
    if len(words) == 5:
        raise ValueError(f"{where} is a box, not a polygon; export the set for segmentation")
    if len(words) % 2 == 0 or len(words) < 7:
        raise ValueError(f"{where} has {len(words) - 1} numbers, not x and y of three points or more")
    shares = numbers(words[1:], (-1, 2))
    if np.abs(shares).max() > _FARTHEST:
        raise ValueError(f"{where} has {np.abs(shares).max():g}, which is no share of the width or height")
    return names[int(words[0])], rings(shares * (size[1], size[0]))
