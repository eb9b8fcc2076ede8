"""The description of a data set: where its files lie, what its labels mean, and the limits of an image.

Segmentation                                            Classification
    root/<image_dir>/<key><image_suffix>  photograph        root/<image_dir>/<class>/<name><image_suffix>
    root/<mask_dir>/<key><mask_suffix>    PNG of raw ids

`{split}` in a folder name is replaced by the split, or by what `split_dirs` gives for it; sub-folders become
part of the key. A raw id becomes a train id 0..K-1, or IGNORE_INDEX, through `label_map`; an empty map means
raw id = train id, and 255 is ignored unless the map says otherwise. `listing.py` lists and reads the files.

Refused: settings that contradict each other, named by their key."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from segformer.errors import ConfigError, listed

IGNORE_INDEX = 255
MAX_CLASSES = 255  # of a segmentation set: masks are written with 8 bits
MAX_IMAGE_CLASSES = 65535  # of a classification set: the index of a shard keeps 16 bits
MAX_RAW_ID = 65535
MAX_PIXELS = 50_000_000  # a 164 KB PNG can hold 169 million pixels; the header is checked before decoding
MAX_TILED_PIXELS = 1_000_000_000  # of an image that is cut into tiles
MAX_TILED_BYTES = 2**31  # of the file of such an image where it is decoded whole: no TIFF, hardly a PNG
MAX_FILE_BYTES = 64 * 2**20
DTYPES, MAX_CHANNELS = ("uint8", "uint16", "float32"), 32
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png", ".tif", ".tiff")
IMAGE_SUFFIXES = (*PHOTO_SUFFIXES, ".tif", ".tiff", ".webp", ".bmp")
FORMATS = "JPEG, PNG, TIFF, WebP or BMP"
TASKS = ("segmentation", "classification")
DIVISION = ("val_share", "val_seed", "test_share", "fold", "group", "stratify")  # of one pool of images
ANY = "*"  # in a list of names: all

_OKABE_ITO = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
_COUNT = {2: "two", 3: "three"}
_FOLD = re.compile(r"([0-9]{1,4})/([0-9]{1,4})", re.ASCII)
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*")


class Pixels(NamedTuple):
    """What the images of a set hold: (H, W, channels) of a dtype of DTYPES."""

    channels: int = 3
    dtype: str = "uint8"

    def __str__(self) -> str:
        return f"{self.channels} x {self.dtype}"


RGB = Pixels()


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """Where a data set lies, how it is laid out and what its labels mean."""

    name: str = ""
    """Short name, written into the shards."""
    task: str = "segmentation"
    """segmentation (a mask per image) or classification (a folder of images per class)."""
    root: str = ""
    """Source folder that data_prep/shard.py reads; training does not need it."""
    shards: str = ""
    """Folder that data_prep/shard.py writes and training reads."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"])
    """Splits to shard, by the names that training uses."""
    split_dirs: dict[str, str] = field(default_factory=dict)
    """Split -> what {split} stands for in image_dir and mask_dir; a split that is not named: its own name."""
    split_lists: dict[str, str] = field(default_factory=dict)
    """Split -> text file below root with one key a line; a split that is not named: every file there is."""
    val_share: float = 0.0
    """Where all splits have one folder: the second's share of its images, by val_seed and key; 0: none."""
    test_share: float = 0.0
    """The third split's share; 0: there is none."""
    fold: str = ""
    """In the place of val_share: 2/5 = the second split is the second fifth, the first split the others."""
    group: str = ""
    """What belongs together and goes into one split: folder, a regular expression on the key whose first
    (group) it is, or a column of a CSV; empty = each image by itself."""
    stratify: bool = False
    """Divide so that each class is in the same share of the images of every split; reads all masks."""
    val_seed: int = 0
    """Another seed, another division."""
    allow_duplicates: list[str] = field(default_factory=list)
    """Splits that may hold images of other splits."""
    image_dir: str = "images/{split}"
    """Image folder below root; of a classification set the folder that holds the class folders."""
    mask_dir: str = "masks/{split}"
    """Mask folder below root."""
    image_suffix: str = ""
    """End of every image file name, in any case: _left.png, or _left for each of IMAGE_SUFFIXES."""
    mask_suffix: str = ".png"
    """End of every mask file name, in any case; PNG, or TIFF (.tif, .tiff)."""
    image_range: list[int] = field(default_factory=list)
    """Values of 16-bit images that become 0 and 255; empty = their upper 8 bits."""
    channels: int = 3
    """Channels of every image, 1 to 32; of 3, gray files become three equal ones."""
    dtype: str = ""
    """uint8, uint16 or float32; empty = uint8, or that of the first file where it is a TIFF."""
    mask_colours: list[list[int]] = field(default_factory=list)
    """Masks that are painted in colors: [red, green, blue] of raw id 0, 1, ...; empty = masks hold ids."""
    classes: list[str] = field(default_factory=list)
    """Class names; the position is the train id. Classification: empty = the names of the class folders."""
    class_dirs: list[str] = field(default_factory=list)
    """Classification: class folders in the order of their ids; empty = those of all splits, sorted."""
    palette: list[list[int]] = field(default_factory=list)
    """One [red, green, blue] of 0-255 per class, for pictures; empty = generated colors."""
    format: str = ""
    """Of label files in the place of masks: coco, yolo, ... (docs/datasets.md); empty = found by itself."""
    labels: str = ""
    """Label file or folder below root, with {split}; empty = where its format usually has it."""
    uncovered: str = "background"
    """Class of the pixels that no shape of a label file covers; ignore = neither trained nor scored."""
    columns: dict[str, str] = field(default_factory=dict)
    """Of a table: image, mask or split -> the column that holds it, where that is called otherwise."""
    category_map: dict[str, str] = field(default_factory=dict)
    """Category of a label file -> class, or ignore; a category that is not named: the class of its name."""
    label_map: dict[int, int] = field(default_factory=dict)
    """Raw id in the masks -> train id or 255 (ignored); empty = raw ids are train ids."""
    drop_classes: list[str] = field(default_factory=list)
    """Classes that min_share counts together."""
    min_share: float = 0.0
    """Training images in which drop_classes have less than this share of all pixels are left out; 0: none."""
    allow_unseen: list[str] = field(default_factory=list)
    """Classes that training images need not hold; [*] = any."""
    license: str = ""
    """License of the data, copied into the shards."""
    citation: str = ""
    """Source to cite, copied into the shards."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigError(f"data.{problem}")

    def _problems(self) -> Iterator[str]:
        if self.task not in TASKS:
            yield f"task={self.task!r} is unknown; use {' or '.join(TASKS)}"
        for key, allowed in (("image_suffix", ("", *IMAGE_SUFFIXES)), ("mask_suffix", MASK_SUFFIXES)):
            suffix = getattr(self, key)
            if "/" in suffix or os.path.splitext(f"key{suffix}")[1].lower() not in allowed:
                formats = FORMATS if "" in allowed else "PNG: lossy formats change ids"
                ends = " or ".join(filter(None, allowed))
                yield f"{key}={suffix!r} must end in {ends}; convert other files to {formats}"
        for key in ("splits", "split_dirs", "split_lists"):
            for split in getattr(self, key):
                if not _SPLIT_NAME.fullmatch(split):
                    yield f"{key} names {split!r}; use letters, digits, '_' and '-' only"
        foreign = ["class_dirs"]
        if self.task == "classification":
            foreign = [
                "label_map",
                "mask_colours",
                "drop_classes",
                "min_share",
                "format",
                "labels",
                "category_map",
            ]
        for key in foreign:
            if getattr(self, key):
                yield f"{key} means nothing where data.task={self.task}; leave it out"
        yield from self._class_problems()
        if self.image_range:
            low, high = self.image_range if len(self.image_range) == 2 else (0, 0)
            if not 0 <= low < high <= MAX_RAW_ID:
                yield f"image_range={self.image_range}; give [lowest,highest] of 0 to {MAX_RAW_ID}"
            if self.dtype not in ("", "uint8"):
                yield f"image_range makes 8 bits of 16, and data.dtype={self.dtype}; leave one of them out"
        if not 1 <= self.channels <= MAX_CHANNELS:
            yield f"channels={self.channels}; use 1 to {MAX_CHANNELS}"
        if self.dtype not in ("", *DTYPES):
            yield f"dtype={self.dtype!r} is unknown; use {', '.join(DTYPES)}"
        yield from _color_problems("palette", self.palette)
        yield from _color_problems("mask_colours", self.mask_colours)
        last = len(self.classes) - 1
        for raw, train in self.label_map.items():
            if not 0 <= raw <= MAX_RAW_ID:
                yield f"label_map has the raw id {raw}; masks hold 0 to {MAX_RAW_ID}"
            if not 0 <= train <= last and train != IGNORE_INDEX:
                yield f"label_map maps {raw} to {train}; use 0 to {last} or 255 (ignore)"
        yield from self._division_problems()
        if not 0 <= self.min_share < 1:
            yield f"min_share={self.min_share}; use a share of the pixels, 0 to below 1"
        if self.min_share and not self.drop_classes:
            yield f"min_share={self.min_share} needs data.drop_classes, the classes that are counted"
        for key, known in (("drop_classes", self.classes), ("allow_unseen", [*self.classes, ANY])):
            unknown = [name for name in getattr(self, key) if name not in known]
            if unknown and (self.classes or key == "drop_classes"):
                yield f"{key} names {listed(unknown)}, which data.classes does not have"

    @property
    def is_divided(self) -> bool:
        """All splits are made of one pool of images."""
        return bool(self.val_share or self.fold)

    def _division_problems(self) -> Iterator[str]:
        for key in ("val_share", "test_share"):
            if not 0 <= getattr(self, key) < 1:
                yield f"{key}={getattr(self, key)}; use a share of the images, 0 to below 1"
        if self.fold:
            number, count = map(int, found.groups()) if (found := _FOLD.fullmatch(self.fold)) else (0, 0)
            if not 1 <= number <= count >= 2:
                yield f"fold={self.fold!r}; use <fold>/<folds>, such as 2/5"
        if self.fold and self.val_share:
            yield f"fold={self.fold} and data.val_share={self.val_share} both say what is val; leave one out"
        if (both := self.val_share + self.test_share) >= 1:
            yield f"val_share and data.test_share are {both:g} together; give less than 1"
        for key in ("test_share", "group", "stratify"):
            if (value := getattr(self, key)) and not self.is_divided:
                yield f"{key}={value!r} divides nothing by itself; add data.val_share=0.2 or data.fold=1/5"
        if self.group.count("(") and (wrong := _pattern_problem(self.group)):
            yield f"group={self.group!r} {wrong}; use a regular expression whose first (group) is the group"
        names = ["train", "val", "test"] if self.test_share else ["train", "val"]
        if self.is_divided and (len(self.splits) != len(names) or self.split_lists):
            give = f"give {setting('splits', '[' + ','.join(names) + ']')}"
            lists = "leave data.split_lists out" if self.split_lists else ""
            do = " and ".join(filter(None, (give if len(self.splits) != len(names) else "", lists)))
            yield f"{self.dividing} divides one folder into {_COUNT[len(names)]} splits; {do}"

    @property
    def dividing(self) -> str:
        """The setting that divides."""
        return f"fold={self.fold}" if self.fold else f"val_share={self.val_share}"

    def _class_problems(self) -> Iterator[str]:
        count, limit = len(self.classes), MAX_IMAGE_CLASSES
        if self.task == "segmentation" and count > MAX_CLASSES:
            yield f"classes has {count} names; masks of 8 bit hold at most {MAX_CLASSES}"
        for key in ("classes", "class_dirs"):
            names = getattr(self, key)
            if len(names) > limit:
                yield f"{key} has {len(names)} names; at most {limit}"
            if twice := sorted(name for name, times in Counter(names).items() if times > 1):
                yield f"{key} names {listed(twice)} twice; class names must differ"
        if count and self.class_dirs and count != len(self.class_dirs):
            yield (
                f"classes has {count} names for {len(self.class_dirs)} folders of data.class_dirs; "
                "give one name per folder or leave data.classes empty"
            )
        if self.palette and len(self.palette) != count:
            yield (
                f"palette has {len(self.palette)} colors for {count} classes; "
                "give one [r,g,b] per class or leave it empty"
            )
        for name in self.class_dirs:
            if name in ("", ".", "..") or "/" in name:
                yield f"class_dirs names {name!r}; give the name of a folder, not a path"

    @property
    def pixels(self) -> Pixels:
        """What its shards hold; a dtype that was left to the files counts as uint8."""
        return Pixels(self.channels, self.dtype or RGB.dtype)

    def folder(self, kind: str, split: str) -> str:
        """`image_dir` or `mask_dir` (kind: image or mask) of a split, below root."""
        pattern = self.image_dir if kind == "image" else self.mask_dir
        return pattern.replace("{split}", self.split_dirs.get(split, split))

    def check_one_folder(self) -> None:
        """ConfigError where the splits of a folder of masks are divided, and have one each."""
        if self.is_divided and len({self.folder("image", split) for split in self.splits}) > 1:
            raise ConfigError(
                f"data.{self.dividing} divides one folder into {_COUNT[len(self.splits)]} splits; give "
                f"{self.one_folder(self.val_share)}"
            )

    def one_folder(self, share: float, **folders: str) -> str:
        """Overrides that divide one folder (image=, mask=; else the first split's) into two splits."""
        first = self.splits[0] if self.splits else "train"
        kinds = ("image", "mask") if self.task == "segmentation" else ("image",)
        dirs = {f"{kind}_dir": folders.get(kind) or self.folder(kind, first) for kind in kinds}
        how = {"fold": self.fold} if self.fold else {"val_share": f"{share}"}
        return " ".join(setting(key, value) for key, value in (how | dirs).items())

    def column(self, role: str) -> str:
        """The column of a table that holds the image, mask or split."""
        return self.columns.get(role, role)

    def ends(self, kind: str) -> tuple[str, ...]:
        """How the names of images or masks (kind: image or mask) end, in small letters."""
        end = (self.image_suffix if kind == "image" else self.mask_suffix).lower()
        return (end,) if end.endswith(IMAGE_SUFFIXES) else tuple(end + suffix for suffix in IMAGE_SUFFIXES)


def setting(key: str, text: str) -> str:
    """`data.key=text`, for a key that takes a text or number, quoted for a shell."""
    return shlex.quote(f"data.{key}={text}")


def _pattern_problem(pattern: str) -> str:
    try:
        return "" if re.compile(pattern).groups else "has no group"
    except re.error as error:
        return f"is none ({error})"


def _color_problems(key: str, colors: list[list[int]]) -> Iterator[str]:
    for color in colors:
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            yield f"{key} holds {color}; a color is [red,green,blue], each 0 to 255"
    twice = [list(color) for color, count in Counter(map(tuple, colors)).items() if count > 1]
    if key == "mask_colours" and twice:
        yield f"{key} holds {twice[0]} twice; a color stands for one id"
    if len(colors) > MAX_RAW_ID + 1:
        yield f"{key} has {len(colors)} colors; at most {MAX_RAW_ID + 1}"


def class_palette(cfg: DatasetConfig) -> np.ndarray:
    """The colors of the classes, uint8 (K, 3).

    Where none are given: of up to 8 classes black and those of Okabe and Ito, which are bright and differ for
    the color-blind, too; of more those of Pascal VOC.
    """
    if cfg.palette:
        return np.array(cfg.palette, np.uint8)
    count = len(cfg.classes)
    return np.array(_OKABE_ITO[:count], np.uint8) if 0 < count <= len(_OKABE_ITO) else voc_palette(count)


def voc_palette(count: int) -> np.ndarray:
    """Pascal VOC's bit-reversed scheme, uint8 (count, 3)."""
    index = np.arange(count)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def label_table(cfg: DatasetConfig) -> np.ndarray:
    """Raw id -> train id, int16 (65536,); -1 where no class is known for a raw id."""
    if not cfg.classes:
        raise ConfigError("data.classes is empty; list the class names, in the order of their ids")
    table = np.full(MAX_RAW_ID + 1, -1, np.int16)
    table[IGNORE_INDEX] = IGNORE_INDEX
    mapping = cfg.label_map or {index: index for index in range(len(cfg.classes))}
    for raw, train in mapping.items():
        table[raw] = train
    return table
