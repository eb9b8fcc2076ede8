"""Mask files -> raw ids, and what to do about masks that hold something else.

    ids       PNG: grey of 1 to 16 bits, or the indices (not the colors) of an indexed one; TIFF: the same of
              8 or 16 bits
    painted   with `data.mask_colours`: colors of 8 bits (RGB, RGBA without its alpha, indexed, grey); TIFF:
              RGB

A color that is not listed is a class without an entry, or a blend: masks that were resized smoothly have
colors between those of two classes in lines along their borders, lossy formats scatter them."""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segformer.data.sources.content import LISTED, SMOOTH, Labels, id_remedy, override
from segformer.data.sources.dataset import IGNORE_INDEX, MAX_RAW_ID, DatasetConfig, label_table
from segformer.data.sources.decode import PNG_MAGIC, read_file
from segformer.data.sources.picture import decode_pixels, whole_tiff
from segformer.data.sources.tiff import is_tiff
from segformer.errors import DataError, listed

MAX_COLORS = 64  # of one mask; more are noise of a lossy format, not a palette
_LOOKED_AT = 256  # masks that are read for a remedy
_NEAR, _BETWEEN = 32, 4  # levels from a listed color, and from the line between two


class Defect(DataError):  # noqa: N818  the doctor counts it, sharding raises it
    """A reason why sharding refuses a set: its kind, one line, and the number of files that it is about.

    listing      folders, pairs and names that do not fit
    unreadable   files that are damaged, of another format, too large or locked
    size         masks of another size than their image
    ids          masks with ids that no class has
    colour       masks with colors where ids are expected
    painted      painted masks with a color that data.mask_colours does not list
    blended      painted masks whose colors are blends of those listed
    """

    def __init__(self, kind: str, text: str, count: int = 1) -> None:
        super().__init__(kind, text, count)  # all of them, so that it pickles
        self.kind, self.text, self.count = kind, text, count

    def __str__(self) -> str:
        return self.text


def mask_ids(cfg: DatasetConfig, path: Path, data: bytes | np.ndarray = b"", top: int = 0) -> np.ndarray:
    """Raw ids of a mask before the label map, uint16 (H, W); DataError for what is no mask of ids.

    data, top: rows of the mask from `top` on in the place of the file, as a PNG or as the pixels of a TIFF.
    """
    data = data if len(data) else read_file(path)
    if isinstance(data, np.ndarray):
        return _tiff_ids(cfg, path, data, top)
    if is_tiff(data):
        return _tiff_ids(cfg, path, whole_tiff(path, data), top)
    if data and data[:8] != PNG_MAGIC:
        raise DataError(f"mask {str(path)!r} is no PNG or TIFF; ids do not survive other formats")
    if cfg.mask_colours and data[24:25] == b"\x10":
        raise DataError(f"mask {str(path)!r} has 16 bits a channel; data.mask_colours are of 8 bits")
    pixels = decode_pixels(path, data, "RGB" if cfg.mask_colours else None)
    if cfg.mask_colours:
        return _painted_ids(cfg, path, pixels, top)
    if pixels.ndim != 2:
        raise Defect(
            "colour",
            f"mask {str(path)!r} is not a PNG with one channel ({pixels.shape[2]} channels); store ids as "
            "grey or indexed PNG, or list its colors in data.mask_colours",
        )
    bits, color_type = data[24], data[25]
    if color_type == 0 and bits in (2, 4):  # Pillow stretches grey of 2 and 4 bits to 0..255
        pixels = pixels // (255 // (2**bits - 1))
    ids: np.ndarray = pixels.astype(np.uint16)
    return ids


def _tiff_ids(cfg: DatasetConfig, path: Path, pixels: np.ndarray, top: int) -> np.ndarray:
    """`mask_ids` of a decoded TIFF (H, W, C)."""
    need, dtypes = ((1, 3), ("uint8",)) if cfg.mask_colours else ((1,), ("uint8", "uint16"))
    if pixels.shape[2] not in need or pixels.dtype not in dtypes:
        wanted = f"{' or '.join(map(str, need))} channels of {' or '.join(dtypes)}"
        raise DataError(f"mask {str(path)!r} holds {pixels.shape[2]} x {pixels.dtype}; save {wanted}")
    if cfg.mask_colours:
        return _painted_ids(cfg, path, np.broadcast_to(pixels, (*pixels.shape[:2], 3)), top)
    ids: np.ndarray = pixels[..., 0].astype(np.uint16)
    return ids


