"""A mask for each class of an image: what isn't 0 in it belongs to the class.

    images/<key>.jpg               or below images/<split>
    masks/<class>/<key>.png        or below masks/<split>
    masks/<key>/<class>.png
    masks/<key>_<class>.png        the longest key that is an image

A class without a file isn't in the image; images without any file, and masks of no image of the split, are
counted. Where masks overlap, that of the class which stands later in `data.classes` (by name without them)
covers the other."""

from collections.abc import Container
from pathlib import Path

from segformer.data.formats.base import SPLITS, Found, Labeled, defect, first_there
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.folder import by_key, files_below, left_out
from segformer.errors import DataError, printable

_IMAGES, _MASKS = ("images/{split}", "images"), ("masks/{split}", "masks")


def detect(cfg: DatasetConfig, root: Path) -> bool:
    """Every mask lies in the folder of a class (none that is called as a split is), or of an image."""
    first = cfg.splits[0] if cfg.splits else ""
    images, masks = (first_there(cfg, root, first, usual) for usual in (_IMAGES, _MASKS))
    if not (images and masks and (root / images).is_dir() and (root / masks).is_dir()):
        return False
    keys, stems = _files(root / images, cfg.ends("image"))[0], _files(root / masks, cfg.ends("mask"))[0]
    ways = [_parted(stem, keys) if "/" in stem else None for stem in stems]
    return bool(ways) and all(way and way[1].lower() not in SPLITS for way in ways)


def _files(folder: Path, ends: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    return by_key(str(folder), files_below(str(folder)), ends)


def _parted(stem: str, keys: Container[str]) -> tuple[str, str] | None:
    """(key, class) of a mask; None where no image has such a key."""
    below, above = stem.partition("/"), stem.rpartition("/")
    ways = [(below[2], below[0]), (above[0], above[2])]
    ways += [(stem[:at], stem[at + 1 :]) for at in reversed(range(len(stem))) if stem[at] == "_"]
    return next((way for way in ways if way[0] in keys and way[1]), None)


def read(cfg: DatasetConfig, root: Path, split: str) -> Found:
    """The masks of a split."""
    image_dir = first_there(cfg, root, split, [cfg.image_dir, *_IMAGES])
    mask_dir = first_there(cfg, root, split, [cfg.labels] if cfg.labels else [cfg.mask_dir, *_MASKS])
    for kind, key, name in (("images", "image_dir", image_dir), ("masks", "labels", mask_dir)):
        if not (name and (root / name).is_dir()):
            do = f"set data.{key} to it, with {{split}} where the split's name stands"
            raise DataError(f"{str(root)!r} has no folder of {kind} for {split}; {do}")
    found = Found()
    keys, further, others = _files(root / image_dir, cfg.ends("image"))
    same = {f"{keys[key]} = {name}" for key, name in further.items()}
    found.defects += defect(f"files in {image_dir!r} share the key of another", "keep one of each", same)
    stems, _, rest = _files(root / mask_dir, cfg.ends("mask"))
    parted = {name: _parted(stem, keys) for stem, name in stems.items()}
    order = {name: place for place, name in enumerate(cfg.classes)}
    masks: dict[str, list[tuple[str, str]]] = {}
    for name, way in sorted(parted.items()):
        if way:
            masks.setdefault(way[0], []).append((way[1], f"{root / mask_dir}/{name}"))
    for key, layers in sorted(masks.items()):
        layers.sort(key=lambda layer: (order.get(cfg.category_map.get(layer[0], layer[0]), -1), layer))
        found.labeled.append(Labeled(key, f"{root / image_dir}/{keys[key]}", shapes=tuple(layers)))
    found.categories = sorted({category for layers in masks.values() for category, _ in layers})
    for folder, unused, left, kind in (
        (image_dir, {keys[key] for key in keys.keys() - masks.keys()}, others, "image without labels"),
        (mask_dir, {name for name, way in parted.items() if not way}, rest, "mask of no image"),
    ):
        kinds = found.left.setdefault(folder, {}) | left_out(left)
        found.left[folder] = kinds | ({kind: (len(unused), printable(min(unused)))} if unused else {})
    return found
