import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image
from samples import list_samples

from segformer.data.shards import pool
from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.verify import find_defects
from segformer.data.shards.workfolder import WorkFolder
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, decode_mask, image_header
from segformer.data.sources.sample import load_sample
from segformer.errors import ConfigError, DataError
from segformer.files import write_atomic

# webdataset closes the tars that it opens by garbage collection, which Python reports.
leaves_files_open = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


def write(cfg: DatasetConfig, root: Path, out: Path, **settings: Any) -> None:
    write_shards(cfg, root, out, **{"seed": 3, "samples_per_shard": 2, "workers": 1} | settings)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    folder: Path, shard_dir: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    write(config, folder, tmp_path / "out", samples_per_shard=8, workers=2)
    assert hashes(tmp_path / "out") == hashes(shard_dir)


@leaves_files_open
def test_stock_webdataset_reads_the_shards(shard_dir: Path, folder: Path, config: DatasetConfig) -> None:
    sources = {sample.key: sample for sample in list_samples(config, folder, "train")}
    urls = sorted(str(path) for path in shard_dir.glob("train-*.tar"))
    seen = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        source = sources[sample["__key__"]]
        seen.append(sample["__key__"])
        np.testing.assert_array_equal(np.asarray(sample["png"])[..., 0], load_sample(config, source).mask)
        np.testing.assert_array_equal(np.asarray(sample["jpg"]), np.asarray(Image.open(source.image)))
    assert seen == ShardSet.open(shard_dir).split("train").keys


@leaves_files_open
def test_stock_webdataset_reads_classification_shards(class_shards: ShardSet) -> None:
    urls = sorted(str(path) for path in Path(class_shards.root).glob("train-*.tar"))
    seen = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in seen] == class_shards.split("train").keys
    for sample in seen:
        assert sample["cls"] == class_shards.classes.index(sample["__key__"].split("/")[0])


def test_training_is_shuffled_by_the_seed_and_validation_is_not(
    folder: Path, shards: ShardSet, config: DatasetConfig, tmp_path: Path
) -> None:
    write(config, folder, tmp_path / "out", seed=4, samples_per_shard=8)
    other = ShardSet.open(tmp_path / "out")
    assert shards.split("val").keys == other.split("val").keys == sorted(other.split("val").keys)
    orders = [split.keys for split in (shards.split("train"), other.split("train"))]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len({tuple(order) for order in [*orders, sorted(orders[0])]}) == 3


@leaves_files_open
def test_png_images_and_names_with_dots_survive(config: DatasetConfig, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    for kind, data in (("images", image), ("masks", image[..., 0] % 3)):
        (tmp_path / kind / "train/town.a").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / kind / "train/town.a/street.01.png"), data)
    cfg = replace(config, splits=["train"], image_suffix=".png")
    write(cfg, tmp_path, tmp_path / "out")
    raw = ShardReader(ShardSet.open(tmp_path / "out").split("train")).read(0)
    assert raw.key == "town.a/street_01"
    assert raw.image == (tmp_path / "images/train/town.a/street.01.png").read_bytes()
    tar = str(tmp_path / "out/train-000000.tar")
    (sample,) = webdataset.WebDataset(tar, shardshuffle=False).decode("pil")
    np.testing.assert_array_equal(np.asarray(sample["image.png"]), image[..., ::-1])
    np.testing.assert_array_equal(np.asarray(sample["png"])[..., 0], image[..., 0] % 3)


def test_names_that_differ_only_by_dots_are_refused(config: DatasetConfig, tmp_path: Path) -> None:
    for kind, end in (("images", ".jpg"), ("masks", ".png")):
        (tmp_path / kind / "train").mkdir(parents=True)
        for name in ("a.b", "a_b"):
            (tmp_path / kind / f"train/{name}{end}").touch()
    with pytest.raises(DataError, match=r"'a_b' and 'a.b' differ only by dots"):
        write(replace(config, splits=["train"]), tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "refused"), [("__x__", True), ("____", True), ("a/__x__", False), ("__x__y", False)]
)
def test_names_that_stock_webdataset_skips_are_refused(
    name: str, refused: bool, config: DatasetConfig, tmp_path: Path
) -> None:
    for kind, end in (("images", ".jpg"), ("masks", ".png")):
        (tmp_path / kind / "train" / name).mkdir(parents=True)
        (tmp_path / kind / "train" / name / f"1{end}").touch()
    message = rf"'{name}/1' cannot be a key, webdataset skips" if refused else r"1.jpg' is not a whole JPEG"
    with pytest.raises(DataError, match=message):
        write(replace(config, splits=["train"]), tmp_path, tmp_path / "out")


