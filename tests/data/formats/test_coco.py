import json
import random
import re
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from labels import NAMES, Drawing, LabelSet, counted, label_set, naive

from segformer.data.formats import base, coco
from segformer.data.formats.base import read_entries
from segformer.data.formats.table import resolved
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import load_sample
from segformer.errors import DataError

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


def one_leaf(root: Path, **other: Any) -> Path:
    shape = Drawing("leaf", [[(0, 0), (2, 0), (2, 2), (0, 2)]])
    return written(root, [LabelSet(3, 3, [shape], "a"), LabelSet(3, 3, [shape], "b")], polygons, **other)


SQUARE = [[0, 0, 2, 0, 2, 2]]
IMAGES = [{"id": k, "file_name": f"{name}.png", "height": 3, "width": 3} for k, name in enumerate("ab")]
GOOD = {"id": 1, "image_id": 0, "category_id": 10, "segmentation": SQUARE}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"images": [*IMAGES, IMAGES[1] | {"id": 5, "file_name": "c.png"}]}, "1 images are not in .*c.png"),
        ({"images": [IMAGES[0], IMAGES[1] | {"id": 0}]}, "1 ids of images come more than once"),
        ({"annotations": [GOOD, GOOD]}, "1 ids of annotations come more than once"),
        ({"annotations": [GOOD | {"image_id": 9}]}, r"1 image ids .* not in the images .*\(9\)"),
        ({"annotations": [GOOD | {"category_id": 9}]}, r"1 category ids .* not in the categories .*\(9\)"),
        (
            {"annotations": [GOOD | {"segmentation": [[1, 2, 3]]}]},
            "id 1: its points are no pairs",
        ),
        ({"annotations": [GOOD | {"segmentation": [1, 2]}]}, "id 1: its points are no pairs"),
        ({"annotations": [GOOD | {"segmentation": {"size": [3, 3], "counts": [8]}}]}, "don't fill 3 x 3"),
        ({"annotations": [GOOD | {"segmentation": {"size": [3, 3], "counts": "`"}}]}, "counts are damaged"),
        ({"annotations": [GOOD | {"segmentation": {"size": [1, 9], "counts": [9]}}]}, "run lengths of"),
        ({"annotations": [7]}, "an entry of annotations is no object"),
        ({"images": [IMAGES[0] | {"file_name": "../a.png"}]}, "leads out of the folder"),
        ({"images": [IMAGES[0] | {"file_name": "/etc/passwd"}]}, "leads out of the folder"),
        ({"images": []}, "have no images"),
        ({"categories": [{"id": 10, "name": "oak"}]}, "data.category_map={oak: ignore}"),
    ],
)
def test_bad_labels_are_one_line(other: dict[str, Any], text: str, tmp_path: Path) -> None:
    one_leaf(tmp_path, **other)
    _, defects, _ = find_samples(CFG, tmp_path, "train")
    assert any(re.search(text, str(defect)) for defect in defects), [*map(str, defects)]
    assert not any("\n" in str(defect) for defect in defects)


def test_labels_without_their_end_are_refused_wherever_it_is_missing(tmp_path: Path) -> None:
    path = one_leaf(tmp_path)
    data = path.read_bytes().rstrip()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match="can't be read"):
            list(read_entries(path))
    path.write_bytes(data)
    whole = json.loads(data)
    found: dict[str, Any] = {key: [] for key in whole}
    for key, entry in read_entries(path):
        found[key] = entry if key == "info" else [*found[key], entry]
    assert found == whole


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"images": [' + "{" * 200_000, '{"a": 1} 2', '{"a" 1}', "{1: 2}"]
)
def test_json_that_is_none_ends_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="can't be read"):
        list(read_entries(tmp_path / "a.json"))


