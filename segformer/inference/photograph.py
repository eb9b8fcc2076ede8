"""An image as a user has it -> pixels (H, W, C), as the model's training would see them.

Of a model of 8-bit RGB, as most are, uint8 (H, W, 3):

    path      JPEG, PNG and TIFF of 16 bits decoded as in training; other TIFF, WebP, BMP and GIF by Pillow;
              then turned upright as their EXIF orientation says (training leaves them as they are stored)
    array     (H, W, 3) RGB or (H, W) gray, uint8 or uint16; 16 bits become 8 as those of a PNG do
    tensor    the same, or (3, H, W) and (1, H, W), as torch has them
    picture   of PIL, turned upright

Of other models, C channels of uint8, uint16 or float32: the files that training takes, decoded by the same
function and turned upright, and arrays (H, W, C), tensors (H, W, C) or (C, H, W) and pictures of just that
type; (H, W) where C is 1.

Files and pictures lose their transparency, as in training. Refuses what it would have to guess: other types
and ranges of values, channels first or a fourth one in an array; damaged files, several pictures in one file,
more than MAX_PIXELS or MAX_FILE_BYTES. The order of the channels can't be seen: whoever read BGR by OpenCV
must turn it.
"""

import io
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from segformer.data.sources.dataset import IMAGE_SUFFIXES, MAX_CHANNELS, MAX_PIXELS, RGB, Pixels
from segformer.data.sources.decode import PNG_MAGIC, eight_bits, read_file
from segformer.data.sources.picture import image_orientation, size_of, upright, whole_image
from segformer.data.sources.tiff import is_tiff, tiff_header
from segformer.errors import DataError, reraise_as

if TYPE_CHECKING:
    from PIL import Image

Photograph: TypeAlias = Union[str, Path, np.ndarray, Tensor, "Image.Image"]  # a name in quotes
STILLS = ("TIFF", "WEBP", "BMP", "GIF")  # read by Pillow, beside JPEG and PNG
SUFFIXES = (*IMAGE_SUFFIXES, ".jfif", ".gif")
_ONE_AT_A_TIME = threading.Lock()  # warnings are switched off for the process
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")  # 8 bits a channel


def to_pixels(image: Photograph, image_range: Sequence[int] = (), pixels: Pixels = RGB) -> np.ndarray:
    """An image of any of the kinds above as (H, W, C) of the channels and dtype of `pixels`.

    image_range: as `data.image_range` of the run.

    Raises:
        DataError: it is refused, or none of them.
    """
    from PIL import Image, ImageOps

    if isinstance(image, str | Path):
        return read_image(Path(image), image_range, pixels)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if pixels != RGB:
            return from_bands(np.asarray(image), pixels)
        return from_array(np.asarray(image.convert("RGB") if image.mode in _MODES else image), image_range)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if pixels != RGB and image.ndim == 3 and image.shape[0] == pixels.channels != image.shape[2]:
            image = image.permute(1, 2, 0)
        elif pixels == RGB and image.ndim == 3 and image.shape[0] in (1, 3):
            image = image.permute(1, 2, 0)[:, :, 0 if image.shape[0] == 1 else slice(None)]
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        kind = type(image).__name__
        raise DataError(f"an image is a path, an array, a tensor or a PIL picture, not a {kind}")
    return from_array(image, image_range) if pixels == RGB else from_bands(image, pixels)


def from_bands(image: np.ndarray, pixels: Pixels) -> np.ndarray:
    """(H, W, C), or (H, W) of one channel, of the channels and dtype of `pixels`; DataError for others."""
    channels, dtype = pixels
    what = f"the image is an array of {image.dtype} {image.shape}"
    found = image[..., None] if image.ndim == 2 and channels == 1 else image
    if found.ndim != 3 or found.shape[2] != channels:
        do = f"give (height, width, {channels}) of {dtype}"
        if found.ndim == 3 and found.shape[0] == channels:
            do = "channels come last: image.transpose(1, 2, 0)"
        elif found.ndim == 4:
            do = "of several images give a list: list(images)"
        raise DataError(f"{what}; {do}")
    if found.dtype.newbyteorder("=") != np.dtype(dtype):
        raise DataError(f"{what}; its values must be those of the training, of {dtype}")
    height, width = found.shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{what}; it must have from 1 to {MAX_PIXELS} pixels")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise DataError(f"{what}, with NaN or infinite values; replace them by numbers")
    return np.ascontiguousarray(found, dtype)


