"""The files of a data set: which samples a split has, and what of its folders does not fit.

`find_samples` walks the folders once with plain strings (a million files: a few seconds) and pairs image and
mask by their key, the path below the split's folder without the suffix; where there are label files in the
place of masks, their format (data/formats) says what belongs together. `sample.py` reads what it finds."""

import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from segformer.data.formats.base import SHOWN, defect
from segformer.data.formats.table import categories_of, label_format, labeled_samples
from segformer.data.sources.dataset import FORMATS, IMAGE_SUFFIXES, PHOTO_SUFFIXES, DatasetConfig, setting
from segformer.data.sources.division import divided, working_share
from segformer.data.sources.folder import (
    LeftOut,
    by_key,
    files_below,
    instead_text,
    is_hidden,
    left_out,
    no_root,
)
from segformer.data.sources.masks import Defect, classes_in
from segformer.data.sources.sample import Sample, noting
from segformer.errors import DataError, is_name, listed, printable, reraise_as
from segformer.files import read_text


@dataclass(slots=True)
class _Side:
    """The images or the masks of a split."""

    kind: str
    """image or mask"""
    folder: str
    ends: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    """Key -> file below the folder."""
    further: dict[str, str] = field(default_factory=dict)
    """Key -> a further file of that key."""


def find_samples(
    cfg: DatasetConfig, root: Path, split: str
) -> tuple[list[Sample], list[Defect], dict[str, LeftOut]]:
    """The samples of a split that can be used, sorted by key; what does not fit; and what else its folders,
    by their names below root, hold."""
    defects: list[Defect] = []
    with noting(defects, "listing"):
        return (_labeled if label_format(cfg, root) else _paired)(cfg, root, split)
    return [], defects, {}


def _paired(
    cfg: DatasetConfig, root: Path, split: str
) -> tuple[list[Sample], list[Defect], dict[str, LeftOut]]:
    """`find_samples` of folders of images and masks, or of classes."""
    samples: list[Sample] = []
    defects: list[Defect] = []
    left: dict[str, LeftOut] = {}
    labels: dict[str, int] = {}
    cfg.check_one_folder()
    with noting(defects, "listing"):
        sides = [
            _Side(kind, _folder(cfg, root, kind, split), cfg.ends(kind))
            for kind in (("image", "mask") if cfg.task == "segmentation" else ("image",))
        ]
        others = {folder: files_below(folder) for folder in dict.fromkeys(side.folder for side in sides)}
        # Where one folder holds both: the longer end first, masks before images.
        for side in sorted(sides, key=lambda side: (min(map(len, side.ends)), side.kind), reverse=True):
            side.files, side.further, others[side.folder] = by_key(
                side.folder, others[side.folder], side.ends
            )
        others[sides[0].folder] += _beside_photos(sides)
        for side in sides:
            twice = {f"{side.files[key]} = {name}" for key, name in side.further.items()}
            defects += defect(f"files in {side.folder!r} share the key of another", "keep one of each", twice)
        kinds = {folder: left_out(names) for folder, names in others.items()}
        left = {cfg.folder(side.kind, split): dict(kinds[side.folder]) for side in sides}
        if split in cfg.split_lists:
            keys, of = _listed_keys(cfg, root, split), f" of {cfg.split_lists[split]!r}"
            remedy = "a line of the list is one key, without folder and suffix"
            for side in sides:
                if unlisted := side.files.keys() - keys:
                    found = (len(unlisted), printable(side.files[min(unlisted)]))
                    left[cfg.folder(side.kind, split)][f"unlisted {side.kind}"] = found
        else:
            keys, of = set().union(*(side.files for side in sides)), ""
            paths = {key: f"{side.folder}/{name}" for side in sides[1:] for key, name in side.files.items()}
            keys = divided(cfg, split, keys, lambda asked: classes_in(cfg, asked, paths))
            remedy = _without_split(cfg, sides) or "add what is missing or remove the others"
            defects += _foreign(cfg, sides[0], others[sides[0].folder])
        for side in sides:
            end, there = "|".join(side.ends), kinds[side.folder]
            what = f"keys{of} have no file {side.folder}/<key>{end}"
            defects += defect(what, instead_text(side.kind, there) + remedy, keys - side.files.keys())
            if not keys:
                text = f"no file in {side.folder!r} ends in {end}: the split is empty"
                do = f"set data.{side.kind}_suffix or leave the split out of data.splits"
                do = instead_text(side.kind, there) + do
                defects.append(Defect("listing", f"{text}; {do}"))
        keys = keys.intersection(*(side.files for side in sides))
        if cfg.task == "classification":
            labels = {name: label for label, name in enumerate(class_folders(cfg, root))}
            outside = {key for key in keys if "/" not in key or key.partition("/")[0] not in labels}
            defects += _class_defects(cfg, sides[0].folder, outside)
            keys -= outside
        for key in sorted(keys):
            image, *masks = (f"{side.folder}/{side.files[key]}" for side in sides)
            label = labels.get(key.partition("/")[0])
            samples.append(Sample(key, image, masks[0] if masks else None, label))
    return samples, defects, {folder: found for folder, found in left.items() if found}


