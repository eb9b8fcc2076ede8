"""Runs on several data sets: their settings, what is refused, and their scores."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.evaluation.metrics import SegmentationScores
from segformer.training.config import RunConfig, compose, frozen, frozen_difference, load_config, save_config
from segformer.training.directory import check_start, settled
from segformer.training.task import check_data, make_task, open_shards

WORLD = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


def sets(shards: Path, *more: str) -> list[str]:
    """A mixture of the same shards under two meanings, weights 2 and 1."""
    return [
        "data=folder",
        f"mixture.sets.one.shards={shards}",
        "mixture.sets.one.weight=2",
        "mixture.sets.one.classes.background=[paper, glass]",
        f"mixture.sets.two.shards={shards}",
        "mixture.sets.two.classes={background: [glass]}",
        *more,
    ]


def configure(shards: Path, *more: str) -> RunConfig:
    return settled(compose(RunConfig, "config", sets(shards, *more)), device="cpu", world_size=1)[0]


def test_sets_are_given_key_by_key_and_the_common_classes_are_their_union(tiny_shards, tmp_path):
    cfg = configure(tiny_shards, "mixture.sets={two: {weight: 0.5}}")
    assert cfg.data.classes == ["paper", "glass", "nucleus"]
    one, two = cfg.mixture.sets.values()
    assert (one.weight, one.classes) == (2, {"background": ["paper", "glass"]})
    assert (two.weight, two.classes) == (0.5, {"background": ["glass"]})
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert isinstance(open_shards(cfg), Mixture)


def test_a_run_keeps_maps_and_weights_for_its_life_but_not_the_place_of_its_shards(tiny_shards):
    cfg = configure(tiny_shards)
    assert frozen_difference(cfg, configure(tiny_shards, "mixture.sets.one.weight=3")) == [
        "mixture.sets.one.weight: 2.0 -> 3.0"
    ]
    moved = configure(tiny_shards)
    moved.mixture.sets["one"].shards = "elsewhere"
    assert not frozen_difference(cfg, moved)
    assert "mixture" not in frozen(compose(RunConfig, "config", [])), "checkpoints say nothing new without it"


REFUSED = {
    "data=sample": "data.shards=data/sample and mixture.sets both say what to train on",
    "mixture.sets.three.weight=1": r"mixture.sets.three.shards is empty; give a folder or URL of shards",
    "mixture.sets.one.wait=1": "one.wait is not a setting; mixture.sets.one has shards, weight, classes",
    "mixture.sets.one.classes.nucleus=cell": r"must be a list of texts, such as .*nucleus=\[cell\]",
    "data.classes=[paper,glass,nucleus,sea]": r"data.classes has sea, which no set of the mixture labels",
    "loss.label_smoothing=0.1": "loss.label_smoothing gives a share to every class",
    "mixture.sets.two.classes={background: [nucleus]}": "background and nucleus may both be nucleus",
}


def start(shards: Path, *more: str) -> None:
    """What a start looks at before it trains."""
    check_start(compose(RunConfig, "config", sets(shards, *more)))
    cfg = configure(shards, *more)
    check_data(cfg, open_shards(cfg))


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_contradicts_itself_is_refused_in_one_line(tiny_shards, wrong):
    with pytest.raises(ConfigError, match=REFUSED[wrong]):
        start(tiny_shards, wrong)


def test_a_mean_of_other_channels_is_refused_before_anything_is_worked_out(tiny_shards):
    """`settled` opens the shards, and its lines are printed only after it."""
    with pytest.raises(
        ConfigError, match=r"augment\.mean has 2 values, but the images of the mixture have 3"
    ):
        configure(tiny_shards, "augment.mean=[1,2]", "augment.std=[1,2]")
    with pytest.raises(ConfigError, match=r"model\.in_channels=4, but the images of the mixture have 3"):
        configure(tiny_shards, "model.in_channels=4")


class Colors(nn.Module):
    """Logits of three classes from the colors of every fourth pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::4, ::4] * torch.tensor([1.0, -2.0, 1.5])[:, None, None]


def test_scores_are_those_of_each_set_in_its_own_labels_and_their_mean(tiny_shards):
    """Against masks predicted and counted image by image."""
    cfg = configure(tiny_shards, "loader.workers=0", "eval_batch=2")
    task = make_task(cfg, open_shards(cfg), WORLD)
    scores = task.evaluate(Colors(), WORLD, should_stop=lambda: False, on_error=pytest.fail, pictures=2)
    assert isinstance(scores, SegmentationScores)
    split = ShardSet.open(tiny_shards).split("val")
    reader = ShardReader(split)
    owners = {"one": {0: 0, 1: 0, 2: 1}, "two": {1: 0, 2: 1}}  # common class -> label
    found = {}
    for name, owner in owners.items():
        counts = torch.zeros(2, 2, dtype=torch.int64)
        for sample_id in range(split.num_samples):
            raw = reader.read(sample_id)
            target = torch.from_numpy(decode_mask(raw.target))
            image = torch.from_numpy(decode_image(raw.image)).permute(2, 0, 1)[None]
            logits = Colors()(task.normalize(image, None))
            enlarged = F.interpolate(logits, tuple(target.shape), mode="bilinear", align_corners=False)[0]
            known = list(owner)
            labels = torch.tensor([owner[k] for k in known])[enlarged[known].argmax(0)]
            for t, p in itertools.product(range(2), range(2)):
                counts[t, p] += int(((target == t) & (labels == p)).sum())
        found[name] = SegmentationScores.from_counts(counts)
    assert (
        torch.tensor(scores.confusion).tolist()
        == torch.block_diag(*(torch.tensor(one.confusion) for one in found.values())).tolist()
    )
    assert scores.miou == pytest.approx((found["one"].miou + found["two"].miou) / 2)
    assert scores.to_dict()["miou/two"] == found["two"].miou
    assert f"(one {100 * found['one'].miou:.2f}%, two" in scores.summary()
    assert task.scored_classes == ["one: background", "one: nucleus", "two: background", "two: nucleus"]
    assert [row["class"] for row in scores.rows(task.scored_classes)][-3:] == [
        "mean of one",
        "mean of two",
        "mean",
    ]
    assert len(scores.pictures) == 2
