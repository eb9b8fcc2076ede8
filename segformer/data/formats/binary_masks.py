"""A mask for each class of an image: what isn't 0 in it belongs to the class.

    images/<key>.jpg               or below images/<split>
    masks/<class>/<key>.png        or below masks/<split>
    masks/<key>/<class>.png
    masks/<key>_<class>.png        the longest key that is an image

A class without a file isn't in the image; images without any file, and masks of no image of the split, are
counted. Where masks overlap, that of the class which stands later in `data.classes` (by name without them)
covers the other."""

from collections.abc import Container

from segformer.data.formats.base import SPLITS, Found, Labeled
from segformer.errors import DataError

_IMAGES, _MASKS = ("images/{split}", "images"), ("masks/{split}", "masks")


def detect(found: Found) -> bool:
    """Every mask lies in the folder of a class (none that is called as a split is), or of an image."""
    images, masks = found.first(*_IMAGES), found.first(*_MASKS)
    if not (images and masks and (found.root / images).is_dir() and (found.root / masks).is_dir()):
        return False
    (keys, _), (stems, _) = found.files(images, "image"), found.files(masks, "mask")
    ways = [_parted(stem, keys) if "/" in stem else None for stem in stems]
    return bool(ways) and all(way and way[1].lower() not in SPLITS for way in ways)


def _parted(stem: str, keys: Container[str]) -> tuple[str, str] | None:
    """(key, class) of a mask; None where no image has such a key."""
    below, above = stem.partition("/"), stem.rpartition("/")
    ways = [(below[2], below[0]), (above[0], above[2])]
    ways += [(stem[:at], stem[at + 1 :]) for at in reversed(range(len(stem))) if stem[at] == "_"]
    return next((way for way in ways if way[0] in keys and way[1]), None)


def read(found: Found) -> None:
    """The masks of a split."""
    cfg, root = found.cfg, found.root
    image_dir = found.first(cfg.image_dir, *_IMAGES)
    mask_dir = found.first(*([cfg.labels] if cfg.labels else [cfg.mask_dir, *_MASKS]))
    for kind, key, name in (("images", "image_dir", image_dir), ("masks", "labels", mask_dir)):
        if not (name and (root / name).is_dir()):
            do = f"set data.{key} to it, with {{split}} where the split's name stands"
            raise DataError(f"{str(root)!r} has no folder of {kind} for {found.split}; {do}")
    (keys, others), (stems, rest) = found.files(image_dir, "image"), found.files(mask_dir, "mask")
    parted = {name: _parted(stem, keys) for stem, name in stems.items()}
    order = {name: place for place, name in enumerate(cfg.classes)}
    masks: dict[str, list[tuple[str, str]]] = {}
    for name, way in sorted(parted.items()):
        if way:
            masks.setdefault(way[0], []).append((way[1], f"{root / mask_dir}/{name}"))
    for key, layers in sorted(masks.items()):
        layers.sort(key=lambda layer: (order.get(cfg.category_map.get(layer[0], layer[0]), -1), layer))
        found.labeled.append(Labeled(key, f"{root / image_dir}/{keys[key]}", shapes=tuple(layers)))
    found.skip_files(image_dir, others)
    found.unlabeled(image_dir, (keys[key] for key in keys.keys() - masks.keys()))
    found.skip_files(mask_dir, rest)
    found.skip(mask_dir, "mask of no image", *(name for name, way in parted.items() if not way))