def test_an_entry_over_the_limit_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_ENTRY", 10_000)
    monkeypatch.setattr(base, "BLOCK", 1000)
    (tmp_path / "a.json").write_text('{"images": [' + "7, " * 50_000 + '"' + "x" * 10_000_000 + '"]}')
    tracemalloc.start()
    with pytest.raises(DataError, match="more than 10000 signs"):
        list(islice(read_entries(tmp_path / "a.json"), 49_999, None))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_classes_come_from_the_labels_and_categories_are_mapped(tmp_path: Path) -> None:
    one_leaf(tmp_path)
    found = resolved(DatasetConfig(splits=["train"]), tmp_path)
    assert (found.format, found.classes) == ("coco", CLASSES)
    merged = dict.fromkeys(NAMES, "plant") | {"leaf": "ignore"}
    cfg = resolved(DatasetConfig(splits=["train"], category_map=merged), tmp_path)
    assert cfg.classes == ["background", "plant"]
    assert masks(tmp_path, cfg)["a"].tolist() == [[255, 255, 0], [255, 255, 0], [0, 0, 0]]
    outside = resolved(DatasetConfig(splits=["train"], uncovered="ignore"), tmp_path)
    assert outside.classes == [*NAMES]
    assert masks(tmp_path, outside)["a"].tolist() == [[0, 0, 255], [0, 0, 255], [255, 255, 255]]


def test_a_category_that_only_groups_others_is_no_class(tmp_path: Path) -> None:
    path = one_leaf(tmp_path)
    content = json.loads(path.read_text("utf-8"))
    groups = [{"id": 0, "name": "top", "supercategory": "none"}]
    own = [
        one | {"supercategory": "leaf" if one["name"] == "leaf" else "top"} for one in content["categories"]
    ]
    path.write_text(json.dumps(content | {"categories": groups + own}), "utf-8")
    assert resolved(DatasetConfig(splits=["train"]), tmp_path).classes == CLASSES


def test_an_image_that_is_listed_twice_is_a_defect(tmp_path: Path) -> None:
    path = one_leaf(tmp_path)
    content = json.loads(path.read_text("utf-8"))
    again = content["images"][0] | {"id": 99}
    path.write_text(json.dumps(content | {"images": [*content["images"], again]}), "utf-8")
    _, (defect,), _ = find_samples(CFG, tmp_path, "train")
    assert "1 images have labels more than once" in str(defect)


def test_one_file_for_all_is_divided_and_changed_labels_are_other_shards(
    tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    rng, root = random.Random(6), tmp_path / "set"
    shape = Drawing("leaf", [[(0, 0), (2, 0), (2, 2), (0, 2)]])
    path = written(root, [LabelSet(3, 4, [shape], f"{rng.random()}"[2:]) for _ in range(12)], polygons)
    for number, image in enumerate(sorted((root / "images/train").iterdir())):
        cv2.imwrite(str(image), np.full((3, 4, 3), 20 * number, np.uint8))
    path = path.rename(root / "annotations.json")
    (root / "images/train").rename(root / "pictures").rename(root / "images")
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | {"categories": content["categories"][:1]}), "utf-8")
    words = ["data=folder", f"root={root}", f"output={tmp_path / 'out'}", "data.val_share=0.5", "workers=1"]
    lines = command("shard", *words)
    assert lines[0] == "labels: data.format=coco, with 'data.classes=[background,leaf]'"
    counts = [int(line.split()[1]) for line in lines if re.match("(train|val): ", line)]
    assert (sum(counts), len(counts)) == (12, 2)
    assert "nothing to do" in command("shard", *words)[1]
    for one in content["annotations"]:
        one["segmentation"] = SQUARE
    path.write_text(json.dumps(content | {"categories": content["categories"][:1]}), "utf-8")
    with pytest.raises(DataError, match="differing: the source"):
        command("shard", *words)


def test_panoptic_segments_are_classes_and_what_is_unlabelled_is_ignored(tmp_path: Path) -> None:
    segments = {0: (0, 255), 256 * 7 + 5: (10, 0), 65536 * 3 + 1: (20, 1)}
    info = [{"id": value, "category_id": number} for value, (number, _) in segments.items() if value]
    whole = {"image_id": 0, "file_name": "a.png", "segments_info": info}
    path = one_leaf(tmp_path, images=IMAGES[:1], annotations=[whole]).rename(
        tmp_path / "annotations/panoptic_train.json"
    )
    ids = np.random.default_rng(8).choice([*segments], (3, 3))
    path.with_suffix("").mkdir()
    bgr = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], 2).astype(np.uint8)
    cv2.imwrite(str(path.with_suffix("") / "a.png"), bgr)
    cfg = resolved(DatasetConfig(splits=["train"]), tmp_path)
    assert (cfg.format, cfg.classes) == ("coco_panoptic", [*NAMES])
    assert masks(tmp_path, cfg)["a"].tolist() == [
        [segments[value][1] for value in row] for row in ids.tolist()
    ]
