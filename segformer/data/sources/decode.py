"""Encoded members -> arrays. A closed set of formats: JPEG, PNG and .npy images, PNG masks, class ids.

The header is looked at before anything is decoded (format, size, MAX_PIXELS), and the result must be what the
header said. DataError for everything else. Training and prediction decode with the same functions. What users
have is read by picture.py.

Masks belong to the stored pixels, so decoding does not apply the EXIF orientation of an image."""

import contextlib
import io
import os
import re
import struct
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np

from segformer.data.sources.dataset import (
    MAX_CHANNELS,
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_TILED_BYTES,
    MAX_TILED_PIXELS,
    Pixels,
)
from segformer.errors import DataError, reraise_as
from segformer.files import regular

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_PARTS = 2**16  # segments of a JPEG before its pixels, chunks of a PNG; Pillow takes 4 us for each
_PIECE, _SHORT = 2**16, 2**8  # bytes of a chunk that are read at a time; of one that counts as a part
MAX_SCANS = 64  # of a progressive JPEG, which has about 10; one of 75 bytes takes 43 ms at 49 million pixels


MAX_RAW_BYTES = 192 * 2**20  # of a TIFF or BMP, which may be plain
_larger: ContextVar[bool] = ContextVar("larger", default=False)


@contextlib.contextmanager
def larger() -> Iterator[None]:
    """Inside, images may have up to MAX_TILED_PIXELS: they are cut into tiles."""
    from PIL import Image  # heavy, and only preparing data needs it

    token, most = _larger.set(True), Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_TILED_PIXELS  # its own limit; what is opened has passed `image_header`
    try:
        yield
    finally:
        _larger.reset(token)
        Image.MAX_IMAGE_PIXELS = most


def most_pixels() -> int:
    """The pixels that an image may have."""
    return MAX_TILED_PIXELS if _larger.get() else MAX_PIXELS


def image_header(data: bytes) -> tuple[str, int, int]:
    """("jpeg" or "png", height, width) from the first bytes of a file, without decoding.

    ValueError for other formats, broken headers and more than MAX_PIXELS. PNG: IHDR; JPEG: the frame
    header SOF0 to SOF2 (ITU-T T.81, B.2.2) after every segment before it. Training reads two headers a
    sample: Pillow takes 15 to 30 us for one, this 1.
    """
    kind, size = "png", (0, 0)
    if data[:8] == PNG_MAGIC and data[12:16] == b"IHDR" and len(data) >= 33:
        size = struct.unpack(">II", data[16:24])[::-1]
    elif data[:2] == b"\xff\xd8":
        kind, at = "jpeg", 2
        for _ in range(MAX_PARTS):
            if at + 9 > len(data) or data[at] != 0xFF:
                raise ValueError("JPEG without a baseline or progressive frame header")
            if data[at + 1] in (0xC0, 0xC1, 0xC2):
                size = struct.unpack(">HH", data[at + 5 : at + 9])
                break
            fill = data[at + 1] == 0xFF
            at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            raise ValueError(f"JPEG of more than {MAX_PARTS} segments")
    else:
        raise ValueError("not a JPEG or PNG file" if data else "empty file (0 bytes)")
    height, width = size
    if not 0 < height * width <= most_pixels():
        raise ValueError(too_many(height, width))
    return kind, height, width


def too_many(height: int, width: int) -> str:
    """What to say of an image beyond `most_pixels`."""
    tile = "" if _larger.get() else " (shard.py cuts larger ones into tiles: tile=[1024,1024])"
    return f"{width} x {height} pixels, the limit is {most_pixels()}{tile}"


_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


# What np.save writes of an image: version 1.0 of NumPy's format, C order, one of DTYPES.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '(\|u1|<u2|<f4)', 'fortran_order': False, "
    rb"'shape': \(([1-9][0-9]{0,7}), ([1-9][0-9]{0,7}), ([1-9][0-9]?)\), \} *\n",
    re.DOTALL,
)
_NPY_LIMIT = 192  # bytes of a header


def encode_array(pixels: np.ndarray) -> bytes:
    """An image (H, W, C) of one of DTYPES as the bytes of a .npy file."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _decode_array(data: bytes) -> np.ndarray:
    """The image of a .npy file; ValueError unless header and length are those that `encode_array` writes."""
    found = _NPY.match(data[:_NPY_LIMIT])
    if found is None or found.end() != 10 + int.from_bytes(found[1], "little"):
        raise ValueError("not the .npy file of an image")
    height, width, channels = (int(found[part]) for part in (3, 4, 5))
    if height * width > MAX_PIXELS or channels > MAX_CHANNELS:
        raise ValueError(
            f"{width} x {height} x {channels} values, the limits are {MAX_PIXELS} pixels, {MAX_CHANNELS}"
        )
    dtype = np.dtype(found[2].decode())
    if len(data) - found.end() != height * width * channels * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are not those of {width} x {height} x {channels} {dtype}")
    return np.frombuffer(data, dtype, offset=found.end()).reshape(height, width, channels).copy()


def is_deep(data: bytes) -> bool:
    """A PNG of 16 bits a channel."""
    return data[:8] == PNG_MAGIC and data[24:25] == b"\x10"


def decode_image(data: bytes, image_range: Sequence[int] = ()) -> np.ndarray:
    """An image of a shard -> (H, W, C): JPEG or PNG as RGB uint8, .npy as it is.

    Not turned by EXIF: masks belong to the stored pixels. image_range: the values of 16 bits that become 0
    and 255; without it their upper 8 bits are taken.
    """
    if data[:6] == b"\x93NUMPY":
        with reraise_as(DataError, "image cannot be decoded", on=ValueError):
            return _decode_array(data)
    if not image_range or not is_deep(data):
        return _decode(data, _COLOR, 3)
    return eight_bits(decode_deep(data), image_range)


def decode_deep(data: bytes) -> np.ndarray:
    """A PNG of 16 bits as RGB uint16 (H, W, 3)."""
    return _decode(data, _COLOR | cv2.IMREAD_ANYDEPTH, 3, np.uint16)


def decode_stored(data: bytes, pixels: Pixels) -> np.ndarray:
    """An image of a set of these pixels, `decode_image`d; DataError where it holds others."""
    image = decode_image(data)
    if (found := Pixels(image.shape[2], str(image.dtype))) != pixels:
        raise DataError(f"image is {found}, the set {pixels}")
    return image


def eight_bits(deep: np.ndarray, image_range: Sequence[int] = ()) -> np.ndarray:
    """Pixels of 16 bits as uint8; `image_range` as in `decode_image`."""
    if not image_range:
        return (deep >> 8).astype(np.uint8)
    low, high = image_range
    scaled: np.ndarray = (deep.astype(np.float32) - low) * (255 / (high - low))
    return scaled.round().clip(0, 255).astype(np.uint8)


def decode_mask(data: bytes) -> np.ndarray:
    """PNG bytes of a shard -> train ids, uint8 (H, W)."""
    return _decode(data, cv2.IMREAD_UNCHANGED, 2)


def decode_label(data: bytes) -> int:
    """The class id of a classification sample, decimal digits as webdataset's .cls members have them."""
    if not data.isdigit() or len(data) > 9:
        raise DataError(f"class id cannot be read: {data[:20]!r} is not a whole number")
    return int(data)


