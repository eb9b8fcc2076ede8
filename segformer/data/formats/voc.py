"""Pascal VOC: masks of one folder, divided by lists; with the names and colors that CVAT and labelme write.

    JPEGImages/<key>.jpg
    SegmentationClass/<key>.png               ids; or the colors of labelmap.txt
    ImageSets/Segmentation/<split>.txt        one key a line; without any list all masks are one pool
    labelmap.txt                              <category>:<red>,<green>,<blue>:...  (CVAT)
    class_names.txt                           one category a line, in the order of the ids (labelme)

Without names, ids mean what `data.classes` says. A key of a list without an image or mask is a defect; images
and masks that no list of the split names are counted."""

import re
from pathlib import Path

from segformer.data.formats.base import Found, Labeled, defect, label_lines, parts_of
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.folder import by_key, files_below, left_out
from segformer.errors import DataError, printable

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
_COLORED = re.compile(r"([^:]+):([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})(:.*)?", re.ASCII)


def detect(cfg: DatasetConfig, root: Path) -> bool:
    """Both folders are there."""
    return (root / IMAGES).is_dir() and (root / MASKS).is_dir()


def read(cfg: DatasetConfig, root: Path, split: str) -> Found:
    """The masks of a split."""
    found = Found(covers=True)
    colors = _categories(root, found)
    sides: dict[str, dict[str, str]] = {}
    for folder, ends in ((IMAGES, cfg.ends("image")), (MASKS, cfg.ends("mask"))):
        if not (root / folder).is_dir():
            raise DataError(f"{str(root / folder)!r} is not a folder; give root=<folder that holds {folder}>")
        sides[folder], further, others = by_key(str(root / folder), files_below(str(root / folder)), ends)
        same = {f"{sides[folder][key]} = {name}" for key, name in further.items()}
        found.defects += defect(f"files in {folder} share the key of another", "keep one of each", same)
        found.left[folder] = left_out(others)
    keys = _listed(cfg, root, split)
    wanted = {*sides[MASKS]} if keys is None else keys
    for folder, files in sides.items():
        do = f"add them, or take them out of {MASKS if keys is None else LISTS}"
        found.defects += defect(f"keys have no file in {folder}", do, wanted - files.keys())
        if unlisted := files.keys() - wanted:
            kind = f"unlisted {'image' if folder == IMAGES else 'mask'}"
            found.left[folder][kind] = (len(unlisted), printable(files[min(unlisted)]))
    for key in sorted(wanted & sides[IMAGES].keys() & sides[MASKS].keys()):
        image, mask = (f"{root / folder}/{files[key]}" for folder, files in sides.items())
        found.labeled.append(Labeled(key, image, mask_file=mask, segments=colors))
    found.left = {folder: kinds for folder, kinds in found.left.items() if kinds}
    return found


def _listed(cfg: DatasetConfig, root: Path, split: str) -> set[str] | None:
    """The keys of a split; None where there is no list."""
    lists = {path.stem: path for path in sorted((root / LISTS).glob("*.txt"))}
    parts = parts_of(cfg, split, lists, f"{LISTS} has the lists") if lists else []
    lines = [line.strip() for part in parts for line in label_lines(lists[part])]
    return {line for line in lines if line and line[0] != "#"} if lists else None


def _categories(root: Path, found: Found) -> dict[int, str] | None:
    """Note the names of the categories; R + 256 G + 65536 B -> category where masks are painted."""
    if (path := root / "class_names.txt").is_file():
        names = [line.strip() for line in label_lines(path)]
        found.categories = [name for name in names if name and name != "__ignore__"]
    if not (path := root / "labelmap.txt").is_file():
        return None
    colors: dict[int, str] = {}
    for number, line in enumerate(label_lines(path), 1):
        if not line.strip() or line[0] == "#":
            continue
        match = _COLORED.fullmatch(line.strip())
        if match is None or max(rgb := [int(value) for value in match.groups()[1:4]]) > 255:
            form = "<category>:<red>,<green>,<blue>:..."
            raise DataError(f"line {number} of {str(path)!r} is {line.strip()[:40]!r}; it must be {form}")
        colors[rgb[0] + 256 * rgb[1] + 65536 * rgb[2]] = match[1]
    found.categories = list(colors.values())
    return colors