def _beside_photos(sides: Sequence[_Side]) -> list[str]:
    """Takes out of the images those of other formats where the JPEGs and PNGs are a whole set by themselves:
    each mask has one, or there are no masks. Such a set stays the same whatever lies beside it."""
    images, *masks = sides
    photos = {key for key, name in images.files.items() if name.lower().endswith(PHOTO_SUFFIXES)}
    if not photos or any(side.files.keys() - photos for side in masks):
        return []
    beside = [images.files.pop(key) for key in images.files.keys() - photos]
    doubled = [key for key, name in images.further.items() if not name.lower().endswith(PHOTO_SUFFIXES)]
    return beside + [images.further.pop(key) for key in doubled]


def _labeled(
    cfg: DatasetConfig, root: Path, split: str
) -> tuple[list[Sample], list[Defect], dict[str, LeftOut]]:
    """`find_samples` of label files."""
    samples, found = labeled_samples(cfg, root, split)
    known = {sample.key: sample for sample in samples}
    first = cfg.splits[0]
    alone = not cfg.is_divided or split == first
    if not alone and known.keys() != {sample.key for sample in labeled_samples(cfg, root, first)[0]}:
        do = "leave it out, or name one file or folder for all in data.labels and data.image_dir"
        raise DataError(f"data.{cfg.dividing} divides one pool, but {first} and {split} have their own; {do}")
    held = {one.key: categories_of(one) for one in found.labeled}
    masks = {one.key: one.mask_file for one in found.labeled if one.mask_file and one.segments is None}

    def present(asked: Sequence[str]) -> Sequence[Collection[Hashable]]:
        return classes_in(cfg, asked, masks) if masks else [held[key] for key in asked]

    keys, of = divided(cfg, split, set(known), present, found.columns), ""
    if split in cfg.split_lists:
        keys, of = _listed_keys(cfg, root, split), f" of {cfg.split_lists[split]!r}"
        found.skip(cfg.split_lists[split], "unlisted image", *known.keys() - keys)
    remedy = "a line of the list is one key, without folder and suffix"
    found.note(f"keys{of} have no image with labels", remedy, keys - known.keys())
    if not (keys or found.defects):
        do = "give its labels (data.labels) or leave the split out of data.splits"
        found.defects.append(Defect("listing", f"no image of {split} has labels: the split is empty; {do}"))
    left = {place: kinds for place, kinds in found.left.items() if kinds}
    return [known[key] for key in sorted(keys & known.keys())], found.defects, left


def _foreign(cfg: DatasetConfig, side: _Side, others: list[str]) -> Iterator[Defect]:
    """Images that data.image_suffix leaves out."""
    plain = cfg.image_suffix.lower() in IMAGE_SUFFIXES
    do = f"data.image_suffix='' reads {FORMATS}" if plain else "set data.image_suffix"
    pictures = {name for name in others if name.lower().endswith(PHOTO_SUFFIXES) and not is_hidden(name)}
    what = f"pictures in {side.folder!r} do not end in {cfg.image_suffix!r}"
    yield from defect(what, f"{do}, or remove them", pictures)


def class_folders(cfg: DatasetConfig, root: Path) -> list[str]:
    """Classification: the class folders in the order of their ids (`data.class_dirs`, or those found)."""
    if cfg.class_dirs:
        return list(cfg.class_dirs)
    found = set().union(*(_folders_in(_folder(cfg, root, "image", split)) for split in cfg.splits))
    if cfg.classes and len(cfg.classes) != len(found):
        raise DataError(
            f"{str(root)!r} has {len(found)} class folders ({listed(sorted(found), SHOWN)}) for the "
            f"{len(cfg.classes)} names of data.classes; set data.class_dirs, or leave data.classes empty"
        )
    if odd := sorted(name for name in found if not is_name(name)):
        raise DataError(
            f"{len(odd)} class folders have names that can't be written ({listed(odd)}); rename them"
        )
    return sorted(found)


