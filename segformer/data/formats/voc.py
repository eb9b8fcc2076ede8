"""Pascal VOC: masks of one folder, divided by lists; with the names and colors that CVAT and labelme write.

    JPEGImages/<key>.jpg
    SegmentationClass/<key>.png               ids; or the colors of labelmap.txt
    ImageSets/Segmentation/<split>.txt        one key a line; without any list all masks are one pool
    labelmap.txt                              <category>:<red>,<green>,<blue>:...  (CVAT)
    class_names.txt                           one category a line, in the order of the ids (labelme)

Without names, ids mean what `data.classes` says. A key of a list without an image or mask is a defect; images
and masks that no list of the split names are counted."""

import re

from segformer.data.formats.base import Found, Labeled, label_lines
from segformer.errors import DataError

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
_COLORED = re.compile(r"([^:]+):([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})(:.*)?", re.ASCII)


def detect(found: Found) -> bool:
    """Both folders are there."""
    return (found.root / IMAGES).is_dir() and (found.root / MASKS).is_dir()


def read(found: Found) -> None:
    """The masks of a split."""
    root, found.covers = found.root, True
    colors = _categories(found)
    sides: dict[str, dict[str, str]] = {}
    for folder, kind in ((IMAGES, "image"), (MASKS, "mask")):
        if not (root / folder).is_dir():
            raise DataError(f"{str(root / folder)!r} is not a folder; give root=<folder that holds {folder}>")
        sides[folder], others = found.files(folder, kind)
        found.skip_files(folder, others)
    keys = _listed(found)
    wanted = {*sides[MASKS]} if keys is None else keys
    for folder, files in sides.items():
        do = f"add them, or take them out of {MASKS if keys is None else LISTS}"
        found.note(f"keys have no file in {folder}", do, wanted - files.keys())
        kind = f"unlisted {'image' if folder == IMAGES else 'mask'}"
        found.skip(folder, kind, *(files[key] for key in files.keys() - wanted))
    for key in sorted(wanted & sides[IMAGES].keys() & sides[MASKS].keys()):
        image, mask = (f"{root / folder}/{files[key]}" for folder, files in sides.items())
        found.labeled.append(Labeled(key, image, mask_file=mask, segments=colors))


def _listed(found: Found) -> set[str] | None:
    """The keys of a split; None where there is no list."""
    lists = {path.stem: path for path in sorted((found.root / LISTS).glob("*.txt"))}
    parts = found.parts(lists, f"{LISTS} has the lists") if lists else []
    lines = [line for part in parts for line in label_lines(lists[part])]
    return {line for line in lines if line and line[0] != "#"} if lists else None


def _categories(found: Found) -> dict[int, str] | None:
    """Note the names of the categories; R + 256 G + 65536 B -> category where masks are painted."""
    if (path := found.root / "class_names.txt").is_file():
        found.categories = [name for name in label_lines(path) if name and name != "__ignore__"]
    if not (path := found.root / "labelmap.txt").is_file():
        return None
    colors: dict[int, str] = {}
    for number, line in enumerate(label_lines(path), 1):
        if not line or line[0] == "#":
            continue
        match = _COLORED.fullmatch(line)
        if match is None or max(rgb := [int(value) for value in match.groups()[1:4]]) > 255:
            form = "<category>:<red>,<green>,<blue>:..."
            raise DataError(f"line {number} of {str(path)!r} is {line[:40]!r}; it must be {form}")
        colors[rgb[0] + 256 * rgb[1] + 65536 * rgb[2]] = match[1]
    found.categories = list(colors.values())
    return colors
