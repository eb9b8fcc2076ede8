"""Pools of images divided by shares, groups, classes and folds: judged from outside, by counting."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from samples import list_samples

from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.division import divided
from segformer.errors import ConfigError, DataError

CLASSES = [f"class{k}" for k in range(8)]
POOL = {"image_dir": "images", "mask_dir": "masks"}


def division(keys: set[str], holds: dict[str, set[int]] | None = None, **settings: Any) -> list[set[str]]:
    """The keys of every split."""
    cfg = DatasetConfig(**{"splits": ["train", "val", "test"][: 2 + ("test_share" in settings)]} | settings)
    return [
        divided(cfg, split, keys, lambda asked: [(holds or {})[key] for key in asked]) for split in cfg.splits
    ]


@pytest.fixture(scope="module")
def films() -> dict[str, set[int]]:
    """Key -> classes of 600 images of 60 films of 1 to 37 images; their classes cluster, some are rare."""
    rng = np.random.default_rng(0)
    found: dict[str, set[int]] = {}
    rates = np.geomspace(0.9, 0.02, 8)
    for film, count in enumerate(rng.multinomial(600, rng.dirichlet(np.full(60, 1.5)))):
        near = rates * rng.uniform(0.3, 1.7, 8)
        for frame in range(count):
            found[f"film{film:02d}/{frame:03d}"] = set(np.flatnonzero(rng.random(8) < near).tolist())
    return found


def test_a_test_share_leaves_the_images_of_val_where_they_were(films: dict[str, set[int]]) -> None:
    keys = set(films)
    _, val = division(keys, val_share=0.2)
    train, same, test = division(keys, val_share=0.2, test_share=0.1)
    assert same == val
    assert train | same | test == keys
    assert len(train) + len(same) + len(test) == len(keys)
    assert 0.05 < len(test) / len(keys) < 0.15
    half = {key for key in keys if key < "film30"}
    assert division(half, val_share=0.2, test_share=0.1)[2] == test & half


@pytest.mark.parametrize("group", ["folder", "^(film[0-9]+)"])
@pytest.mark.parametrize("stratify", [False, True])
def test_no_group_is_in_two_splits(films: dict[str, set[int]], group: str, stratify: bool) -> None:
    splits = division(set(films), films, val_share=0.2, test_share=0.1, group=group, stratify=stratify)
    of = [{key.partition("/")[0] for key in split} for split in splits]
    assert sum(map(len, of)) == len(set.union(*of)) == len({key.partition("/")[0] for key in films})
    for split, share in zip(splits, (0.7, 0.2, 0.1), strict=True):
        assert len(split) / len(films) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("group", ["", "folder"])
def test_stratified_splits_hold_each_class_alike(films: dict[str, set[int]], group: str) -> None:
    def worst(**settings: Any) -> float:
        """Images of a class by which a split differs most from its share of them."""
        found = 0.0
        splits = division(set(films), films, val_share=0.2, group=group, **settings)
        for split, share in zip(splits, (0.8, 0.2), strict=True):
            counts = Counter(label for key in split for label in films[key])
            totals = Counter(label for labels in films.values() for label in labels)
            found = max(found, *(abs(counts[k] - share * totals[k]) for k in totals))
        return found

    assert worst(stratify=True) <= (5 if group else 1)
    assert worst(stratify=True) < worst() / 2


@pytest.mark.parametrize(
    "more", [{}, {"group": "folder"}, {"stratify": True}, {"group": "folder", "stratify": True}]
)
@pytest.mark.parametrize("test_share", [0.0, 0.1])
def test_every_image_is_val_in_exactly_one_fold(
    films: dict[str, set[int]], more: dict[str, Any], test_share: float
) -> None:
    given = more | ({"test_share": test_share} if test_share else {})
    folds = [division(set(films), films, fold=f"{k}/5", **given) for k in range(1, 6)]
    held = Counter(key for fold in folds for key in fold[1])
    assert set(held.values()) == {1}
    assert len({frozenset().union(*fold[2:]) for fold in folds}) == 1  # one test split for all
    for fold in folds:
        assert set.union(*fold) == set(films)
        assert fold[0] == set(held) - fold[1]
    sizes = [len(fold[1]) for fold in folds]
    assert max(sizes) - min(sizes) <= (12 if "group" in more else 1 + 2 * ("stratify" in more))


def test_another_seed_is_another_division_and_the_same_seed_the_same(films: dict[str, set[int]]) -> None:
    given: dict[str, Any] = {"fold": "1/5", "stratify": True}
    first, again = (division(set(keys), films, **given) for keys in (films, reversed(films)))
    assert first == again
    assert division(set(films), films, **given, val_seed=1) != first


def test_two_groups_of_one_size_are_one_split_each() -> None:
    keys = {f"{film}/{n}" for film in "ab" for n in range(9)}
    train, val = division(keys, val_share=0.1, group="folder")
    assert len(train) == len(val) == 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fold": "6/5"}, "data.fold='6/5'; use <fold>/<folds>"),
        ({"fold": "2/5", "val_share": 0.1}, "data.fold=2/5 and data.val_share=0.1 both say"),
        ({"val_share": 0.6, "test_share": 0.4}, "together"),
        ({"group": "folder"}, "data.group='folder' divides nothing by itself; add data.val_share=0.2"),
        ({"val_share": 0.2, "group": "([a"}, "is none"),
        ({"val_share": 0.2, "group": "(?:a)"}, "has no group"),
        (
            {"val_share": 0.2, "test_share": 0.1, "splits": ["train", "val"]},
            r"data.splits=\[train,val,test\]",
        ),
    ],
)
def test_settings_that_contradict_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        DatasetConfig(**settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"val_share": 0.2, "group": "nowhere"}, ConfigError),
        ({"val_share": 0.2, "group": "(x)"}, DataError),
        ({"val_share": 0.2, "group": "(film)"}, DataError),
        ({"fold": "1/900"}, DataError),
    ],
)
def test_what_a_refused_division_names_divides(
    films: dict[str, set[int]], settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as refused:
        division(set(films), **settings)
    key, value = re.findall(r"data\.(group|fold)=([^'\s;]+)", str(refused.value))[-1]
    assert all(division(set(films), **settings | {key: value.replace('"', "").strip()}))


def test_shards_hold_the_fold_and_say_so(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "pool", {"": 12})
    cv2.imwrite(str(root / "masks/005.png"), np.full((56, 40), 2, np.uint8))
    cfg = replace(config, **POOL, fold="2/3", stratify=True)
    write_shards(cfg, root, tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
    content = ShardSet.open(tmp_path / "out").content
    assert [content["splits"][split]["samples"] for split in ("train", "val")] == [8, 4]
    assert (content["fold"], content["stratify"], content["val_seed"]) == ("2/3", True, 0)
    assert not {"group", "test_share"} & content.keys()
    assert {s.key for s in list_samples(cfg, root, "val")} == set(
        ShardSet.open(tmp_path / "out").split("val").keys
    )
