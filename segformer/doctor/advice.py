"""Settings that would waste the hour: what they cost, and what sizing.py would take in their place.

Every WARN ends in settings that can be copied. A remedy counts as taken in those after it, so that a command
with all of them gets no further WARN, and neither does what a recipe has worked out for itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from segformer.data.sources.content import WARN, Finding, override
from segformer.doctor.scan import SplitScan
from segformer.errors import listed
from segformer.training.config import RunConfig
from segformer.training.sizing import FINETUNE_LR, MOST_EPOCHS, RARE, RULES, Facts, with_values, written

LEAST_EPOCHS, LONGEST_WARMUP, EVALUATIONS = 2, 0.1, 5
SLOW_LR = 2e-4  # of random weights in batches of 8: below it the encoder hardly leaves its place
FAST_LR = 5 * FINETUNE_LR  # of trained weights in batches of 16: above it they are soon forgotten
ENLARGED, PADDED, CROP_SHARE = 1.1, 0.25, 1 / 30

Advice = tuple[str, dict[str, Any]] | None
"What is wrong, and the settings to take; no settings where the text has the remedy."


def facts_of(
    cfg: RunConfig, scans: list[SplitScan], classes: list[str], gpu: bool, ranks: int
) -> Facts | None:
    """What the rules know of the data, from scans; None where a split has no image or no label."""
    by_name = {scan.name: scan for scan in scans if scan.heights and scan.class_pixels.any()}
    if cfg.train_split not in by_name or cfg.eval_split not in by_name:
        return None
    train, held = by_name[cfg.train_split], by_name[cfg.eval_split]
    pixels = np.array(held.heights, np.int64) * held.widths
    return Facts(
        images=len(train.heights),
        side=(int(np.median(train.heights)), int(np.median(train.widths))),
        eval_pixels=int(pixels.sum()),
        eval_side=int(pixels.max()),
        class_pixels=train.class_pixels,
        classes=classes,
        gpu=gpu,
        world_size=ranks,
    )


def judge_recipe(cfg: RunConfig, facts: Facts) -> Iterator[Finding]:
    """A WARN for each setting of a segmentation run that would waste its time."""
    for about, check in CHECKS:
        if advice := check(cfg, facts):
            text, values = advice
            cfg = with_values(cfg, values)
            take = " ".join(override(key, value) for key, value in values.items())
            yield Finding(WARN, about, f"{text}; {take}" if take else text)


def chosen(cfg: RunConfig, facts: Facts, *keys: str) -> dict[str, Any]:
    """The values that the recipe of `experiment=scratch` would take for keys of one rule."""
    rule = next(rule for ruled, rule in RULES if keys[0] in ruled)
    values, _ = rule(cfg, facts)
    return {key: values[key] for key in keys}


def _learning_rate(cfg: RunConfig, facts: Facts) -> Advice:
    optim, lr = cfg.optim, f"optim.lr={cfg.optim.lr:g}"
    if optim.name != "adamw" or optim.frozen_stages == 4:
        return None
    if not cfg.model.pretrained and optim.lr < SLOW_LR * (cfg.global_batch / 8) ** 0.5:
        text = f"{lr} is a rate for trained weights (model.pretrained=<file>); random ones hardly learn by it"
        return text, chosen(cfg, facts, "optim.lr", "optim.head_lr_factor")
    if cfg.model.pretrained and optim.lr > FAST_LR * (cfg.global_batch / 16) ** 0.5:
        text = f"{lr} is a rate for random weights; those of {cfg.model.pretrained} would soon be forgotten"
        return text, {"optim.lr": float(f"{FINETUNE_LR * (cfg.global_batch / 16) ** 0.5:.2g}")}
    return None


def _length(cfg: RunConfig, facts: Facts) -> Advice:
    epochs, take = cfg.steps * cfg.global_batch / facts.images, chosen(cfg, facts, "steps")
    text = f"{cfg.steps} steps are {written(epochs)} epochs of {facts.images} images"
    if epochs > MOST_EPOCHS and take["steps"] < cfg.steps:
        return f"{text}: far more than they teach", take
    if epochs < LEAST_EPOCHS and take["steps"] > cfg.steps:
        return f"{text}: most are seen once or never", take
    return None


def _warmup(cfg: RunConfig, facts: Facts) -> Advice:
    share = cfg.optim.warmup_steps / cfg.steps
    if share <= LONGEST_WARMUP:
        return None
    text = f"optim.warmup_steps={cfg.optim.warmup_steps} are {share:.0%} of {cfg.steps} steps"
    return text, chosen(cfg, facts, "optim.warmup_steps")


def _resize(cfg: RunConfig, facts: Facts) -> Advice:
    if (factor := _factor(cfg, facts)) <= ENLARGED:
        return None
    bounds = ",".join(map(str, cfg.augment.resize))
    text = f"augment.resize=[{bounds}] enlarges the median image, {_size(facts.side)}, {factor:.1f} times"
    return f"{text}, and evaluation takes it as it is", {"augment.resize": []}


def _crop(cfg: RunConfig, facts: Facts) -> Advice:
    factor, (height, width) = _factor(cfg, facts), cfg.augment.crop
    rows, columns = (side * factor for side in facts.side)
    about = f"augment.crop=[{height},{width}] of the median image, {_size((round(rows), round(columns)))}"
    about += " after augment.resize" if factor != 1 else ""
    take = chosen(cfg, facts, "augment.crop")
    padding = 1 - min(rows, height) * min(columns, width) / (height * width)
    if padding > PADDED and take["augment.crop"] != [height, width]:
        return f"{about}, is {padding:.0%} padding", take
    share = height * width / (rows * columns)
    if share >= CROP_SHARE:
        return None
    text = f"{about}, is {share:.1%} of it: too little to tell what is seen"
    if (larger := take["augment.crop"])[0] * larger[1] > height * width:
        return text, take
    side = 32 * round(max(facts.side) * (9 * share) ** 0.5 / 32)
    return f"{text}; shard it reduced: data_prep/shard.py long_side={side}", {}


def _evaluation(cfg: RunConfig, facts: Facts) -> Advice:
    take = chosen(cfg, facts, "eval_every")
    every, own = cfg.eval_every, take["eval_every"]
    if every >= cfg.steps > own:
        return f"eval_every={every} of {cfg.steps} steps: nothing is scored before the end", take
    if every > max(cfg.steps / EVALUATIONS, own):
        return f"eval_every={every} is {every / cfg.steps:.0%} of the run: it is hardly watched", take
    height, width = cfg.augment.crop
    share = facts.eval_pixels / (3 * every * cfg.global_batch * height * width)  # forward alone
    if share > 1 and every < own:
        text = f"an evaluation takes {share:.1f} times as long as the eval_every={every} steps before it"
        return text, take
    return None


def _imbalance(cfg: RunConfig, facts: Facts) -> Advice:
    share = facts.class_pixels / max(1, facts.class_pixels.sum())
    rare = [k for k in np.argsort(share) if 0 < share[k] < RARE]
    weighted = cfg.loss.class_weights or cfg.loss.class_weighting or set(cfg.loss.terms) - {"cross_entropy"}
    if not rare or weighted or cfg.mixture.joint or cfg.augment.class_balanced_crop or cfg.augment.copy_paste:
        return None
    names = listed([f"{facts.classes[k]} {share[k]:.2%}" for k in rare], 4)
    text = f"{len(rare)} of {len(share)} classes have under {RARE:.0%} of the pixels ({names}) and no weight"
    return text, {"loss.class_weighting": "auto"}


CHECKS: tuple[tuple[str, Callable[[RunConfig, Facts], Advice]], ...] = (
    ("resize", _resize),
    ("crop", _crop),
    ("length", _length),
    ("learning rate", _learning_rate),
    ("warm-up", _warmup),
    ("evaluation", _evaluation),
    ("rare classes", _imbalance),
)


def _factor(cfg: RunConfig, facts: Facts) -> float:
    """By how much augment.resize enlarges the median image at scale 1."""
    if not cfg.augment.resize:
        return 1.0
    sides, bounds = sorted(facts.side), sorted(cfg.augment.resize)
    return min(bound / side for bound, side in zip(bounds, sides, strict=True))


def _size(side: tuple[int, int]) -> str:
    return f"{side[0]}x{side[1]}"
