"""The files of a data set: which samples a split has, and one sample as bytes, ids and sizes.

`list_samples` walks the folders once with plain strings (a million files: a few seconds) and pairs image and
mask by their key, the path below the split's folder without the suffix. `load_sample` reads one pair:

    image   the file's bytes as they are, decoded as training does, to make sure that it is whole
    mask    PNG: grey of 1 to 16 bits or indices (not colours) -> raw ids; or, with `data.mask_colours`,
            colours of 8 bits (RGB, RGBA without its alpha, indexed, grey) -> raw ids; then -> train ids

Refused: pairs that do not match, listed keys without file, damaged or too large images, masks of another size
than their image, unknown ids or colors, images outside the class folders, folders that cannot be read."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segformer.data.sources.dataset import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    DatasetConfig,
    image_header,
    label_table,
)
from segformer.data.sources.decode import (
    check_sums,
    decode_image,
    image_orientation,
    orientation_text,
    unusable,
)
from segformer.errors import DataError

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its mask (segmentation) or class id (classification) on disk."""

    key: str
    """Path below the split's folder without the suffix."""
    image_file: str
    """Path of the image; a string, because a set has millions."""
    mask_file: str | None = None
    """Path of the mask."""
    label: int | None = None
    """Class id."""

    @property
    def image(self) -> Path:
        return Path(self.image_file)

    @property
    def mask(self) -> Path | None:
        return None if self.mask_file is None else Path(self.mask_file)


@dataclass(frozen=True, slots=True)
class LoadedSample:
    """What one sample holds; mask uint8 (H, W) of train ids and IGNORE_INDEX, None in classification."""

    image: bytes
    mask: np.ndarray | None
    raw_ids: dict[int, int]
    """Raw id -> pixels, before the label map; empty in classification."""
    height: int
    width: int
    orientation: int = 1
    """EXIF orientation of the image, which is not applied."""


def list_samples(cfg: DatasetConfig, root: Path, split: str) -> list[Sample]:
    """Every sample of a split, sorted by key.

    DataError for a missing folder, an image without mask or a mask without image, an empty split, pictures in
    the image folder whose name does not end in `image_suffix`, and what a list of keys names in vain.
    """
    if cfg.task == "classification":
        return _list_images(cfg, root, split)
    image_dir, mask_dir = (_folder(cfg, root, kind, split) for kind in ("image", "mask"))
    images, others = find_files(image_dir, cfg.image_suffix)
    masks = find_files(mask_dir, cfg.mask_suffix)[0]
    if split in cfg.split_lists:
        keys = _listed(cfg, root, split)
        _check_listed(cfg, split, keys, images, f"{image_dir}/<key>{cfg.image_suffix}")
        _check_listed(cfg, split, keys, masks, f"{mask_dir}/<key>{cfg.mask_suffix}")
    else:
        if image_dir == mask_dir:
            others = [name for name in others if not name.endswith(cfg.mask_suffix)]
        _check_found(cfg, image_dir, images or masks, others)
        _check_pairs(cfg, (image_dir, mask_dir), images, masks)
        keys = images
    end = (cfg.image_suffix, cfg.mask_suffix)
    return [Sample(key, f"{image_dir}/{key}{end[0]}", f"{mask_dir}/{key}{end[1]}") for key in sorted(keys)]


