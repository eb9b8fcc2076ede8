"""TIFF -> pixels, within bounds: the layouts in which images and masks of ids are kept without loss.

    read      8, 16, 32 and 64 bits a sample, whole or float; gray, RGB, indices, up to 32 bands; in strips or
              tiles, interleaved or planar; plain, LZW, deflate, PackBits or Zstandard; classic and BigTIFF
    refused   several images in one file (reduced copies and masks of the first, as in cloud-optimized
              GeoTIFFs, are not read), other compressions and colors, directories that loop, what lies
              outside the file or decodes to more than it says

The directories are looked at here, before anything is decoded. tifffile then sees a file with one directory
of the known tags alone: what it knows of other software's metadata stays unread."""

import io
import logging
import struct
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from segformer.data.sources.dataset import MAX_CHANNELS
from segformer.data.sources.decode import most_pixels, too_many
from segformer.errors import ConfigError, reraise_as

MAX_DIRECTORIES = 256
MAX_TAGS = 4096  # of one directory
MAX_SEGMENTS = 2**18  # strips or tiles: 64 x 64 in an image of MAX_PIXELS are 12,207 a band

_MAGIC = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_WHOLE = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of tags
_FORMATS = {1: "uint", 2: "int", 3: "float", 4: "uint"}
_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
_COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_ORIENTATION, _SAMPLES, _ROWS, _PLANAR, _PREDICTOR = 274, 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _FILL_ORDER = 322, 323, 338, 339, 266
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets, bytes
_KNOWN = {
    *(_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR),
    *(_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _FILL_ORDER, *_STRIPS, *_TILES),
}


@dataclass(frozen=True, slots=True)
class TiffHeader:
    """What a TIFF says of its image."""

    height: int
    width: int
    channels: int
    dtype: str
    indexed: bool
    """Indices into a table of colors."""
    planar: bool
    orientation: int
    directory: bytes
    """Its known tags as a directory, the last of the file."""


def is_tiff(data: bytes) -> bool:
    """The file begins as a TIFF."""
    return data[:4] in _MAGIC


def encode_tiff(pixels: np.ndarray) -> bytes:
    """An image (H, W, C) as the bytes of a TIFF."""
    import tifffile

    out = io.BytesIO()
    layout = {} if pixels.shape[2] == 1 else {"planarconfig": "contig"}
    found = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    tifffile.imwrite(out, found, photometric="minisblack", **layout)
    return out.getvalue()


def tiff_header(data: bytes) -> TiffHeader:
    """The header of the image in a TIFF; ValueError for what is not read."""
    order, big = _MAGIC[data[:4]]
    try:
        found: list[tuple[dict[int, tuple[int, ...]], bytes]] = []
        at = struct.unpack_from(order + "Q" * big + "I" * (not big), data, 8 if big else 4)[0]
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) == MAX_DIRECTORIES:
                raise ValueError(f"its directories loop, or are more than {MAX_DIRECTORIES}")
            seen.add(at)
            tags, directory, at = _directory(data, at, order, big)
            if not found or not tags.get(_SUBFILE, (0,))[0] & 5:  # a reduced copy, a mask
                found.append((tags, directory))
    except struct.error as error:
        raise ValueError("it is truncated or damaged") from error
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} images; save each as a file of its own")
    return _checked(*found[0], len(data))


def _directory(data: bytes, at: int, order: str, big: bool) -> tuple[dict[int, tuple[int, ...]], bytes, int]:
    """(the known tags with their values, the same as a directory without a next, place of the next)."""
    count, entry, place = (
        order + letters for letters in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I"))
    )
    (number,) = struct.unpack_from(count, data, at)
    if number > MAX_TAGS:
        raise ValueError(f"a directory of {number} tags, the limit is {MAX_TAGS}")
    at += struct.calcsize(count)
    size, tags, kept = struct.calcsize(entry), {}, []
    for start in range(at, at + number * size, size):
        code, kind, length, value = struct.unpack_from(entry, data, start)
        if code not in _KNOWN:
            continue
        if code in tags or kind not in _WHOLE or not 0 < length <= MAX_SEGMENTS:
            raise ValueError(f"its tag {code} is not what a TIFF has there")
        values = f"{order}{length}{_WHOLE[kind]}"
        inside = struct.calcsize(values) <= len(value)
        where = start + size - len(value) if inside else struct.unpack(place, value)[0]
        tags[code] = struct.unpack_from(values, data, where)
        kept.append(data[start : start + size])
    after = struct.unpack_from(place, data, at + number * size)[0]
    return tags, struct.pack(count, len(kept)) + b"".join(kept) + struct.pack(place, 0), after


