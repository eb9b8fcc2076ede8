"""What the label files of tools hold beside polygons, as rings and run lengths (shapes.py draws them).

A box or an ellipse becomes a ring; a bitmap, which a tool stores as a PNG of the part that it covers, becomes
run lengths of the whole picture. What a payload unpacks to is bounded before it is unpacked."""

import base64
import math
import os
import unicodedata
import zlib
from itertools import takewhile
from typing import Any

import cv2
import numpy as np

from segformer.data.formats.base import Found, Labeled, key_of
from segformer.data.sources.dataset import MAX_FILE_BYTES, MAX_TILED_PIXELS
from segformer.data.sources.decode import PNG_MAGIC, check_parts
from segformer.data.sources.folder import files_below, is_hidden
from segformer.data.sources.shapes import FARTHEST, GRID, ring
from segformer.errors import listed, printable


def picture_size(height: Any, width: Any, most: int = MAX_TILED_PIXELS) -> tuple[int, int]:
    """(height, width) as a label file says them; ValueError for what can't be drawn."""
    if not all(type(side) is int and side > 0 for side in (height, width)) or height * width > most:
        size = printable(f"{width!r} x {height!r}")[:60]
        raise ValueError(f"a picture or mask is of {size} pixels; the limit is {most} in all")
    return height, width


def numbers(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Finite numbers, float64 of that shape; ValueError for everything else."""
    try:
        found: np.ndarray = np.asarray(values, np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{printable(repr(values))[:60]} are no {shape} numbers") from error
    if not np.isfinite(found).all():
        raise ValueError("a number is not finite")
    return found


def rings(*outlines: Any) -> tuple[np.ndarray, ...]:
    """The rings of one shape; of fewer than three points they enclose nothing."""
    return tuple(ring(points) for points in outlines)


def box(
    x0: float, y0: float, x1: float, y1: float, degrees: float = 0, around: tuple[float, float] = (0, 0)
) -> tuple[np.ndarray, ...]:
    """A rectangle, turned around a point, clockwise as one sees it."""
    return rings(_turned(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], np.float64), degrees, *around))


def ellipse(x: float, y: float, across: float, down: float, degrees: float = 0) -> tuple[np.ndarray, ...]:
    """An ellipse around (x, y) with two half axes, turned there: points joined within 1/256 pixel of it."""
    longer = max(abs(across), abs(down), 1.0)
    if longer > FARTHEST:
        raise ValueError(f"an ellipse has a radius of {longer:.0f} pixels")
    number = math.ceil(math.pi * math.sqrt(GRID * longer / 2)) + 4  # sagitta: longer * (pi / number)**2 / 2
    angle = np.arange(number) * (2 * math.pi / number)
    points = np.stack([x + across * np.cos(angle), y + down * np.sin(angle)], axis=1)
    return rings(_turned(points, degrees, x, y))


def _turned(points: np.ndarray, degrees: float, x: float, y: float) -> np.ndarray:
    if not degrees:
        return points
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result: np.ndarray = (points - (x, y)) @ np.array([(cosine, sine), (-sine, cosine)]) + (x, y)
    return result


def run_lengths(mask: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """A bool (h, w) mask, whose first pixel is at column x and row y of a picture, as its run lengths."""
    height, width = size
    left, top = max(x, 0), max(y, 0)
    part = mask[top - y : max(height - y, 0), left - x : max(width - x, 0)]
    columns = np.zeros((part.shape[1], height), bool)
    columns[:, top : top + part.shape[0]] = part.T
    ends = np.flatnonzero(np.diff(columns.reshape(-1), prepend=False, append=False))
    if not len(ends):
        return np.array([height * width], np.uint32)
    return np.diff(ends + left * height, prepend=0, append=height * width).astype(np.uint32)


def png_mask(text: str, *, packed: bool = False) -> np.ndarray:
    """A PNG in base64, with or without line breaks, as bool (h, w): where alpha, or one channel, is not 0.

    packed: zlib packed it; what that unpacks to is at most MAX_FILE_BYTES.
    """
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        if packed:
            unpacked = zlib.decompressobj()
            data = unpacked.decompress(data, MAX_FILE_BYTES)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"a bitmap is damaged: {error}") from error
    if packed and not unpacked.eof:
        raise ValueError(f"a bitmap is truncated, or unpacks to more than {MAX_FILE_BYTES} bytes")
    if data[:8] != PNG_MAGIC:
        raise ValueError("a bitmap is not a PNG")
    check_parts(data)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or (pixels.ndim == 3 and pixels.shape[2] != 4):
        raise ValueError("a bitmap is a PNG without alpha, or damaged")
    mask: np.ndarray = (pixels if pixels.ndim == 2 else pixels[:, :, 3]) != 0
    return mask


class Pictures:
    """The images below data.image_dir, where that is there, else below root, found by a tool's names.

    A tool knows an image by a path on its own server, which ends as that of the file does. Names compare in
    their composed form (NFC): macOS writes them in the other.
    """

    def __init__(self, found: Found) -> None:
        folder, self._found = found.cfg.folder("image", found.split), found
        self._shown = folder if (found.root / folder).is_dir() else "."
        self._folder = str(found.root / self._shown)
        self._by_name: dict[str, list[str]] = {}
        for name in files_below(self._folder):
            if name.lower().endswith(found.cfg.ends("image")) and not is_hidden(name):
                self._by_name.setdefault(_composed(os.path.basename(name)), []).append(name)
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """An image has this name, wherever it lies."""
        return _composed(name) in self._by_name

    def find(self, path: str, *, whole: bool = True, part: str = "") -> Labeled:
        """The one image whose path ends as this does, in all of it or (not `whole`) as far as any does.

        part: folder, in any case, that tells several apart.

        Raises:
            ValueError: there is none, are several, or it was found before.
        """
        wanted = _composed(path).split("/")
        ends: dict[int, list[str]] = {}
        for name in self._by_name.get(wanted[-1], ()):
            parts = _composed(f"{self._shown}/{name}").split("/")
            pairs = zip(reversed(parts), reversed(wanted), strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            ends.setdefault(same, []).append(name)
        found = ends[max(ends)] if ends and max(ends) >= (len(wanted) if whole else 1) else []
        if len(found) > 1:
            found = [name for name in found if part.lower() in name.lower().split("/")] or found
        if len(found) != 1:
            many = f"{len(found)} files ({listed(found, 3)})" if found else "no file"
            raise ValueError(f"{many} found for the image {path!r} below {self._folder!r}")
        if found[0] in self._used:
            raise ValueError(f"the image {path!r} has labels already")
        self._used.add(found[0])
        return Labeled(key_of(found[0]), f"{self._folder}/{found[0]}")

    def count_unused(self) -> None:
        """Count the images that were not asked for."""
        names = {name for same in self._by_name.values() for name in same}
        self._found.unlabeled(self._shown, names - self._used)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
