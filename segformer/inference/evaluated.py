"""Which model is scored on which images: opened, and held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.mixture import LabelMap
from segformer.data.shards.format import ShardSet, Split
from segformer.data.sources.dataset import Pixels
from segformer.distributed.engine import EngineConfig
from segformer.errors import (
    CheckpointError,
    ConfigError,
    at_least,
    listed,
    reraise_as,
)
from segformer.evaluation.evaluate import mode_of
from segformer.evaluation.inference_mode import InferenceModeConfig, check_images, settings, trained_at
from segformer.inference.export import check_output, open_checkpoint
from segformer.models.weights.bundle import Weights
from segformer.models.weights.write import images_of


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(InferenceModeConfig):
    """Which model to score, on which images, and how it sees them."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    shards: str = ""
    "Folder of shards, or a set of the run's mixture by name; empty takes those of the training."
    split: str = "val"
    "Split of the shards."
    batch: int = 1
    "Images per forward and rank, of one size each."
    precision: str = "auto"
    "fp32, bf16 or auto, as engine.precision of a run: bf16 where the GPU has it, fp32 on a CPU."
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    "Worker processes."
    ignore_classes: list[str] = field(default_factory=list)
    "Classes that the means over classes leave out; their pixels count for the others."
    boundary: bool = False
    "Also boundary IoU: that of the pixels near the edges of each class."
    calibration: bool = False
    "Also the expected calibration error, with its plot."
    worst: int = 0
    "So many images with the lowest mIoU are listed and drawn."
    against: str = ""
    "Another run or export: the difference to its scores on the same images, with its interval."
    output: str = ""
    "Folder for the scores as JSON, CSV and Markdown; empty = scores in the directory of the run."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        at_least(self, "", batch=1, worst=0)
        EngineConfig(precision=self.precision)
        check_output(self.output, "the scores are written as several files")


def mode_for(cfg: InferenceModeConfig | None, trained: Weights, split: Split) -> InferenceModeConfig:
    """The inference mode of `cfg`, or that of a plain evaluation: images are as large as in training."""
    names = [field.name for field in fields(InferenceModeConfig)]
    mode = InferenceModeConfig(**{name: getattr(cfg, name) for name in names if cfg is not None})
    if split.tiled:
        return mode_of(split, mode)
    longest = int(max(split.heights.max(), split.widths.max()))
    reduced = trained.arch.kind == "segmentation" and longest > trained.metadata.long_side
    return trained_at(mode, trained.metadata.long_side) if reduced else mode


def _sets_of(cfg: EvaluateConfig, trained: Weights, key: str) -> dict[str, Any]:
    """The sets of the model's mixture by name; ConfigError where neither one of them nor shards are named."""
    said, wrong = trained.provenance.get("sets", {}), (AttributeError, TypeError, KeyError)
    with reraise_as(CheckpointError, f"{cfg.checkpoint}: what it says of its data sets is damaged", on=wrong):
        sets = {str(name): {"shards": one["shards"], "classes": one["classes"]} for name, one in said.items()}
    if (
        sets
        and cfg.shards not in sets
        and not (cfg.shards and (Path(cfg.shards).exists() or "://" in cfg.shards))
    ):
        wrong_name = f", and {key}={cfg.shards} is none of them" if cfg.shards else ""
        raise ConfigError(
            f"{cfg.checkpoint} was trained on several data sets{wrong_name}; give {_own(sets, key)}"
        )
    return sets


def _own(sets: dict[str, Any], key: str) -> str:
    return " or ".join(f"{key}={name}" for name in sets) or "shards of its own"


def open_scored(
    cfg: EvaluateConfig, splits: Sequence[str] | None = None, key: str = "shards"
) -> tuple[Weights, ShardSet, LabelMap | None]:
    """The model, its shards, checked for `splits` (None: cfg.split; empty: all), and what their labels are in
    its classes where these are others. key: names the shards."""
    trained = open_checkpoint(cfg.checkpoint, cfg.step, cfg.loader.storage)
    sets = _sets_of(cfg, trained, key)
    one = sets.get(cfg.shards, {})
    place = one.get("shards") or cfg.shards or trained.provenance.get("shards")
    kind, predicted = trained.arch.kind, trained.metadata.classes
    if not place:
        text = f"{cfg.checkpoint} does not say which shards it was trained with"
        raise ConfigError(f"{text}; give {key}=<shards>")
    shards = ShardSet.open(place, cfg.loader.storage)
    if shards.task != kind:
        raise ConfigError(
            f"{cfg.checkpoint} is a model for {kind}, {place} was sharded for {shards.task}; give shards of "
            "its own"
        )
    labels = None
    if one:
        key = f"{cfg.checkpoint}: mixture.sets.{cfg.shards}.classes"
        labels = LabelMap.of(key, one["classes"], shards.classes, predicted)
    elif list(shards.classes) != predicted:
        raise ConfigError(
            f"{cfg.checkpoint} predicts {len(predicted)} classes ({listed(predicted, 3)}), the shards have "
            f"{len(shards.classes)} ({listed(shards.classes, 3)}); give {_own(sets, key)}"
        )
    if shards.pixels != images_of(trained):
        raise ConfigError(
            f"{cfg.checkpoint} takes images of {Pixels(*images_of(trained))}, those of {place} are "
            f"{shards.pixels}; give shards of its own"
        )
    changed = settings(cfg)
    if changed and kind != "segmentation":
        raise ConfigError(
            f"{', '.join(changed)}: {cfg.checkpoint} is a classifier, which sees the center of each "
            "image; leave this out"
        )
    for split in map(shards.split, [cfg.split] if splits is None else splits or list(shards.splits)):
        if changed and split.tiled:
            mode_of(split, cfg)
        if changed:
            check_images(cfg, zip(split.heights.tolist(), split.widths.tolist(), strict=True))
    return trained, shards, labels
