"""Exports of labeling tools: YOLO, labelme, CVAT, Label Studio, Supervisely."""

import base64
import json
import random
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from labels import NAMES, label_set, naive
from writers import WRITERS, Item, Outline

from segformer.data.formats import cvat, outlines
from segformer.data.formats.table import label_format, labeled_samples
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import inspect_sample
from segformer.data.sources.shapes import draw
from segformer.errors import DataError

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
        for item, mask in few[:50]
    ]
    assert wrong_pixels(name, tmp_path, masks) == 0


LABELS = {  # where a file of labels lies, and what stands in it
    "yolo": ("labels/train/a.txt", "0 "),
    "labelme": ("train/a.json", '"leaf"'),
    "cvat": ("annotations.xml", '"leaf"'),
    "label_studio": ("train.json", '["leaf"]'),
    "supervisely": ("train/ann/a.png.json", '"leaf"'),
}
IMAGES = {"yolo": "images/train/a.png", "labelme": "train/a.png", "cvat": "images/train/a.png"} | {
    "label_studio": "images/train/00000000-a.png",
    "supervisely": "train/img/a.png",
}


def export(name: str, root: Path) -> Path:
    """Two images with a triangle each; the path of the labels of the first."""
    image = np.zeros((9, 12, 3), np.uint8)
    pair = [Item(key, image, [("leaf", [[(1, 1), (9, 1), (1, 7)]])]) for key in "ab"]
    WRITERS[name](root, {"train": pair}, ["leaf"])
    return root / LABELS[name][0]


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def defects(root: Path, **settings: Any) -> list[str]:
    """The lines of what is wrong, as sharding and the doctor find it."""
    given = {"splits": ["train"], "classes": ["background", "leaf"]} | settings
    samples, found, _ = find_samples(DatasetConfig(**given), root, "train")
    for sample in samples:
        found += inspect_sample(DatasetConfig(**given), sample)[1]
    lines = [str(one) for one in found]
    assert all(line.isprintable() and len(line) < 700 for line in lines)
    return lines


@pytest.mark.parametrize("name", WRITERS)
def test_an_image_that_is_missing_is_a_defect_and_stops_sharding_before_it_writes(
    name: str, tmp_path: Path
) -> None:
    export(name, tmp_path / "set")
    assert defects(tmp_path / "set") == []
    (tmp_path / "set" / IMAGES[name]).unlink()
    (line,) = defects(tmp_path / "set")
    assert "a.png" in line or "a.txt" in line
    cfg = DatasetConfig(splits=["train"], classes=["background", "leaf"])
    with pytest.raises(DataError):
        write_shards(cfg, tmp_path / "set", tmp_path / "out", seed=0, samples_per_shard=8, workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_category_names_what_to_paste(name: str, tmp_path: Path) -> None:
    path, word = export(name, tmp_path), LABELS[name][1]
    rewrite(path, word, "7 " if name == "yolo" else word.replace("leaf", "Stängel"))
    (line,) = defects(tmp_path)
    assert ("'7'" if name == "yolo" else """'data.category_map={"Stängel": "ignore"}'""") in line
    if name != "yolo":
        assert defects(tmp_path, category_map={"Stängel": "ignore"}) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_one_defect(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b" ")])
    (line,) = defects(tmp_path)
    assert path.name in line


