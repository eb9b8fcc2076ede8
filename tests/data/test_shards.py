import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from segformer.data.dataset import DatasetConfig, list_samples
from segformer.data.shards import ShardReader, ShardSet
from segformer.data.verify import verify
from segformer.errors import DataError


@pytest.fixture
def copy(shard_dir: Path, tmp_path: Path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(shard_dir, tmp_path / "copy"))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_every_sample_comes_back_as_it_was(shards: ShardSet, folder: Path, config: DatasetConfig) -> None:
    for name, split in shards.splits.items():
        sources = {sample.key: sample for sample in list_samples(config, folder, name)}
        reader = ShardReader(split)
        read = [reader.read(sample_id) for sample_id in range(split.num_samples)]
        assert [raw.key for raw in read] == split.keys
        assert sorted(split.keys) == sorted(sources)
        for raw in read:
            assert raw.image == sources[raw.key].image.read_bytes()


def test_the_set_describes_itself(shards: ShardSet) -> None:
    assert shards.classes == ["sky", "road", "tree"]
    assert shards.palette.shape == (3, 3)
    assert len(shards.digest) == 64
    assert {name: split.num_samples for name, split in shards.splits.items()} == {"train": 21, "val": 10}
    assert shards.split("train").shard_sizes == [8, 8, 5]


def test_an_unknown_split_names_those_that_exist(shards: ShardSet) -> None:
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        shards.split("test")


def test_a_split_pickles_small_and_opens_again(shards: ShardSet) -> None:
    split = shards.split("train")
    data = pickle.dumps(ShardReader(split))
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.read(9) == ShardReader(split).read(9)
    assert again.split.keys == split.keys


def test_a_reader_keeps_few_files_open(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segformer.data.shards.OPEN_FILES", 2)
    reader = ShardReader(shards.split("train"))
    for sample_id in (0, 20, 9, 1, 20):
        reader.read(sample_id)
    assert len(reader._files) == 2


def test_shards_that_do_not_exist_are_refused_with_the_command_that_writes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"python data_prep/shard.py"):
        ShardSet.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("dataset.json", "dataset.json' is (damaged|not)"),
        ("train-000001.idx", "train-000001.idx' is damaged"),
    ],
)
def test_a_flipped_bit_in_a_description_is_found_when_opening(copy: Path, file: str, message: str) -> None:
    size = (copy / file).stat().st_size
    whole = (copy / file).read_bytes()
    for offset in range(1, size, max(1, size // 40)):
        flip(copy / file, offset, offset % 7)
        with pytest.raises(DataError, match=message):
            ShardSet.open(copy).split("train")
        (copy / file).write_bytes(whole)


def test_a_missing_or_shortened_tar_is_found_when_opening(copy: Path) -> None:
    tar = copy / "train-000001.tar"
    data = tar.read_bytes()
    for length in (0, 512, 5000, len(data) - 1):
        tar.write_bytes(data[:length])
        with pytest.raises(DataError, match=f"train-000001.tar' has {length} bytes instead of {len(data)}"):
            ShardSet.open(copy)
    tar.unlink()
    with pytest.raises(DataError, match=r"train-000001.tar' is missing"):
        ShardSet.open(copy)


def test_a_shard_name_that_leaves_the_folder_is_refused(copy: Path) -> None:
    from segformer.data.shards import content_digest

    content = json.loads((copy / "dataset.json").read_text())
    content["splits"]["train"]["shards"][0]["file"] = "../train-000000.tar"
    content["digest"] = content_digest(content)
    (copy / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no plain tar name"):
        ShardSet.open(copy)


def test_every_flipped_bit_in_a_member_is_found_when_reading(copy: Path) -> None:
    split = ShardSet.open(copy).split("val")
    rng = np.random.default_rng(1)
    for _ in range(200):
        sample_id = int(rng.integers(8))  # in the first shard
        record = split.records[sample_id]
        member = "image" if rng.random() < 0.5 else "mask"
        offset = int(record[f"{member}_offset"] + rng.integers(record[f"{member}_size"]))
        bit = int(rng.integers(8))
        flip(copy / split.files[0], offset, bit)
        with pytest.raises(DataError, match=rf"val-000000.tar', key '00{sample_id}': the {member} at offset"):
            ShardReader(split).read(sample_id)
        flip(copy / split.files[0], offset, bit)


def test_a_tar_that_shrinks_while_training_is_a_short_read(copy: Path) -> None:
    split = ShardSet.open(copy).split("val")
    reader = ShardReader(split)
    reader.read(0)
    with (copy / split.files[0]).open("r+b") as stream:
        stream.truncate(int(split.records[1]["mask_offset"]) + 3)
    with pytest.raises(DataError, match=r"val-000000.tar', key '001': \d+ of \d+ bytes"):
        reader.read(1)


def test_verify_accepts_what_was_written(shard_dir: Path) -> None:
    verify(shard_dir)


def test_verify_finds_a_flipped_bit_anywhere_in_a_tar(copy: Path) -> None:
    tar = copy / "train-000000.tar"
    size = tar.stat().st_size
    for offset in range(0, size, size // 50):
        flip(tar, offset, offset % 8)
        with pytest.raises(DataError, match=r"train-000000.tar' is damaged"):
            verify(copy)
        flip(tar, offset, offset % 8)
