"""What is left over of a folder, counted by kind, so that no file is left out without a word.

".tif"        the suffix in small letters
"hidden"      the name, or that of a folder above it, begins with a dot (._a.jpg of macOS, .git), or the
              system made it (Thumbs.db, desktop.ini)
"sub-folder"  given with a slash at its end, by who doesn't look into it
"other"       no suffix, or none that says what a file is (scan.0001)
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from segformer.data.sources.dataset import FORMATS, IMAGE_SUFFIXES, MASK_SUFFIXES, PHOTO_SUFFIXES, setting
from segformer.errors import DataError, listed, printable, reraise_as

LeftOut = dict[str, tuple[int, str]]
"""Kind -> (number of files, the first of them by name)."""

_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def left_out(names: Iterable[str]) -> LeftOut:
    """The kinds of files, given by their paths below a folder; a folder ends in a slash."""
    found: LeftOut = {}
    for name in sorted(names):
        count, first = found.get(kind := printable(_kind(name)), (0, printable(name)))
        found[kind] = (count + 1, first)
    return found


def left_out_text(found: Mapping[str, tuple[int, str]]) -> str:
    """`left_out` in words: "6 x .tif (a.tif, ...), 1 x hidden (.DS_Store)"; empty of nothing."""
    return listed(
        f"{count} x {kind} ({first}{', ...' if count > 1 else ''})" for kind, (count, first) in found.items()
    )


def instead_text(kind: str, found: Mapping[str, tuple[int, str]]) -> str:
    """Middle of a message about images or masks (kind: image or mask) that are not there: what lies there."""
    if not found:
        return ""
    need = f"image must be a {FORMATS}: convert them"
    if kind == "mask":
        need = "mask must be a PNG or TIFF, for others change ids: save them as PNG where they were made"
    readable = IMAGE_SUFFIXES if kind == "image" else MASK_SUFFIXES
    there = f"{left_out_text(found)} lie there"
    if ends := [end for end in found if end in readable]:
        return f"{there}: give {setting(f'{kind}_suffix', ends[0])}, or "
    return f"{there}, but each {need}, or "


def is_hidden(name: str) -> bool:
    """The file, or a folder that it is in, is hidden, or the system made it."""
    return name.startswith(".") or "/." in name or os.path.basename(name).lower() in _OF_SYSTEMS


def _kind(name: str) -> str:
    if is_hidden(name):
        return "hidden"
    if name.endswith("/"):
        return "sub-folder"
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix[1:].isalnum() and not suffix[1:].isdigit() else "other"


def files_below(folder: str) -> list[str]:
    """Every file below, as sub/folder/name.

    Raises:
        DataError: a folder or link can't be followed, or links to a folder that it lies in.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename!r} cannot be listed: {error.strerror}; check its permissions"
        ) from error

    found: list[str] = []
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = path[len(folder) + 1 :]
        found += (f"{inside}/{name}" if inside else name for name in names)
        for name in folders:
            if os.path.islink(link := f"{path}/{name}"):
                real, way = os.path.realpath(link), inside.split("/")
                above = [os.path.realpath("/".join([folder, *way[:depth]])) for depth in range(len(way) + 1)]
                if any(os.path.commonpath([real, place]) == real for place in above):
                    raise DataError(f"{link!r} links to a folder that it lies in; remove the link")
    return found


def no_root(root: Path) -> str:
    """What to say where the root is not there; where a relative path was looked for."""
    where = "" if root.is_absolute() else f" ({os.path.abspath(root)})"
    return f"data root {str(root)!r} is not a folder{where}; give root=<folder of the data set>"


def by_key(
    folder: str, names: Iterable[str], ends: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """({key: file}, {key: a further file of that key}, the other files); `ends`: suffixes in small letters.

    A JPEG or PNG goes before a file of another format, which is then one of the others.

    Raises:
        DataError: one of the others is a link that can't be followed: it could be a folder of files.
    """
    found: dict[str, str] = {}
    further: dict[str, str] = {}
    others: list[str] = []
    for name in names:
        cut = next((len(end) for end in ends if name[-len(end) :].lower() == end), 0)
        key = name[:-cut] if cut else ""
        if key and key[-1] != "/" and not is_hidden(name):
            held = found.setdefault(key, name)
            photo = name.lower().endswith(PHOTO_SUFFIXES)
            if held is name:
                continue
            if held.lower().endswith(PHOTO_SUFFIXES) == photo:
                further[key] = name
                continue
            found[key], name = (name, held) if photo else (held, name)
        others.append(name)
        if os.path.islink(link := f"{folder}/{name}"):  # a folder that can't be looked at counts as a file
            what, do = f"{link!r} cannot be listed", "check its permissions"
            with reraise_as(DataError, what, do), suppress(FileNotFoundError):
                os.stat(link)
    return found, further, others
