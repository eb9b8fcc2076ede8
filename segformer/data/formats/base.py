"""What every format of label files gives, the images and what is drawn on each; and how its files are read.

A format is a module with

    detect(found)   whether its files lie there: cheap and certain, asked of every set, by its first split
    read(found)     fills it in; DataError where nothing can be listed, else the defects of single images

and one row of `table.FORMATS`. Names in label files are not trusted: none leads out of the folder of the
images (`inside`), and no file is read without a bound. JSON of any size is read entry by entry."""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import numpy as np

from segformer.data.sources.content import override
from segformer.data.sources.dataset import DatasetConfig, setting
from segformer.data.sources.folder import LeftOut, by_key, files_below, left_out
from segformer.data.sources.masks import Defect
from segformer.data.sources.sample import noting
from segformer.errors import DataError, listed, printable, reraise_as
from segformer.files import read_json, read_text, regular

MAX_LABEL_BYTES = 2**26  # of a label file that is read whole
MAX_LIST_BYTES = 2**33  # of one that is read entry by entry
MAX_ENTRY = 2**24  # signs of one entry
BLOCK = 2**22  # signs that are read at a time
_HEAD = 2**16  # bytes in which a file says what it is
IGNORE = "ignore"  # category of pixels that neither loss nor scores count
SHOWN = 3  # names in a message

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")  # and what they are called
_ALSO = {"val": ["val", "valid", "validation"]}
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


def defect(text: str, do: str, names: Iterable[str] = ()) -> Iterator[Defect]:
    """One about several names, "<count> <text> (a, b and 3 more); <do>"; none without a name."""
    if found := sorted(set(names)):
        yield Defect("listing", f"{len(found)} {text} ({listed(found, SHOWN)}); {do}", len(found))


@dataclass(slots=True)
class Found:
    """The labels of one split: where they lie, and what is found in them."""

    cfg: DatasetConfig
    root: Path
    split: str
    labeled: list[Labeled] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    left: dict[str, LeftOut] = field(default_factory=dict)
    """Folder or file -> what of it is not used."""
    categories: list[str] = field(default_factory=list)
    """Those that the files name, in their order; empty: those that are drawn, by name."""
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name -> key -> value, of a table; `data.group` may name one."""
    covers: bool = False
    """The shapes leave no pixel out, so that none needs data.uncovered."""

    def places(self, *patterns: str, split: str = "") -> list[str]:
        """The patterns of paths with {split} for the split, or for what val is often called."""
        split, dirs = split or self.split, self.cfg.split_dirs
        names = [dirs[split]] if split in dirs else _ALSO.get(split, [split])
        return [*dict.fromkeys(pattern.replace("{split}", name) for name in names for pattern in patterns)]

    def first(self, *patterns: str) -> str:
        """The first of the patterns, below root, that a file or folder has; "" where none has."""
        return next((name for name in self.places(*patterns) if os.path.exists(self.root / name)), "")

    def label_name(self, *usual: str) -> str:
        """`data.labels`, or the first of the usual places, below root; "" where it is not there."""
        return self.first(*([self.cfg.labels] if self.cfg.labels else usual))

    def labels(self, *usual: str, pooled: bool = False) -> Path:
        """The label file or folder; DataError where it is not there.

        pooled: where one pool is divided, those of a split don't count.
        """
        if pooled and self.cfg.is_divided:
            usual = tuple(pattern for pattern in usual if "{split}" not in pattern)
        if not (name := self.label_name(*usual)):
            tried = listed(self.places(*([self.cfg.labels] if self.cfg.labels else usual)), 8)
            do = "set data.labels to it, from root on, with {split} where the split's name stands"
            raise DataError(f"{str(self.root)!r} has no labels of {self.split}: there is no {tried}; {do}")
        return self.root / name

    def folder(self) -> Path:
        """`data.labels`, or the folder of the split; root where there is none, or one pool is divided."""
        if self.cfg.labels:
            return self.labels()
        return self.root / ("" if self.cfg.is_divided else self.first("{split}"))

    def below(self, path: Path) -> str:
        """Its name below root."""
        return path.relative_to(self.root).as_posix()

    def parts(self, there: Collection[str], what: str) -> list[str]:
        """Those of the names that a label file has for its splits, `there`, which make up the split.

        A division (data.val_share, data.fold) begins from all that data.splits has; one name only, which no
        split has, is the pool of all. `what` begins the DataError where there is nothing: "<file> has the
        splits".
        """
        cfg, split = self.cfg, self.split
        own = {
            name: [at for at in self.places("{split}", split=name) if at in there][:1] for name in cfg.splits
        }
        if found := [*chain(*own.values())] if cfg.is_divided else own[split]:
            return found
        if len(there) == 1 and (cfg.is_divided or not any(own.values())):
            return list(there)
        such = override("data.split_dirs", {split: min(there, default="name")})
        do = f"say which is {split}, such as {such}"
        if len(there) == 1 and len(cfg.splits) == 2:
            do = f"divide it: {setting('val_share', '0.2')}"
        raise DataError(f"{what} {listed(sorted(there))}, and none for {split}; {do}")

    @contextmanager
    def refusing(self, where: str, do: str) -> Iterator[None]:
        """End the block where it raises, and note that as a defect of the label file or line `where`."""
        with noting(self.defects, "listing"), reraise_as(DataError, where, do, on=ValueError):
            yield

    def note(self, text: str, do: str, names: Iterable[str]) -> None:
        """A defect of several names; none without a name."""
        self.defects += defect(text, do, names)

    def skip(self, place: str, kind: str, *names: str) -> None:
        """Count what of a folder or file is not used."""
        if names:
            kinds = self.left.setdefault(place, {})
            number, first = kinds.get(kind, (0, printable(min(names))))
            kinds[kind] = (number + len(names), first)

    def unlabeled(self, place: str, names: Iterable[str]) -> None:
        """Count images that no label speaks of."""
        self.skip(place, "image without labels", *names)

    def files(self, folder: str, kind: str) -> tuple[dict[str, str], list[str]]:
        """{key: file} of the images or masks below a folder (kind: image or mask), and the other files."""
        where = str(self.root / folder)
        keys, further, others = by_key(where, files_below(where), self.cfg.ends(kind))
        same = {f"{keys[key]} = {name}" for key, name in further.items()}
        self.note(f"files in {folder!r} share the key of another", "keep one of each", same)
        return keys, others

    def skip_files(self, place: str, names: Iterable[str]) -> None:
        """Count files of a folder that are not used, by their kinds."""
        self.left.setdefault(place, {}).update(left_out(names))


class Format(Protocol):
    """The two functions of a module that reads a format."""

    def detect(self, found: Found) -> bool: ...

    def read(self, found: Found) -> None: ...


def need(entry: Any, key: str, kind: type[_T], where: str) -> _T:
    """`entry[key]`; DataError, naming `where`, for what isn't there or of another kind."""
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind):
        got = "is not there" if value is None else f"is {printable(repr(value))[:40]}"
        raise DataError(f"{where}: {key!r} {got}; it must be {_KINDS[kind]}, so export the labels again")
    return value


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