@pytest.mark.parametrize("name", WRITERS)
def test_two_hundred_megabytes_are_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    (line,) = defects(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.name in line
    assert peak < 80_000_000  # a file of MAX_LABEL_BYTES is read whole


@pytest.mark.parametrize("name", ["yolo", "labelme", "cvat", "label_studio"])
def test_a_path_out_of_the_folder_is_a_defect(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path / "set")
    (tmp_path / "c.png").write_bytes((tmp_path / "set" / IMAGES[name]).read_bytes())
    if name == "yolo":
        (tmp_path / "set/list.txt").write_text("../c.png\n")
        path, old, new = tmp_path / "set/data.yaml", "train: images/train", "train: list.txt"
    elif name == "labelme":
        old, new = '"a.png"', '"..\\\\..\\\\c.png"'
    elif name == "cvat":
        old, new = '"train/a.png"', '"../c.png"'
    else:
        old, new = "/data/upload/1/00000000-a.png", "/data/upload/../../../c.png"
    rewrite(path, old, new)
    (line,) = defects(tmp_path / "set")
    assert "c.png" in line


@pytest.mark.parametrize("name", ["labelme", "cvat", "label_studio"])
def test_labels_of_one_image_that_come_twice_are_a_defect(name: str, tmp_path: Path) -> None:
    path, image = export(name, tmp_path), Path(IMAGES[name]).name
    path = path.with_name("b.json") if name == "labelme" else path
    rewrite(path, image.replace("0-a", "1-b").replace("a.", "b."), image)
    assert sum("labels already" in line for line in defects(tmp_path)) == 1
    if name == "label_studio":
        export(name, tmp_path)
        region = json.loads(path.read_text())
        region[0]["annotations"][0]["result"] *= 2
        path.write_text(json.dumps(region))
        (line,) = defects(tmp_path)
        assert "one id" in line


@pytest.mark.parametrize("name", ["yolo", "cvat", "supervisely"])
def test_images_that_differ_in_the_suffix_only_are_a_defect(name: str, tmp_path: Path) -> None:
    image = np.zeros((9, 12, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    WRITERS[name](tmp_path, {"train": [Item("a", image, []), Item("a", image, [], jpeg)]}, ["leaf"])
    (line,) = defects(tmp_path, format=name)
    assert "1 images have labels more than once, or names that differ in the suffix only" in line


def test_names_of_two_subsets_of_cvat_are_told_apart(tmp_path: Path) -> None:
    image = np.zeros((9, 12, 3), np.uint8)
    sets = {split: [Item("a", image, [(split, [[(1, 1), (9, 1), (1, 7)]])])] for split in ("train", "val")}
    cvat_xml = tmp_path / "annotations.xml"
    WRITERS["cvat"](tmp_path, sets, ["train", "val"])
    (tmp_path / "images/train").rename(tmp_path / "images/Train")
    cvat_xml.write_text(re.sub('name="(train|val)/', 'name="', cvat_xml.read_text()))
    for split in sets:
        samples, found = labeled_samples(DatasetConfig(), tmp_path, split)
        assert [sample.image.parent.name.lower() for sample in samples] == [split]
        assert not found.defects


def test_labels_in_other_folders_are_those_of_labelme_and_not_of_yolo(tmp_path: Path) -> None:
    export("labelme", tmp_path)
    (tmp_path / "train").rename(tmp_path / "field A")
    (tmp_path / "compose.yaml").write_text("services: {}\n")
    assert label_format(DatasetConfig(val_share=0.5), tmp_path) == "labelme"
    assert label_format(DatasetConfig(labels="field A"), tmp_path) == "labelme"


@pytest.mark.parametrize("name", ["labelme", "cvat", "label_studio", "supervisely"])
def test_labels_for_an_image_of_another_size_are_a_defect(name: str, tmp_path: Path) -> None:
    export(name, tmp_path)
    cv2.imwrite(str(tmp_path / IMAGES[name]), np.zeros((18, 24, 3), np.uint8))
    (line,) = defects(tmp_path)
    assert "12 x 9 pixels, its image 24 x 18" in line


def drawn(root: Path, **settings: Any) -> tuple[np.ndarray, Any]:
    """Raw ids of the first image of a set without defects, and what is not used."""
    cfg = DatasetConfig(splits=["train"], classes=["background", "leaf", "stem"], **settings)
    samples, found, left = find_samples(cfg, root, "train")
    assert [str(one) for one in found] == []
    loaded = inspect_sample(cfg, samples[0])[0]
    assert loaded.ids is not None
    return loaded.ids, left


def disk(x: float, y: float, across: float, down: float, degrees: float = 0) -> np.ndarray:
    """Pixels of the 9 x 12 picture whose centers lie in an ellipse."""
    row, column = np.mgrid[:9, :12] + 0.5
    turn = np.exp(-1j * np.radians(degrees))
    place = ((column - x) + 1j * (row - y)) * turn
    inside: np.ndarray = (place.real / across) ** 2 + (place.imag / down) ** 2 < 1
    return inside


def test_labelme_draws_boxes_circles_and_untyped_shapes_and_counts_lines(tmp_path: Path) -> None:
    path = export("labelme", tmp_path)
    content = json.loads(path.read_text())
    box = {"label": "leaf", "shape_type": "rectangle", "points": [[8, 6], [2, 1]]}
    circle = {"label": "stem", "shape_type": "circle", "points": [[6.1, 4.2], [6.1, 6.9]]}
    untyped = {"label": "leaf", "points": [[0, 0], [2, 0], [2, 2], [0, 2]]}
    lines = [
        {"label": "x", "shape_type": kind, "points": [[1, 1]]} for kind in ("point", "linestrip", "line")
    ]
    path.write_text(json.dumps(content | {"shapes": [box, circle, untyped, *lines]}))
    ids, left = drawn(tmp_path)
    expected = np.zeros((9, 12), int)
    expected[1:6, 2:8] = 1
    expected[disk(6.1, 4.2, 2.7, 2.7)] = 2
    expected[:2, :2] = 1
    np.testing.assert_array_equal(ids, expected)
    assert {kind: count for kind, (count, _) in left["train"].items()} == dict.fromkeys(
        ("point", "linestrip", "line"), 1
    )


def test_cvat_turns_boxes_and_ellipses_orders_by_z_and_counts_what_is_no_area(tmp_path: Path) -> None:
    path = export("cvat", tmp_path)
    text = path.read_text().replace("<name>leaf</name>", "<name>leaf</name></label><label><name>stem</name>")
    shapes = (
        '<ellipse label="stem" cx="6" cy="4.1" rx="3.3" ry="1.4" rotation="30" z_order="2"/>'
        '<box label="leaf" xtl="4" ytl="1" xbr="8" ybr="7" rotation="90" z_order="1"/>'
        '<polyline label="x" points="1,1;2,2"/><points label="x" points="1,1"/><tag label="x"/>'
        '<skeleton label="x"><points label="y" points="1,1"/></skeleton>'
    )
    path.write_text(re.sub("<polygon.*?/>", shapes, text, count=1))
    ids, left = drawn(tmp_path)
    expected = np.zeros((9, 12), int)
    expected[2:6, 3:9] = 1
    expected[disk(6, 4.1, 3.3, 1.4, 30)] = 2
    np.testing.assert_array_equal(ids, expected)
    assert {kind: n for kind, (n, _) in left["annotations.xml"].items()} == dict.fromkeys(
        ("polyline", "points", "tag", "skeleton"), 1
    )


def test_cvat_refuses_a_document_type_a_video_and_an_endless_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvat, "MAX_TAG", 2**19)
    path = export("cvat", tmp_path)
    text = path.read_text()
    bomb = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><annotations>&c;'
    for old, new, reason in (
        ("<annotations>", bomb, "document type"),
        ("<image", '<track id="0"/><image', "CVAT for video"),
        ("<image", f'<image name="{"x" * 1_500_000}"', "in one tag"),
        ("<image", "<a>" * 99 + "<image", "nested"),
    ):
        path.write_text(text.replace(old, new, 1))
        (line,) = defects(tmp_path)
        assert reason in line


def test_label_studio_turns_shapes_chooses_the_ground_truth_and_counts_keypoints(tmp_path: Path) -> None:
    path = export("label_studio", tmp_path)
    tasks = json.loads(path.read_text())
    (polygon,) = tasks[0]["annotations"][0]["result"]
    whole = {key: polygon[key] for key in ("original_width", "original_height", "image_rotation")}
    box = {"x": 600 / 12, "y": 100 / 9, "width": 400 / 12, "height": 200 / 9, "rotation": 90}
    oval = {"x": 50, "y": 50, "radiusX": 330 / 12, "radiusY": 140 / 9, "rotation": 30}
    result = [
        whole | {"id": "a", "type": "rectangle", "value": box},
        whole | {"id": "a", "type": "labels", "value": box | {"labels": ["leaf"]}},
        whole | {"id": "b", "type": "ellipselabels", "value": oval | {"ellipselabels": ["stem"]}},
        whole | {"id": "c", "type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["leaf"]}},
        {"id": "d", "type": "choices", "value": {"choices": ["good"]}},
    ]
    truth = tasks[0]["annotations"][0] | {"ground_truth": True, "result": result}
    tasks[0]["annotations"] += [truth, truth | {"was_cancelled": True}]
    tasks[1]["annotations"] = []
    path.write_text(json.dumps(tasks))
    ids, left = drawn(tmp_path)
    expected = np.zeros((9, 12), int)
    expected[1:5, 4:6] = 1
    expected[disk(6, 4.5, 3.3, 1.4, 30)] = 2
    np.testing.assert_array_equal(ids, expected)
    assert [*left["train.json"]] == ["keypointlabels", "choices", "task without an annotation"]
    tasks[0]["annotations"][1]["ground_truth"] = False
    path.write_text(json.dumps(tasks))
    assert "it has 2 annotations" in defects(tmp_path)[0]


def test_supervisely_takes_whole_numbers_for_pixels_and_counts_tags(tmp_path: Path) -> None:
    path = export("supervisely", tmp_path)
    content = json.loads(path.read_text())
    box = {"exterior": [[2, 1], [7, 5]], "interior": []}
    hole = {"exterior": [[8.0, 1.0], [12.0, 1.0], [12.0, 5.0], [8.0, 5.0]]}
    hole["interior"] = [[[9.0, 2.0], [11.0, 2.0], [11.0, 4.0], [9.0, 4.0]]]
    row = {"exterior": [[0, 7], [3, 7], [3, 8], [0, 8]], "interior": []}
    objects = [
        {"classTitle": "leaf", "geometryType": "rectangle", "points": box},
        {"classTitle": "stem", "geometryType": "polygon", "points": hole},
        {"classTitle": "stem", "geometryType": "polygon", "points": row},
        {"classTitle": "x", "geometryType": "line", "points": row},
    ]
    path.write_text(json.dumps(content | {"tags": [{"name": "wet"}], "objects": objects}))
    ids, left = drawn(tmp_path)
    expected = np.zeros((9, 12), int)
    expected[1:6, 2:8] = 1
    expected[1:5, 8:12] = 2
    expected[2:4, 9:11] = 0
    expected[7, 0:3] = 2  # from the center of pixel (0, 7) to that of (3, 8)
    np.testing.assert_array_equal(ids, expected)
    assert {kind: count for kind, (count, _) in left["train"].items()} == {"tag": 1, "line": 1}


@pytest.mark.parametrize("name", ["labelme", "supervisely"])
def test_a_bitmap_that_unpacks_to_too_much_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlines, "MAX_FILE_BYTES", 2**20)
    path = export(name, tmp_path)
    content = json.loads(path.read_text())
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    if name == "labelme":
        mask = {"shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": base64.b64encode(png).decode()}
        payloads = [{"shapes": [mask | {"label": "leaf"}]}]
    else:
        bombs = [zlib.compress(png), zlib.compress(bytes(2**21))]
        bitmaps = [{"data": base64.b64encode(bomb).decode(), "origin": [0, 0]} for bomb in bombs]
        found = [{"classTitle": "leaf", "geometryType": "bitmap", "bitmap": bitmap} for bitmap in bitmaps]
        payloads = [{"objects": [one]} for one in found]
    for payload in payloads:
        path.write_text(json.dumps(content | payload))
        (line,) = defects(tmp_path)
        assert "limit" in line or "unpacks to more" in line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 1 is a box"),
        ("0 0.1 0.1 0.2 0.2 0.3", "5 numbers"),
        ("0 10 10 200 10 200 100", "no share"),
        ("0 0.1 0.1 nan 0.1 0.2 0.2", "not finite"),
        ("leaf 0.1 0.1 0.2 0.1 0.2 0.2", "class 'leaf'"),
    ],
)
def test_a_line_that_is_no_polygon_of_shares_is_refused(line: str, reason: str, tmp_path: Path) -> None:
    export("yolo", tmp_path).write_text(f"{line}\n")
    (found,) = defects(tmp_path)
    assert reason in found


