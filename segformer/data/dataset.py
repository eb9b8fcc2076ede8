"""A segmentation data set as people keep it: a folder of images beside a folder of masks.

    root/<image_dir>/<key><image_suffix>     JPEG or PNG photograph
    root/<mask_dir>/<key><mask_suffix>       PNG, one channel of raw label ids (grey, indexed or 16 bit)

`{split}` in both folder names is replaced by the split; sub-folders become part of the key. A raw id
becomes a train id 0..K-1, or IGNORE_INDEX, through `label_map`; an empty map means raw id = train id, and
255 is ignored unless the map says otherwise.

Refused: pairs that do not match up, files of another format, images above MAX_PIXELS, damaged images, masks
of another size than their image, masks with colour channels, ids that no class is known for. Nothing is
skipped."""

import io
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segformer.errors import ConfigError, DataError

IGNORE_INDEX = 255
MAX_CLASSES = 255
MAX_PIXELS = 50_000_000  # a 164 KB PNG can hold 169 million pixels; the header is checked before decoding
MAX_FILE_BYTES = 64 * 2**20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """Where a data set lies, how it is laid out and what its labels mean."""

    name: str = ""
    """Short name, written into the shards."""
    root: str = ""
    """Source folder that data_prep/shard.py reads; training does not need it."""
    shards: str = ""
    """Folder that data_prep/shard.py writes and training reads."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"])
    """Splits to shard, by the names used in the folder names."""
    image_dir: str = "images/{split}"
    """Image folder below root."""
    mask_dir: str = "masks/{split}"
    """Mask folder below root."""
    image_suffix: str = ".jpg"
    """End of every image file name: .jpg, .jpeg or .png, or longer (_leftImg8bit.png)."""
    mask_suffix: str = ".png"
    """End of every mask file name; PNG."""
    classes: list[str] = field(default_factory=list)
    """Class names; the position is the train id."""
    palette: list[list[int]] = field(default_factory=list)
    """One [red, green, blue] of 0-255 per class, for pictures; empty = generated colours."""
    label_map: dict[int, int] = field(default_factory=dict)
    """Raw id in the masks -> train id or 255 (ignored); empty = raw ids are train ids."""
    license: str = ""
    """Licence of the data, copied into the shards."""
    citation: str = ""
    """Source to cite, copied into the shards."""

    def __post_init__(self) -> None:
        for key in ("image_suffix", "mask_suffix"):
            suffix = getattr(self, key)
            allowed = IMAGE_SUFFIXES if key == "image_suffix" else (".png",)
            if not suffix.lower().endswith(allowed):
                raise ConfigError(
                    f"data.{key}={suffix!r} is not supported; it must end in {' or '.join(allowed)}"
                )
        for split in self.splits:
            if not _SPLIT_NAME.fullmatch(split):
                raise ConfigError(f"data.splits names {split!r}; use letters, digits, '_' and '-' only")
        if len(self.classes) > MAX_CLASSES:
            raise ConfigError(
                f"data.classes has {len(self.classes)} names; masks of 8 bit hold at most {MAX_CLASSES}"
            )
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ConfigError(f"data.classes names {', '.join(twice)} twice; class names must differ")
        self._check_palette()
        self._check_label_map()

    def _check_palette(self) -> None:
        if self.palette and len(self.palette) != len(self.classes):
            raise ConfigError(
                f"data.palette has {len(self.palette)} colours for {len(self.classes)} classes; "
                "give one [r,g,b] per class or leave it empty"
            )
        for colour in self.palette:
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise ConfigError(f"data.palette holds {colour}; a colour is [red,green,blue], each 0 to 255")

    def _check_label_map(self) -> None:
        for raw, train in self.label_map.items():
            if not 0 <= raw <= 65535:
                raise ConfigError(f"data.label_map has the raw id {raw}; masks hold 0 to 65535")
            if not 0 <= train < len(self.classes) and train != IGNORE_INDEX:
                last = len(self.classes) - 1
                raise ConfigError(f"data.label_map maps {raw} to {train}; use 0 to {last} or 255 (ignore)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its mask on disk; `key` is the path below the split's folder without the suffix."""

    key: str
    image: Path
    mask: Path


