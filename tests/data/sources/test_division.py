"""Two splits share no image: what one folder or copies would make of them, and the division of one folder."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from samples import list_samples

from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import ConfigError, DataError
from segformer.training.config import RunConfig, compose
from segformer.training.run import _check

ONE = {"image_dir": "images/all", "mask_dir": "masks/all"}


@pytest.fixture(scope="module")
def one_folder(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pairs in one folder."""
    return make_folder(tmp_path_factory.mktemp("one"), {"all": 12})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., ShardSet]:
    def run(cfg: DatasetConfig, root: Path) -> ShardSet:
        write_shards(cfg, root, tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
        return ShardSet.open(tmp_path / "out")

    return run


def test_one_folder_for_two_splits_is_refused_and_divided_by_the_line_that_says_so(
    one_folder: Path, config: DatasetConfig, write: Callable[..., ShardSet]
) -> None:
    one = replace(config, **ONE)
    with pytest.raises(
        DataError, match=r"12 images are in train and in val \(000, 001, 002 and 9 more\)"
    ) as e:
        write(one, one_folder)
    share = re.search(r"data\.val_share=([0-9.]+)", str(e.value))
    assert share is not None
    shards = write(replace(one, val_share=float(share[1])), one_folder)
    train, val = (set(shards.split(split).keys) for split in ("train", "val"))
    assert (len(train | val), len(train & val)) == (12, 0)
    assert min(len(train), len(val)) >= 1
    hashes = {key: int(hashlib.sha256(f"0\0{key}".encode()).hexdigest()[:16], 16) for key in train | val}
    assert val == {key for key, drawn in hashes.items() if drawn < float(share[1]) * 2**64}


def test_more_images_move_no_other_and_another_seed_does(one_folder: Path, config: DatasetConfig) -> None:
    def val(root: Path, seed: int = 0) -> set[str]:
        cfg = replace(config, **ONE, val_share=0.5, val_seed=seed)
        return {sample.key for sample in list_samples(cfg, root, "val")}

    root = one_folder.with_name("more")
    shutil.copytree(one_folder, root)
    for number in range(100, 120):
        for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
            shutil.copy(root / kind / f"all/000{suffix}", root / kind / f"all/{number}{suffix}")
    known = {f"{number:03d}" for number in range(12)}
    assert val(root) & known == val(one_folder)
    assert val(root) - known
    assert val(one_folder, 1) != val(one_folder)


def test_a_share_that_leaves_a_split_empty_names_one_that_does_not(
    one_folder: Path, config: DatasetConfig
) -> None:
    cfg = replace(config, **ONE, val_share=1e-9)
    with pytest.raises(
        DataError, match=r"leaves no image for val of 12; set data\.val_share=0\.\d"
    ) as refused:
        list_samples(cfg, one_folder, "val")
    share = float(str(refused.value).rpartition("=")[2])
    assert list_samples(replace(cfg, val_share=share), one_folder, "val")


@pytest.mark.parametrize(
    "more",
    [{"image_dir": "images/{split}"}, {"splits": ["train", "val", "test"]}, {"split_lists": {"val": "a"}}],
)
def test_a_share_that_divides_nothing_is_refused(config: DatasetConfig, more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="divides one folder into two splits"):
        list_samples(replace(config, **ONE | {"val_share": 0.1} | more), Path("nowhere"), "val")


@pytest.mark.parametrize(
    ("way", "count"),
    [("link to folder", 21), ("lists", 1), ("folder inside", 10), ("copied image", 1), ("linked image", 1)],
)
def test_images_of_two_splits_are_refused_but_by_name(
    way: str, count: int, folder: Path, config: DatasetConfig, write: Callable[..., ShardSet], tmp_path: Path
) -> None:
    root, cfg = Path(shutil.copytree(folder, tmp_path / "set")), config
    if way == "link to folder":
        for kind in ("images", "masks"):
            shutil.rmtree(root / kind / "val")
            (root / kind / "val").symlink_to(root / kind / "train")
    elif way == "lists":
        (root / "train.txt").write_text("000\n001\n002\n")
        (root / "val.txt").write_text("002\n003\n")
        lists = {"train": "train.txt", "val": "val.txt"}
        cfg = replace(config, split_lists=lists, split_dirs={"train": "train", "val": "train"})
    elif way == "folder inside":
        for kind in ("images", "masks"):
            (root / kind / "val").rename(root / kind / "train/val")
        cfg = replace(config, split_dirs={"val": "train/val"})
    else:
        image = root / "images/val/001.jpg"
        image.unlink()
        if way == "copied image":
            shutil.copy(root / "images/train/001.jpg", image)
        else:
            image.symlink_to(root / "images/train/001.jpg")
    with pytest.raises(
        DataError, match=r"images are in train and in val.*if that is meant: .*duplicates=\[val"
    ) as e:
        write(cfg, root)
    assert str(e.value).startswith(f"{count} ")
    assert not (tmp_path / "out").exists()
    shards = write(replace(cfg, allow_duplicates=["val"]), root)
    assert shards.content["allow_duplicates"] == ["val"]


def test_splits_that_are_both_trained_on_or_both_scored_may_share_images(
    folder: Path, config: DatasetConfig, write: Callable[..., ShardSet]
) -> None:
    same = {"trainval": "train", "minival": "val"}
    cfg = replace(
        config, splits=["train", "trainval", "val", "val-mini"], split_dirs=same | {"val-mini": "val"}
    )
    assert set(write(cfg, folder).splits) == set(cfg.splits)
    replace(config, allow_duplicates=["test"])  # a split of the shards that this configuration does not name


def test_training_refuses_shards_whose_two_splits_are_one(
    one_folder: Path, config: DatasetConfig, write: Callable[..., ShardSet]
) -> None:
    shards = write(replace(config, **ONE, splits=["train", "val"], allow_duplicates=["val"]), one_folder)
    given = ["data=folder", f"data.shards={shards.root}", "global_batch=2", "augment.crop=[32,32]"]
    cfg = compose(RunConfig, "config", given)
    _check(cfg, 1)  # as sharding was told
    content = {key: value for key, value in shards.content.items() if key != "allow_duplicates"}
    path = Path(shards.root) / "dataset.json"
    path.write_text(json.dumps(content | {"digest": content_digest(content)}))
    with pytest.raises(DataError, match="12 images are in train and in val, byte for byte"):
        _check(cfg, 1)
    _check(compose(RunConfig, "config", [*given, "data.allow_duplicates=[val]"]), 1)
    _check(compose(RunConfig, "config", [*given, "eval_split=train"]), 1)