def test_yolo_reads_the_layouts_of_roboflow_cvat_and_label_studio(tmp_path: Path) -> None:
    for name in ("roboflow", "cvat", "studio"):
        export("yolo", tmp_path / name)
    root = tmp_path / "roboflow"
    (root / "valid").mkdir()
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / "valid" / kind)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: ['leaf']\n")
    names = DatasetConfig(splits=["val"], classes=["background", "leaf"])
    assert [sample.key for sample in find_samples(names, root, "val")[0]] == ["a", "b"]
    root = tmp_path / "cvat"
    (root / "data.yaml").write_text("path: ./\ntrain: train.txt\nnames: {0: leaf}\n")
    (root / "train.txt").write_text("data/images/train/a.png\nimages/train/b.png\n")
    pool = DatasetConfig(classes=["background", "leaf"], fold="1/2")
    keys = [[sample.key for sample in find_samples(pool, root, split)[0]] for split in pool.splits]
    assert sorted(keys[0] + keys[1]) == ["images/train/a", "images/train/b"]
    root = tmp_path / "studio"
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("leaf\n")
    (root / "labels/train/b.txt").unlink()
    _, found, left = find_samples(pool, root, "val")
    assert found == []
    assert left["labels"] == {"image without a text file, which has no objects": (1, "images/train/b.png")}
