"""CVAT for images 1.1: one XML file of a task or project, most often annotations.xml beside images/.

    <annotations><version>1.1</version><meta>... <labels><label><name>leaf</name><type>any</type> ...
      <image id="0" name="a.jpg" subset="Train" width="640" height="480">
        <polygon label="leaf" points="x,y;x,y;..." z_order="0" occluded="0"/>
        <box xtl="" ytl="" xbr="" ybr="" rotation="30"/>     turned around its center, clockwise
        <ellipse cx="" cy="" rx="" ry="" rotation=""/>
        <mask rle="3, 5, ..." left="" top="" width="" height=""/>    run lengths along the rows of its box
        <polyline/> <points/> <cuboid/> <skeleton/> <tag/>           no areas: counted, not drawn

Shapes are drawn by z_order, then in the order of the file. A split is a file of its own, or the images of
its subset in one file, or all of that. XML is read in a stream; a document type, which could define entities,
is refused."""

from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from segformer.data.formats.base import (
    MAX_LIST_BYTES,
    Found,
    Labeled,
    Outline,
    first_there,
    key_of,
    labels_place,
    split_places,
)
from segformer.data.formats.outlines import (
    Pictures,
    box,
    count,
    ellipse,
    numbers,
    picture_size,
    pooled,
    refusing,
    rings,
    run_lengths,
    turned,
)
from segformer.data.sources.dataset import MAX_PIXELS, DatasetConfig
from segformer.data.sources.folder import LeftOut
from segformer.errors import DataError, listed, printable, reraise_as
from segformer.files import regular

AREAS = ("polygon", "box", "ellipse", "mask")
NO_AREAS = ("polyline", "points", "cuboid", "skeleton", "tag")
MAX_TAG = 2**23  # bytes of one tag, as of a mask
_PLACES = ("{split}/annotations.xml", "{split}.xml", "annotations.xml")
_BLOCK = 2**18
_DEEPEST = 64


def detect(cfg: DatasetConfig, root: Path) -> bool:
    """There is such a file, at one of its usual places."""
    name = cfg.labels or first_there(cfg, root, cfg.splits[0], _PLACES)
    with suppress(OSError), regular(root / name).open("rb") as file:
        return b"<annotations" in file.read(4096)
    return False


def read(cfg: DatasetConfig, root: Path, split: str) -> Found:
    """The images of a split in its file."""
    path = labels_place(cfg, root, split, pooled(cfg, *_PLACES))
    what = f"the labels {str(path)!r} can't be read"
    own = set() if cfg.is_divided else {name.lower() for name in split_places(cfg, ["{split}"], split)}
    reader = _Reader(str(path), Pictures(cfg, root, split), own)
    with reraise_as(DataError, what, "export them again", on=(OSError, ValueError, expat.ExpatError)):
        reader.read(path)
    if reader.others and not reader.images:
        do = "set data.split_dirs, or divide all of them: data.val_share=0.2"
        raise DataError(f"{str(path)!r} has no subset {split!r}, but {listed(sorted(reader.others))}; {do}")
    found = Found(reader.images, reader.defects, categories=reader.categories)
    found.left = {path.relative_to(root).as_posix(): reader.left}
    pictures = reader.pictures
    found.left[pictures.shown] = found.left.get(pictures.shown, {}) | pictures.unused()
    return found