@contextmanager
def reading(path: Path, *also: type[Exception]) -> Iterator[None]:
    """DataError, naming the label file, where the block can't read it."""
    what, do = f"the labels {str(path)!r} can't be read", "export them again"
    with reraise_as(DataError, what, do, on=(OSError, ValueError, *also)):
        yield


def head(path: Path) -> bytes:
    """The first bytes of a file, which say what it is; none where it can't be read."""
    with suppress(OSError), regular(path).open("rb") as file:
        return file.read(_HEAD).lstrip()
    return b""


def read_labels(path: Path) -> Any:
    """The content of a JSON file of at most MAX_LABEL_BYTES; DataError for what is none."""
    with reading(path):
        return read_json(path, most=MAX_LABEL_BYTES)


def label_text(path: Path, most: int = MAX_LABEL_BYTES) -> str:
    """The content of a text file."""
    with reading(path):
        return read_text(path, most=most)


def label_lines(path: Path, most: int = MAX_LABEL_BYTES) -> list[str]:
    """The lines of a text file without the blanks around them."""
    return [line.strip() for line in label_text(path, most).splitlines()]


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, entry) for each entry of the lists in a JSON object, in their order; (key, value) of the rest.

    A list in the place of the object gives ("", entry). What is held at a time is one entry and a block of
    the file.

    Raises:
        DataError: the file can't be read or isn't whole; it names the place.
    """
    with reading(path), regular(path).open(encoding="utf-8-sig") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_LIST_BYTES:
            raise ValueError(f"it has {size} bytes, the limit is {MAX_LIST_BYTES}")
        text = _Text(stream)
        if text.sign("[{") == "[":
            yield from (("", text.value()) for _ in text.items("]"))
        else:
            for _ in text.items("}"):
                if not isinstance(key := text.value(), str):
                    raise ValueError(f"the name of a value is expected at sign {text.place}")
                if text.sign(":") and text.peek() == "[":
                    text.sign("[")
                    yield from ((key, text.value()) for _ in text.items("]"))
                else:
                    yield key, text.value()
        if text.peek():
            raise ValueError(f"there is more after its end at sign {text.place}")


class _Text:
    """JSON that is read in blocks; signs are counted from 0."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._ended = stream, False
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._gone = "", 0, 0

    @property
    def place(self) -> int:
        return self._gone + self._at

    def _more(self) -> None:
        more = self._stream.read(BLOCK)
        self._text, self._ended = self._text[self._at :] + more, not more
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

    def items(self, end: str) -> Iterator[None]:
        """Once for each item, which is then to be taken, up to the end of what is open."""
        more = self.peek() != end or not self.sign(end)
        while more:
            yield
            more = self.sign("," + end) == ","

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
