"""TIFF -> pixels, within bounds: the layouts in which images and masks of ids are kept without loss.

    read      8, 16, 32 and 64 bits a sample, whole or float; gray, RGB, indices, up to 32 bands; in strips or
              tiles, interleaved or planar; plain, LZW, deflate, PackBits or Zstandard; classic and BigTIFF
    refused   several images in one file (reduced copies and masks of the first, as in cloud-optimized
              GeoTIFFs, are not read), other compressions and colors, directories that loop, what lies
              outside the file or decodes to more than it says

The directories are looked at here, before anything is decoded. tifffile then sees a file with one directory
of the known tags alone: what it knows of other software's metadata stays unread. It decodes the strips or
tiles one by one, those that lie in the rows asked for, so a file need not be read as a whole."""

import functools
import io
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from segformer.data.sources.dataset import MAX_CHANNELS
from segformer.data.sources.decode import Data, most_pixels, too_many
from segformer.errors import ConfigError, reraise_as

MAX_DIRECTORIES = 256
MAX_TAGS = 4096  # of one directory
MAX_SEGMENTS = 2**18  # strips or tiles: 64 x 64 in an image of MAX_PIXELS are 12,207 a band
_PLAIN = 2**20  # bytes of the parts in which a single plain strip is read

_MAGIC = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_WHOLE = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of tags
_FORMATS = {1: "uint", 2: "int", 3: "float", 4: "uint"}
_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
_COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_ORIENTATION, _SAMPLES, _ROWS, _PLANAR, _PREDICTOR = 274, 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _FILL_ORDER = 322, 323, 338, 339, 266
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets, bytes
_LAYOUT = (_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR, _PREDICTOR, _TILE_WIDTH)
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
    rows: int
    columns: int
    """Of a strip or tile."""
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    """Of the bytes of each strip or tile."""
    layout: dict[int, int]
    """The tags that say how these are decoded."""


def is_tiff(data: Data) -> bool:
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


def tiff_header(data: Data) -> TiffHeader:
    """The header of the image in a TIFF; ValueError for what is not read."""
    order, big = _MAGIC[data[:4]]
    try:
        found: list[dict[int, tuple[int, ...]]] = []
        (at,) = _unpack(order + "Q" * big + "I" * (not big), data, 8 if big else 4)
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) == MAX_DIRECTORIES:
                raise ValueError(f"its directories loop, or are more than {MAX_DIRECTORIES}")
            seen.add(at)
            tags, at = _directory(data, at, order, big)
            if not found or not tags.get(_SUBFILE, (0,))[0] & 5:  # a reduced copy, a mask
                found.append(tags)
    except struct.error as error:
        raise ValueError("it is truncated or damaged") from error
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} images; save each as a file of its own")
    return _checked(found[0], len(data))


def _unpack(form: str, data: Data, at: int) -> tuple[int, ...]:
    return struct.unpack(form, data[at : at + struct.calcsize(form)])


