"""What every format of label files gives, the images and what is drawn on each; and how its files are read.

A format is a module with

    detect(cfg, root)       whether its files lie there: cheap and certain, for it is asked of every set
    read(cfg, root, split)  -> Found; DataError where nothing can be listed, else the defects of single images

and one row of `table.FORMATS`. Names in label files are not trusted: none leads out of the folder of the
images (`inside`), and no file is read without a bound. JSON of any size is read entry by entry."""

import codecs
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from segformer.data.sources.content import override
from segformer.data.sources.dataset import IMAGE_SUFFIXES, DatasetConfig, setting
from segformer.data.sources.folder import LeftOut, files_below, left_out
from segformer.data.sources.masks import Defect
from segformer.errors import DataError, listed, printable, reraise_as
from segformer.files import read_json, read_text, regular

MAX_LABEL_BYTES = 2**26  # of a label file that is read whole
MAX_LIST_BYTES = 2**33  # of one that is read entry by entry
MAX_ENTRY = 2**24  # signs of one entry
BLOCK = 2**22  # bytes that are read at a time
IGNORE = "ignore"  # category of pixels that neither loss nor scores count
SHOWN = 3  # names in a message

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")  # and what they are called
_ALSO = {"val": ["val", "valid", "validation"]}
_LOOKED_AT = 32  # names that say which folder is meant
_BLANK = re.compile(r"[ \t\r\n]*")
_T = TypeVar("_T")
_KINDS: dict[Any, str] = {str: "text", int: "a whole number", list: "a list", dict: "an object"}

Outline = tuple[np.ndarray, ...] | np.ndarray | str
"""The rings of one shape (shapes.ring), its run lengths, or the path of its mask: 0 is outside."""


@dataclass(slots=True)
class Labeled:
    """One image, and what is known of its pixels: shapes or a mask."""

    key: str
    """Path below the folder of the images, without the suffix."""
    image_file: str
    shapes: tuple[tuple[str, Outline], ...] | None = None
    """Category and outline of each; later ones cover earlier ones."""
    mask_file: str | None = None
    size: tuple[int, int] | None = None
    """Height and width of the image that the labels are meant for, where the file says so."""
    segments: dict[int, str] | None = None
    """Mask of segments in colors: R + 256 G + 65536 B -> category; None: the mask holds raw ids."""


@dataclass(slots=True)
class Found:
    """What the label files of one split hold."""

    labeled: list[Labeled] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    left: dict[str, LeftOut] = field(default_factory=dict)
    """Folder or file -> what of it is not used."""
    categories: list[str] = field(default_factory=list)
    """Those that the files name, in their order."""
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name -> key -> value, of a table; `data.group` may name one."""
    covers: bool = False
    """The shapes leave no pixel out, so that none needs data.uncovered."""


class Format(Protocol):
    """The two functions of a module that reads a format."""

    def detect(self, cfg: DatasetConfig, root: Path) -> bool: ...

    def read(self, cfg: DatasetConfig, root: Path, split: str) -> Found: ...


def defect(text: str, do: str, names: Iterable[str] = ()) -> Iterator[Defect]:
    """One about several names, "<count> <text> (a, b and 3 more); <do>"; none without a name."""
    if found := sorted(set(names)):
        yield Defect("listing", f"{len(found)} {text} ({listed(found, SHOWN)}); {do}", len(found))


def need(entry: Any, key: str, kind: type[_T], where: str) -> _T:
    """`entry[key]`; DataError, naming `where`, for what isn't there or of another kind."""
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind):
        got = "is not there" if value is None else f"is {printable(repr(value))[:40]}"
        raise DataError(f"{where}: {key!r} {got}; it must be {_KINDS[kind]}, so export the labels again")
    return value


def split_place(cfg: DatasetConfig, pattern: str, split: str) -> str:
    """A pattern of a path with {split} for the split."""
    return pattern.replace("{split}", cfg.split_dirs.get(split, split))


def split_places(cfg: DatasetConfig, patterns: Iterable[str], split: str) -> list[str]:
    """The patterns of paths with {split} for the split, or for what val is often called."""
    names = [cfg.split_dirs[split]] if split in cfg.split_dirs else _ALSO.get(split, [split])
    return [*dict.fromkeys(pattern.replace("{split}", name) for name in names for pattern in patterns)]