def class_folders(cfg: DatasetConfig, root: Path) -> list[str]:
    """Classification: the class folders in the order of their ids (`data.class_dirs`, or those found)."""
    if cfg.class_dirs:
        return list(cfg.class_dirs)
    found: set[str] = set()
    for split in cfg.splits:
        folder = _folder(cfg, root, "image", split)
        found.update(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if cfg.classes and len(cfg.classes) != len(found):
        raise DataError(
            f"{str(root)!r} has {len(found)} class folders ({_some(found)}) for the {len(cfg.classes)} names "
            "of data.classes; set data.class_dirs, or leave data.classes empty"
        )
    return sorted(found)


def _list_images(cfg: DatasetConfig, root: Path, split: str) -> list[Sample]:
    folder = _folder(cfg, root, "image", split)
    labels = {name: label for label, name in enumerate(class_folders(cfg, root))}
    keys, others = find_files(folder, cfg.image_suffix)
    _check_found(cfg, folder, keys, others)
    there = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    if missing := [name for name in cfg.class_dirs if name not in there]:
        raise DataError(
            f"{len(missing)} of {len(labels)} class folders are missing in {folder!r} ({_some(missing)}); "
            "add them (empty, if the split has no such image) or correct data.class_dirs"
        )
    if stray := [key for key in keys if key.partition("/")[0] not in labels or "/" not in key]:
        raise DataError(
            f"{len(stray)} images in {folder!r} are in no class folder ({_some(stray)}); "
            "move or remove them, or add their folder to data.class_dirs"
        )
    if split in cfg.split_lists:
        listed = _listed(cfg, root, split)
        _check_listed(cfg, split, listed, keys, f"{folder}/<key>{cfg.image_suffix}")
        keys = listed
    end = cfg.image_suffix
    return [Sample(key, f"{folder}/{key}{end}", label=labels[key.partition("/")[0]]) for key in sorted(keys)]


def _folder(cfg: DatasetConfig, root: Path, kind: str, split: str) -> str:
    if not os.path.isdir(root):  # False too where its parents may not be entered
        raise DataError(f"data root {str(root)!r} is not a folder; give root=<folder of the data set>")
    folder = root / cfg.folder(kind, split)
    if not os.path.isdir(folder):
        raise DataError(
            f"{kind} folder {str(folder)!r} is missing; set data.{kind}_dir, data.split_dirs or data.splits"
        )
    return str(folder)


def find_files(folder: str, suffix: str) -> tuple[set[str], list[str]]:
    """Keys of the files that end in suffix, and the names of all other pictures, below the folder."""
    found: set[str] = set()
    others: list[str] = []
    cut = -len(suffix)
    for path in _walk(folder):
        if path.endswith(suffix) and path[:cut][-1:] not in ("", "/"):
            found.add(path[:cut])
        elif path.lower().endswith(IMAGE_SUFFIXES):
            others.append(path)
    return found, others


def _walk(folder: str) -> Iterator[str]:
    """Every file below, as sub/folder/name; links are followed, circles refused."""
    stack: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(folder), ())]
    while stack:
        prefix, real, left = stack.pop()  # left: the real folders of the links on the way here
        path = f"{folder}/{prefix[:-1]}" if prefix else folder
        if any(os.path.commonpath([real, place]) == real for place in left):
            raise DataError(f"{path!r} links to a folder that it lies in; remove the link")
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if not entry.is_dir():
                        yield name
                    elif entry.is_symlink():
                        stack.append((f"{name}/", os.path.realpath(entry.path), (*left, real)))
                    else:
                        stack.append((f"{name}/", f"{real}/{entry.name}", left))
        except OSError as error:
            reason = f"cannot be listed: {error.strerror}; check its permissions"
            raise DataError(f"{error.filename!r} {reason}") from error


def _listed(cfg: DatasetConfig, root: Path, split: str) -> set[str]:
    """The keys in the list of a split."""
    path = root / cfg.split_lists[split]
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(
            f"the list {str(path)!r} of the split {split} cannot be read: {reason}; set data.split_lists"
        ) from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise DataError(f"the list {str(path)!r} of the split {split} is empty; write one key a line")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise DataError(f"the list {str(path)!r} names {_some(twice)} twice; a sample comes once")
    return set(keys)


def _check_listed(cfg: DatasetConfig, split: str, keys: set[str], there: set[str], pattern: str) -> None:
    missing = keys - there
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(keys)} keys in {cfg.split_lists[split]!r} have no file {pattern} "
            f"({_some(missing)}); a line of the list is one key, without folder and suffix"
        )


def _check_found(cfg: DatasetConfig, folder: str, keys: set[str], others: list[str]) -> None:
    if others:
        raise DataError(
            f"{len(others)} pictures in {folder!r} do not end in {cfg.image_suffix!r} ({_some(others)}); "
            "set data.image_suffix, or convert or remove them"
        )
    if not keys:
        raise DataError(
            f"no file in {folder!r} ends in {cfg.image_suffix!r}: the split is empty; "
            "set data.image_suffix or leave the split out of data.splits"
        )


