"""data_prep/shard.py from the command line, the shipped sample and the files of conf/data."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from segformer.data.shards.format import ShardSet
from segformer.data.sources.listing import list_samples
from segformer.training.config import RunConfig, compose

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "data_prep/sample"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, from the repository root."""
    return subprocess.run(
        [sys.executable, "data_prep/shard.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_shows_the_label_map_and_counts_and_ends_with_the_place(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    done = run("data=sample", f"output={out}", "workers=1", "samples_per_shard=200")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("label map")
    assert "1 ->   1 nucleus" in done.stdout
    assert "train: 292 images in 2 shards" in lines
    assert "val: 80 images in 1 shards" in lines
    assert lines[-1] == f"shards: {out}  (digest {ShardSet.open(out).digest[:12]})"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=camvid"], "ConfigError: no source folder; give root="),
        (["data=sample", "root=nowhere"], "DataError: data root 'nowhere' is not a folder"),
        (["data=folder", "root=.", "output=o", "classes=[a]"], "ConfigError"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("out", "reason"),
    [("file/x", "Not a directory"), ("file/x/y", "Not a directory"), ("n" * 300, "too long")],
)
def test_a_place_that_cannot_be_is_not_promised_to_go_on(out: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("data=sample", f"output={tmp_path / out}", "workers=1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("DataError: shards cannot be written to ")
    assert reason in done.stderr
    assert done.stderr.endswith("; give another output=<folder>\n")


def test_the_label_map_says_what_was_seen_and_what_never(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root, out = make_folder(tmp_path / "set", {"train": 4, "val": 2}), tmp_path / "out"
    done = run(
        *(
            "data=folder",
            f"root={root}",
            f"output={out}",
            "data.classes=[land,ship]",
            "workers=1",
            "quality=80",
        ),
        "+data.label_map={0: 0, 1: 255, 2: 0, 7: 1, 255: 255}",
    )
    assert done.returncode == 0, done.stderr
    masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (root / "masks").rglob("*.png")]
    pixels = np.bincount(np.concatenate([mask.reshape(-1) for mask in masks]), minlength=256)
    share = [f"{100 * count / pixels.sum():.2f} %" for count in pixels]
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"0 -> 0 land {share[0]}" in lines
    assert f"2 -> 0 land {share[2]}" in lines
    assert "7 -> 1 ship NEVER SEEN" in lines
    assert f"ignored (-> 255): 1 ({share[1]}), 255 ({share[255]})" in lines
    assert lines.count("ship never seen") == 2
    assert ShardSet.open(out).content["quality"] == 80


def test_a_folder_of_class_folders_becomes_a_classification_set(
    make_classes: Callable[..., Path], tmp_path: Path
) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    make_classes(root / "images", {"train": 7, "val": 2})
    done = run("data=folder", "data.task=classification", f"root={root}", f"output={out}", "workers=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:5] == [
        "train: 7 images in 1 shards",
        "  2 to 3 images in each of 3 classes",
        "val: 2 images in 1 shards",
        "  0 to 1 images in each of 3 classes",
        "  never seen: owl",
    ]
    assert ShardSet.open(out).classes == ["cat", "dog", "owl"]


def test_the_shipped_sample_is_small_whole_and_its_splits_share_no_image() -> None:
    files = [path for path in SAMPLE.rglob("*") if path.is_file()]
    blocks = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert blocks < 6_000_000
    data = compose(RunConfig, "config", ["data=sample"]).data
    pictures = {
        split: {
            hashlib.sha256(sample.image.read_bytes()).hexdigest()
            for sample in list_samples(data, SAMPLE, split)
        }
        for split in ("train", "val")
    }
    assert {split: len(hashes) for split, hashes in pictures.items()} == {"train": 292, "val": 80}
    assert not pictures["train"] & pictures["val"]