def first_there(cfg: DatasetConfig, root: Path, split: str, patterns: Iterable[str]) -> str:
    """The first of the patterns, below root, that a file or folder has; "" where none has."""
    return next((name for name in split_places(cfg, patterns, split) if os.path.exists(root / name)), "")


def images_place(
    cfg: DatasetConfig, root: Path, split: str, usual: Iterable[str], names: Sequence[str]
) -> str:
    """The folder of a split's images, below root: `data.image_dir`, or, where that is as it comes, the first
    of it and the usual places that holds one of the named images.

    Raises:
        DataError: it is not there.
    """
    default = cfg.image_dir == DatasetConfig().image_dir
    places = split_places(cfg, [cfg.image_dir, *(usual if default else ())], split)
    there = [place for place in places if os.path.isdir(root / place)]
    if not there:
        do = "set data.image_dir, with {split} where the split's name stands"
        raise DataError(f"image folder {str(root / places[0])!r} is not a folder; {do}")
    some = names[:: -(-len(names) // _LOOKED_AT) or 1]
    holds = (place for place in there if any(os.path.isfile(root / place / name) for name in some))
    return next(holds, there[0])


def parts_of(cfg: DatasetConfig, split: str, there: Collection[str], what: str) -> list[str]:
    """Those of the names that a label file has for its splits, `there`, which make up a split.

    A division (data.val_share, data.fold) begins from all that data.splits has; one name only, which no split
    has, is the pool of all. `what` begins the DataError where there is nothing: "<file> has the splits".
    """
    usual = {name: split_places(cfg, ["{split}"], name) for name in cfg.splits}
    own = {name: [given for given in usual[name] if given in there][:1] for name in cfg.splits}
    if found := [*chain(*own.values())] if cfg.is_divided else own[split]:
        return found
    if len(there) == 1 and (cfg.is_divided or not any(own.values())):
        return list(there)
    do = f"say which is {split}, such as {override('data.split_dirs', {split: min(there, default='name')})}"
    if len(there) == 1 and len(cfg.splits) == 2:
        do = f"divide it: {setting('val_share', '0.2')}"
    raise DataError(f"{what} {listed(sorted(there))}, and none for {split}; {do}")


def labels_place(cfg: DatasetConfig, root: Path, split: str, usual: Iterable[str]) -> Path:
    """The label file or folder of a split: `data.labels`, or the first of the usual places that is there."""
    usual = [cfg.labels] if cfg.labels else list(usual)
    if not (name := first_there(cfg, root, split, usual)):
        tried = listed(split_places(cfg, usual, split), 8)
        do = "set data.labels to the file or folder below root, with {split} where the split's name stands"
        raise DataError(f"{str(root)!r} has no labels of {split}: there is no {tried}; {do}")
    return root / name


def inside(folder: str, name: str, start: str = "") -> str:
    """The path below `folder` that a label file means by `name`, given from `start` below it.

    Raises:
        DataError: the path is absolute, leads out of the folder, or can't be one.
    """
    path = os.path.normpath(os.path.join(start, name.replace("\\", "/")))
    if not name or "\0" in name or re.match(r"/|\.\.?(/|$)|[A-Za-z]:", path):
        raise DataError(f"the path {name!r} leads out of the folder {folder!r}; give it from that folder on")
    return path


def key_of(name: str) -> str:
    """The key of an image by its path below the folder."""
    return os.path.splitext(name)[0]


def compared(
    found: Found, folder: str, shown: str, wanted: Mapping[str, str], own: Collection[str] = ()
) -> None:
    """Note what the labels and the folder of the images don't share.

    folder: where it lies; shown: its name below root; wanted: path of an image below it -> key; own: label
    files in it. Labels of a missing image are removed and become a defect; images without labels and other
    files are counted.
    """
    there = set(files_below(folder))
    missing = {name for name in wanted if name not in there}
    gone = {wanted[name] for name in missing}
    found.labeled = [one for one in found.labeled if one.key not in gone]
    do = "add them, set data.image_dir, or take them out of the labels"
    found.defects += defect(f"images are not in {folder!r}, but have labels", do, missing)
    others = there - wanted.keys() - {*own}
    images = {name for name in others if name.lower().endswith(IMAGE_SUFFIXES)}
    kinds = left_out(others - images)
    if images:
        kinds["image without labels"] = (len(images), printable(min(images)))
    if kinds:
        found.left[shown] = found.left.get(shown, {}) | kinds


def read_labels(path: Path) -> Any:
    """The content of a JSON file of at most MAX_LABEL_BYTES; DataError for what is none."""
    what, do = f"the labels {str(path)!r} can't be read", "export them again"
    with reraise_as(DataError, what, do, on=(OSError, ValueError)):
        return read_json(path, most=MAX_LABEL_BYTES)


def label_lines(path: Path, *, ends: bool = False) -> list[str]:
    """The lines of a text file of at most MAX_LABEL_BYTES; `ends` keeps their ends."""
    what, do = f"the labels {str(path)!r} can't be read", "export them again"
    with reraise_as(DataError, what, do, on=(OSError, ValueError)):
        return read_text(path, most=MAX_LABEL_BYTES).splitlines(ends)


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, entry) for each entry of the lists in a JSON object, in their order; (key, value) of the rest.

    A list in the place of the object gives ("", entry). What is held at a time is one entry and a block of
    the file.

    Raises:
        DataError: the file can't be read or isn't whole; it names the place.
    """
    what, do = f"the labels {str(path)!r} can't be read", "export them again"
    with reraise_as(DataError, what, do, on=(OSError, ValueError)), regular(path).open("rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_LIST_BYTES:
            raise ValueError(f"it has {size} bytes, the limit is {MAX_LIST_BYTES}")
        text = _Text(stream)
        opened = text.sign("[{")
        if opened == "[":
            yield from (("", entry) for entry in text.entries("]"))
        while (opened == "{" and text.peek() != "}") or opened == ",":
            if not isinstance(key := text.value(), str):
                raise ValueError(f"the name of a value is expected at sign {text.place}")
            text.sign(":")
            if text.peek() == "[":
                text.sign("[")
                yield from ((key, entry) for entry in text.entries("]"))
            else:
                yield key, text.value()
            opened = text.sign(",}")
        if opened == "{":
            text.sign("}")
        if text.peek():
            raise ValueError(f"there is more after its end at sign {text.place}")


class _Text:
    """JSON that is read in blocks; signs are counted from 0."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._ended = stream, False
        self._codec = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._gone = "", 0, 0

    @property
    def place(self) -> int:
        return self._gone + self._at

    def _more(self) -> None:
        data = self._stream.read(BLOCK)
        self._ended = not data
        self._text = self._text[self._at :] + self._codec.decode(data, final=self._ended)
        self._gone, self._at = self.place, 0

    def peek(self) -> str:
        """The next sign that is no blank, which stays; "" at the end."""
        while True:
            found = _BLANK.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def sign(self, allowed: str) -> str:
        """Take the next sign, which must be one of those."""
        if (found := self.peek()) not in [*allowed]:
            got = f"{found!r} stands" if found else "the file ends"
            raise ValueError(f"{got} at sign {self.place}, where {' or '.join(allowed)} is expected")
        self._at += 1
        return found

    def entries(self, end: str) -> Iterator[Any]:
        """The values up to the end of a list, which is open."""
        more = self.peek() != end
        while more:
            yield self.value()
            more = self.sign("," + end) == ","
            if not more:
                return
        self.sign(end)

    def value(self) -> Any:
        """Take the next value."""
        self.peek()
        while True:
            reason = f"more than {MAX_ENTRY} signs"
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number could go on
                    self._at = end
                    return value
            except RecursionError as error:
                raise ValueError(f"the value at sign {self.place} is nested too deeply") from error
            except ValueError as error:
                reason = f"no whole JSON ({error})" if self._ended else reason
            if self._ended or len(self._text) - self._at > MAX_ENTRY:
                raise ValueError(f"the value at sign {self.place} is {reason}")
            self._more()