def _check_pairs(cfg: DatasetConfig, folders: tuple[str, str], images: set[str], masks: set[str]) -> None:
    sides = ("image", folders[0], images, cfg.image_suffix), ("mask", folders[1], masks, cfg.mask_suffix)
    for (kind, folder, keys, _), (other, place, partners, suffix) in (sides, sides[::-1]):
        if alone := keys - partners:
            raise DataError(
                f"{len(alone)} of {len(keys)} {kind}s in {folder!r} have no {other} ({_some(alone)}); "
                f"add <key>{suffix} to {place!r} or remove them"
            )


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def load_sample(cfg: DatasetConfig, sample: Sample) -> LoadedSample:
    """One sample, whole and checked; DataError names the file and what was found."""
    image = read_file(sample.image)
    height, width = whole_image(sample.image, image).shape[:2]
    orientation = image_orientation(image)
    if sample.mask is None:
        return LoadedSample(image, None, {}, height, width, orientation)
    raw = mask_ids(cfg, sample.mask)
    if raw.shape != (height, width):
        raise DataError(
            f"mask {str(sample.mask)!r} is {raw.shape[1]} x {raw.shape[0]} pixels, "
            f"its image {width} x {height}; they must agree{orientation_text(orientation)}"
        )
    counts = np.bincount(raw.reshape(-1))
    raw_ids = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    table = label_table(cfg)
    if unknown := [value for value in raw_ids if table[value] < 0]:
        shown = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        known = "the keys of data.label_map" if cfg.label_map else f"0 to {len(cfg.classes) - 1}"
        raise DataError(
            f"mask {str(sample.mask)!r} holds the ids {shown}, outside {known} and 255; "
            "add them to data.classes or map them in data.label_map (255 = ignore)"
        )
    return LoadedSample(image, table.astype(np.uint8)[raw], raw_ids, height, width, orientation)


def read_file(path: Path, first: int = -1) -> bytes:
    """All bytes, or the first so many, of a file of at most MAX_FILE_BYTES."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{str(path)!r} has {size} bytes; the limit for one file is {MAX_FILE_BYTES}; make it smaller"
            )
        with path.open("rb") as stream:
            return stream.read(first)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions") from error


def whole_image(path: Path, data: bytes) -> np.ndarray:
    """RGB uint8 (H, W, 3) of an image that is whole, as training decodes it."""
    if data[:8] != _PNG_MAGIC:  # Pillow refuses damaged JPEGs that OpenCV fills up, but no further PNGs
        decode_pixels(path, data)
    try:
        image_header(data)
        check_sums(data)
        return decode_image(data)
    except (ValueError, DataError) as error:
        raise unusable(path, error) from error


def decode_pixels(path: Path, data: bytes, mode: str | None = None) -> np.ndarray:
    """Pixels of a JPEG or PNG, as stored or in a mode of Pillow."""
    from PIL import Image  # heavy, and only preparing data needs it

    try:
        image_header(data)
        check_sums(data)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture if mode is None else picture.convert(mode))
    except (ValueError, OSError, SyntaxError) as error:
        raise unusable(path, error) from error


def mask_ids(cfg: DatasetConfig, path: Path) -> np.ndarray:
    """Raw ids of a mask before the label map, uint16 (H, W)."""
    data = read_file(path)
    if data and data[:8] != _PNG_MAGIC:
        raise DataError(f"mask {str(path)!r} is not a PNG; ids do not survive other formats")
    return _painted_ids(cfg, path, data) if cfg.mask_colours else _stored_ids(path, data)


def _stored_ids(path: Path, data: bytes) -> np.ndarray:
    """Grey of 1 to 16 bits, or the indices (not the colours) of an indexed PNG."""
    pixels = decode_pixels(path, data)
    if pixels.ndim != 2:
        raise DataError(
            f"mask {str(path)!r} is not a PNG with one channel ({pixels.shape[2]} channels); store ids as "
            "grey or indexed PNG, or list its colours in data.mask_colours"
        )
    bits, colour_type = data[24], data[25]
    if colour_type == 0 and bits in (2, 4):  # Pillow stretches grey of 2 and 4 bits to 0..255
        pixels = pixels // (255 // (2**bits - 1))
    ids: np.ndarray = pixels.astype(np.uint16)
    return ids


def _painted_ids(cfg: DatasetConfig, path: Path, data: bytes) -> np.ndarray:
    """Colour -> its position in data.mask_colours."""
    if len(data) > 24 and data[24] == 16:
        raise DataError(f"mask {str(path)!r} has 16 bits a channel; data.mask_colours are of 8 bits")
    pixels = decode_pixels(path, data, "RGB").astype(np.uint32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]  # (H, W)
    colours = np.array(cfg.mask_colours, np.uint32)
    known = colours[:, 0] << 16 | colours[:, 1] << 8 | colours[:, 2]  # (raw ids,)
    order = np.argsort(known)
    nearest = order[np.searchsorted(known, packed, sorter=order).clip(max=len(known) - 1)]
    wrong = known[nearest] != packed
    if wrong.any():
        row, column = (int(value) for value in np.argwhere(wrong)[0])
        raise DataError(
            f"mask {str(path)!r} has the colour {pixels[row, column].tolist()} at row {row}, column "
            f"{column}, which data.mask_colours does not list; add it (data.label_map can ignore it)"
        )
    ids: np.ndarray = nearest.astype(np.uint16)
    return ids