def _painted_ids(cfg: DatasetConfig, path: Path, pixels: np.ndarray, top: int) -> np.ndarray:
    """Color (H, W, 3) -> its position in data.mask_colours."""
    weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
    packed = pixels.astype(np.uint32) @ weights  # (H, W)
    known = np.array(cfg.mask_colours, np.uint32) @ weights  # (raw ids,)
    nearest, wrong = _places(known, packed)
    if wrong.any():
        missing = _missing(packed, wrong, np.array(cfg.mask_colours, np.float64))
        row, column = (
            int(value) for value in np.argwhere(wrong if missing is None else packed == missing)[0]
        )
        where = (
            f"mask {str(path)!r} has the color {pixels[row, column].tolist()} at row {top + row}, "
            f"column {column}, "
        )
        if missing is None:
            raise Defect("blended", f"{where}a blend of those in data.mask_colours, {SMOOTH}")
        text = "which data.mask_colours does not list; add it (data.label_map can ignore it)"
        raise Defect("painted", where + text)
    ids: np.ndarray = nearest.astype(np.uint16)
    return ids


def binary_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """True where the mask of one class isn't 0, bool (H, W); DataError for another size or many values."""
    data = read_file(path)
    if data[:8] != PNG_MAGIC:
        raise DataError(f"mask {str(path)!r} is not a PNG; ids do not survive other formats")
    pixels = decode_pixels(path, data)
    if pixels.ndim == 3:  # without its alpha
        pixels = pixels[..., : 1 if pixels.shape[2] < 3 else 3].max(2)
    if pixels.shape != size:
        text = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, its image {size[1]} x {size[0]}"
        raise Defect("size", f"mask {str(path)!r} is {text}; they must agree")
    if (pixels[inside := pixels > 0] != pixels.max()).any():
        values = len(np.unique(pixels))
        raise Defect("blended", f"mask {str(path)!r} of one class has {values} values, {SMOOTH}")
    return inside


def segment_ids(path: Path, raw_ids: Mapping[int, int]) -> np.ndarray:
    """Raw ids of a mask of segments in colors, uint16 (H, W); raw_ids: R + 256 G + 65536 B -> raw id."""
    pixels = decode_pixels(path, read_file(path), "RGB").astype(np.uint32)
    packed = pixels @ np.array([1, 1 << 8, 1 << 16], np.uint32)  # (H, W)
    nearest, wrong = _places(np.array([*raw_ids], np.uint32), packed)
    if wrong.any():
        unknown = np.unique(packed[wrong]).tolist()
        text = f"mask {str(path)!r} has {len(unknown)} segments without an entry in the labels "
        raise DataError(f"{text}({listed(map(str, unknown))}); export both again")
    ids: np.ndarray = np.array([*raw_ids.values()], np.uint16)[nearest]
    return ids


