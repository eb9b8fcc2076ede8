"""The first lines of a run's log: what is trained on what, with what, and from where."""

from pathlib import Path

from torch import nn

from segformer.checkpoint.format import TrainState
from segformer.data.shards.format import ShardSet
from segformer.distributed.engine import resolve_precision, resolve_stage
from segformer.distributed.world import World
from segformer.models.encoders import BACKBONES
from segformer.models.variants import VARIANTS
from segformer.telemetry.jsonl import newest_row
from segformer.telemetry.logger import Telemetry
from segformer.training.config import RunConfig
from segformer.training.optim import schedule_remark
from segformer.training.task import training_crop


def announce(
    cfg: RunConfig, world: World, telemetry: Telemetry, shards: ShardSet, model: nn.Module, state: TrainState
) -> None:
    """Say what is trained on what, with what, and from where; all ranks."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    precision = resolve_precision(cfg.engine, world.device)
    train_split, eval_split = shards.split(cfg.train_split), shards.split(cfg.eval_split)
    frozen = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if not p.requires_grad)
    kept = f" ({frozen / 1e6:.2f} M of them frozen)" if frozen else ""
    network = f"{BACKBONES[VARIANTS[cfg.model.variant].backbone].title}-{cfg.model.variant.upper()}"
    telemetry.line(
        f"run {cfg.name}: {network}, {parameters / 1e6:.2f} M parameters{kept}, "
        f"{precision}, ZeRO-{resolve_stage(cfg.engine, world.device)}, {world.size} x {world.device.type}"
    )
    telemetry.line(
        f"data {cfg.data.shards}: {train_split.num_samples} training and {eval_split.num_samples} validation "
        f"images, {len(shards.classes)} classes"
    )
    telemetry.line(
        f"batch {cfg.batch_shape(world.size)}, crop {'x'.join(map(str, training_crop(cfg)))}, "
        f"{cfg.steps} steps"
    )
    if remark := schedule_remark(cfg.optim, cfg.steps):
        telemetry.line(remark)
    if state.step:
        _say_return(cfg, world, telemetry, state.step)
    elif pretrained := getattr(model, "pretrained", ""):
        telemetry.line(f"weights of {pretrained}")


def _say_return(cfg: RunConfig, world: World, telemetry: Telemetry, step: int) -> None:
    """Say where the run goes on, and what the interruption has cost as far as the log knows; rank zero."""
    if not world.is_main:
        return
    # A start that made no step has cost none: what was to be done again then, still is.
    last = newest_row(Path(cfg.run_dir), "train", "continued")
    redone = max(0, last["step"] - step) if last else 0
    cost = f"; {redone} more had been logged and are done again" if redone else ""
    telemetry.line(f"continuing from step {step}{cost}")
    telemetry.event("continued", step, redone=redone, ranks=world.size)
