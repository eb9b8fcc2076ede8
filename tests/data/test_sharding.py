import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from segformer.data.dataset import DatasetConfig, list_samples, load_sample
from segformer.data.sharding import write_shards
from segformer.data.shards import ShardReader, ShardSet
from segformer.errors import ConfigError, DataError

# webdataset closes the tars that it opens by garbage collection, which Python reports.
leaves_files_open = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    workers: int, folder: Path, shard_dir: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    write_shards(config, folder, tmp_path / "out", seed=3, samples_per_shard=8, workers=workers)
    assert hashes(tmp_path / "out") == hashes(shard_dir)


@leaves_files_open
def test_stock_webdataset_reads_the_shards(shard_dir: Path, folder: Path, config: DatasetConfig) -> None:
    masks = {sample.key: load_sample(config, sample)[1] for sample in list_samples(config, folder, "train")}
    urls = sorted(str(path) for path in shard_dir.glob("train-*.tar"))
    seen = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        seen.append(sample["__key__"])
        pixels = np.asarray(sample["png"])
        np.testing.assert_array_equal(pixels[..., 0], masks[sample["__key__"]])
        assert np.asarray(sample["jpg"]).shape == pixels.shape
    assert seen == ShardSet.open(shard_dir).split("train").keys


def test_training_is_shuffled_by_the_seed_and_validation_is_not(
    folder: Path, shards: ShardSet, config: DatasetConfig, tmp_path: Path
) -> None:
    write_shards(config, folder, tmp_path / "out", seed=4, samples_per_shard=8, workers=1)
    other = ShardSet.open(tmp_path / "out")
    assert shards.split("val").keys == other.split("val").keys == sorted(other.split("val").keys)
    orders = [split.keys for split in (shards.split("train"), other.split("train"))]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({tuple(order) for order in [*orders, sorted(orders[0])]}) == 3


def test_class_pixels_and_sizes_are_those_of_the_masks(
    shards: ShardSet, folder: Path, config: DatasetConfig
) -> None:
    for name, split in shards.splits.items():
        masks = {s.key: load_sample(config, s)[1] for s in list_samples(config, folder, name)}
        assert shards.stats[name] == [
            sum(int((mask == k).sum()) for mask in masks.values()) for k in range(3)
        ]
        ignored = sum(int((mask == 255).sum()) for mask in masks.values())
        assert shards.content["splits"][name]["ignored_pixels"] == ignored
        for sample_id, key in enumerate(split.keys):
            mask = masks[key]
            assert (split.heights[sample_id], split.widths[sample_id]) == mask.shape
            labels = mask[mask != 255]
            assert split.records["max_label"][sample_id] == (labels.max() if labels.size else -1)


@leaves_files_open
def test_png_images_and_names_with_dots_survive(config: DatasetConfig, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    for kind, data in (("images", image), ("masks", image[..., 0] % 3)):
        (tmp_path / kind / "train/town.a").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / kind / "train/town.a/street.01.png"), data)
    cfg = replace(config, splits=["train"], image_suffix=".png")
    write_shards(cfg, tmp_path, tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
    raw = ShardReader(ShardSet.open(tmp_path / "out").split("train")).read(0)
    assert raw.key == "town.a/street_01"
    assert raw.image == (tmp_path / "images/train/town.a/street.01.png").read_bytes()
    tar = str(tmp_path / "out/train-000000.tar")
    (sample,) = webdataset.WebDataset(tar, shardshuffle=False).decode("pil")
    np.testing.assert_array_equal(np.asarray(sample["image.png"]), image[..., ::-1])
    np.testing.assert_array_equal(np.asarray(sample["png"])[..., 0], image[..., 0] % 3)


def test_names_that_differ_only_by_dots_are_refused(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 2})
    for kind, end in (("images", ".jpg"), ("masks", ".png")):
        for number, name in enumerate(("a.b", "a_b")):
            (root / kind / f"train/00{number}{end}").rename(root / kind / f"train/{name}{end}")
    with pytest.raises(DataError, match=r"'a_b' and 'a.b' differ only by dots"):
        write_shards(
            replace(config, splits=["train"]), root, tmp_path / "out", seed=0, samples_per_shard=8, workers=1
        )


def test_a_finished_set_is_left_alone_and_says_so(
    folder: Path, config: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_shards(config, folder, out, seed=3, samples_per_shard=8, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write_shards(config, folder, out, seed=3, samples_per_shard=8, workers=1)
    assert "already holds exactly these shards" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_folder_that_holds_something_else_is_refused(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root, out = make_folder(tmp_path / "set", {"train": 2}), tmp_path / "out"
    cfg = replace(config, splits=["train"])
    write_shards(cfg, root, out, seed=0, samples_per_shard=8, workers=1)
    others = [(replace(cfg, classes=["a", "b", "c"]), 0), (cfg, 1)]
    for other, seed in others:
        with pytest.raises(DataError, match="holds something else"):
            write_shards(other, root, out, seed=seed, samples_per_shard=8, workers=1)
    mask = root / "masks/train/000.png"
    pixels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(mask), np.where(pixels == 1, 0, pixels))
    with pytest.raises(DataError, match="holds something else"):
        write_shards(cfg, root, out, seed=0, samples_per_shard=8, workers=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    with pytest.raises(DataError, match="holds something else"):
        write_shards(cfg, root, tmp_path / "notes", seed=0, samples_per_shard=8, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_nothing_behind(
    workers: int, make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 5})
    (root / "images/train/003.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"003.jpg' is not a whole JPEG or PNG: empty file \(0 bytes\)"):
        write_shards(
            replace(config, splits=["train"]),
            root,
            tmp_path / "out",
            seed=0,
            samples_per_shard=1,
            workers=workers,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_digest_covers_the_classes(
    folder: Path, config: DatasetConfig, tmp_path: Path, shards: ShardSet
) -> None:
    other = replace(config, classes=["sky", "road", "shrub"])
    write_shards(other, folder, tmp_path / "out", seed=3, samples_per_shard=8, workers=1)
    assert ShardSet.open(tmp_path / "out").digest != shards.digest
    assert json.loads((tmp_path / "out/dataset.json").read_text())["license"] == "none"


def test_wrong_settings_are_refused(folder: Path, config: DatasetConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples_per_shard=0"):
        write_shards(config, folder, tmp_path / "out", seed=0, samples_per_shard=0, workers=1)
    with pytest.raises(ConfigError, match="seed=-1"):
        write_shards(config, folder, tmp_path / "out", seed=-1, samples_per_shard=1, workers=1)
    with pytest.raises(ConfigError, match=r"data.splits is empty"):
        write_shards(
            replace(config, splits=[]), folder, tmp_path / "out", seed=0, samples_per_shard=1, workers=1
        )