def _directory(data: Data, at: int, order: str, big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """(the known tags with their values, place of the next directory)."""
    count, entry, place = (order + letters for letters in (("Q", "HHQ", "Q") if big else ("H", "HHI", "I")))
    (number,) = _unpack(count, data, at)
    if number > MAX_TAGS:
        raise ValueError(f"a directory of {number} tags, the limit is {MAX_TAGS}")
    at += struct.calcsize(count)
    before, inside = struct.calcsize(entry), struct.calcsize(place)
    end, tags = at + number * (before + inside), {}
    entries = data[at:end]  # so that a file is not read for each
    for start in range(0, end - at, before + inside):
        code, kind, length = _unpack(entry, entries, start)
        if code not in _KNOWN:
            continue
        if code in tags or kind not in _WHOLE or not 0 < length <= MAX_SEGMENTS:
            raise ValueError(f"its tag {code} is not what a TIFF has there")
        values = f"{order}{length}{_WHOLE[kind]}"
        if struct.calcsize(values) <= inside:
            tags[code] = _unpack(values, entries, start + before)
        else:
            tags[code] = _unpack(values, data, _unpack(place, entries, start + before)[0])
    return tags, _unpack(place, data, end)[0]


def _checked(tags: dict[int, tuple[int, ...]], size: int) -> TiffHeader:
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
    line = width * np.dtype(dtype).itemsize * (1 if planar else channels)  # bytes
    if not tiled and rows == height and (one(_COMPRESSION, 1), one(_PREDICTOR, 1)) == (1, 1):
        if min(counts) < height * line:
            raise ValueError("it is damaged: a strip is too short")
        rows = max(1, min(height, _PLAIN // line))
        starts = range(0, height, rows)
        offsets = tuple(at + start * line for at in offsets for start in starts)
        counts = tuple(min(rows, height - start) * line for start in starts) * (channels if planar else 1)
    if (most := grid[1] * rows * columns * channels * np.dtype(dtype).itemsize) > 3 * most_pixels():
        what = f"its strips or tiles, {rows} rows of {channels} x {dtype}, take {most} bytes decoded"
        raise ValueError(f"{what}, the limit is {3 * most_pixels()}; save it with smaller ones")
    indexed, orientation = one(_PHOTOMETRIC, 1) == 3, one(_ORIENTATION, 1)
    kind = {_PHOTOMETRIC: 1, _FORMAT: " uif".index(np.dtype(dtype).kind), _STRIPS[0]: 1}
    kind |= {_TILE_HEIGHT: rows} if tiled else {_ROWS: rows}
    layout = {code: tags[code][0] for code in _LAYOUT if code in tags} | kind
    place = rows, columns, offsets, counts, layout
    return TiffHeader(height, width, channels, dtype, indexed, planar, orientation, *place)


def _decoder(header: TiffHeader, order: str) -> Callable[[bytes, int], tuple[Any, ...]]:
    """tifffile's decoder of single strips or tiles."""
    what, do = "TIFFs need tifffile and imagecodecs", "pip install 'tifffile>=2025.5' 'imagecodecs>=2025.3'"
    with reraise_as(ConfigError, what, do, on=ImportError):
        import imagecodecs  # noqa: F401  tifffile decodes with it
        import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors come as exceptions
    entries = [
        struct.pack(order + "HHII", code, 4, 1, value) for code, value in sorted(header.layout.items())
    ]
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    with tifffile.TiffFile(io.BytesIO(start + b"".join(entries) + bytes(4))) as file:
        decode: Callable[[bytes, int], tuple[Any, ...]] = file.pages[0].decode
    return decode


def tiff_rows(data: Data, *, indexed: bool = False) -> Callable[[int, int], np.ndarray]:
    """(top, bottom) -> these rows of the image of a TIFF as they are stored, (rows, W, C).

    In memory are the rows that are asked for, and of the strips or tiles as many as lie side by side.
    indexed: it may hold indices into a table of colors.

    Raises:
        ValueError: it is not read, or damaged, which may show when its rows are asked for.
        ConfigError: the packages that it takes are not there.
    """
    header = tiff_header(data)
    if header.indexed and not indexed:
        raise ValueError("its colors are indices, which only masks may be; save it as RGB")
    decode = _decoder(header, _MAGIC[data[:4]][0])
    down, across = ceil(header.height / header.rows), ceil(header.width / header.columns)
    planes = header.channels if header.planar else 1

    @functools.lru_cache(maxsize=planes * across)  # the last ones of a call are often the first of the next
    def segment(index: int) -> np.ndarray:
        at, count = header.offsets[index], header.counts[index]
        with reraise_as(ValueError, "it is damaged", on=(ValueError, RuntimeError, struct.error)):
            decoded: np.ndarray = decode(data[at : at + count], index)[0][0]  # (rows, columns, C)
        return decoded

    def rows(top: int, bottom: int) -> np.ndarray:
        found = np.empty((bottom - top, header.width, header.channels), header.dtype)
        for line in range(top // header.rows, ceil(bottom / header.rows)):
            first = line * header.rows
            start, stop = max(top, first), min(bottom, first + header.rows)
            for plane in range(planes):
                into = found[start - top : stop - top, :, slice(plane, plane + 1) if header.planar else ...]
                for column in range(across):
                    left = column * header.columns
                    part = segment((plane * down + line) * across + column)[start - first : stop - first]
                    into[:, left : left + header.columns] = part[:, : header.width - left]
        return found

    return rows


def decode_tiff(data: bytes, *, indexed: bool = False) -> np.ndarray:
    """The image of a TIFF as it is stored, (H, W, C); the rest: `tiff_rows`."""
    header = tiff_header(data)
    size = header.height, header.width, header.channels
    if prod(size) * np.dtype(header.dtype).itemsize > 3 * most_pixels():
        what = f"{header.width} x {header.height} pixels of {header.channels} x {header.dtype}"
        raise ValueError(f"{what}; the limit for them is {3 * most_pixels()} bytes")
    return tiff_rows(data, indexed=indexed)(0, header.height)
