"""Encoded members -> arrays. A closed set of formats: JPEG and PNG images, PNG masks, class ids as text.

The header is looked at before anything is decoded (format, size, MAX_PIXELS), and the result must be what the
header said. DataError for everything else."""

import cv2
import numpy as np

from segformer.data.dataset import image_header
from segformer.errors import DataError


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
