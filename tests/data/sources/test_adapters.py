"""Every file of conf/data on a miniature tree in the official layout of its set, sharded and read back.

The paths, raw ids and class names below are written out here, not taken from the configuration."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig, class_palette, label_table
from segformer.data.sources.decode import decode_image, decode_label, decode_mask
from segformer.training.config import RunConfig, compose

ROOT = Path(__file__).resolve().parents[3]
IGNORED = 255


@dataclass(frozen=True)
class Layout:
    """Files of a set: (split, image, mask) and what its raw ids are, by class name (None: ignored)."""

    pairs: list[tuple[str, str, str]]
    ids: dict[int, str | None]
    classes: int
    lists: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    """Files that lie beside the images and masks and must not disturb."""
    indexed: bool = False
    unknown: int = 250
    """A raw id that the set does not have."""


def voc(masks: str, images: str, lists: str, train: str) -> dict[str, object]:
    """The layout of VOC's devkit."""
    keys = {train: ["2007_000032", "2008_000008"], "val": ["2007_000033"]}
    return {
        "pairs": [
            ("val" if split == "val" else "train", f"{images}/{key}.jpg", f"{masks}/{key}.png")
            for split, names in keys.items()
            for key in names
        ],
        "lists": {f"{lists}/{split}.txt": "\n".join(names) + "\n" for split, names in keys.items()},
        "extra": [f"{images}/2012_004331.jpg"],
    }


