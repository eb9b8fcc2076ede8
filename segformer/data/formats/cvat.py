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

from contextlib import AbstractContextManager
from pathlib import Path
from xml.parsers import expat

import numpy as np

from segformer.data.formats.base import MAX_LIST_BYTES, Found, Outline, head, reading
from segformer.data.formats.outlines import Pictures, box, ellipse, numbers, picture_size, rings, run_lengths
from segformer.data.sources.dataset import MAX_PIXELS
from segformer.errors import DataError, listed, printable
from segformer.files import regular

AREAS = ("polygon", "box", "ellipse", "mask")
NO_AREAS = ("polyline", "points", "cuboid", "skeleton", "tag")
MAX_TAG = 2**23  # bytes of one tag, as of a mask
_PLACES = ("{split}/annotations.xml", "{split}.xml", "annotations.xml")
_BLOCK = 2**18
_DEEPEST = 64


def detect(found: Found) -> bool:
    """There is such a file, at one of its usual places."""
    return b"<annotations" in head(found.root / found.label_name(*_PLACES))


def read(found: Found) -> None:
    """The images of a split in its file."""
    path = found.labels(*_PLACES, pooled=True)
    reader = _Reader(found, path)
    with reading(path, expat.ExpatError):
        reader.read(path)
    if reader.others and not found.labeled:
        do = "set data.split_dirs, or divide all of them: data.val_share=0.2"
        others = listed(sorted(reader.others))
        raise DataError(f"{str(path)!r} has no subset {found.split!r}, but {others}; {do}")
    reader.pictures.count_unused()


class _Reader:
    """The parser of a file, which fills in what is found."""

    def __init__(self, found: Found, path: Path) -> None:
        self.found, self.path, self.place = found, str(path), found.below(path)
        self.pictures = Pictures(found)
        self.own = set() if found.cfg.is_divided else {name.lower() for name in found.places("{split}")}
        self.others: set[str] = set()
        """Subsets that are not its own."""
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
        self._tags: list[tuple[int, str, dict[str, str]]] = []
        """Line, name and values of those in the open image."""

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
            self._tags.append((self._parser.CurrentLineNumber, tag, values))
        elif tag == "image":
            self._image, self._tags = values, []
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
                self.found.categories.append(self._label.get("name", ""))
        elif tag == "image":
            name, subset = self._image.get("name", ""), self._image.get("subset", "")
            if self.own and subset and subset.lower() not in self.own:
                self.others.add(subset)
                self.found.skip(self.place, f"image of the subset {printable(subset)}", name)
            else:
                self._draw(name, subset)

    def _draw(self, name: str, subset: str) -> None:
        """The open image with its shapes, unless one of them is wrong."""
        before, shapes = len(self.found.defects), []
        with self._noting(self._parser.CurrentLineNumber):
            width, height = _whole(self._image, "width", "height")
            size = picture_size(height, width)
            for line, tag, values in self._tags:
                if tag in NO_AREAS:
                    self.found.skip(self.place, tag, name)
                    continue
                with self._noting(line):
                    (order,) = _whole({"z_order": "0"} | values, "z_order")
                    shapes.append((order, values.get("label", ""), _outline(tag, values, size)))
            if len(self.found.defects) == before:
                one = self.pictures.find(name, part=subset)
                ordered = sorted(shapes, key=lambda shape: shape[0])
                one.shapes, one.size = tuple((label, outline) for _, label, outline in ordered), size
                self.found.labeled.append(one)

    def _noting(self, line: int) -> AbstractContextManager[None]:
        where = f"{self.path!r}, line {line}"
        return self.found.refusing(where, "correct it in CVAT and export again")


def _outline(tag: str, values: dict[str, str], size: tuple[int, int]) -> Outline:
    if tag not in AREAS:
        raise ValueError(f"the shape <{tag}> is unknown")
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
        return ellipse(x, y, across, down, degrees)
    x0, y0, x1, y1 = _real(values, "xtl", "ytl", "xbr", "ybr")
    return box(x0, y0, x1, y1, degrees, ((x0 + x1) / 2, (y0 + y1) / 2))


def _real(values: dict[str, str], *keys: str) -> list[float]:
    found: list[float] = numbers([values.get(key) for key in keys], (len(keys),)).tolist()
    return found


def _whole(values: dict[str, str], *keys: str) -> list[int]:
    return [int(value) for value in _real(values, *keys)]
