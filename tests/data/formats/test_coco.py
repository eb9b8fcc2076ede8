import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from labels import NAMES, Drawing, LabelSet, counted, label_set, naive

from segformer.data.formats import coco
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import load_sample

CLASSES = ["background", *NAMES]
IDS = {name: number for number, name in enumerate(CLASSES)}
CFG = DatasetConfig(classes=CLASSES, splits=["train"])


def compress(runs: list[int]) -> str:
    """COCO's text of run lengths, number by number."""
    signs = ""
    for place, run in enumerate(runs):
        value = run - (runs[place - 2] if place > 2 else 0)
        more = True
        while more:
            part, value = value & 31, value >> 5
            more = value != (-1 if part & 16 else 0)
            signs += chr(48 + part + 32 * more)
    return signs


def written(
    root: Path, sets: list[LabelSet], segmentation: Callable[[LabelSet, Drawing], Any], **other: Any
) -> Path:
    """A COCO data set of one split; `other` replaces what its file holds."""
    (root / "images/train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number, labels in enumerate(sets):
        name = f"{labels.key}.png"
        cv2.imwrite(str(root / "images/train" / name), np.zeros((labels.height, labels.width, 3), np.uint8))
        images.append({"id": number, "file_name": name, "height": labels.height, "width": labels.width})
        for shape in labels.shapes:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 10 * IDS[shape.category],
                    "segmentation": segmentation(labels, shape),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 10 * IDS[name], "name": name} for name in NAMES]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories} | other
    path = root / "annotations/instances_train.json"
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


def polygons(labels: LabelSet, shape: Drawing) -> list[list[float]]:
    return [[value for point in ring for value in point] for ring in shape.rings]


def runs(labels: LabelSet, shape: Drawing) -> dict[str, Any]:
    whole = naive(LabelSet(labels.height, labels.width, [shape]), dict.fromkeys(NAMES, 1), 0)
    return {"size": [labels.height, labels.width], "counts": counted(whole)}


def compressed(labels: LabelSet, shape: Drawing) -> dict[str, Any]:
    found = runs(labels, shape)
    return found | {"counts": compress(found["counts"])}


def masks(root: Path, cfg: DatasetConfig = CFG) -> dict[str, np.ndarray]:
    samples, defects, _ = find_samples(cfg, root, "train")
    assert not defects
    found = {sample.key: load_sample(cfg, sample).mask for sample in samples}
    return {key: mask for key, mask in found.items() if mask is not None}


def either_runs(labels: LabelSet, shape: Drawing) -> dict[str, Any]:
    return (runs, compressed)[len(labels.key) % 2](labels, shape)


@pytest.mark.parametrize("kind", [polygons, pytest.param(either_runs, marks=pytest.mark.slow)])
def test_a_thousand_label_sets_have_no_wrong_pixel(kind: Callable[..., Any], tmp_path: Path) -> None:
    rng = random.Random(4)
    sets = [label_set(rng, holes=kind is not polygons) for _ in range(1000)]
    for number, labels in enumerate(sets):
        labels.key = f"{number} Bäume"
    written(tmp_path, sets, kind)
    found = masks(tmp_path)
    assert len(found) == 1000
    for labels in sets:
        np.testing.assert_array_equal(found[labels.key], naive(labels, IDS, 0), str(labels))


def test_run_lengths_are_those_of_pycocotools() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(5)
    for _ in range(300):
        size = tuple(rng.integers(1, 40, 2))
        mask = (cv2.resize(rng.random((3, 3)), size) < rng.random()).astype(np.uint8)
        mask ^= rng.random(mask.shape) < rng.choice([0, 0.1])
        encoded = tools.encode(np.asfortranarray(mask))
        ours = coco.decompressed(encoded["counts"].decode())
        assert ours.tolist() == counted(mask)
        assert compress(ours.tolist()) == encoded["counts"].decode()
    wide = [5, 500_000_000, 7, 399_999_000, 988]
    encoded = tools.frPyObjects({"size": [30_000, 30_000], "counts": wide}, 30_000, 30_000)
    assert coco.decompressed(encoded["counts"].decode()).tolist() == wide


def test_parts_of_an_object_unite_and_a_crowd_lies_below(tmp_path: Path) -> None:
    square = [0, 0, 2, 0, 2, 2, 0, 2]
    shape = Drawing("leaf", [])
    path = written(tmp_path, [LabelSet(3, 3, [shape])], lambda *_: [square, [1, 1, 3, 1, 3, 3, 1, 3]])
    content = json.loads(path.read_text("utf-8"))
    crowd = {"id": 7, "image_id": 0, "category_id": 20, "iscrowd": 1}
    crowd["segmentation"] = {"size": [3, 3], "counts": [0, 9]}
    path.write_text(json.dumps(content | {"annotations": [*content["annotations"], crowd]}), "utf-8")
    assert masks(tmp_path)["a"].tolist() == [[1, 1, 2], [1, 1, 1], [2, 1, 1]]
