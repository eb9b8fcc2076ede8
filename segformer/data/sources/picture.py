"""An image file as users have it -> pixels as a set holds them: JPEG, PNG, TIFF (tiff.py), WebP or BMP.

Headers are looked at before anything is decoded, and what is damaged or too large is refused; DataError names
the file. JPEGs and PNGs of 3 x uint8 are decoded as training decodes them.

The EXIF orientation of an image (TIFF 6.0, tag 274: how the stored pixels are to be turned or mirrored for
viewing) is not applied: `image_orientation` reads it from the header, `upright` applies it."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from segformer.data.sources.dataset import (
    DTYPES,
    FORMATS,
    RGB,
    DatasetConfig,
    Pixels,
)
from segformer.data.sources.decode import (
    PNG_MAGIC,
    Data,
    FileBytes,
    check_parts,
    decode_deep,
    decode_image,
    eight_bits,
    image_header,
    is_deep,
    larger,
    most_pixels,
    too_many,
)
from segformer.data.sources.tiff import decode_tiff, is_tiff, tiff_header
from segformer.errors import DataError, reraise_as


def decode_pixels(path: Path, data: bytes, mode: str | None = None) -> np.ndarray:
    """Pixels of a JPEG or PNG, as stored or in a mode of Pillow."""
    from PIL import Image  # heavy, and only preparing data needs it

    with unless_whole(path):
        check_parts(data)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture if mode is None else picture.convert(mode))


def unless_whole(path: Path) -> contextlib.AbstractContextManager[None]:
    """DataError naming the file that the block cannot decode."""
    refused = (ValueError, OSError, SyntaxError, DataError, struct.error, zlib.error)
    what = f"{str(path)!r} is not a whole {FORMATS}"
    return reraise_as(DataError, what, "replace, shrink or remove it", on=refused)


def value_range(data: bytes) -> tuple[int, int] | None:
    """Lowest and highest value of an image of 16 bits, None for others."""
    if is_tiff(data):
        if tiff_header(data).dtype != "uint16":
            return None
        deep = decode_tiff(data)
    elif is_deep(data):
        deep = decode_deep(data)
    else:
        return None
    return int(deep.min()), int(deep.max())


def whole_image(
    path: Path,
    data: bytes | np.ndarray,
    image_range: Sequence[int] = (),
    pixels: Pixels = RGB,
    taker: str = "the set",
    top: int = 0,
) -> np.ndarray:
    """An image file that is whole -> (H, W, C) as a set of these `pixels` holds it, as training decodes it.

    Of 3 channels a gray image becomes three equal ones; alpha that no channel is left for is dropped (not of
    a TIFF, whose last channel may be anything). image_range: as in `decode_image`, for uint8. taker: what has
    these `pixels`, in words; of a set the settings are named. data, top: may be rows from `top` on, as a PNG
    or the pixels of a TIFF.

    Raises:
        DataError: it is damaged, of another format, or does not fit `pixels`.
    """
    if isinstance(data, np.ndarray):
        return _finite(path, _fitted(path, data, image_range, pixels, taker, alpha=False), top)
    photo = _is_photo(data)
    with unless_whole(path):
        if photo:
            check_parts(data)
        if photo and data[:8] != PNG_MAGIC:  # Pillow refuses damaged JPEGs that OpenCV fills up
            _load(data)
        if photo and pixels == RGB:
            return decode_image(data, image_range)
        found = _stored(data, photo)
    return _finite(path, _fitted(path, found, image_range, pixels, taker, alpha=not is_tiff(data)), top)


def _is_photo(data: bytes) -> bool:
    return data[:8] == PNG_MAGIC or data[:2] == b"\xff\xd8"


def _load(data: bytes) -> None:
    from PIL import Image  # heavy, and only preparing data needs it

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
        picture.load()


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of an image file, from its header; ValueError for what is not read."""
    if is_tiff(data):
        header = tiff_header(data)
        return header.height, header.width
    return (image_header if _is_photo(data) else still_header)(data)[1:]


def _stored(data: bytes, photo: bool) -> np.ndarray:
    """The channels of an image file as they are stored, (H, W, C)."""
    if is_tiff(data):
        return decode_tiff(data)
    if not photo:
        return _still(data)
    flags = cv2.IMREAD_UNCHANGED
    found = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if found is None or found.shape[:2] != image_header(data)[1:]:
        raise ValueError("image cannot be decoded")
    found = found[..., None] if found.ndim == 2 else found[..., [2, 1, 0, 3][: found.shape[2]]]
    if data[:8] == PNG_MAGIC and data[25] == 4:  # gray and alpha, decoded as RGBA
        found = found[..., [0, -1]]
    return np.ascontiguousarray(found)


