"""Recipes that size themselves: the settings that RunConfig.auto lists, from the data and the device.

`sized` is a function of configuration, index, kind of device and number of ranks; no clock and no memory of
this machine is asked, so that the same command means the same run. RULES is the order of decisions, each a
function of the configuration as far as it is decided: (values, reason). docs/recipes.md has the reasons.

A start asks it (directory.py), and config.yaml holds plain numbers then. A run that has a checkpoint keeps
those of `auto`, here or elsewhere; `epochs` and loss.class_weighting are worked out at every start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet
from segformer.errors import ConfigError, listed
from segformer.models.macs import training_flops
from segformer.models.variants import RGB, VARIANTS
from segformer.models.weights.read import read_weights
from segformer.training.config import RunConfig
from segformer.training.losses import balanced_weights

BATCH = {"gpu": 16, "cpu": 8}
CROP = {"gpu": 512, "cpu": 256}  # most pixels of a side
LEAST_CROP = 64
# Epochs of a small set, and the most images of a run (of 16 a step), for random and for trained weights.
EPOCHS = {"scratch": (300, 160_000 * 16), "finetune": (100, 40_000 * 16)}
MOST_EPOCHS, FIRST_LOOK_EPOCHS = 500, 10
FIRST_LOOK_S = 360.0
CPU_FLOPS = 77e9  # of two cores: b0 trains on 19 crops of 256 x 256 a second
SHORT_EPOCHS = 50  # below, regularization costs more than it gains
RARE = 0.01  # share of the pixels of a class
SCRATCH_LR, FINETUNE_LR = 1e-3, 6e-5  # of b0 in batches of 8; of every encoder in batches of 16
# Steps below which the lr is raised by sqrt(these / steps), and by how much at most.
SHORTER = {"scratch": (5000, 2.0), "finetune": (10_000, 4.0)}

Chosen = tuple[dict[str, Any], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rules know beside the configuration."""

    images: int
    "Images that are trained on."
    side: tuple[int, int]
    "Their median height and width, pixels."
    eval_pixels: int
    "Pixels of all images that are evaluated."
    eval_side: int
    "Pixels of the largest of them."
    class_pixels: np.ndarray
    "Pixels of each class in training (K,)."
    classes: list[str]
    gpu: bool
    world_size: int
    channels: int = RGB
    "Channels of the images."

    @classmethod
    def of(cls, cfg: RunConfig, shards: ShardSet | Mixture, device: str, world_size: int) -> Facts:
        """The facts of a configuration's splits."""
        train, held = shards.split(cfg.train_split), shards.split(cfg.eval_split)
        pixels = held.heights.astype(np.int64) * held.widths
        return cls(
            images=train.num_samples,
            side=(int(np.median(train.heights)), int(np.median(train.widths))),
            eval_pixels=int(pixels.sum()),
            eval_side=int(pixels.max()),
            class_pixels=train.class_pixels,
            classes=shards.classes,
            channels=shards.channels,
            gpu=device != "cpu",
            world_size=world_size,
        )

    @property
    def kind(self) -> str:
        """gpu or cpu."""
        return "gpu" if self.gpu else "cpu"


def needs_sizing(cfg: RunConfig) -> bool:
    """Something is left to be worked out."""
    return bool(cfg.auto or cfg.epochs is not None or cfg.loss.class_weighting)


def sized(
    cfg: RunConfig, shards: ShardSet | Mixture, *, device: str, world_size: int
) -> tuple[RunConfig, list[str]]:
    """The configuration in plain numbers, and a line "key=value: reason" for what was worked out.

    Args:
        cfg: `auto` lists what is left open; `epochs` and loss.class_weighting become numbers, too.
        shards: the run's data.
        device: type of the ranks' device, cpu or cuda.

    Raises:
        ConfigError: the data is no segmentation set, whose sizes the rules are of.
        CheckpointError: model.pretrained can't be read.
    """
    if not needs_sizing(cfg):
        return cfg, []
    if shards.task != "segmentation" and (cfg.auto or cfg.loss.class_weighting):
        asked = f"loss.class_weights={cfg.loss.class_weighting}"
        asked = "a recipe that sizes itself (experiment=scratch, finetune)" if cfg.auto else asked
        raise ConfigError(
            f"{asked} is for segmentation only, and {cfg.data.shards} is for {shards.task}; use "
            "experiment=imagenet_300ep, or give the settings"
        )
    open_keys = set(cfg.auto)
    open_keys |= {"steps"} if cfg.epochs is not None else set()
    open_keys |= {"loss.class_weights"} if cfg.loss.class_weighting else set()
    facts, lines = Facts.of(cfg, shards, device, world_size), []
    for keys, rule in RULES:
        if not open_keys & set(keys):
            continue
        values, reason = rule(cfg, facts)
        values = {key: value for key, value in values.items() if key in open_keys}
        cfg = with_values(cfg, values)
        lines.append(f"{' '.join(f'{key}={_short(value)}' for key, value in values.items())}: {reason}")
    return replace(cfg, auto=[], epochs=None, loss=replace(cfg.loss, class_weighting="")), lines


