"""The scores of a finished model: a run or an export, on any split of any shards with its classes.

Images are taken whole and at their own size, but not larger than those of the training, where shard.py has
reduced these; logits are brought to the size of the label, and one confusion matrix counts the split. A
classifier gets the center of every image, cropped as in its training. So do the evaluations during training:
the numbers agree with theirs. Published scores resize images, slide windows, flip and scale
(evaluation/inference_mode.py).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet, Split
from segformer.distributed.engine import EngineConfig, resolve_precision
from segformer.distributed.world import init_world, limit_threads
from segformer.errors import ConfigError, SegformerError, at_least, listed, say
from segformer.evaluation.evaluate import evaluate
from segformer.evaluation.inference_mode import InferenceModeConfig, check_images, settings, trained_at
from segformer.evaluation.metrics import Scores
from segformer.inference.export import build, open_checkpoint
from segformer.models.weights.bundle import Weights
from segformer.telemetry.progress import duration


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(InferenceModeConfig):
    """Which model to score, on which images, and how it sees them."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    shards: str = ""
    "Folder of shards; empty takes those that the model was trained with."
    split: str = "val"
    "Split of the shards."
    batch: int = 1
    "Images per forward and rank, of one size each."
    precision: str = "auto"
    "fp32, bf16 or auto, as engine.precision of a run: bf16 where the GPU has it, fp32 on a CPU."
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    "Worker processes."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        at_least(self, "", batch=1)
        EngineConfig(precision=self.precision)


def evaluate_checkpoint(cfg: EvaluateConfig) -> Scores:
    """Print the table of scores (rank zero) and return them; all ranks."""
    world = init_world()
    try:
        limit_threads(world)
        world.on_main(lambda: _open(cfg) and None)  # one message where something is wrong
        trained, classes, split = _open(cfg)
        view, longest = None, int(max(split.heights.max(), split.widths.max()))
        if trained.arch.kind == "segmentation" and longest > trained.metadata.long_side:
            cfg = trained_at(cfg, trained.metadata.long_side)
        if trained.arch.kind == "classification":
            size, short = trained.metadata.view
            view = ClassificationAugment(size=size, eval_resize=short)
        start = time.monotonic()
        failures: list[SegformerError] = []
        scores = evaluate(
            build(trained).to(world.device),
            Normalize(trained.metadata.mean, trained.metadata.std).to(world.device),
            split,
            cfg.loader,
            world,
            num_classes=len(classes),
            batch_size=cfg.batch,
            bf16=resolve_precision(EngineConfig(precision=cfg.precision), world.device) == "bf16",
            should_stop=lambda: world.any(bool(failures)),
            on_error=failures.append,
            view=view,
            mode=cfg,
        )
    finally:
        world.close()
    if scores is None:  # logged once, by the rank that met it
        raise failures[0] if failures else SystemExit(SegformerError.exit_code)
    if world.is_main:
        mode = ", ".join(settings(cfg)) or "whole images"
        if view is not None:
            mode = f"short side to {view.eval_resize}, center {view.size} x {view.size}"
        say(
            f"{cfg.checkpoint} at step {trained.provenance.get('step')} on {split.num_samples} images of "
            f"{cfg.split} ({mode}) in {duration(time.monotonic() - start)}",
            file=sys.stderr,
        )
        print(scores.table(classes))
    return scores


def _open(cfg: EvaluateConfig) -> tuple[Weights, list[str], Split]:
    """The model, the names of its classes and the split."""
    trained = open_checkpoint(cfg.checkpoint, cfg.step, cfg.loader.storage)
    place = cfg.shards or trained.provenance.get("shards")
    kind, predicted = trained.arch.kind, trained.metadata.classes
    if not place:
        raise ConfigError(f"{cfg.checkpoint} does not say which shards it was trained with; give shards=...")
    shards = ShardSet.open(place, cfg.loader.storage)
    if shards.task != kind:
        raise ConfigError(
            f"{cfg.checkpoint} is a model for {kind}, {place} was sharded for {shards.task}; give shards of "
            "its own"
        )
    if list(shards.classes) != predicted:
        raise ConfigError(
            f"{cfg.checkpoint} predicts {len(predicted)} classes ({listed(predicted, 3)}), the shards have "
            f"{len(shards.classes)} ({listed(shards.classes, 3)}); give shards of its own"
        )
    split = shards.split(cfg.split)
    if changed := settings(cfg):
        if kind != "segmentation":
            raise ConfigError(
                f"{', '.join(changed)}: {cfg.checkpoint} is a classifier, which sees the center of each "
                "image; leave this out"
            )
        check_images(cfg, zip(split.heights.tolist(), split.widths.tolist(), strict=True))
    return trained, predicted, split
