import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import list_samples

from segformer.data.shards.format import ShardSet, Split, content_digest
from segformer.data.shards.index import INDEX, LABELS, pack_index, parse_index
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.verify import find_defects
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.sample import load_sample
from segformer.errors import DataError


def describe(folder: Path, content: dict[str, Any]) -> None:
    """Write dataset.json with a digest that fits it."""
    content["digest"] = content_digest(content)
    (folder / "dataset.json").write_text(json.dumps(content))


def replace_bytes(path: Path, data: bytes) -> None:
    """A new file in the place of an old one, which may be mapped."""
    path.unlink()
    path.write_bytes(data)


def test_every_sample_comes_back_as_it_was(shards: ShardSet, folder: Path, config: DatasetConfig) -> None:
    for name, split in shards.splits.items():
        sources = {sample.key: sample for sample in list_samples(config, folder, name)}
        reader = ShardReader(split)
        read = [reader.read(sample_id) for sample_id in range(split.num_samples)]
        assert [raw.key for raw in read] == split.keys == [split.key(i) for i in range(split.num_samples)]
        assert sorted(split.keys) == sorted(sources)
        for raw in read:
            assert raw.image == sources[raw.key].image.read_bytes()


def test_the_set_describes_itself(shards: ShardSet, shard_dir: Path) -> None:
    assert (shards.task, shards.root) == ("segmentation", str(shard_dir))
    assert shards.classes == ["sky", "road", "tree"]
    assert shards.palette.shape == (3, 3)
    assert {name: split.num_samples for name, split in shards.splits.items()} == {"train": 21, "val": 10}
    assert shards.split("train").shard_sizes == [8, 8, 5]
    assert [shards.split("train").shard_of(i) for i in (0, 7, 8, 20)] == [0, 0, 1, 2]


def test_the_histograms_are_those_of_the_masks(shards: ShardSet, folder: Path, config: DatasetConfig) -> None:
    for name, split in shards.splits.items():
        masks = {s.key: load_sample(config, s).mask for s in list_samples(config, folder, name)}
        holders: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for sample_id, key in enumerate(split.keys):
            labels, pixels = np.unique(masks[key], return_counts=True)
            expected = dict(zip(labels.tolist(), pixels.tolist(), strict=True))
            expected.pop(255, None)
            ids, counts = split.labels(sample_id)
            assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == expected
            for label in expected:
                holders[label].append(sample_id)
        for label, expected_ids in holders.items():
            found = split.samples_with(label)
            assert found.dtype == np.int64
            assert found.tolist() == expected_ids
        assert split.samples_with(77).tolist() == []
        assert split.class_pixels.tolist() == shards.content["splits"][name]["class_pixels"]


def test_a_classification_set_has_its_class_ids(class_shards: ShardSet) -> None:
    assert class_shards.task == "classification"
    assert class_shards.classes == ["cat", "dog", "owl"]
    split = class_shards.split("train")
    reader = ShardReader(split)
    for sample_id, key in enumerate(split.keys):
        label = class_shards.classes.index(key.split("/")[0])
        assert reader.read(sample_id).target == str(label).encode()
        assert split.records["max_label"][sample_id] == label
        assert [part.tolist() for part in split.labels(sample_id)] == [[label], [1]]
    assert split.class_pixels.tolist() == [5, 4, 4]
    assert [len(split.samples_with(label)) for label in range(3)] == [5, 4, 4]


def test_an_unknown_split_names_those_that_exist(shards: ShardSet) -> None:
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        shards.split("test")


def test_a_split_pickles_small_and_opens_again(shards: ShardSet) -> None:
    split = shards.split("train")
    data = pickle.dumps(split)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert ShardReader(again).read(9) == ShardReader(split).read(9)
    assert again.keys == split.keys


def test_a_set_that_was_replaced_is_noticed_by_a_worker(copy: Path) -> None:
    data = pickle.dumps(ShardSet.open(copy).split("train"))
    content = json.loads((copy / "dataset.json").read_text()) | {"license": "another"}
    describe(copy, content)
    with pytest.raises(DataError, match="changed while they were in use"):
        pickle.loads(data)


def test_shards_that_do_not_exist_are_refused_with_the_command_that_writes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python data_prep/shard.py"):
        ShardSet.open(tmp_path / "nothing")


def test_a_missing_or_shortened_tar_is_found_when_opening(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    data = tar.read_bytes()
    for length in (0, 5000, len(data) - 1):
        tar.write_bytes(data[:length])
        with pytest.raises(DataError, match=f"train-000001.tar' has {length} bytes instead of {len(data)}"):
            ShardSet.open(copy)
    tar.unlink()
    with pytest.raises(DataError, match=r"train-000001.tar' cannot be read: .*No such file"):
        ShardSet.open(copy)


# What is wrong -> a change of dataset.json, which gets a digest that fits.
EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "first version": lambda content: content.update(version=1),
    "no classes": lambda content: content.pop("classes"),
    "no splits": lambda content: content.pop("splits"),
    "no index": lambda content: content["splits"]["val"].pop("index"),
    "no shards": lambda content: content["splits"]["val"].pop("shards"),
    "no statistics": lambda content: content["splits"]["val"].pop("class_pixels"),
    "no sum": lambda content: content["splits"]["val"]["shards"][0].pop("sha256"),
    "samples as text": lambda content: content["splits"]["val"]["shards"][0].update(samples="3"),
    "pixels as text": lambda content: content["splits"]["val"].update(class_pixels=["x"]),
    "more samples than numbers": lambda content: content["splits"]["val"]["shards"][0].update(samples=2**70),
    "fewer samples than none": lambda content: content["splits"]["val"]["shards"][0].update(samples=-5),
    "more pixels than numbers": lambda content: content["splits"]["val"]["class_pixels"].__setitem__(
        0, 2**70
    ),
    "colors of no picture": lambda content: content["palette"].append([2**70, 0, 0]),
    "a class that is no name": lambda content: content["classes"].__setitem__(0, ["sky"]),
    "a class too many": lambda content: content["splits"]["val"]["class_pixels"].append(0),
    "folder": lambda content: content["splits"]["val"]["shards"][0].update(file="../val-000000.tar"),
    "other file": lambda content: content["splits"]["val"]["shards"][0].update(file="val-000000.tar.gz"),
}