def kept(cfg: RunConfig, saved: RunConfig, keys: Iterable[str]) -> RunConfig:
    """The configuration with the numbers that its run has for `keys`; steps stay those of `epochs`."""
    values = {key: reduce(getattr, key.split("."), saved) for key in keys}
    if cfg.epochs is not None:
        values.pop("steps", None)
    left = [key for key in cfg.auto if key not in values]
    return replace(with_values(cfg, values), auto=left)


def with_values(cfg: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The configuration with these values by dotted key."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        change = {group: replace(getattr(cfg, group), **{name: value})} if group else {name: value}
        cfg = replace(cfg, **change)
    return cfg


def fitting_batch(wanted: int, world_sizes: Iterable[int], micro_batch: int | None) -> int:
    """The least number from `wanted` on that every number of ranks can share out."""
    share = math.lcm(*world_sizes) * (micro_batch or 1)
    return -(-wanted // share) * share


def _batch(cfg: RunConfig, facts: Facts) -> Chosen:
    usual = BATCH[facts.kind]
    wanted = min(usual, 2 ** int(math.log2(facts.images)))
    batch = fitting_batch(wanted, [facts.world_size], cfg.micro_batch)
    why = f"{usual} on a {facts.kind.upper()}"
    why += f", no more than the {facts.images} images" if wanted < usual else ""
    why += f", shared out over {facts.world_size} ranks" if facts.world_size > 1 else ""
    return {"global_batch": batch}, why


def _crop(cfg: RunConfig, facts: Facts) -> Chosen:
    most = CROP[facts.kind]
    crop = [max(LEAST_CROP, min(most, side)) for side in facts.side]
    height, width = facts.side
    return {"augment.crop": crop}, f"the median image, {height}x{width}, at most {most} a side"


def _length(cfg: RunConfig, facts: Facts) -> Chosen:
    batch, why = cfg.global_batch, ""
    epochs = cfg.epochs
    if epochs is None:
        most_epochs, most = EPOCHS["finetune" if cfg.model.pretrained else "scratch"]
        usual = epochs = min(most_epochs, most / facts.images)
        if not facts.gpu:
            network = replace(cfg.model, in_channels=facts.channels)
            flops = training_flops(network, _size(cfg), len(facts.classes)) * facts.images
            epochs = min(epochs, max(FIRST_LOOK_EPOCHS, FIRST_LOOK_S * CPU_FLOPS / flops))
            minutes = max(1, round(epochs * flops / CPU_FLOPS / 60))
            why = f", about {minutes} minutes on two cores"
            if epochs < usual:
                why += f": a first look, a GPU would take epochs={written(usual)}"
        epochs = math.floor(epochs) if epochs >= 1 else epochs
    steps = max(1, math.ceil(round(epochs * facts.images / batch, 6)))
    text = f"{written(epochs)} epochs of {facts.images} images in batches of {batch}{why}"
    return {"steps": steps}, text


def _scale(cfg: RunConfig, facts: Facts) -> Chosen:
    wide = _epochs(cfg, facts) >= SHORT_EPOCHS
    why = "evaluation takes images at their own size"
    why += "" if wide or "augment.scale" not in cfg.auto else ", and a short run stays near it"
    return {"augment.resize": [], "augment.scale": [0.5, 2.0] if wide else [0.7, 1.5]}, why


def _learning_rate(cfg: RunConfig, facts: Facts) -> Chosen:
    sizes, batch = VARIANTS[cfg.model.variant], cfg.global_batch
    usual, most = SHORTER["finetune" if cfg.model.pretrained else "scratch"]
    raised = min(most, max(1.0, math.sqrt(usual / cfg.steps)))
    details = f" in batches of {batch}" + (f", {cfg.steps} steps are few" if raised > 1 else "")
    details = details if "optim.lr" in cfg.auto else ""  # nothing to the factor of the head
    if not cfg.model.pretrained:
        small = VARIANTS["b0"]
        width = math.sqrt(sizes.embed_dims[-1] / small.embed_dims[-1])
        depth = (sum(sizes.depths) / sum(small.depths)) ** 0.25
        lr = SCRATCH_LR * math.sqrt(batch / 8) / width / depth * raised
        why = f"random weights of {cfg.model.variant}{details}"
        return {"optim.lr": _rounded(lr), "optim.head_lr_factor": 1.0}, why
    arch = (weights := read_weights(cfg.model.pretrained)).arch
    fits = (arch.kind, arch.num_classes) == ("segmentation", len(facts.classes))
    lr = FINETUNE_LR * math.sqrt(batch / 16)
    if fits and weights.metadata.classes in ([], facts.classes):
        why = "the whole model is trained already" + details.partition(",")[0]
        return {"optim.lr": _rounded(lr), "optim.head_lr_factor": 1.0}, why
    why = f"a trained encoder and a new head{details}"
    return {"optim.lr": _rounded(lr * raised), "optim.head_lr_factor": 10.0}, why


def _warmup(cfg: RunConfig, facts: Facts) -> Chosen:
    return {"optim.warmup_steps": min(1500, cfg.steps // 20)}, "5 % of the steps, at most 1500"


def _drop_path(cfg: RunConfig, facts: Facts) -> Chosen:
    short = _epochs(cfg, facts) < SHORT_EPOCHS
    why = "too few epochs to overfit" if short else "the recipe of the paper"
    return {"model.drop_path_rate": 0.0 if short else 0.1}, why


def _intervals(cfg: RunConfig, facts: Facts) -> Chosen:
    height, width = _size(cfg)
    trained = 3 * cfg.steps * cfg.global_batch * height * width  # forward and backward
    count = int(min(10, max(2, trained / 10 / facts.eval_pixels)))
    why = f"{count} evaluations, so that they take about a tenth of the time at most"
    return {"eval_every": math.ceil(cfg.steps / count)}, why


def _saves(cfg: RunConfig, facts: Facts) -> Chosen:
    save, keep = min(cfg.eval_every, 2000), cfg.checkpoint.keep_every
    why = "at every evaluation" if save == cfg.eval_every else "often enough for evaluations this far apart"
    if keep % save:  # the next lower divisor, unless that would save much more often
        save = next((number for number in range(save, save // 4, -1) if keep % number == 0), keep)
        why = f"checkpoint.keep_every={keep} is a multiple of it"
    return {"checkpoint.save_every": save}, why


def _eval_batch(cfg: RunConfig, facts: Facts) -> Chosen:
    pixels = 4 * CROP[facts.kind] ** 2
    batch = max(1, min(8, pixels // facts.eval_side))
    return {"eval_batch": batch}, f"images of up to {pixels} pixels in all"


def _log_every(cfg: RunConfig, facts: Facts) -> Chosen:
    return {"telemetry.log_every": max(1, min(50, cfg.steps // 40))}, "about 40 lines, more of a long run"


def _class_weights(cfg: RunConfig, facts: Facts) -> Chosen:
    share = facts.class_pixels / max(1, facts.class_pixels.sum())
    rare = int(((share > 0) & (share < RARE)).sum())
    weighting = cfg.loss.class_weighting
    if not weighting and cfg.mixture.joint:
        return {"loss.class_weights": []}, "a class of the mixture may be several, of which each has its own"
    if not weighting and not rare:
        return {"loss.class_weights": []}, f"no class has under {RARE:.0%} of the pixels"
    weights = balanced_weights(facts.class_pixels.tolist(), weighting or "auto")
    order = np.argsort(weights)[::-1]
    each = [f"{facts.classes[k]} {weights[k]:.2f} ({share[k]:.2%})" for k in order]
    if weighting:
        why = "auto, which is sqrt: " if weighting == "auto" else f"{weighting}: "
    else:
        why = f"{rare} of {len(share)} classes with under {RARE:.0%} of the pixels; sqrt: "
    return {"loss.class_weights": weights}, why + listed(each, 12)


RULES: tuple[tuple[tuple[str, ...], Callable[[RunConfig, Facts], Chosen]], ...] = (
    (("global_batch",), _batch),
    (("augment.crop",), _crop),
    (("steps",), _length),
    (("augment.resize", "augment.scale"), _scale),
    (("optim.lr", "optim.head_lr_factor"), _learning_rate),
    (("optim.warmup_steps",), _warmup),
    (("model.drop_path_rate",), _drop_path),
    (("eval_every",), _intervals),
    (("checkpoint.save_every",), _saves),
    (("eval_batch",), _eval_batch),
    (("telemetry.log_every",), _log_every),
    (("loss.class_weights",), _class_weights),
)


def _size(cfg: RunConfig) -> tuple[int, int]:
    return cfg.augment.crop[0], cfg.augment.crop[1]


def _epochs(cfg: RunConfig, facts: Facts) -> float:
    return cfg.steps * cfg.global_batch / facts.images


def _rounded(lr: float) -> float:
    return float(f"{lr:.2g}")


def written(epochs: float) -> str:
    """A number of epochs as it is shown."""
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"


def _short(value: Any) -> str:
    """A value as the command line takes it, a long list cut short."""
    if isinstance(value, list):
        return f"[{','.join(map(_short, value[:4]))}{',...' if len(value) > 4 else ''}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
