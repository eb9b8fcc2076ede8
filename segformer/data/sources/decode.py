"""Encoded members -> arrays. A closed set of formats: JPEG and PNG images, PNG masks, class ids as text.

The header is looked at before anything is decoded (format, size, MAX_PIXELS), and the result must be what the
header said. DataError for everything else. Training and prediction decode with the same functions.

Masks belong to the stored pixels, so decoding does not apply the EXIF orientation of an image (TIFF 6.0, tag
274: how the stored pixels are to be turned or mirrored for viewing). `image_orientation` reads it from the
header, `upright` applies it."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

from segformer.data.sources.dataset import TooManyPixelsError, image_header
from segformer.errors import DataError

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"


def decode_image(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> RGB uint8 (H, W, 3), not turned by EXIF: masks belong to the stored pixels."""
    return _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, 3)


def decode_mask(data: bytes) -> np.ndarray:
    """PNG bytes of a shard -> train ids, uint8 (H, W)."""
    return _decode(data, cv2.IMREAD_UNCHANGED, 2)


def decode_label(data: bytes) -> int:
    """The class id of a classification sample, decimal digits as webdataset's .cls members have them."""
    if not data.isdigit() or len(data) > 9:
        raise DataError(f"class id cannot be read: {data[:20]!r} is not a whole number")
    return int(data)


def _decode(data: bytes, flags: int, dimensions: int) -> np.ndarray:
    try:
        _, height, width = image_header(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (ValueError, cv2.error) as error:
        raise DataError(f"image cannot be decoded: {error}") from error
    if (
        pixels is None
        or pixels.dtype != np.uint8
        or pixels.ndim != dimensions
        or pixels.shape[:2] != (height, width)
    ):
        found = "nothing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise DataError(f"image cannot be decoded: expected {height} x {width}, got {found}")
    decoded: np.ndarray = pixels
    return decoded


def check_sums(data: bytes) -> None:
    """ValueError for a PNG that is cut or whose chunks differ from their CRC: Pillow may not see it."""
    at, kind = 8, b"" if data[:8] == _PNG_MAGIC else b"IEND"
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        crc = int.from_bytes(data[end - 4 : end], "big")
        if end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != crc:
            raise ValueError(f"it is truncated or damaged after {at} of {len(data)} bytes")
        at, kind = end, data[at + 4 : at + 8]


def unusable(path: Path, error: Exception) -> DataError:
    """The error of a file that `image_header`, `check_sums` or a decoder has refused."""
    if isinstance(error, TooManyPixelsError):
        return DataError(f"{str(path)!r} has {error}; make it smaller or cut it into parts")
    return DataError(f"{str(path)!r} is not a whole JPEG or PNG: {error}; replace or remove it")


def image_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG or PNG, 1 to 8, without decoding; 1 (upright) where it says nothing."""
    tiff = _exif(data)
    order = ">" if tiff[:2] == b"MM" else "<"
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, first)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, first + 2 + 12 * entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:  # cut, or none
        pass
    return 1


def orientation_text(orientation: int) -> str:
    """What follows in a message about an image that is stored turned; nothing for orientation 1."""
    if orientation == 1:
        return ""
    return (
        f"; the image is stored rotated (EXIF orientation {orientation}), which is not applied: the mask "
        "must fit the stored pixels, so turn one of the two files (an image: mogrify -auto-orient)"
    )


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, C) as they are to be viewed: (W, H, C) from orientation 5 on."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _exif(data: bytes) -> bytes:
    """The TIFF structure in the APP1 segment of a JPEG or the eXIf chunk of a PNG; empty without one."""
    if data[:8] == _PNG_MAGIC:
        at = 8
        while at + 8 <= len(data):
            end = at + 8 + int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] == b"eXIf":
                return data[at + 8 : end].removeprefix(_EXIF)
            at = end + 4
        return b""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # until the scan
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == _EXIF:
            return data[at + 10 : end]
        at = at + 1 if data[at + 1] == 0xFF else end  # 0xFF: a fill byte
    return b""