@pytest.mark.parametrize("wrong", EDITS)
def test_a_description_that_cannot_be_used_is_refused(wrong: str, copy: Path) -> None:
    content = json.loads((copy / "dataset.json").read_text())
    EDITS[wrong](content)
    describe(copy, content)
    with pytest.raises(DataError, match=r"dataset.json' (is not complete|is not of format|names a shard)"):
        ShardSet.open(copy)
    (defect,) = find_defects(copy)
    assert "dataset.json" in defect


# What is wrong -> a change of (records, labels, keys). Each would mislead a reader.
NONSENSE: dict[str, Callable[[np.ndarray, np.ndarray, bytearray], object]] = {
    "image before the tar": lambda r, _h, _k: r["image_offset"].__setitem__(0, -1),
    "an image without end": lambda r, _h, _k: r["image_size"].__setitem__(3, 2**63 - 1),
    "labels that go around": lambda r, _h, _k: r["labels_end"].__setitem__([3, 4], [2**62, -(2**62) - 1]),
    "image of no bytes": lambda r, _h, _k: r["image_size"].__setitem__(3, 0),
    "target inside the image": lambda r, _h, _k: r["target_offset"].__setitem__(2, r["image_offset"][2]),
    "target past the tar": lambda r, _h, _k: r["target_size"].__setitem__(7, 10**9),
    "two samples in one place": lambda r, _h, _k: r["image_offset"].__setitem__(5, r["image_offset"][4]),
    "no height": lambda r, _h, _k: r["height"].__setitem__(1, 0),
    "an image bomb": lambda r, _h, _k: r["width"].__setitem__(1, 2**30),
    "labels that go back": lambda r, _h, _k: r["labels_end"].__setitem__(4, 0),
    "more labels than there are": lambda r, h, _k: r["labels_end"].__setitem__(20, len(h) + 1),
    "keys that go back": lambda r, _h, _k: r["key_end"].__setitem__(4, 0),
    "a newline in a key": lambda _r, _h, k: k.__setitem__(1, 10),
    "an unknown class": lambda _r, h, _k: h["label"].__setitem__(-1, 3),
    "a class twice": lambda _r, h, _k: h["label"].__setitem__(1, h["label"][0]),
    "more pixels than the image": lambda _r, h, _k: h["pixels"].__setitem__(0, 2**31),
    "another total": lambda _r, h, _k: h["pixels"].__setitem__(0, h["pixels"][0] - 1),
    "another highest label": lambda r, _h, _k: r["max_label"].__setitem__(0, 7),
}


@pytest.mark.parametrize("wrong", NONSENSE)
def test_an_index_that_makes_no_sense_is_refused_even_with_the_right_sum(
    wrong: str, copy: Path, reseal: Callable[..., None]
) -> None:
    path = copy / "train.idx"
    records, labels, keys = (part.copy() for part in parse_index(np.fromfile(path, np.uint8)))
    blob = bytearray(keys.tobytes())
    NONSENSE[wrong](records, labels, blob)
    replace_bytes(path, pack_index(records, labels, bytes(blob)))
    reseal(copy)
    with pytest.raises(DataError, match=r"train.idx' contradicts itself"):
        ShardSet.open(copy)


def test_a_large_index_opens_without_a_step_per_sample(copy: Path, reseal: Callable[..., None]) -> None:
    """200,000 samples, which a loop in Python would need seconds for; the tar behind them is a hole."""
    count, area = 200_000, 40 * 56
    records, labels = np.zeros(count, INDEX), np.zeros(2 * count, LABELS)
    records["image_offset"] = 512 + 4096 * np.arange(count)
    records["image_size"], records["target_size"] = 1000, 700
    records["target_offset"] = records["image_offset"] + 1536
    records["height"], records["width"], records["max_label"] = 40, 56, 2
    records["labels_end"], records["key_end"] = 2 * np.arange(1, count + 1), 10 * np.arange(1, count + 1) - 1
    labels["label"], labels["pixels"] = np.tile([0, 2], count), area // 2
    keys = "\n".join(f"{number:09d}" for number in range(count)).encode()
    replace_bytes(copy / "val.idx", pack_index(records, labels, keys))
    with (copy / "val-000000.tar").open("wb") as stream:
        stream.truncate(512 + 4096 * count)
    content = json.loads((copy / "dataset.json").read_text())
    content["splits"]["val"]["class_pixels"] = [count * area // 2, 0, count * area // 2]
    content["splits"]["val"]["shards"] = [{"file": "val-000000.tar", "samples": count}]
    content["splits"]["val"]["shards"][0] |= {"bytes": 512 + 4096 * count, "sha256": ""}
    reseal(copy, content, tars=False)
    began = time.monotonic()
    split: Split = ShardSet.open(copy).split("val")
    assert split.key(123_456) == "000123456"
    assert len(split.samples_with(2)) == count
    assert time.monotonic() - began < 1.0


def test_files_that_are_not_used_change_no_digest(shards: ShardSet) -> None:
    splits = {name: entry | {"left_out": {"images": {}}} for name, entry in shards.content["splits"].items()}
    assert content_digest(shards.content | {"splits": splits}) == shards.digest
    assert content_digest(shards.content | {"license": "none at all"}) != shards.digest
