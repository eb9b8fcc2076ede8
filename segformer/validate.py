"""The scores of a finished model: a run or an export, on any split of any shards with its classes.

Protocol: whole images at their own size, logits brought to the size of the label, one confusion matrix over
the split. It is the protocol of the evaluations during training, so the numbers agree with theirs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from segformer.data.loader import LoaderConfig, eval_batches, num_eval_batches
from segformer.data.shards import ShardSet
from segformer.data.transforms import AugmentConfig, Normalize
from segformer.dist import World, init_world, limit_threads
from segformer.errors import ConfigError
from segformer.evaluate import evaluate
from segformer.export import Trained, open_checkpoint
from segformer.metrics import Scores
from segformer.telemetry import duration


@dataclass(kw_only=True, slots=True)
class ValidateConfig:
    """What to score, and on which images."""

    checkpoint: str = "???"
    "Directory of a run (its newest checkpoint) or of an export."
    shards: str = ""
    "Folder of shards; empty takes those that the model was trained with."
    split: str = "val"
    "Split of the shards."
    batch: int = 1
    "Images per forward and rank, of one size each."
    bf16: bool = False
    "Run the model in bf16 autocast."
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    "Worker processes."

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} must be 1 or more")


def validate(cfg: ValidateConfig) -> Scores:
    """Print the table of scores (rank zero) and return them; all ranks."""
    world = init_world()
    try:
        limit_threads(world)
        world.on_main(lambda: _open(cfg) and None)  # one message where something is wrong
        trained, shards = _open(cfg)
        start = time.monotonic()
        scores = _score(cfg, world, trained, shards)
    finally:
        world.close()
    if world.is_main:
        split = shards.split(cfg.split)
        print(
            f"{cfg.checkpoint} at step {trained.step} on {split.num_samples} images of {cfg.split} "
            f"(whole images, original size) in {duration(time.monotonic() - start)}",
            file=sys.stderr,
        )
        print(scores.table(shards.classes))
    return scores


def _open(cfg: ValidateConfig) -> tuple[Trained, ShardSet]:
    trained = open_checkpoint(cfg.checkpoint)
    if not (cfg.shards or trained.shards):
        raise ConfigError(
            f"{cfg.checkpoint} does not say which shards it was trained with; give shards=<folder>"
        )
    shards = ShardSet.open(cfg.shards or trained.shards)
    if list(shards.classes) != trained.classes:
        raise ConfigError(
            f"{cfg.checkpoint} predicts {len(trained.classes)} classes ({', '.join(trained.classes[:3])}), "
            f"the shards have {len(shards.classes)} ({', '.join(shards.classes[:3])}); give shards of its own"
        )
    shards.split(cfg.split)
    return trained, shards


def _score(cfg: ValidateConfig, world: World, trained: Trained, shards: ShardSet) -> Scores:
    split = shards.split(cfg.split)
    return evaluate(
        trained.build().to(world.device),
        Normalize(AugmentConfig(mean=trained.mean, std=trained.std)).to(world.device),
        eval_batches(
            split,
            cfg.loader,
            rank=world.rank,
            world_size=world.size,
            local_world_size=world.local_size,
            batch_size=cfg.batch,
        ),
        world,
        num_classes=len(shards.classes),
        rounds=max(num_eval_batches(split, world.size, cfg.batch)),
        autocast=cfg.bf16,
    )
