"""What a set must contain: sharding and training refuse the rest, with a line that repairs it."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.sources.content import Histogram, Labels, check_content, override
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import DataError, SegformerError
from segformer.training.config import RunConfig, compose
from segformer.training.run import _check

Command = Callable[..., list[str]]


def write_pairs(root: Path, ids: dict[str, list[int]], size: int = 12) -> Path:
    """Two random images a split with masks of these ids in stripes, as many pixels of each."""
    rng = np.random.default_rng(5)
    for split, values in ids.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(2):
            mask = np.repeat(np.array(values, np.uint16), size)[None].repeat(8, 0)
            depth = np.uint8 if max(values) < 256 else np.uint16
            image = rng.integers(0, 256, (*mask.shape, 3), np.uint8)
            cv2.imwrite(str(root / "images" / split / f"{number}.jpg"), image)
            cv2.imwrite(str(root / "masks" / split / f"{number}.png"), mask.astype(depth))
    return root


@pytest.fixture
def shard(command: Command, tmp_path: Path) -> Callable[..., ShardSet]:
    """(masks' ids by split, overrides ...) -> the shards, made by data_prep/shard.py in this process."""

    def run(ids: dict[str, list[int]], *overrides: str) -> ShardSet:
        root, out = tmp_path / "set", tmp_path / "out"
        if not root.exists():
            write_pairs(root, ids)
        command("shard", "data=folder", f"root={root}", f"output={out}", "workers=1", *overrides)
        return ShardSet.open(out)

    return run


AB, ABC = "data.classes=[a,b]", "data.classes=[a,b,c]"


MAP, NAMES = "data.label_map=", "data.classes="
LEARNT = [
    ([0, 255], [0, 255], AB, "only 'a' is ever seen in train", [MAP + "{0: 0, 255: 1}"], [192, 192]),
    (
        *(
            [0, 255, 255],
            [0, 255],
            "data.classes=[leaf]",
            "if 0 is 'leaf': .*={0: 1, 255: 0}'; if 255",
        ),
        *([NAMES + "[background,leaf]", MAP + "{0: 0, 255: 1}"], [192, 384]),
    ),
    ([0, 1], [0, 1], "data.classes=[a]", "a softmax over one class", [NAMES + "[background,a]"], [192, 192]),
    ([0, 1, 1], [0, 2], ABC, "'c' never seen in train but in val", ["data.allow_unseen=[c]"], [192, 384, 0]),
    (
        *([0, 1], [0, 1], 'data.classes=[a,b,"c, d"]', "'c, d' never seen in train"),
        *(['data.allow_unseen=["c, d"]'], [192, 192, 0]),
    ),
    ([0, 1, 255], [0, 1], ABC, "'c' never seen", [MAP + "{0: 0, 1: 1, 255: 2}"], [192, 192, 192]),
    (
        *([0, 1], [0, 1], 'data.classes=[a,b,"\u0645\u06cc\u200c\u062e"]', "never seen in train"),
        *(["data.allow_unseen=[*]"], [192, 192, 0]),
    ),
]


@pytest.mark.parametrize(("train", "val", "classes", "message", "remedy", "pixels"), LEARNT)
def test_what_cannot_be_learnt_is_refused_with_a_line_that_repairs_it(
    train: list[int],
    val: list[int],
    classes: str,
    message: str,
    remedy: list[str],
    pixels: list[int],
    shard: Callable[..., ShardSet],
    tmp_path: Path,
) -> None:
    ids = {"train": train, "val": val}
    with pytest.raises(DataError, match=message) as refused:
        shard(ids, classes)
    assert not (tmp_path / "out").exists()
    assert all(shlex.quote(setting) in str(refused.value) for setting in remedy), refused.value
    shards = shard(ids, classes, *remedy)
    assert shards.content["splits"]["train"]["class_pixels"] == pixels


def test_a_set_in_which_all_is_ignored_or_one_class_is_left_has_no_way_out(
    shard: Callable[..., ShardSet],
) -> None:
    with pytest.raises(DataError, match=r"every pixel of train is ignored: .*: export them again$"):
        shard({"train": [255], "val": [255]}, AB)


def test_what_was_allowed_keeps_the_finished_shards_and_is_known_to_training(
    shard: Callable[..., ShardSet], tmp_path: Path
) -> None:
    ids = {"train": [0, 1], "val": [0, 1]}
    with pytest.raises(DataError, match=r"data\.allow_unseen"):
        shard(ids, ABC)
    (tar,) = tmp_path.rglob("train-000000.tar")
    made = tar.stat().st_mtime_ns
    content = shard(ids, ABC, "data.allow_unseen=[c]").content
    assert (tmp_path / "out/train-000000.tar").stat().st_mtime_ns == made
    check_content(
        Labels.of(content, DatasetConfig()), {"train": Histogram.of(content["splits"]["train"])}, ["train"]
    )
    for more in ([], ["data.allow_unseen=[*]"]):  # a finished set stays as it is
        assert shard(ids, ABC, *more).digest == content["digest"]


def test_a_split_without_labels_is_sharded_but_not_scored(shard: Callable[..., ShardSet]) -> None:
    dummy = "data.label_map={0: 0, 1: 1, 7: 255}"
    with pytest.raises(DataError, match=r"of val is ignored.*; or leave it out of data\.splits and score"):
        shard(ids := {"train": [0, 1], "val": [7], "test": [7]}, AB, dummy)
    shards = shard(ids, AB, dummy, "data.splits=[train,test]")
    given = ["data=folder", f"data.shards={shards.root}", "global_batch=2", "augment.crop=[32,32]"]
    given += ["eval_split=test"]
    wrong = r"of test is ignored.*data\.label_map, and shard again with it; or .*: eval_split=<split>$"
    with pytest.raises(DataError, match=wrong):
        _check(compose(RunConfig, "config", given), 1)


def test_a_part_of_the_work_is_not_judged_and_the_joined_set_is(shard: Callable[..., ShardSet]) -> None:
    ids = {"train": [0, 255], "val": [0, 255]}
    for part in ("0/2", "1/2"):
        with pytest.raises(DataError, match="no shards in"):
            shard(ids, AB, f"part={part}")
    with pytest.raises(DataError, match="only 'a' is ever seen"):
        shard(ids, AB)


def test_classes_of_a_classifier_need_images_and_company() -> None:
    def check(pixels: list[int], allowed: tuple[str, ...] = ()) -> None:
        labels = Labels("classification", ["cat", "dog", "owl"][: len(pixels)], allow_unseen=allowed)
        check_content(labels, {"train": Histogram(sum(pixels), np.array(pixels))}, ["train"])

    check([3, 1, 2])
    check([3, 0, 2], ("dog",))
    with pytest.raises(
        DataError, match=r"'dog' never seen in train; if that is meant: 'data\.allow_unseen=\[dog"
    ):
        check([3, 0, 2])
    with pytest.raises(DataError, match="'cat' is the only class"):
        check([3])
    with pytest.raises(DataError, match="only 'owl' is ever seen in train"):
        check([0, 0, 2], ("cat", "dog"))


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b c"],
        ["it's", 'say "hi"'],
        ["back\\slash", 'x\\"'],
        ["true", "null", "1"],
        ["a,b", "{c: d}"],
        ["*"],
    ],
)
def test_an_override_to_paste_is_what_hydra_reads(names: list[str]) -> None:
    (word,) = shlex.split(override("data.classes", names))
    assert compose(RunConfig, "config", ["data=folder", word]).data.classes == names


def test_training_refuses_shards_of_another_time_in_its_first_second(
    shard: Callable[..., ShardSet], tmp_path: Path
) -> None:
    shards = shard({"train": [0, 1], "val": [0, 1, 2]}, ABC, "data.allow_unseen=[c]")
    path = Path(shards.root) / "dataset.json"
    content: dict[str, Any] = shards.content | {}
    del content["allow_unseen"]
    path.write_text(json.dumps(content | {"digest": content_digest(content)}))
    given = ["data=folder", f"data.shards={shards.root}", "global_batch=2", "augment.crop=[32,32]"]
    with pytest.raises(SegformerError, match="'c' never seen in train but in val"):
        _check(compose(RunConfig, "config", given), 1)
    _check(compose(RunConfig, "config", [*given, "data.allow_unseen=[c]"]), 1)
    with pytest.raises(SegformerError, match=r"class 2 is 'x' here, 'c' there; .*'data\.classes=\[a,b,c\]'"):
        _check(compose(RunConfig, "config", [*given, "data.classes=[a,b,x]"]), 1)