class _Reader:
    """What a file holds, gathered while it is parsed."""

    def __init__(self, path: str, pictures: Pictures, own: set[str]) -> None:
        self.path, self.pictures, self.own = path, pictures, own
        self.images: list[Labeled] = []
        self.others: set[str] = set()
        """Subsets that are not its own."""
        self.defects: list[Any] = []
        self.left: LeftOut = {}
        self.categories: list[str] = []
        self._parser = parser = expat.ParserCreate("utf-8")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data
        self._open: list[str] = []
        self._text = ""
        self._label: dict[str, str] = {}
        self._image: dict[str, str] = {}
        self._shapes: list[tuple[int, str, Outline]] = []
        self._broken = False

    def read(self, path: Path) -> None:
        done = 0
        with regular(path).open("rb") as file:
            while block := file.read(_BLOCK):
                self._parser.Parse(block)
                done += len(block)
                if done > MAX_LIST_BYTES or done - self._parser.CurrentByteIndex > MAX_TAG:
                    raise ValueError(f"it has more than {MAX_LIST_BYTES} bytes, or {MAX_TAG} in one tag")
        self._parser.Parse(b"", True)

    def _refuse(self, *_: object) -> None:
        raise ValueError("it declares a document type, which CVAT never does")

    def _data(self, text: str) -> None:
        self._text += text if len(self._text) < _BLOCK else ""

    def _start(self, tag: str, values: dict[str, str]) -> None:
        self._text = ""
        if len(self._open) == 1 and tag == "track":
            raise ValueError("it is 'CVAT for video'; export as 'CVAT for images 1.1'")
        if self._open[-1:] == ["image"]:
            with self._noting():
                self._shape(tag, values)
        elif tag == "image":
            self._image, self._shapes, self._broken = values, [], True
            with self._noting():
                self._size()
                self._broken = False
        elif tag == "label":
            self._label = {}
        if len(self._open) > _DEEPEST:
            raise ValueError(f"its tags are nested more than {_DEEPEST} deep")
        self._open.append(tag)

    def _end(self, tag: str) -> None:
        self._open.pop()
        if self._open[-1:] == ["label"]:
            self._label[tag] = self._text
        elif tag == "label" and self._open[-1:] == ["labels"]:
            kind = self._label.get("type", "any")
            if kind not in NO_AREAS and "parent" not in self._label:
                self.categories.append(self._label.get("name", ""))
        elif tag == "image":
            name, subset = self._image.get("name", ""), self._image.get("subset", "")
            if self.own and subset and subset.lower() not in self.own:
                self.others.add(subset)
                count(self.left, f"image of the subset {printable(subset)}", name)
            elif not self._broken:
                with self._noting():
                    file = self.pictures.find(name, part=subset)
                    ordered = sorted(self._shapes, key=lambda shape: shape[0])
                    shapes = tuple((label, outline) for _, label, outline in ordered)
                    image = f"{self.pictures.folder}/{file}"
                    self.images.append(Labeled(key_of(file), image, shapes, size=self._size()))

    def _noting(self) -> Any:
        where = f"{self.path!r}, line {self._parser.CurrentLineNumber}"
        return refusing(self.defects, where, "correct it in CVAT and export again")

    def _size(self) -> tuple[int, int]:
        width, height = _whole(self._image, "width", "height")
        return picture_size(height, width)

    def _shape(self, tag: str, values: dict[str, str]) -> None:
        if tag in NO_AREAS:
            count(self.left, tag, self._image.get("name", ""))
            return
        self._broken, broken = True, self._broken  # until it has been read
        if tag not in AREAS:
            raise ValueError(f"the shape <{tag}> is unknown")
        (order,) = _whole({"z_order": "0"} | values, "z_order")
        self._shapes.append((order, values.get("label", ""), _outline(tag, values, self._size())))
        self._broken = broken


def _outline(tag: str, values: dict[str, str], size: tuple[int, int]) -> Outline:
    if tag == "polygon":
        return rings(numbers(values.get("points", "").replace(";", ",").split(","), (-1, 2)))
    if tag == "mask":
        left, top, width, height = _whole(values, "left", "top", "width", "height")
        runs = numbers(values.get("rle", "").split(","), (-1,))
        picture_size(height, width, MAX_PIXELS)
        if runs.min() < 0 or runs.sum() != width * height:
            raise ValueError(f"the runs of a mask don't fill its box of {width} x {height} pixels")
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64))
        return run_lengths(inside.reshape(height, width), left, top, size)
    (degrees,) = numbers([values.get("rotation", 0)], (1,))
    if tag == "ellipse":
        x, y, across, down = _real(values, "cx", "cy", "rx", "ry")
        return rings(turned(ellipse(x, y, across, down), degrees, x, y))
    x0, y0, x1, y1 = _real(values, "xtl", "ytl", "xbr", "ybr")
    return rings(turned(box(x0, y0, x1, y1), degrees, (x0 + x1) / 2, (y0 + y1) / 2))


def _real(values: dict[str, str], *keys: str) -> list[float]:
    found: list[float] = numbers([values.get(key) for key in keys], (len(keys),)).tolist()
    return found


def _whole(values: dict[str, str], *keys: str) -> list[int]:
    return [int(value) for value in _real(values, *keys)]