def test_the_source_hash_is_over_names_classes_and_bytes(
    folder: Path, shards: ShardSet, config: DatasetConfig
) -> None:
    entry = shards.content["splits"]["val"]["shards"][0]
    digest = hashlib.sha256()
    for sample in list_samples(config, folder, "val")[: entry["samples"]]:
        digest.update(f"{sample.key}\0{sample.label}".encode())
        for kind, end in (("images", "jpg"), ("masks", "png")):
            data = (folder / kind / "val" / f"{sample.key}.{end}").read_bytes()
            digest.update(len(data).to_bytes(8, "little") + data)
    assert entry["source_sha256"] == digest.hexdigest()


def test_a_folder_that_holds_something_else_is_refused(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root, out = make_folder(tmp_path / "set", {"train": 2}), tmp_path / "out"
    cfg = replace(config, splits=["train"])
    write(cfg, root, out)

    def refused(cfg: DatasetConfig, out: Path, **settings: int) -> None:
        with pytest.raises(DataError, match="holds something else"):
            write(cfg, root, out, **settings)

    refused(cfg, root)
    refused(replace(cfg, classes=["a", "b", "c"]), out)
    there, here = ", ".join(cfg.classes), ", ".join(cfg.classes[::-1])
    with pytest.raises(DataError, match=rf"differing: classes: \[{there}\] there, \[{here}\] here"):
        write(replace(cfg, classes=cfg.classes[::-1]), root, out)
    refused(cfg, out, seed=4)
    repaint(root / "masks/train/000.png")
    refused(cfg, out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    refused(cfg, tmp_path / "notes")


def repaint(mask: Path) -> None:
    """Class 1 of a mask becomes 0."""
    pixels = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(mask), np.where(pixels == 1, 0, pixels))


def test_a_failure_before_the_first_shard_leaves_nothing_behind(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 5})
    for path in (root / "images/train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"jpg' is not a whole .* or BMP: empty file \(0 bytes\)"):
        write(replace(config, splits=["train"]), root, tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -2}, r"workers=-2; use -1"),
        ({"splits": []}, r"data.splits is empty"),
        ({"out": Path("/")}, r"output='/' has no name"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any], message: str, folder: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    given = {"splits": ["train"], "out": tmp_path / "out"} | settings
    with pytest.raises(ConfigError, match=message):
        write(replace(config, splits=given.pop("splits")), folder, given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_class_names_that_can_not_be_shown_are_refused(
    folder: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    names = [f"{name}\x1b[2J\n" for name in config.classes]
    with pytest.raises(ConfigError, match=r"data\.classes: .*\\x1b\[2J\\n.* hold control characters"):
        write(replace(config, classes=names), folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_raw_ids_are_counted_before_the_label_map(
    folder: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    merged = replace(config, classes=["ground", "rest"], label_map={0: 1, 1: 0, 2: 255, 9: 0, 255: 255})
    write(merged, folder, tmp_path / "out", samples_per_shard=8)
    content = ShardSet.open(tmp_path / "out").content
    for split in ("train", "val"):
        masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (folder / "masks" / split).iterdir()]
        ids, pixels = np.unique(np.concatenate([mask.reshape(-1) for mask in masks]), return_counts=True)
        counts = dict(zip(ids.tolist(), pixels.tolist(), strict=True))
        entry = content["splits"][split]
        assert {int(raw): count for raw, count in entry["raw_ids"].items()} == counts
        assert entry["class_pixels"] == [counts[1], counts[0]]
        assert entry["ignored_pixels"] == counts[2] + counts[255]
        assert entry["class_images"] == [sum(bool((mask == raw).any()) for mask in masks) for raw in (1, 0)]


def area_average(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of the result is the mean over the rectangle that it covers in `pixels` (H, W, 3)."""

    def weights(target: int, source: int) -> np.ndarray:
        edges = np.linspace(0, source, target + 1)
        left, right = edges[:-1, None], edges[1:, None]
        covered = np.minimum(right, np.arange(source) + 1) - np.maximum(left, np.arange(source))
        return covered.clip(0) / (source / target)

    rows, columns = weights(height, pixels.shape[0]), weights(width, pixels.shape[1])
    return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(float))


def test_images_above_the_long_side_are_reduced_with_their_masks(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 4}, suffix=".png")  # longer sides 56, 56, 48, 56
    cfg = replace(config, splits=["train"], image_suffix=".png")
    write(cfg, root, tmp_path / "out", long_side=48)
    split = ShardSet.open(tmp_path / "out").split("train")
    assert find_defects(tmp_path / "out") == []
    assert split.heights.max() == split.widths.max() == 48
    for sample in list_samples(cfg, root, "train"):
        raw, loaded = ShardReader(split).read(split.keys.index(sample.key)), load_sample(cfg, sample)
        mask, image = loaded.mask, decode_image(loaded.image)
        assert mask is not None
        if max(mask.shape) > 48:
            height, width = (34, 48) if loaded.width == 56 else (48, 34)
            image = area_average(image, height, width)
            rows = ((np.arange(height) + 0.5) * loaded.height / height).astype(int)
            columns = ((np.arange(width) + 0.5) * loaded.width / width).astype(int)
            mask = mask[rows][:, columns]
        else:
            assert raw.image == loaded.image
        np.testing.assert_array_equal(decode_mask(raw.target), mask)
        np.testing.assert_allclose(decode_image(raw.image), image, atol=1)


def test_a_quality_makes_every_image_a_jpeg(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 1}, suffix=".png")
    image = cv2.imread(str(root / "images/train/000.png"))[..., ::-1]
    sizes = []
    for quality in (30, 90):
        out = tmp_path / f"out{quality}"
        write(replace(config, splits=["train"], image_suffix=".png"), root, out, quality=quality)
        raw = ShardReader(ShardSet.open(out).split("train")).read(0)
        assert image_header(raw.image) == ("jpeg", 40, 56)
        assert np.abs(decode_image(raw.image).astype(int) - image).mean() < 12
        sizes.append(len(raw.image))
    assert sizes[0] < sizes[1]


def test_images_without_the_wanted_classes_are_left_out_of_training(
    folder: Path, config: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(config, drop_classes=["road", "tree"], min_share=0.5)
    write(cfg, folder, tmp_path / "out", samples_per_shard=8)
    shares = {}
    for sample in list_samples(config, folder, "train"):
        mask = load_sample(config, sample).mask
        assert mask is not None
        shares[sample.key] = ((mask == 1) | (mask == 2)).mean()
    wanted = sorted(key for key, share in shares.items() if share >= 0.5)
    assert 0 < len(wanted) < 21
    shards = ShardSet.open(tmp_path / "out")
    assert sorted(shards.split("train").keys) == wanted
    assert shards.split("val").num_samples == 10
    assert {name: split["dropped"] for name, split in shards.content["splits"].items()} == {
        "train": 21 - len(wanted),
        "val": 0,
    }
    left_out = f"train: {21 - len(wanted)} of 21 images are left out (road, tree below 50 % of the pixels)"
    assert left_out in capsys.readouterr().out
    write(cfg, folder, tmp_path / "out", samples_per_shard=8)
    assert "already holds exactly these shards" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"leaves no image of train"):
        write(replace(cfg, drop_classes=["road"], min_share=0.999), folder, tmp_path / "none")


def test_a_finished_set_is_known_again_without_reading_the_source(
    make_folder: Callable[..., Path],
    config: DatasetConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, out = make_folder(tmp_path / "set", {"train": 4}), tmp_path / "out"
    cfg = replace(config, splits=["train"])
    write(cfg, root, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    image = root / "images/train/001.jpg"
    before, data = image.stat(), image.read_bytes()
    image.write_bytes(data[::-1])
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    write(cfg, root, out)  # same name, size and time: not looked into
    assert "already holds exactly these shards" in capsys.readouterr().out
    os.utime(image)
    with pytest.raises(DataError, match="differing: the source"):
        write(cfg, root, out)
    image.write_bytes(data)
    write(cfg, root, out)  # another time, but the same bytes
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    (out / ".sources.json").unlink()
    write(cfg, root, out)
    content = json.loads((out / "dataset.json").read_text())
    content["palette"] = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]  # that earlier versions gave to three classes
    write_atomic(out / "dataset.json", json.dumps(content | {"digest": content_digest(content)}))
    write(cfg, root, out)


def test_a_second_process_is_refused(folder: Path, config: DatasetConfig, tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "out", "another set").hold(),
        pytest.raises(DataError, match=r"another process is writing .*out'; wait until it has finished"),
    ):
        write(config, folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def interrupted(make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path) -> Path:
    """A source of 5 + 1 images whose last one was damaged, sharded as far as it went, and mended."""
    root = make_folder(tmp_path / "set", {"train": 5, "val": 1})
    whole = (root / "images/val/000.jpg").read_bytes()
    (root / "images/val/000.jpg").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"val/000.jpg' is not a whole JPEG"):
        write(config, root, tmp_path / "out")
    (root / "images/val/000.jpg").write_bytes(whole)
    return root


@pytest.mark.parametrize("change", ["seed", "a further image"])
def test_other_settings_or_files_start_over_and_say_so(
    change: str, interrupted: Path, config: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = 4 if change == "seed" else 3
    if change != "seed":
        for kind, end in (("images", ".jpg"), ("masks", ".png")):
            source = interrupted / kind / "train"
            (source / f"new{end}").write_bytes((source / f"000{end}").read_bytes())
    write(config, interrupted, tmp_path / "out", seed=seed)
    printed = capsys.readouterr().out
    assert "what an earlier try with other settings or files left in " in printed
    assert "are kept" not in printed
    write(config, interrupted, tmp_path / "undisturbed", seed=seed)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_finished_shards_are_kept_unless_their_source_or_files_changed(
    interrupted: Path, config: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repaint(interrupted / "masks/val/000.png")
    (work,) = (path for path in (tmp_path / ".out.tmp").iterdir() if path.is_dir())
    kept = (work / "set/train-000002.tar").stat()
    for name in ("set/train-000000.tar", "parts/train-000001.part"):
        data = bytearray((work / name).read_bytes())
        data[len(data) // 2] ^= 1
        (work / name).write_bytes(data)
    write(config, interrupted, tmp_path / "out")
    assert "1 of 4 shards were complete already and are kept" in capsys.readouterr().out
    after = (tmp_path / "out/train-000002.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    write(config, interrupted, tmp_path / "undisturbed")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


def test_parts_are_written_side_by_side_and_joined_to_the_same_bytes(
    folder: Path, shard_dir: Path, config: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with WorkFolder(out, "another node").hold(shared=True):
        for index in (2, 0, 1):
            write(config, folder, out, samples_per_shard=8, part=(index, 3))
        with pytest.raises(DataError, match="another process is writing"):
            write(config, folder, out, samples_per_shard=8)
    assert not out.exists()
    write(config, folder, out, samples_per_shard=8)
    assert "5 of 5 shards were complete already and are kept" in capsys.readouterr().out
    assert hashes(out) == hashes(shard_dir)


def _end_at_the_second(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.faults
def test_a_worker_that_dies_is_one_error_and_not_a_wait() -> None:
    with pytest.raises(DataError, match=r"a worker process died while counting: .*; if memory ran out"):
        pool.run(_end_at_the_second, range(4), images=[1] * 4, workers=2, desc="counting")


def test_ctrl_c_leaves_what_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.tqdm, "update", lambda *_: signal.raise_signal(signal.SIGINT))
    tasks = [tmp_path / str(number) for number in range(40)]
    with pytest.raises(KeyboardInterrupt):
        pool.run(_slow_touch, tasks, images=[1] * 40, workers=2, desc="counting")
    assert len(list(tmp_path.iterdir())) < 20


def _slow_touch(path: Path) -> None:
    time.sleep(0.05)
    path.touch()


@pytest.mark.faults
def test_sigkill_at_every_step_and_with_workers_loses_no_finished_shard(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root, many = make_folder(tmp_path / "set", {"train": 3}), make_folder(tmp_path / "many", {"train": 40})
    script = Path(__file__).with_name("kill_sharding.py")
    command = [sys.executable, str(script), str(root), str(many), str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