def _decode(data: bytes, flags: int, dimensions: int, dtype: type = np.uint8) -> np.ndarray:
    try:
        _, height, width = image_header(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (ValueError, cv2.error) as error:
        raise DataError(f"image cannot be decoded: {error}") from error
    if (
        pixels is None
        or pixels.dtype != dtype
        or pixels.ndim != dimensions
        or pixels.shape[:2] != (height, width)
    ):
        found = "nothing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise DataError(f"image cannot be decoded: expected {height} x {width}, got {found}")
    decoded: np.ndarray = pixels
    return decoded


def _unread(path: Path) -> tuple[str, str]:
    return f"{str(path)!r} cannot be read", "replace it, or check its permissions"


class FileBytes:
    """The bytes of a file of any size, read when they are sliced."""

    def __init__(self, path: Path) -> None:
        with reraise_as(DataError, *_unread(path)):
            self._file = os.open(regular(path), os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self._size = os.fstat(self._file).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        return os.pread(self._file, max(stop - start, 0), start)


Data: TypeAlias = bytes | FileBytes


def png_chunks(data: Data) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a PNG, long ones in pieces.

    ValueError after one that is cut or differs from its CRC, and for more than MAX_PARTS short ones.
    """
    at, parts = 8, 0
    while parts <= MAX_PARTS:
        start = data[at : at + 8]
        kind, end = start[4:], at + 8 + int.from_bytes(start[:4], "big")
        crc, parts = zlib.crc32(kind), parts + (end - at < _SHORT)
        for first in range(at + 8, min(end, len(data)), _PIECE):
            piece = data[first : min(first + _PIECE, end)]
            crc = zlib.crc32(piece, crc)
            yield kind, piece
        if len(start) < 8 or data[end : end + 4] != crc.to_bytes(4, "big"):
            raise ValueError(f"it is truncated or damaged after {at} of {len(data)} bytes")
        if kind == b"IEND":
            return
        at = end + 4
    raise ValueError(f"PNG of more than {MAX_PARTS} chunks")


def check_parts(data: bytes) -> None:
    """ValueError for what no decoder looks at: chunks of a PNG that are cut or differ from their CRC, and
    small files that would take minutes, by endless parts, scans, or pixels beyond those of the header."""
    kind, height, width = image_header(data)
    if kind == "png":
        _check_png(data, 16 * (height + 1) * (width + 1))  # twice what the deepest pixels take
    else:
        _check_jpeg(data)


def _check_jpeg(data: bytes) -> None:
    at, parts = 2, 0
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in b"\xda":
        fill = data[at + 1] == 0xFF
        at, parts = at + (1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")), parts + 1
        if parts > MAX_PARTS:
            raise ValueError(f"JPEG of more than {MAX_PARTS} segments")
    end = data.find(b"\xff\xd9", at)  # a phone may append a film, whose bytes are no scans
    if (scans := data.count(b"\xff\xda", at, end if end > 0 else None)) > MAX_SCANS:
        raise ValueError(f"JPEG of {scans} scans, the limit is {MAX_SCANS}")


def _check_png(data: bytes, most: int) -> None:
    inflate = zlib.decompressobj()
    for kind, piece in png_chunks(data):
        if kind == b"IDAT" and not inflate.eof:
            with contextlib.suppress(zlib.error):  # the decoder says so
                most -= len(inflate.decompress(piece))
            if most < 0:
                raise ValueError("it holds more pixels than its header says")


def read_file(path: Path, first: int = -1) -> bytes:
    """All bytes, or the first so many, of a file of at most MAX_FILE_BYTES (TIFF, BMP: MAX_RAW_BYTES)."""
    with reraise_as(DataError, *_unread(path)):
        size, limit = regular(path).stat().st_size, MAX_TILED_BYTES if _larger.get() else MAX_FILE_BYTES
        if not _larger.get() and path.suffix.lower() in (".tif", ".tiff", ".bmp"):
            limit = MAX_RAW_BYTES
        if size > limit:
            raise DataError(
                f"{str(path)!r} has {size} bytes; the limit for one file is {limit}; make it smaller"
            )
        with path.open("rb") as stream:
            return stream.read(first)