def _checked(tags: dict[int, tuple[int, ...]], directory: bytes, size: int) -> TiffHeader:
    """ValueError unless the image is one that is read, and its strips or tiles lie in a file of `size`."""

    def one(code: int, default: int = 0) -> int:
        return tags.get(code, (default,))[0]

    height, width, channels = one(_HEIGHT), one(_WIDTH), one(_SAMPLES, 1)
    planar = one(_PLANAR, 1) == 2 and channels > 1
    kinds = {
        (_FORMATS.get(kind, "?"), bits) for kind in tags.get(_FORMAT, (1,)) for bits in tags.get(_BITS, (1,))
    }
    dtype = " and ".join(f"{kind}{bits}" for kind, bits in sorted(kinds))
    if dtype not in _DTYPES:
        raise ValueError(f"its samples are {dtype}; save it with 8 or 16 bits, or as float32")
    if not 0 < height * width <= most_pixels():
        raise ValueError(too_many(height, width))
    if not 0 < channels <= MAX_CHANNELS:
        raise ValueError(f"{channels} channels, the limit is {MAX_CHANNELS}")
    if height * width * channels * np.dtype(dtype).itemsize > 3 * most_pixels():
        what = f"{width} x {height} pixels of {channels} x {dtype}"
        raise ValueError(f"{what}; the limit for them is {3 * most_pixels()} bytes")
    if one(_COMPRESSION, 1) not in _COMPRESSIONS or one(_PREDICTOR, 1) not in (1, 2, 3):
        raise ValueError(f"its compression ({one(_COMPRESSION)}) is not read; save it with LZW or deflate")
    if one(_PHOTOMETRIC, 1) not in (1, 2, 3) or one(_FILL_ORDER, 1) != 1:
        raise ValueError(f"its colors (photometric {one(_PHOTOMETRIC)}) are not read; save it as gray or RGB")
    tiled = _TILES[0] in tags
    rows, columns = (
        (one(_TILE_HEIGHT), one(_TILE_WIDTH)) if tiled else (min(one(_ROWS, height), height), width)
    )
    if not rows or not columns:
        raise ValueError("its strips or tiles have no size")
    grid = ceil(height / rows), ceil(width / columns)
    if prod(grid) * rows * columns > 4 * most_pixels():
        raise ValueError(f"its tiles of {columns} x {rows} are too large for {width} x {height} pixels")
    offsets, counts = (tags.get(code, ()) for code in (_TILES if tiled else _STRIPS))
    if len(offsets) != prod(grid) * (channels if planar else 1) or len(counts) != len(offsets):
        raise ValueError("it has not as many strips or tiles as its size takes")
    ends = map(int.__add__, offsets, counts)
    if min(counts) <= 0 or max(ends) > size or sum(counts) > size:
        raise ValueError("it is truncated or damaged: strips or tiles lie outside of it or overlap")
    indexed = one(_PHOTOMETRIC, 1) == 3
    return TiffHeader(height, width, channels, dtype, indexed, planar, one(_ORIENTATION, 1), directory)


class _Joined(io.RawIOBase):
    """Pieces as one file, without a copy of them."""

    def __init__(self, *pieces: bytes | memoryview) -> None:
        super().__init__()
        self._pieces, self._at = pieces, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, sum(map(len, self._pieces)))[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        at = self._at
        for piece in self._pieces:
            if at < len(piece):
                part = memoryview(piece)[at : at + len(buffer)]
                buffer[: len(part)] = part
                self._at += len(part)
                return len(part)
            at -= len(piece)
        return 0


def decode_tiff(data: bytes) -> np.ndarray:
    """The image of a TIFF as it is stored, (H, W, C); ValueError for what is not read or damaged.

    Raises:
        ConfigError: the packages that it takes are not there.
    """
    header = tiff_header(data)
    what, do = "TIFFs need tifffile and imagecodecs", "pip install 'tifffile>=2025.5' 'imagecodecs>=2025.3'"
    with reraise_as(ConfigError, what, do, on=ImportError):
        import imagecodecs  # noqa: F401  tifffile decodes with it
        import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors come as exceptions
    order, big = _MAGIC[data[:4]]
    pad = b"\0" * (len(data) % 2)
    end = struct.pack(order + ("Q" if big else "I"), len(data) + len(pad))
    start = data[: 8 if big else 4] + end
    with (
        reraise_as(ValueError, "it is damaged", on=(ValueError, RuntimeError, struct.error)),
        io.BufferedReader(_Joined(start, memoryview(data)[len(start) :], pad, header.directory)) as joined,
        tifffile.TiffFile(joined) as file,
    ):
        found = file.pages[0].asarray(maxworkers=1)
    size = (header.height, header.width)
    if found.size != prod(size) * header.channels or str(found.dtype.newbyteorder("=")) != header.dtype:
        raise ValueError(f"it is damaged: {found.dtype} {found.shape} instead of {header.dtype} {size}")
    if header.planar:
        found = found.reshape(header.channels, *size).transpose(1, 2, 0)
    return np.ascontiguousarray(found.reshape(*size, header.channels), found.dtype.newbyteorder("="))