def _still(data: bytes) -> np.ndarray:
    """The pixels of a WebP or BMP, uint8 (H, W, C)."""
    from PIL import Image  # heavy, and training needs none

    kind, height, width = still_header(data)
    with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
        if picture.size != (width, height) or getattr(picture, "is_animated", False):
            raise ValueError("it holds several pictures")
        found = np.asarray(picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB"))
    return found.reshape(height, width, -1)


def still_header(data: bytes) -> tuple[str, int, int]:
    """("WEBP" or "BMP", height, width) without decoding: Pillow opens a WebP with memory for its pixels."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":  # the canvas
            width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        elif data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        else:
            width, height = (side & 0x3FFF for side in struct.unpack("<HH", data[26:30]))
        kind = "WEBP"
    elif data[:2] == b"BM" and len(data) >= 26:
        form = "<HH" if data[14] == 12 else "<ii"
        width, height = struct.unpack_from(form, data, 18)
        kind, height = "BMP", abs(height)
    else:
        raise ValueError(f"not a {FORMATS} file" if data else "empty file (0 bytes)")
    if not 0 < height * width <= most_pixels():
        raise ValueError(too_many(height, width))
    return kind, height, width


def _fitted(
    path: Path, found: np.ndarray, image_range: Sequence[int], pixels: Pixels, taker: str, *, alpha: bool
) -> np.ndarray:
    """Channels and dtype as `pixels` says; DataError names the setting where they are others."""
    channels, dtype, given = found.shape[2], str(found.dtype), taker == "the set"
    if alpha and channels in (2, 4) and channels != pixels.channels:
        found = found[..., :-1]
    if found.shape[2] == 1 and pixels.channels == 3:
        found = np.repeat(found, 3, axis=2)
    if found.shape[2] != pixels.channels:
        what = f"{str(path)!r} has {channels} channels, {taker} {pixels.channels}"
        do = f"give data.channels={channels} or leave it out" if given else f"give images of {pixels}"
        raise DataError(f"{what}; {do}")
    if pixels.dtype == "uint8" and dtype == "uint16":
        found = eight_bits(found, image_range)
    elif pixels.dtype == "float32" and dtype != "uint8" and np.can_cast(dtype, np.float32):
        found = found.astype(np.float32, copy=False)
    elif pixels.dtype != dtype:
        fits = dtype if dtype in DTYPES else "float32" if np.can_cast(dtype, np.float32) else ""
        do = f"give data.dtype={fits} or convert it" if fits else "save it as float32"
        do = do if given else f"give images of {pixels}"
        raise DataError(f"{str(path)!r} holds {dtype}, {taker} {pixels.dtype}; {do}")
    if found.nbytes > 3 * most_pixels():
        what = f"{str(path)!r} takes {found.nbytes} bytes, the limit is {3 * most_pixels()}"
        raise DataError(f"{what}; cut it into smaller images")
    return np.ascontiguousarray(found)


def _finite(path: Path, found: np.ndarray, top: int) -> np.ndarray:
    """The pixels, which are rows from `top` on; DataError where one is no number."""
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        row, column, channel = np.argwhere(~np.isfinite(found))[0].tolist()
        where = f"row {top + row}, column {column}, channel {channel}"
        raise DataError(f"{str(path)!r} holds NaN or infinite values ({where}); replace them by numbers")
    return found


def whole_tiff(path: Path, data: bytes) -> np.ndarray:
    """The image of a TIFF as it is stored, (H, W, C)."""
    with unless_whole(path):
        return decode_tiff(data, indexed=True)


def with_dtype(cfg: DatasetConfig, first: Path) -> DatasetConfig:
    """`cfg` with the dtype that it leaves to the files: that of the first where it is a TIFF."""
    if cfg.dtype or cfg.image_range or first.suffix.lower() not in (".tif", ".tiff"):
        return cfg
    with unless_whole(first), larger():
        found = tiff_header(data).dtype if is_tiff(data := FileBytes(first)) else ""
    if found not in DTYPES and found and np.can_cast(found, np.float32):
        found = "float32"
    return replace(cfg, dtype=found) if found in DTYPES[1:] else cfg


def image_orientation(data: Data) -> int:
    """EXIF orientation of a whole image, 1 to 8, without decoding; 1 (upright) where it says nothing."""
    from PIL import Image  # heavy, and training needs none

    exif, value = Image.Exif(), 1
    with contextlib.suppress(OSError, ValueError, SyntaxError, struct.error, Warning):  # a damaged header
        if is_tiff(data):
            return max(1, tiff_header(data).orientation % 9)
        with Image.open(io.BytesIO(data[:]), formats=("JPEG", "PNG", "WEBP")) as picture:
            exif.load(picture.info.get("exif", b""))
        value = exif.get(0x0112, 1)
    return value if value in range(1, 9) else 1


def orientation_text(orientation: int) -> str:
    """End of a message about an image that is stored turned; empty for orientation 1."""
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


def by_four(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """A function of OpenCV, which may know no more than four channels and drops a single one, of all of them.

    image (H, W, C) -> (h, w, C).
    """
    channels = image.shape[2]
    if 1 < channels <= 4:
        return function(image)
    parts = (np.ascontiguousarray(image[..., first : first + 4]) for first in range(0, channels, 4))
    return np.concatenate([np.atleast_3d(function(part)) for part in parts], axis=2)
