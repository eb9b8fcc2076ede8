"""The formats of label files, which one a data set has, and its labels as samples.

A category's raw id is the place of its class in `data.classes`; `data.category_map` names the class of a
category that is called otherwise, or `ignore`. Without `data.classes` the classes are `data.uncovered` and
then the categories of the files, over all splits."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from segformer.data.formats import (
    binary_masks,
    coco,
    coco_panoptic,
    csv_pairs,
    cvat,
    huggingface,
    label_studio,
    labelme,
    supervisely,
    voc,
    yolo,
)
from segformer.data.formats.base import IGNORE, Format, Found, Labeled, Outline
from segformer.data.sources.content import override
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, setting
from segformer.data.sources.folder import no_root
from segformer.data.sources.masks import Defect
from segformer.data.sources.sample import Sample
from segformer.data.sources.shapes import Shape
from segformer.errors import ConfigError, DataError, listed

FORMATS: dict[str, Format] = {
    "coco": coco,
    "coco_panoptic": coco_panoptic,
    "yolo": yolo,
    "labelme": labelme,
    "cvat": cvat,
    "label_studio": label_studio,
    "supervisely": supervisely,
    "voc": voc,
    "binary_masks": binary_masks,
    "csv": csv_pairs,
    "huggingface": huggingface,
}

_SHOWN = 6  # categories in a message


def label_format(cfg: DatasetConfig, root: Path) -> str:
    """`data.format`, or the one format that fits where there is no folder of masks; "" for such a folder.

    Raises:
        DataError: several fit.
    """
    if cfg.format and cfg.format not in FORMATS:
        raise ConfigError(
            f"data.format={cfg.format!r} is unknown; use {', '.join(FORMATS)} or leave it empty"
        )
    if cfg.format and not os.path.isdir(root):
        raise DataError(no_root(root))
    masks = any(os.path.isdir(root / cfg.folder("mask", split)) for split in cfg.splits)
    if cfg.format or cfg.task != "segmentation" or masks or not cfg.splits:
        return cfg.format
    first = Found(cfg, root, cfg.splits[0])
    found = [name for name, module in FORMATS.items() if module.detect(first)]
    if len(found) > 1:
        choices = " or ".join(setting("format", name) for name in found)
        raise DataError(f"{str(root)!r} has labels of {len(found)} formats; give {choices}")
    return found[0] if found else ""


def resolved(cfg: DatasetConfig, root: Path) -> DatasetConfig:
    """The data set with its format, and with the classes of its label files where it names none."""
    if not (name := label_format(cfg, root)):
        return cfg
    cfg = replace(cfg, format=name)
    if cfg.classes:
        return cfg
    found = [_read(cfg, root, split) for split in cfg.splits]
    categories = [_class_of(cfg, category) for one in found for category in one.categories or _drawn(one)]
    if categories and not all(one.covers for one in found):
        categories.insert(0, cfg.uncovered)
    return replace(cfg, classes=[name for name in dict.fromkeys(categories) if name != IGNORE])


def _read(cfg: DatasetConfig, root: Path, split: str) -> Found:
    """The labels of a split."""
    found = Found(cfg, root, split)
    FORMATS[cfg.format].read(found)
    return found


def _drawn(found: Found) -> list[str]:
    return sorted({name for one in found.labeled for name in categories_of(one)} - {""})


def _class_of(cfg: DatasetConfig, category: str) -> str:
    return cfg.category_map.get(category, category)


def categories_of(one: Labeled) -> list[str]:
    """The categories of an image, one for each shape or segment."""
    return [*(name for name, _ in one.shapes or ()), *(one.segments or {}).values()]


def labeled_samples(cfg: DatasetConfig, root: Path, split: str) -> tuple[list[Sample], Found]:
    """The samples of a split's label files, and all that these hold, with the defects of their classes."""
    cfg = resolved(cfg, root)
    found = _read(cfg, root, split)
    raw_ids = {name: raw for raw, name in enumerate(cfg.classes)} | {IGNORE: IGNORE_INDEX}
    found.defects += _class_defects(cfg, found, raw_ids)
    twice = [key for key, count in Counter(one.key for one in found.labeled).items() if count > 1]
    what = "images have labels more than once, or names that differ in the suffix only"
    found.note(what, "keep one of each", twice)
    uncovered = raw_ids.get(cfg.uncovered, IGNORE_INDEX)

    def raw_id(category: str) -> int:
        return raw_ids.get(_class_of(cfg, category), IGNORE_INDEX)  # a defect says so

    samples = []
    for one in found.labeled:
        shapes = (
            None
            if one.shapes is None
            else tuple(_shape(raw_id(name), outline) for name, outline in one.shapes)
        )
        segments = None
        if one.segments is not None:
            segments = tuple((value, raw_id(name)) for value, name in one.segments.items())
        samples.append(
            Sample(one.key, one.image_file, one.mask_file, None, shapes, uncovered, one.size, segments)
        )
    return samples, found


def _shape(raw_id: int, outline: Outline) -> Shape:
    if isinstance(outline, str):
        return Shape(raw_id, file=outline)
    return Shape(raw_id, rle=outline) if isinstance(outline, np.ndarray) else Shape(raw_id, outline)


def _class_defects(cfg: DatasetConfig, found: Found, known: dict[str, int]) -> Iterator[Defect]:
    """Categories without a class, and pixels without one."""
    used: dict[str, int] = {}
    for category in (name for one in found.labeled for name in categories_of(one)):
        used[category] = used.get(category, 0) + 1
    if unknown := {name: count for name, count in used.items() if _class_of(cfg, name) not in known}:
        count = sum(unknown.values())
        do = override("data.category_map", cfg.category_map | dict.fromkeys(sorted(unknown), IGNORE))
        yield Defect(
            "listing",
            f"{count} shapes are of {len(unknown)} categories that data.classes doesn't have "
            f"({listed(sorted(unknown), _SHOWN)}); add them, or map each to a class or to {IGNORE}: {do}",
            count,
        )
    drawn = any(one.shapes is not None for one in found.labeled)
    if drawn and not found.covers and cfg.uncovered not in known:
        add = override("data.classes", [cfg.uncovered, *cfg.classes])
        yield Defect(
            "listing",
            f"data.uncovered={cfg.uncovered!r}, the class of pixels that no shape covers, is not in "
            f"data.classes; give {add}, or leave these pixels out: {setting('uncovered', IGNORE)}",
        )