def _places(known: np.ndarray, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place in `known` of each value, any where there is none; True where there is none."""
    order = np.argsort(known)
    places = order[np.searchsorted(known, packed, sorter=order).clip(max=len(known) - 1)]
    return places, known[places] != packed


def _missing(packed: np.ndarray, wrong: np.ndarray, known: np.ndarray) -> int | None:
    """The most frequent color of those not listed that is no blend; None where blends have more pixels.

    packed, wrong: (H, W). known: float (raw ids, 3).
    """
    colors, counts = np.unique(packed[wrong], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:256]
    colors, counts = colors[most], counts[most]
    around = np.lib.stride_tricks.sliding_window_view(np.pad(packed, 1, mode="edge"), (3, 3))
    areas = np.unique(packed[wrong & (around == packed[..., None, None]).all((2, 3))])
    points = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], 1).astype(np.float64)  # (C, 3)
    near = np.abs(points[:, None] - known).max(2).min(1) <= _NEAR
    between = np.zeros(len(colors), bool)
    for start in known:
        lines = known - start  # (raw ids, 3)
        along = ((points - start) @ lines.T) / np.maximum((lines**2).sum(1), 1)  # (C, raw ids)
        places = start + along.clip(0, 1)[..., None] * lines
        between |= np.abs(points[:, None] - places).max(2).min(1) <= _BETWEEN
    blends = between & ~np.isin(colors, areas) | near & (len(colors) > 2)
    if counts[blends].sum() >= counts[~blends].sum():
        return None
    return int(colors[~blends][0])


def mask_colors(path: Path) -> list[tuple[int, ...]]:
    """The first MAX_COLORS colors of a mask."""
    pixels = decode_pixels(path, read_file(path), "RGB").reshape(-1, 3)
    return [tuple(color) for color in np.unique(pixels, axis=0)[:MAX_COLORS].tolist()]


def color_remedy(colors: Counter[tuple[int, ...]], classes: int) -> str:
    """What to do about masks with colors in the place of ids."""
    if len(colors) > 4 * max(LISTED, classes):
        return f"the masks have {len(colors)} colors or more, {SMOOTH}"
    if all(len(set(color)) == 1 for color in colors):
        return "all of them are grey, so the ids lie in each channel: save one channel as the mask"
    found = [list(color) for color, _ in colors.most_common()]
    return (
        f"give their colors in the order of the raw ids, such as {override('data.mask_colours', found)} "
        "(found, most frequent first)"
    )


def explained(cfg: DatasetConfig, defect: Defect, masks: Sequence[Path]) -> DataError:
    """The defect of one mask, with what to do about it in view of up to 256 masks of the set."""
    looked_at = masks[:: -(-len(masks) // _LOOKED_AT) or 1]
    remedy = ""
    if defect.kind == "colour":
        colors: Counter[tuple[int, ...]] = Counter()
        for path in looked_at:
            with suppress(DataError):
                colors.update(mask_colors(path))
        remedy = color_remedy(colors, len(cfg.classes))
    elif defect.kind == "ids" and not cfg.label_map:
        remedy = id_remedy(Labels.configured(cfg, cfg.classes), set(_ids(cfg, looked_at)))
    return DataError(f"{defect.text}; {remedy}" if remedy else defect.text)


def _ids(cfg: DatasetConfig, masks: Sequence[Path]) -> Iterator[int]:
    for path in masks:
        with suppress(DataError):
            yield from np.unique(mask_ids(cfg, path)).tolist()


def classes_in(cfg: DatasetConfig, keys: Sequence[str], masks: Mapping[str, str]) -> list[set[Any]]:
    """The classes of each image: train ids in its mask, raw ids without data.classes; none where the mask is
    not usable, which others say. Masks that rest are read once for all splits."""
    if cfg.task == "classification":
        return [{key.partition("/")[0]} for key in keys]
    facts = []
    for path in (masks.get(key, "") for key in keys):
        found = os.stat(path) if os.path.exists(path) else None
        facts.append((path, found and (found.st_size, found.st_mtime_ns)))
    colors = tuple(map(tuple, cfg.mask_colours))
    table = label_table(cfg) if cfg.classes else np.arange(MAX_RAW_ID + 1)
    return [{int(table[raw]) for raw in ids} - {-1, IGNORE_INDEX} for ids in _read_ids(colors, tuple(facts))]


@functools.lru_cache(maxsize=2)
def _read_ids(colors: tuple[tuple[int, ...], ...], facts: tuple[tuple[str, Any], ...]) -> list[list[int]]:
    cfg = DatasetConfig(mask_colours=[list(color) for color in colors])

    def read(fact: tuple[str, Any]) -> list[int]:
        return list(_ids(cfg, [Path(fact[0])]))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(read, facts)
        return list(tqdm(found, "classes", len(facts), unit="mask", leave=False, disable=None))


def unknown_ids(cfg: DatasetConfig, found: Sequence[int]) -> list[int]:
    """The raw ids that are neither a class nor in the label map, ascending."""
    table = label_table(cfg)
    return sorted(value for value in found if table[value] < 0)
