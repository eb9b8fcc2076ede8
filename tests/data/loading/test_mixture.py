"""Several shard sets as one: maps of labels, samples that ranks and workers can't change, what is refused."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig, spent_budget, train_batches
from segformer.data.loading.mixture import (
    LabelMap,
    MixedSplit,
    Mixture,
    MixtureConfig,
    SetConfig,
    common_classes,
)
from segformer.data.loading.order import BatchShape, MixedOrder, SampleOrder, make_order_spec, shared_slots
from segformer.data.loading.samples import Batch, Samples
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig, class_palette
from segformer.errors import ConfigError

AUGMENT = AugmentConfig(crop=[24, 24], resize=[], mosaic=0.3, copy_paste=0.3, class_balanced_crop=0.5)
CONFIG = MixtureConfig(
    sets={
        "town": SetConfig(shards="-", weight=2, classes={"road": ["street", "lane"], "sky": ["ignore"]}),
        "wood": SetConfig(shards="-", classes={"tree": ["wood"], "road": ["street"]}),
    }
)
CLASSES = ["street", "lane", "tree", "sky", "wood"]


@pytest.fixture(scope="module")
def mixture(
    shards: ShardSet, make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mixture:
    """21 samples of `shards` and 9 of another set, both of sky, road and tree."""
    place = tmp_path_factory.mktemp("wood")
    config = DatasetConfig(name="wood", classes=["sky", "road", "tree"], allow_unseen=["*"])
    folder = make_folder(place / "folder", {"train": 9, "val": 4}, suffix=".png")
    write_shards(config, folder, place / "shards", seed=1, samples_per_shard=5, workers=1)
    sets = {"town": shards, "wood": ShardSet.open(place / "shards")}
    assert common_classes(CONFIG, {name: one.classes for name, one in sets.items()}) == CLASSES
    return Mixture(CONFIG, sets, CLASSES, class_palette(DatasetConfig(classes=CLASSES)))


def order_of(split: MixedSplit) -> MixedOrder:
    slots = shared_slots({"town": 2, "wood": 1})
    orders = {
        name: SampleOrder(make_order_spec(part.shard_sizes, seed=k, global_batch=2, chunk=2, block=2))
        for k, (name, part) in enumerate(zip(split.names, split.parts, strict=True))
    }
    return MixedOrder(orders, list(slots.values()))


def batches(
    split: MixedSplit, steps: int, *, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
):
    shape = BatchShape(6, 6 // world // (2 if world == 1 else 1), world)
    stream = iter(
        train_batches(
            split,
            order_of(split),
            AUGMENT,
            LoaderConfig(workers=workers, prefetch=2, max_corrupt=0),
            batch=shape,
            seed=0,
            rank=rank,
            start_step=start,
        )
    )
    taken = [next(stream) for _ in range(steps * shape.accumulation)]
    stream.close()
    return taken


def joined(parts: list[Batch]) -> list[torch.Tensor]:
    return [
        torch.cat([getattr(b, name) for b in parts]) for name in ("images", "targets", "sample_ids", "sets")
    ]


def test_the_samples_of_a_mixture_are_those_of_its_sets_whatever_ranks_and_workers(mixture: Mixture):
    """Each epoch of a set holds each sample once, and each is what its set alone makes of it."""
    split = mixture.split("train")
    images, targets, ids, sets = joined(batches(split, 16))
    assert [int(i) >= 21 for i in ids] == sets.tolist()
    for index, (first, size) in enumerate(((0, 21), (21, 9))):
        own = (ids[sets == index] - first).tolist()
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))
    alone = [Samples(part, AUGMENT, seed=k) for k, part in enumerate(split.parts)]
    tables = [{0: 255, 1: 0, 2: 2, 255: 255}, {0: 3, 1: 0, 2: 4, 255: 255}]
    met = Counter()
    for image, target, sample_id, index in zip(images, targets, ids.tolist(), sets.tolist(), strict=True):
        sample = alone[index].sample(sample_id - 21 * index, met[sample_id])
        met[sample_id] += 1
        assert np.array_equal(sample.image, image.permute(1, 2, 0).numpy())
        assert [[tables[index][v] for v in row] for row in sample.target.tolist()] == target.tolist()
    for world, workers in ((3, 0), (1, 2)):
        for start in (0, 7):
            ranks = [
                batches(split, 5, start=start, rank=r, world=world, workers=workers) for r in range(world)
            ]
            steps = zip(*ranks, strict=True) if world > 1 else ((b,) for b in ranks[0])
            found = joined([batch for step in steps for batch in step])
            whole = [part[6 * start : 6 * (start + 5)] for part in (images, targets, ids, sets)]
            assert all(map(torch.equal, found, whole))


def test_a_sample_is_described_by_its_set_and_counts_against_its_budget(mixture: Mixture):
    split = mixture.split("train")
    assert split.key(22).startswith("wood/")
    assert split.key(22).endswith(mixture.sets["wood"].split("train").key(1))
    assert split.describe(20) == mixture.sets["town"].split("train").describe(20)
    budgets = LoaderConfig(max_corrupt=0.1)  # 2 of 21 and none of 9
    assert spent_budget(budgets, split, [3, 20]) is None
    assert spent_budget(budgets, split, [3, 4, 20]) == (3, 2)
    assert spent_budget(budgets, split, [3, 21]) == (1, 0)


def test_pixels_of_the_common_classes_are_those_that_are_drawn(mixture: Mixture):
    town, wood = (mixture.sets[name].split("train").class_pixels for name in ("town", "wood"))
    wanted = {"street": (town[1], wood[1]), "tree": (town[2], 0), "sky": (0, wood[0]), "wood": (0, wood[2])}
    found = dict(zip(CLASSES, mixture.split("train").class_pixels.tolist(), strict=True))
    assert found.pop("lane") == 0
    assert found == {k: pytest.approx(a * 20 / 21 + b * 10 / 9, abs=1) for k, (a, b) in wanted.items()}


REFUSED = {
    r"mixture.sets.x.classes names raod, which the set does not have; it has sky, road, tree": {
        "raod": ["road"]
    },
    r"road stands for rod, which data.classes does not have; give 'm.*\{road: \[ignore\]\}'": {
        "road": ["rod"]
    },
    r"sky and road may both be sky; give it to one of them": {"road": ["sky"]},
    r"leaves 1 of 3 classes": {"road": ["ignore"], "sky": ["ignore"]},
    r"road stands for no class": {"road": []},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_map_that_has_no_meaning_is_refused(message: str):
    with pytest.raises(ConfigError, match=message):
        LabelMap.of(
            "mixture.sets.x.classes", REFUSED[message], ["sky", "road", "tree"], ["sky", "road", "tree"]
        )


def test_sets_and_weights_that_contradict_each_other_are_refused(mixture: Mixture):
    for wrong, message in (
        ({"sets": {"a b": SetConfig()}}, "names 'a b'"),
        ({"sets": {"a": SetConfig(weight=0)}}, "weight=0 must be above 0"),
        ({"sets": {"a": SetConfig(weight=1)}, "temperature": 2.0}, "decide the same"),
        ({"temperature": -1.0}, "temperature=-1.0 must be from 0 to 1000"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixtureConfig(**wrong)
    by_size = MixtureConfig(sets={"a": SetConfig(), "b": SetConfig()}, temperature=2.0)
    assert by_size.weights({"a": 100, "b": 25}) == {"a": 10, "b": 5}
    assert mixture.unlabeled([]) == []
    more = Mixture(CONFIG, mixture.sets, [*CLASSES, "sea"], mixture.palette)
    assert (more.unlabeled([]), more.unlabeled(["sea"]), more.unlabeled(["*"])) == (["sea"], [], [])
    assert replace(CONFIG).weights({"town": 1, "wood": 1}) == {"town": 2, "wood": 1}