def class_palette(cfg: DatasetConfig) -> np.ndarray:
    """The colours of the classes, uint8 (K, 3); Pascal VOC's bit-reversed scheme where none are given."""
    if cfg.palette:
        return np.array(cfg.palette, np.uint8)
    palette = np.zeros((len(cfg.classes), 3), np.uint8)
    for index in range(len(cfg.classes)):
        for bit in range(8):
            for channel in range(3):
                palette[index, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette


def label_table(cfg: DatasetConfig) -> np.ndarray:
    """Raw id -> train id, int16 (65536,); -1 where no class is known for a raw id."""
    if not cfg.classes:
        raise ConfigError("data.classes is empty; list the class names, in the order of their ids")
    table = np.full(65536, -1, np.int16)
    table[IGNORE_INDEX] = IGNORE_INDEX
    mapping = cfg.label_map or {index: index for index in range(len(cfg.classes))}
    for raw, train in mapping.items():
        table[raw] = train
    return table


def list_samples(cfg: DatasetConfig, root: Path, split: str) -> list[Sample]:
    """Every image of a split with its mask, sorted by key.

    DataError for a missing folder, an image without mask or a mask without image, an empty split, and for
    pictures in the image folder whose name does not end in `image_suffix`.
    """
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder; give root=<folder of the data set>")
    image_dir = root / cfg.image_dir.format(split=split)
    mask_dir = root / cfg.mask_dir.format(split=split)
    for kind, folder in (("image", image_dir), ("mask", mask_dir)):
        if not folder.is_dir():
            raise DataError(f"{kind} folder {str(folder)!r} is missing; set data.{kind}_dir or data.splits")
    images, others = _files(image_dir, cfg.image_suffix)
    masks, _ = _files(mask_dir, cfg.mask_suffix)
    if image_dir == mask_dir:
        others = [name for name in others if not name.endswith(cfg.mask_suffix)]
    _check_pairs(cfg, (image_dir, mask_dir), set(images), set(masks), others)
    return [Sample(key, images[key], masks[key]) for key in sorted(images)]


def _files(folder: Path, suffix: str) -> tuple[dict[str, Path], list[str]]:
    """key -> path of the files that end in suffix, and the names of all other pictures."""
    found: dict[str, Path] = {}
    others: list[str] = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if name.endswith(suffix):
                found[relative[: -len(suffix)]] = path
            elif name.lower().endswith(IMAGE_SUFFIXES):
                others.append(relative)
    return found, others


def _check_pairs(
    cfg: DatasetConfig, folders: tuple[Path, Path], images: set[str], masks: set[str], others: list[str]
) -> None:
    image_dir, mask_dir = (repr(str(folder)) for folder in folders)
    if others:
        raise DataError(
            f"{len(others)} pictures in {image_dir} do not end in {cfg.image_suffix!r} ({_some(others)}); "
            "set data.image_suffix, or convert or remove them"
        )
    if not images and not masks:
        raise DataError(
            f"no file in {image_dir} ends in {cfg.image_suffix!r}: the split is empty; "
            "set data.image_suffix or leave the split out of data.splits"
        )
    alone = images - masks
    if alone:
        raise DataError(
            f"{len(alone)} of {len(images)} images in {image_dir} have no mask ({_some(alone)}); "
            f"add <key>{cfg.mask_suffix} to {mask_dir} or remove them"
        )
    alone = masks - images
    if alone:
        raise DataError(
            f"{len(alone)} of {len(masks)} masks in {mask_dir} have no image ({_some(alone)}); "
            f"add <key>{cfg.image_suffix} to {image_dir} or remove them"
        )


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def image_header(data: bytes) -> tuple[str, int, int]:
    """("jpeg" or "png", height, width) from the first bytes of a file, without decoding.

    ValueError for other formats, broken headers and more than MAX_PIXELS pixels. JPEG: the frame header
    SOF0 to SOF2 (ITU-T T.81, B.2.2) after skipping every segment before it; PNG: IHDR.
    """
    if data[:8] == _PNG_MAGIC and data[12:16] == b"IHDR" and len(data) >= 33:
        kind = "png"
        width, height = struct.unpack(">II", data[16:24])
    elif data[:2] == b"\xff\xd8":
        kind = "jpeg"
        height, width = _jpeg_size(data)
    else:
        raise ValueError("not a JPEG or PNG file" if data else "empty file (0 bytes)")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; the limit is {MAX_PIXELS}")
    return kind, height, width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in (0xC0, 0xC1, 0xC2):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return height, width
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("JPEG without a baseline or progressive frame header")


def load_sample(cfg: DatasetConfig, sample: Sample) -> tuple[bytes, np.ndarray]:
    """The image file's bytes as they are, and the mask as train ids, uint8 (H, W) with IGNORE_INDEX.

    Decodes the image once to make sure that it is whole. DataError names the file and what was found.
    """
    image = _read(sample.image)
    height, width = _decoded(sample.image, image).shape[:2]
    raw = _mask_ids(sample.mask, _read(sample.mask))
    if raw.shape != (height, width):
        raise DataError(
            f"mask {str(sample.mask)!r} is {raw.shape[1]} x {raw.shape[0]} pixels, "
            f"its image {width} x {height}; they must agree"
        )
    mask: np.ndarray = label_table(cfg)[raw]
    if mask.min() < 0:
        unknown = [int(value) for value in np.unique(raw[mask < 0])]
        shown = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        known = "the keys of data.label_map" if cfg.label_map else f"0 to {len(cfg.classes) - 1}"
        raise DataError(
            f"mask {str(sample.mask)!r} holds the ids {shown}, outside {known} and 255; "
            "add them to data.classes or map them in data.label_map (255 = ignore)"
        )
    return image, mask.astype(np.uint8)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{str(path)!r} has {size} bytes; the limit for one file is {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


def _decoded(path: Path, data: bytes) -> np.ndarray:
    """Pixels by Pillow, which refuses a truncated file where OpenCV fills it up with grey."""
    from PIL import Image  # heavy, and only preparing data needs it

    try:
        image_header(data)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture)
    except (ValueError, OSError, SyntaxError) as error:
        raise DataError(f"{str(path)!r} is not a whole JPEG or PNG: {error}; replace or remove it") from error


def _mask_ids(path: Path, data: bytes) -> np.ndarray:
    """Raw ids (H, W) of a PNG: grey of 1 to 16 bits, or the indices (not the colours) of an indexed one."""
    pixels: np.ndarray = _decoded(path, data)
    if data[:8] != _PNG_MAGIC or pixels.ndim != 2:
        found = f"{pixels.ndim}-dimensional" if pixels.ndim != 3 else f"{pixels.shape[2]} channels"
        raise DataError(
            f"mask {str(path)!r} is not a PNG with one channel ({found}); store ids as grey or indexed PNG"
        )
    bits, colour_type = data[24], data[25]
    if colour_type == 0 and bits in (2, 4):  # Pillow stretches grey of 2 and 4 bits to 0..255
        pixels = pixels // (255 // (2**bits - 1))
    ids: np.ndarray = pixels.astype(np.uint16)
    return ids
