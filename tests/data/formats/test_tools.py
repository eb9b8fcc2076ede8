"""Exports of labeling tools: YOLO, labelme, CVAT, Label Studio, Supervisely."""

import random
from pathlib import Path

import numpy as np
import pytest
from labels import NAMES, label_set, naive
from writers import WRITERS, Item, Outline

from segformer.data.formats.table import labeled_samples
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.shapes import draw

CLASSES = ["background", *NAMES]
FEW, ALL = 150, 1000
Sets = list[tuple[Item, np.ndarray]]


def made(count: int) -> Sets:
    """Label sets with outlines that enclose something, and their pixels."""
    rng, raw_ids, found = random.Random(16), {name: raw for raw, name in enumerate(CLASSES)}, []
    for number in range(count):
        labels = label_set(rng)
        for shape in labels.shapes:
            shape.rings = [ring for ring in shape.rings if len(ring) > 2]
        labels.shapes = [shape for shape in labels.shapes if shape.rings]
        image = np.zeros((labels.height, labels.width, 3), np.uint8)
        shapes: list[tuple[str, Outline]] = [(shape.category, shape.rings) for shape in labels.shapes]
        found.append((Item(f"{'sub/' * (number % 2)}ü {number}", image, shapes), naive(labels, raw_ids, 0)))
    return found


def wrong_pixels(name: str, root: Path, sets: Sets) -> int:
    """Of sets that are written in a format and read again."""
    WRITERS[name](root, {"train": [item for item, _ in sets]}, NAMES)
    samples, found = labeled_samples(DatasetConfig(splits=["train"], classes=CLASSES), root, "train")
    assert [str(defect) for defect in found.defects] == []
    by_name = {sample.image.stem.rpartition("-")[2]: sample for sample in samples}
    assert len(samples) == len(by_name) == len(sets)
    wrong = 0
    for item, expected in sets:
        sample = by_name[item.key.rpartition("/")[2]]
        assert sample.key.startswith("sub/") == item.key.startswith("sub/")
        wrong += int((draw(sample.shapes or (), expected.shape, sample.uncovered) != expected).sum())
    return wrong


@pytest.fixture(scope="module")
def few() -> Sets:
    return made(FEW)


@pytest.fixture(scope="module")
def many() -> Sets:
    return made(ALL)


@pytest.mark.parametrize("name", WRITERS)
def test_label_sets_have_every_pixel_of_a_naive_rasterizer(name: str, few: Sets, tmp_path: Path) -> None:
    assert wrong_pixels(name, tmp_path, few) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_thousand_label_sets_have_every_pixel_of_a_naive_rasterizer(
    name: str, many: Sets, tmp_path: Path
) -> None:
    assert wrong_pixels(name, tmp_path, many) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_masks_come_back_from_bitmaps_or_traced_outlines(name: str, few: Sets, tmp_path: Path) -> None:
    masks = [
        (Item(item.key, item.image, [(CLASSES[raw], mask == raw) for raw in np.unique(mask) if raw]), mask)
        for item, mask in few
    ]
    assert wrong_pixels(name, tmp_path, masks) == 0