def from_array(pixels: np.ndarray, image_range: Sequence[int] = ()) -> np.ndarray:
    """(H, W, 3) RGB or (H, W) gray of 8 or 16 bits as (H, W, 3) uint8; DataError for other arrays."""
    what = f"the image is an array of {pixels.dtype} {pixels.shape}"
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3):
        do = "give (height, width, 3) in RGB or (height, width) in gray"
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
            do = "channels come last: image.transpose(1, 2, 0)" if pixels.shape[0] == 3 else "use image[0]"
        elif pixels.ndim == 3 and pixels.shape[2] in (1, 4):
            do = "leave the fourth out: image[..., :3]" if pixels.shape[2] == 4 else "use image[..., 0]"
        elif pixels.ndim == 3 and 4 < pixels.shape[2] <= MAX_CHANNELS:
            do += f"; {pixels.shape[2]} channels are trained on with data.channels={pixels.shape[2]}"
        elif pixels.ndim == 4:
            do = "of several images give a list: list(images)"
        raise DataError(f"{what}; {do}")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)  # big-endian, as FITS has them
    if pixels.dtype not in (np.uint8, np.uint16):
        do = "give uint8 (0 to 255) or uint16"
        if pixels.dtype.kind == "f" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
            do = "of values from 0 to 1 make (image * 255).round().astype('uint8')"
        raise DataError(f"{what}; {do}")
    height, width = pixels.shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"{what}; it must have from 1 to {MAX_PIXELS} pixels")
    if pixels.dtype == np.uint16:
        pixels = eight_bits(pixels, image_range)
    return np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels


def read_image(path: Path, image_range: Sequence[int] = (), pixels: Pixels = RGB) -> np.ndarray:
    """An image as (H, W, C) of `pixels`: decoded as in training, then turned as its EXIF orientation says.

    image_range: as `data.image_range` of the run.

    Raises:
        DataError: not one whole picture of a format that is read, or above MAX_PIXELS or MAX_FILE_BYTES.
    """
    return from_bytes(read_file(path), path, image_range, pixels)


def from_bytes(
    data: bytes, path: Path, image_range: Sequence[int] = (), pixels: Pixels = RGB, most: int = MAX_PIXELS
) -> np.ndarray:
    """The bytes of a file, which messages name as `path`, as `read_image` has them.

    most: pixels that it may have by its header, which is read before anything is decoded.
    """
    from PIL import ImageOps

    with suppress(ValueError, struct.error):  # the decoder says what is wrong
        height, width = size_of(data)
        if height * width > most:
            raise DataError(
                f"{str(path)!r} has {width} x {height} pixels, the limit is {most}; make it smaller"
            )
    if pixels != RGB or trained_on(data) or _is_deep_tiff(data):
        found = whole_image(path, data, image_range, pixels, taker="the model takes")
        return upright(found, image_orientation(data))
    with open_still(path, data, most) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def trained_on(data: bytes) -> bool:
    """The file begins as JPEG or PNG, or with nothing."""
    return data[:8] == PNG_MAGIC or data[:2] == b"\xff\xd8" or not data


def _is_deep_tiff(data: bytes) -> bool:
    """A TIFF that training reads and Pillow doesn't show right: of more than 8 bits."""
    with suppress(ValueError):  # Pillow knows more kinds of TIFF
        return is_tiff(data) and tiff_header(data).dtype != "uint8"
    return False


class _Named(io.BytesIO):
    """The bytes of a file, which Pillow's messages name."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(data)
        self._path = path

    def __repr__(self) -> str:
        return repr(str(self._path))


@contextmanager
def open_still(path: Path, data: bytes, most: int = MAX_PIXELS) -> Iterator["Image.Image"]:
    """A picture of one of STILLS, opened; DataError for all else, and for what the block can't decode."""
    from PIL import Image

    damaged = (OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error)  # as Image.open has
    unread = (*damaged, Image.DecompressionBombError)
    what = f"{str(path)!r} is not a whole picture of a format that is read (JPEG, PNG, {', '.join(STILLS)})"
    with (
        reraise_as(DataError, what, "replace, shrink or remove it", on=unread),
        _ONE_AT_A_TIME,
        warnings.catch_warnings(action="ignore"),  # of odd entries beside the pixels
        Image.open(_Named(data, path), formats=STILLS) as picture,
    ):
        if picture.width * picture.height > most:
            raise ValueError(f"{picture.width} x {picture.height} pixels, the limit is {most}")
        if getattr(picture, "is_animated", False):
            raise ValueError("it holds several pictures")
        if picture.mode not in _MODES:
            raise ValueError(f"its pixels ({picture.mode}) are not of 8 bits a channel")
        yield picture
