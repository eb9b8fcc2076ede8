"""data_prep/shard.py with its settings, and the shipped sample."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from samples import list_samples

from segformer.data.shards.format import ShardSet
from segformer.errors import ConfigError, DataError, SegformerError
from segformer.training.config import RunConfig, compose

SAMPLE = Path(__file__).resolve().parents[3] / "data_prep/sample"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["data=camvid"], ConfigError, "no source folder; give root="),
        (["data=folder", "root=.", "output="], ConfigError, "no output folder; give output="),
        (
            ["data=sample", "root=nowhere"],
            DataError,
            r"data root 'nowhere' is not a folder \(/.*/nowhere\); ",
        ),
        (
            ["data=sample", "data.classes=[background,", "leaf]"],
            ConfigError,
            r"is cut at a space; quote it: 'data.classes=\[background, leaf\]'",
        ),
        (["data=sample", "part=3/3"], ConfigError, "part='3/3'; use <index>/<count>"),
    ],
)
def test_wrong_input_is_refused_by_name(
    arguments: list[str], kind: type[SegformerError], message: str, command: Callable[..., list[str]]
) -> None:
    with pytest.raises(kind, match=message):
        command("shard", *arguments)


def pasted(line: str, start: str) -> list[str]:
    """The overrides that a message proposes after `start`."""
    found = shlex.split(line.partition(start)[2].partition(";")[0])
    return found[: next((i for i, word in enumerate(found) if "=" not in word), None)]


@pytest.mark.parametrize("layout", ["no val", "flat", "labels", "labels without split"])
def test_what_is_proposed_for_another_layout_works_as_it_is_pasted(
    layout: str, make_folder: Callable[..., Path], tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    root, given = make_folder(tmp_path / "set", {"train": 12, "val": 2}), ["data.allow_unseen=[*]"]
    if layout in ("no val", "flat"):
        for kind in ("images", "masks"):
            shutil.rmtree(root / kind / "val")
            if layout == "flat":
                shutil.copytree(root / kind / "train", root / kind, dirs_exist_ok=True)
                shutil.rmtree(root / kind / "train")
        divide = ["data.val_share=0.2", *(f"data.{k}_dir={k}s/train" for k in ("image", "mask"))]
        start, proposed = "folder there is: ", divide
        if layout == "flat":
            proposed = [one.replace("/train", "") for one in divide]
            with pytest.raises(ConfigError) as alone:  # without a look at the disk
                command("shard", "data=folder", f"root={root}", f"output={tmp_path}/x", "data.val_share=0.2")
            assert pasted(str(alone.value), "splits; give ") == divide
            given += divide
    else:
        (root / "masks").rename(root / "labels")
        given += ["data.mask_dir=labels"] * (layout != "labels")
        start, proposed = "give ", ["data.mask_dir=labels/{split}"]
    call = ["data=folder", f"root={root}", f"output={tmp_path}/out", "workers=1", "data.classes=[a,b,c]"]
    with pytest.raises(DataError) as refused:
        command("shard", *call, *given)
    assert pasted(str(refused.value), start) == proposed
    command("shard", *call, *given, *proposed)
    assert sum(split.num_samples for split in ShardSet.open(tmp_path / "out").splits.values()) >= 12


def test_missing_class_names_and_one_too_many_are_answered_with_the_ids_of_the_masks(
    make_folder: Callable[..., Path], tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    root = make_folder(tmp_path / "set", {"train": 4, "val": 2})
    call = ["data=folder", f"root={root}", f"output={tmp_path}/out", "workers=1"]
    with pytest.raises(ConfigError) as refused:
        command("shard", *call)
    assert "masks hold 0 to 2" in str(refused.value)
    assert pasted(str(refused.value), "such as ") == ["data.classes=[background,class1,class2]"]
    for path in (root / "masks").rglob("*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.where(mask == 255, 0, mask))
    with pytest.raises(DataError, match="'d' never seen in train; masks hold 0 to 2 only: leave the"):
        command("shard", *call, "data.classes=[a,b,c,d]")
    assert not any(line.startswith("ignored") for line in command("shard", *call, "data.classes=[a,b,c]"))


@pytest.mark.parametrize(("out", "reason"), [("file/x/y", "Not a directory"), ("n" * 300, "too long")])
def test_a_place_that_cannot_be_written_to_is_named(
    out: str, reason: str, tiny_root: Path, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"cannot be written to .*{reason}; give another output=<folder>"):
        command("shard", "data=sample", f"root={tiny_root}", f"output={tmp_path / out}", "workers=1")


def test_the_command_says_what_was_seen_of_the_label_map_and_where_the_shards_are(
    make_folder: Callable[..., Path], tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    root, out = make_folder(tmp_path / "set", {"train": 4, "val": 2}), tmp_path / "out"
    for name in (".DS_Store", "x.gif", "y.gif"):
        (root / "images/train" / name).touch()
    settings = ["data=folder", f"root={root}", f"output={out}", "workers=1", "quality=80"]
    settings += ["samples_per_shard=3", "data.classes=[land,ship,sea]", "data.allow_unseen=[ship]"]
    printed = command("shard", *settings, "+data.label_map={0: 0, 1: 255, 2: 2, 7: 1, 255: 255}")
    masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (root / "masks").rglob("*.png")]
    pixels = np.bincount(np.concatenate([mask.reshape(-1) for mask in masks]), minlength=256)
    share = [f"{100 * count / pixels.sum():.2f} %" for count in pixels]
    lines = [" ".join(line.split()) for line in printed]
    assert lines[0].startswith("label map")
    assert {f"0 -> 0 land {share[0]}", f"2 -> 2 sea {share[2]}", "7 -> 1 ship never seen"} < set(lines)
    assert f"ignored (-> 255): 1 ({share[1]}), 255 ({share[255]})" in lines
    assert {"train: 4 images in 2 shards", "val: 2 images in 1 shards"} < set(lines)
    assert "not used of images/train: 1 x hidden (.DS_Store), 2 x .gif (x.gif, ...)" in lines
    left_out = {"images/train": {"hidden": [1, ".DS_Store"], ".gif": [2, "x.gif"]}}
    splits = ShardSet.open(out).content["splits"]
    assert [splits[split].get("left_out") for split in ("train", "val")] == [left_out, None]
    assert lines.count("ship never seen") == 2
    assert lines[-1] == f"shards: {out} (digest {ShardSet.open(out).digest[:12]})"
    assert ShardSet.open(out).content["quality"] == 80


def test_a_folder_of_class_folders_becomes_a_classification_set(
    make_classes: Callable[..., Path], tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    make_classes(root / "images", {"train": 7, "val": 2})
    settings = ["data=folder", "data.task=classification", f"root={root}", f"output={out}", "workers=1"]
    assert command("shard", *settings)[:5] == [
        "train: 7 images in 1 shards",
        "  2 to 3 images in each of 3 classes",
        "val: 2 images in 1 shards",
        "  0 to 1 images in each of 3 classes",
        "  never seen: owl",
    ]
    assert ShardSet.open(out).classes == ["cat", "dog", "owl"]


def test_the_shipped_sample_is_small_whole_and_its_splits_share_no_image() -> None:
    files = [path for path in SAMPLE.rglob("*") if path.is_file()]
    assert sum(-(-path.stat().st_size // 4096) * 4096 for path in files) < 6_000_000
    data = compose(RunConfig, "config", ["data=sample"]).data
    pictures = {
        split: {sample.image.read_bytes() for sample in list_samples(data, SAMPLE, split)}
        for split in ("train", "val")
    }
    assert {split: len(found) for split, found in pictures.items()} == {"train": 292, "val": 80}
    assert not pictures["train"] & pictures["val"]