def _class_defects(cfg: DatasetConfig, folder: str, outside: set[str]) -> Iterator[Defect]:
    """Class folders that are missing, and images outside of them."""
    do = "add them (empty, if the split has no such image) or correct data.class_dirs"
    missing = set(cfg.class_dirs) - _folders_in(folder)
    yield from defect(f"class folders are missing in {folder!r}", do, missing)
    what, do = f"images in {folder!r} are in no class folder", "move or remove them"
    yield from defect(what, f"{do}, or add their folder to data.class_dirs", outside)


def _folders_in(folder: str) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)}


def _folder(cfg: DatasetConfig, root: Path, kind: str, split: str) -> str:
    """The image or mask folder of a split; DataError where it is not there."""
    folder = root / cfg.folder(kind, split)
    if not os.path.isdir(root):  # False too where its parents may not be entered
        raise DataError(no_root(root))
    if not os.path.isdir(folder):
        remedy = ""
        with suppress(OSError):
            remedy = _divided_folder(cfg, root, split) or _other_folder(cfg, root, kind, split)
        remedy = remedy or f"set data.{kind}_dir, data.split_dirs or data.splits"
        raise DataError(f"{kind} folder {str(folder)!r} is not a folder; {remedy}")
    return str(folder)


def _divided_folder(cfg: DatasetConfig, root: Path, split: str) -> str:
    """How to divide what one folder holds, that of the other split or of none; "" without one."""
    kinds = ("image", "mask") if cfg.task == "segmentation" else ("image",)
    here = any(os.path.isdir(root / cfg.folder(kind, split)) for kind in kinds)
    if here or len(cfg.splits) != 2 or cfg.split_lists:
        return ""
    above = {kind: os.path.dirname(cfg.folder(kind, split)) for kind in kinds}
    for one in ({kind: cfg.folder(kind, other) for kind in kinds} for other in cfg.splits):
        if all(_holds(cfg, kind, root / name) for kind, name in one.items()):
            break
    else:
        one = above
        if not all(name and _holds(cfg, kind, root / name, below=False) for kind, name in one.items()):
            return ""
    folder = str(root / one["image"])
    share = cfg.val_share or working_share(cfg, {*by_key(folder, files_below(folder), cfg.ends("image"))[0]})
    return f"divide the one folder there is: {cfg.one_folder(share, **one)}" if share else ""


def _other_folder(cfg: DatasetConfig, root: Path, kind: str, split: str) -> str:
    """The folders beside the missing one that could be meant; "" without any."""
    own, other = cfg.image_dir, cfg.mask_dir
    if kind == "mask":
        own, other = other, own
    first, _, rest = own.partition("/")
    if "{split}" in first:
        return ""
    names = [name for name in sorted(_folders_in(str(root))) if name not in (first, other.partition("/")[0])]
    patterns = [f"{name}/{rest}".rstrip("/") for name in names]
    end = cfg.split_dirs.get(split, split)
    found = [name for name in patterns if _holds(cfg, kind, root / name.replace("{split}", end))]
    there = listed((name.partition("/")[0] for name in found), SHOWN)
    return f"there is {there}: give {' or '.join(setting(f'{kind}_dir', n) for n in found)}" if found else ""


def _holds(cfg: DatasetConfig, kind: str, folder: Path, *, below: bool = True) -> bool:
    """The folder, or one below it, holds a file that could be an image or mask."""
    walk = os.walk(folder)
    names = (name for _, _, files in (walk if below else [next(walk, ("", [], []))]) for name in files)
    return any(name.lower().endswith(cfg.ends(kind)) and not is_hidden(name) for name in names)


def _without_split(cfg: DatasetConfig, sides: list[_Side]) -> str:
    """What to set where the keys of a folder begin with the splits; "" where none do."""
    splits = {cfg.split_dirs.get(split, split) for split in cfg.splits}
    found = []
    for side in sides:
        pattern = cfg.image_dir if side.kind == "image" else cfg.mask_dir
        if (
            "{split}" not in pattern
            and side.files
            and {key.partition("/")[0] for key in side.files} <= splits
        ):
            found.append(setting(f"{side.kind}_dir", f"{pattern}/{{split}}"))
    return f"it has a folder for each split: give {' '.join(found)}" if found else ""


def _listed_keys(cfg: DatasetConfig, root: Path, split: str) -> set[str]:
    """The keys in the list of a split."""
    path = root / cfg.split_lists[split]
    what = f"the list {str(path)!r} of the split {split}"
    with reraise_as(DataError, f"{what} cannot be read", "set data.split_lists", on=(OSError, ValueError)):
        lines = read_text(path).splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise DataError(f"{what} is empty; write one key a line")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise DataError(f"{what} names {listed(twice)} twice; a sample comes once")
    return set(keys)
