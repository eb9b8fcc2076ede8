"""Pascal VOC, one mask a class, CSV of pairs, Hugging Face: what is chosen, and what is wrong in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from segformer.data.formats import huggingface
from segformer.data.formats.table import label_format, resolved
from segformer.data.shards.packing import source_hash, stat_hash
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import inspect_sample, load_sample
from segformer.errors import DataError

CLASSES = ["background", "leaf"]
ONE = np.array([[0, 0, 1, 1]] * 4, np.uint8)


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return path


def pair(root: Path, key: str, image: str, mask: str, ids: np.ndarray = ONE) -> None:
    png(root / f"{image}/{key}.png", np.zeros((4, 4, 3), np.uint8))
    png(root / f"{mask}/{key}.png", ids)


def csv(root: Path, text: str) -> DatasetConfig:
    for key in ("a", "b"):
        pair(root, key, "images", "ids")
    (root / "pairs.csv").write_bytes(text.encode())
    return DatasetConfig(format="csv", classes=CLASSES)


def voc(root: Path, **texts: str) -> DatasetConfig:
    for key in ("a", "b"):
        pair(root, key, "JPEGImages", "SegmentationClass")
    for name, text in texts.items():
        path = root / ("ImageSets/Segmentation/" * (name != "labelmap")) / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return DatasetConfig(format="voc", classes=CLASSES)


def binary(root: Path, *values: int, size: int = 4) -> DatasetConfig:
    png(root / "images/a.png", np.zeros((4, 4, 3), np.uint8))
    png(root / "masks/leaf/a.png", np.resize(np.array(values, np.uint8), (4, size)))
    return DatasetConfig(format="binary_masks", splits=["train"], classes=CLASSES)


def parquet(root: Path, name: str = "mask") -> DatasetConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image

    features = Features({"image": Image(), name: Image()})
    image = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    mask = cv2.imencode(".png", ONE)[1].tobytes()
    columns = {"image": [image, image], name: [mask, None]}
    rows = {
        key: [value and {"bytes": value, "path": "../../x.png"} for value in values]
        for key, values in columns.items()
    }
    (root / "data").mkdir(parents=True)
    pq.write_table(pa.table(rows, features.arrow_schema), root / "data/train-00000-of-00001.parquet")
    return DatasetConfig(format="huggingface", splits=["train"], classes=CLASSES)


BAD: dict[str, tuple[Callable[[Path], DatasetConfig], str]] = {
    "csv missing image": (
        lambda r: csv(r, "image,mask\nimages/z.png,ids/a.png\n"),
        "1 images of .* are not below .*z.png.*; add them",
    ),
    "csv out of the folder": (
        lambda r: csv(r, "image,mask\nimages/a.png,../../etc/passwd\n"),
        "line 2 of .* leads out of the folder",
    ),
    "csv out of the folder, whole": (
        lambda r: csv(r, "image,mask\n/etc/passwd,ids/a.png\n"),
        "line 2 of .* leads out of the folder",
    ),
    "csv without a column": (lambda r: csv(r, "photo,mask\na,b\n"), "no column 'image', but photo, mask"),
    "csv of semicolons": (lambda r: csv(r, "image;mask\na;b\n"), "save it with commas"),
    "csv of unequal lines": (lambda r: csv(r, "image,mask\na,b,c\n"), "line 2 of .* has 3 values for 2"),
    "csv cut in a value": (lambda r: csv(r, 'image,mask\n"a,b\n'), "is no CSV: unexpected end of data"),
    "csv twice": (
        lambda r: csv(r, "image,mask\nimages/a.png,ids/a.png\nimages/a.png,ids/b.png\n"),
        "1 images have labels more than once",
    ),
    "csv of another split": (
        lambda r: csv(r, "image,mask,split\nimages/a.png,ids/a.png,a\nimages/b.png,ids/b.png,b\n"),
        "has the splits a, b, and none for train",
    ),
    "voc missing image": (lambda r: voc(r, train="a\nz\n", val="b\n"), "1 keys have no file in .*z"),
    "voc out of the folder": (lambda r: voc(r, train="../../a\n", val="b\n"), "keys have no file in"),
    "voc without a list": (lambda r: voc(r, trainval="a\n", test="b\n"), "has the lists test, trainval"),
    "voc unknown color": (
        lambda r: voc(r, train="a\n", val="b\n", labelmap="background:0,0,0::\n"),
        "segments without an entry",
    ),
    "voc labelmap": (lambda r: voc(r, train="a\n", labelmap="leaf\n"), "line 1 of .* must be <category>"),
    "mask of many values": (lambda r: binary(r, 0, 3, 255), "of one class has 3 values"),
    "mask of another size": (lambda r: binary(r, 0, 1, size=5), "is 5 x 4 pixels, its image 4 x 4"),
    "row without a mask": (parquet, r"1 rows of .* have no image or no mask \(train-0000001\)"),
    "columns not known": (lambda r: parquet(r, "depth"), r"\(image, depth\).*data.columns={image"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def first_defect(cfg: DatasetConfig, root: Path) -> str:
    cfg = resolved(cfg, root)
    samples, defects, _ = find_samples(cfg, root, "train")
    for sample in samples:
        defects += inspect_sample(cfg, sample)[1]
    return str(defects[0])


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(name: str, tmp_path: Path) -> None:
    make, expected = BAD[name]
    cfg = make(tmp_path / "set")
    with pytest.raises(DataError, match=expected) as caught:
        raise DataError(first_defect(cfg, tmp_path / "set"))
    assert "\n" not in str(caught.value)


def test_a_column_divides_a_pool_by_groups(tmp_path: Path) -> None:
    rows = [f"images/{n}.png,ids/{n}.png,plot {n % 4}" for n in range(12)]
    for number in range(12):
        pair(tmp_path, str(number), "images", "ids")
    (tmp_path / "pairs.csv").write_text("\ufeffimage,mask,plot\r\n" + "\r\n".join(rows), encoding="utf-8")
    cfg = DatasetConfig(classes=CLASSES, val_share=0.25, group="plot")
    plots = [
        {int(s.key[7:]) % 4 for s in find_samples(cfg, tmp_path, split)[0]} for split in ("train", "val")
    ]
    assert len(plots[0]) == 3
    assert len(plots[1]) == 1
    assert plots[0].isdisjoint(plots[1])


def test_masks_of_pairs_are_stratified_by_their_classes(tmp_path: Path) -> None:
    for number in range(40):
        pair(tmp_path, f"{number:02d}", "images", "ids", ONE * (number % 10 == 0))
    rows = [f"images/{number:02d}.png,ids/{number:02d}.png" for number in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask", *rows]))
    cfg = DatasetConfig(classes=CLASSES, val_share=0.5, stratify=True)
    rare = [
        sum(sample.key.endswith("0") for sample in find_samples(cfg, tmp_path, split)[0])
        for split in cfg.splits
    ]
    assert rare == [2, 2]


def test_the_later_class_covers_and_a_changed_mask_changes_the_shard(tmp_path: Path) -> None:
    cfg = binary(tmp_path, 0, 0, 255, 255)
    png(tmp_path / "masks/stem/a.png", np.resize(np.array([0, 1, 1, 0], np.uint8), (4, 4)))
    for classes, row in ((["stem", "leaf"], [0, 1, 2, 2]), (["leaf", "stem"], [0, 2, 2, 1])):
        cfg.classes = ["background", *classes]
        (sample,), defects, _ = find_samples(cfg, tmp_path, "train")
        assert not defects
        np.testing.assert_array_equal(load_sample(cfg, sample).mask, [row] * 4)
    before = stat_hash([sample]), source_hash([sample])
    png(tmp_path / "masks/stem/a.png", ONE)
    assert stat_hash([sample]) != before[0]
    assert source_hash([sample]) != before[1]


def test_rows_are_written_once_and_go_on_where_they_ended(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = parquet(tmp_path / "set")
    written = huggingface.write_atomic

    def full(path: Path, *data: object, **options: bool) -> None:
        if "masks" in str(path):
            raise OSError(28, "No space left on device")
        written(path, *data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface, "write_atomic", full)
    assert "No space left on device; make room, or set HF_HOME" in first_defect(cfg, tmp_path / "set")
    (image,) = cache.rglob("images/*")
    first = image.stat().st_mtime_ns
    monkeypatch.setattr(huggingface, "write_atomic", written)
    assert len(find_samples(cfg, tmp_path / "set", "train")[0]) == 1
    monkeypatch.setattr(huggingface, "_rows", None)  # a call would raise
    assert len(find_samples(cfg, tmp_path / "set", "train")[0]) == 1
    assert image.stat().st_mtime_ns == first
    (rows,) = (cache / "segformer").iterdir()
    assert {path.name for path in rows.iterdir()} == {"images", "masks", "rows.json"}


def test_a_row_group_of_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_ROW_GROUP", 100)
    assert "row group 0 of" in first_defect(parquet(tmp_path / "set"), tmp_path / "set")


def test_names_of_ids_are_the_classes(tmp_path: Path) -> None:
    cfg = parquet(tmp_path)
    cfg.classes = []
    (tmp_path / "id2label.json").write_text(json.dumps({"1": "leaf", "0": "background"}))
    assert resolved(cfg, tmp_path).classes == CLASSES


def test_folders_of_masks_that_are_called_as_splits_are_no_classes(tmp_path: Path) -> None:
    binary(tmp_path, 0, 1)
    assert label_format(DatasetConfig(), tmp_path) == "binary_masks"
    (tmp_path / "masks/leaf").rename(tmp_path / "masks/Training")
    assert label_format(DatasetConfig(), tmp_path) == ""
