"""The rows of a PNG from top to bottom, without the rest of it in memory.

Lines are inflated as they are asked for, and handed to the decoders as a PNG of their own: first as bytes,
below the line before them, which takes the filters away (PNG specification, 9); then, unfiltered, with the
header and colors of the file. So the pixels are what these decoders make of the whole file. Rows above those
that were asked for last begin anew. Interlaced files, which have no lines, are not read here."""

import struct
import zlib
from itertools import takewhile

import cv2
import numpy as np

from segformer.data.sources.decode import PNG_MAGIC, FileBytes, image_header, png_chunks

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a color type
_AS = {1: (8, 0), 2: (16, 0), 3: (8, 2), 4: (8, 6), 6: (16, 2), 8: (16, 6)}  # bytes: bits, color type
_BAND = 2**24  # bytes of lines that are unfiltered at a time


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(size: tuple[int, int], kind: tuple[int, int], lines: bytes, colors: bytes = b"") -> bytes:
    """A PNG of filtered lines. size: (width, height); kind: (bits, color type)."""
    header = _chunk(b"IHDR", struct.pack(">2I5B", *size, *kind, 0, 0, 0))
    return PNG_MAGIC + header + colors + _chunk(b"IDAT", zlib.compress(lines, 0)) + _chunk(b"IEND", b"")


class PngRows:
    """(top, bottom) -> these rows as the bytes of a PNG.

    ValueError or zlib.error where the file is damaged, which may show as late as with its last rows."""

    def __init__(self, data: FileBytes) -> None:
        start, self._data = data[:33], data
        _, self._height, self._width = image_header(start)
        self._kind = start[24], start[25]
        if self._kind[0] not in (1, 2, 4, 8, 16) or self._kind[1] not in _CHANNELS:
            raise ValueError("its header is damaged")
        bits = self._kind[0] * _CHANNELS[self._kind[1]]
        self._pixel = max(1, bits // 8)  # bytes
        self._line = -(-self._width * bits // 8 // self._pixel) * self._pixel
        before = takewhile(lambda part: part[0] != b"IDAT", png_chunks(data))
        self._colors = b"".join(_chunk(*part) for part in before if part[0] in (b"PLTE", b"tRNS"))
        self._restart()

    def _restart(self) -> None:
        parts, inflate = png_chunks(self._data), zlib.decompressobj()
        pieces = (piece for kind, piece in parts if kind == b"IDAT" and not inflate.eof)
        self._inflated, self._pending = map(inflate.decompress, pieces), bytearray()
        self._rows, self._top = np.empty((0, self._line), np.uint8), 0
        self._last = np.zeros((1, self._line), np.uint8)

    def __call__(self, top: int, bottom: int) -> bytes:
        if top < self._top:
            self._restart()
        end, parts = self._top + len(self._rows), [self._rows[top - self._top :]]
        while end < bottom:
            rows = self._unfiltered(min(max(1, _BAND // self._line), bottom - end))
            parts.append(rows[max(0, top - end) :])
            end += len(rows)
            if end == self._height and (self._pending or any(self._inflated)):
                raise ValueError("it holds more pixels than its header says")
        self._rows, self._top = np.concatenate(parts), top
        lines = np.pad(self._rows[: bottom - top], ((0, 0), (1, 0)))  # no filter
        return _png((self._width, bottom - top), self._kind, lines.tobytes(), self._colors)

    def _unfiltered(self, count: int) -> np.ndarray:
        """The bytes of the next lines, uint8 (lines, bytes of a line)."""
        size = count * (1 + self._line)
        while len(self._pending) < size:
            if (piece := next(self._inflated, None)) is None:
                raise ValueError("it is truncated or damaged")
            self._pending += piece
        lines = np.frombuffer(bytes(self._pending[:size]), np.uint8).reshape(count, -1)
        del self._pending[:size]
        if lines[:, 0].max() > 4:
            raise ValueError("it is damaged: a line has an unknown filter")
        above = np.pad(self._last, ((0, 0), (1, 0)))
        data = _png(
            (self._line // self._pixel, count + 1), _AS[self._pixel], above.tobytes() + lines.tobytes()
        )
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None or found.nbytes != (count + 1) * self._line:
            raise ValueError("it cannot be decoded")
        if found.ndim == 3:
            found = found[..., [2, 1, 0, 3][: found.shape[2]]]
        found = np.ascontiguousarray(found, found.dtype.newbyteorder(">"))[1:]
        rows: np.ndarray = found.view(np.uint8).reshape(count, self._line)
        self._last = rows[-1:].copy()
        return rows