ADE = [
    ("train", "images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"),
    ("train", "images/training/ADE_train_00000002.jpg", "annotations/training/ADE_train_00000002.png"),
    ("val", "images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"),
]
VOC_IDS: dict[int, str | None] = {0: "background", 1: "aeroplane", 7: "car", 15: "person", 20: "tvmonitor"}
CONTEXT_IDS: dict[int, str | None] = {1: "aeroplane", 14: "car", 37: "person", 47: "sky", 59: "wood"}
PLAIN = [
    ("train", "images/train/a.jpg", "masks/train/a.png"),
    ("val", "images/val/b.jpg", "masks/val/b.png"),
]
CITY = "aachen/aachen_000000_000019"
LAYOUTS = {
    "ade20k": Layout(
        ADE,
        {0: None, 1: "wall", 13: "person", 21: "car", 127: "animal", 150: "flag"},
        150,
        unknown=151,
        extra=["objectInfo150.txt", "sceneCategories.txt"],
    ),
    "ade20k_4": Layout(
        ADE,
        {0: None}
        | dict.fromkeys((1, 3, 150), "background")
        | dict.fromkeys((5, 10, 18, 67, 73), "plant")
        | dict.fromkeys((13, 127), "person_or_animal")
        | dict.fromkeys((21, 77, 81, 84, 91, 103, 104, 117, 128), "vehicle"),
        4,
        unknown=151,
    ),
    "cityscapes": Layout(
        [
            (split, f"leftImg8bit/{split}/{key}_leftImg8bit.png", f"gtFine/{split}/{key}_gtFine_labelIds.png")
            for split, key in (("train", CITY), ("val", "munster/munster_000173_000019"))
        ],
        dict.fromkeys((0, 3, 6, 9, 29, 30))
        | {7: "road", 8: "sidewalk", 11: "building", 17: "pole", 21: "vegetation", 23: "sky", 24: "person"}
        | {25: "rider", 26: "car", 31: "train", 33: "bicycle"},
        19,
        unknown=34,
        extra=[
            f"gtFine/train/{CITY}_gtFine_{end}" for end in ("color.png", "instanceIds.png", "polygons.json")
        ],
    ),
    "coco_stuff164k": Layout(
        [
            ("train", "images/train2017/000000000009.jpg", "annotations/train2017/000000000009.png"),
            ("val", "images/val2017/000000000139.jpg", "annotations/val2017/000000000139.png"),
        ],
        {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush"}
        | {91: "banner", 181: "wood", 255: None},
        171,
        unknown=11,
        indexed=True,
    ),
    "voc2012": Layout(
        ids={**VOC_IDS, 255: None},
        classes=21,
        indexed=True,
        **voc("SegmentationClass", "JPEGImages", "ImageSets/Segmentation", "train"),
    ),
    "voc2012_aug": Layout(
        ids={**VOC_IDS, 255: None},
        classes=21,
        **voc("SegmentationClassAug", "JPEGImages", "ImageSets/Segmentation", "trainaug"),
    ),
    "pascal_context_59": Layout(
        ids={0: None, **CONTEXT_IDS},
        classes=59,
        unknown=60,
        **voc("SegmentationClassContext", "JPEGImages", "ImageSets/SegmentationContext", "train"),
    ),
    "pascal_context_60": Layout(
        ids={0: "background", **CONTEXT_IDS, 255: None},
        classes=60,
        unknown=60,
        **voc("SegmentationClassContext", "JPEGImages", "ImageSets/SegmentationContext", "train"),
    ),
    "mapillary_vistas": Layout(
        [
            ("train", "training/images/-0AbC_dEf.jpg", "training/v1.2/labels/-0AbC_dEf.png"),
            ("val", "validation/images/x9Yz.jpg", "validation/v1.2/labels/x9Yz.png"),
        ],
        {0: "Bird", 13: "Road", 19: "Person", 55: "Car", 64: "Ego Vehicle", 65: None},
        65,
        unknown=66,
        indexed=True,
        extra=["training/v1.2/instances/-0AbC_dEf.png", "testing/images/q.jpg"],
    ),
    "camvid": Layout(
        [
            ("train", "images/train/0001TP_006690.jpg", "masks/train/0001TP_006690.png"),
            ("val", "images/val/0016E5_07959.jpg", "masks/val/0016E5_07959.png"),
            ("test", "images/test/0001TP_008550.jpg", "masks/test/0001TP_008550.png"),
        ],
        {0: "sky", 3: "road", 8: "car", 10: "bicyclist", 255: None},
        11,
    ),
    "sample": Layout(PLAIN, {0: "background", 1: "nucleus", 255: None}, 2),
    "folder": Layout(PLAIN, {0: "bark", 1: "leaf", 255: None}, 2),
}
OVERRIDES = {"folder": ["data.classes=[bark,leaf]", "data.name=folder"]}
TRIMMED = "ADE_train_00000002"  # of ade20k_4: all background


@functools.cache
def adapter(name: str) -> DatasetConfig:
    return compose(RunConfig, "config", [f"data={name}", *OVERRIDES.get(name, [])]).data


def placed(path: Path) -> Path:
    """A path whose folder is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_tree(root: Path, name: str) -> dict[tuple[str, str], np.ndarray]:
    """The files of a layout, its raw ids as squares of 4 x 4 pixels; (split, image) -> raw ids."""
    layout, raw = LAYOUTS[name], {}
    for number, (split, image, mask) in enumerate(layout.pairs):
        listed = [1, 0] if TRIMMED in image and name == "ade20k_4" else list(layout.ids)
        ids = np.tile(np.repeat(np.roll(listed, number), 4).astype(np.uint8), (4, 1))
        cv2.imwrite(str(placed(root / image)), np.full((*ids.shape, 3), 40 * number, np.uint8))
        picture = Image.fromarray(ids)
        if layout.indexed:
            picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        picture.save(placed(root / mask))
        raw[split, image] = ids
    for path, text in layout.lists.items():
        placed(root / path).write_text(text)
    for path in layout.extra:
        placed(root / path).touch()
    return raw


def read(out: Path) -> Iterator[tuple[str, str, bytes, bytes]]:
    """(split, key, image, target) of every sample of a set of shards."""
    for name, split in ShardSet.open(out).splits.items():
        reader = ShardReader(split)
        for sample_id in range(split.num_samples):
            raw = reader.read(sample_id)
            yield name, raw.key, raw.image, raw.target


def test_every_file_of_conf_data_has_a_miniature_tree_here() -> None:
    names = {path.stem for path in (ROOT / "conf/data").glob("*.yaml")}
    assert names == {*LAYOUTS, "imagenet"}
    assert not any(Path(adapter(name).root).is_absolute() for name in names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_official_layout_becomes_shards_with_the_official_classes(name: str, tmp_path: Path) -> None:
    cfg, layout = replace(adapter(name), allow_unseen=["*"]), LAYOUTS[name]
    assert label_table(cfg)[layout.unknown] == -1
    raw = write_tree(tmp_path / "set", name)
    write_shards(cfg, tmp_path / "set", tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
    classes = ShardSet.open(tmp_path / "out").classes
    assert len(classes) == len(class_palette(cfg)) == layout.classes
    if name == "ade20k_4":
        raw = {place: ids for place, ids in raw.items() if TRIMMED not in place[1]}
    train_ids = {ident: classes.index(label) if label else IGNORED for ident, label in layout.ids.items()}
    for split, key, image, target in read(tmp_path / "out"):
        (source,) = (s for s in raw if s[0] == split and Path(s[1]).name.startswith(Path(key).name))
        expected = np.vectorize(train_ids.get)(raw.pop(source))
        np.testing.assert_array_equal(decode_mask(target), expected)
        assert decode_image(image).shape[:2] == expected.shape
    assert not raw


def test_cityscapes_has_the_nineteen_classes_in_the_order_of_their_train_ids() -> None:
    assert adapter("cityscapes").classes == [
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
        *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
        *("motorcycle", "bicycle"),
    ]


def test_coco_stuff_leaves_out_the_eleven_things_without_segmentation() -> None:
    cfg = adapter("coco_stuff164k")
    assert sorted(set(range(182)) - set(cfg.label_map)) == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert sorted(train for train in cfg.label_map.values() if train != IGNORED) == list(range(171))


def test_ade20k_s_four_classes_are_those_of_the_150_by_name() -> None:
    names, four = adapter("ade20k").classes, adapter("ade20k_4")
    merged = {
        "plant": {"tree", "grass", "plant", "field", "flower", "palm"},
        "person_or_animal": {"person", "animal"},
        "vehicle": {"car", "boat", "bus", "truck", "airplane", "van", "ship", "minibike", "bicycle"},
    }
    for label, members in merged.items():
        raws = {raw for raw, train in four.label_map.items() if train == four.classes.index(label)}
        assert {names[raw - 1] for raw in raws} == members


def test_imagenet_is_a_thousand_class_folders(tmp_path: Path) -> None:
    cfg = replace(adapter("imagenet"), allow_unseen=["*"], allow_duplicates=["val"])
    assert (len(cfg.class_dirs), cfg.class_dirs[0], cfg.class_dirs[-1]) == (1000, "n01440764", "n15075141")
    some = {"n01440764": 0, "n02012849": 134, "n03126707": 517, "n15075141": 999}
    for split in ("train", "val"):
        for name in cfg.class_dirs:
            (tmp_path / "set" / split / name).mkdir(parents=True)
        for name in some:
            data = cv2.imencode(".jpg", np.zeros((9, 7, 3), np.uint8))[1].tobytes()
            (tmp_path / "set" / split / name / f"{split}_{name}.JPEG").write_bytes(data)
    write_shards(cfg, tmp_path / "set", tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
    assert ShardSet.open(tmp_path / "out").classes == cfg.class_dirs
    labels = {(split, key): decode_label(target) for split, key, _, target in read(tmp_path / "out")}
    assert labels == {
        (split, f"{name}/{split}_{name}"): label for split in ("train", "val") for name, label in some.items()
    }
