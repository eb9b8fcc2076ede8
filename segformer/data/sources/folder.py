"""What is left over of a folder, counted by kind, so that no file is left out without a word.

".tif"        the suffix in small letters
"hidden"      the name, or that of a folder above it, begins with a dot (._a.jpg of macOS, .git), or the
              system made it (Thumbs.db, desktop.ini)
"sub-folder"  given with a slash at its end, by who doesn't look into it
"other"       no suffix, or none that says what a file is (scan.0001)
"""

import os
from collections.abc import Iterable, Mapping

from segformer.errors import listed, printable

LeftOut = dict[str, tuple[int, str]]
"""Kind -> (number of files, the first of them by name)."""

_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def left_out(names: Iterable[str]) -> LeftOut:
    """The kinds of files, given by their paths below a folder; a folder ends in a slash."""
    found: LeftOut = {}
    for name in sorted(names):
        count, first = found.get(kind := _kind(name), (0, name))
        found[kind] = (count + 1, first)
    return found


def left_out_text(found: Mapping[str, tuple[int, str]]) -> str:
    """`left_out` in words: "6 x .tif (a.tif, ...), 1 x hidden (.DS_Store)"; empty of nothing."""
    return listed(
        f"{count} x {kind} ({printable(first)}{', ...' if count > 1 else ''})"
        for kind, (count, first) in found.items()
    )


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
