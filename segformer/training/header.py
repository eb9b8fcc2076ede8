"""What a start says of itself: lines for the log, the row "start" of metrics.jsonl, and train_batch.jpg.

run sample: SegFormer-B0, 3.71 M parameters, fp32, ZeRO-0, 1 x cpu
data data/sample: 292 training and 80 validation images, 2 classes
batch 8 = 8 a forward x 1 accumulated x 1 ranks, crop 256x256, 500 steps = 13.7 epochs
files in runs/sample; Ctrl-C saves and stops, and the same command goes on
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segformer.checkpoint.format import TrainState
from segformer.data.loading.mixture import Mixture
from segformer.data.loading.order import MixedOrder, SampleOrder
from segformer.data.loading.samples import Batch
from segformer.data.shards.format import ShardSet
from segformer.data.sources.dataset import RGB
from segformer.distributed.engine import resolve_precision, resolve_stage
from segformer.distributed.world import World
from segformer.errors import reason_of, reported
from segformer.evaluation.drawing import batch_picture, displayed, write_picture
from segformer.models.encoders import BACKBONES
from segformer.models.ops import native
from segformer.models.variants import VARIANTS
from segformer.telemetry.jsonl import newest_row
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.machine import start_row
from segformer.training.config import RunConfig
from segformer.training.optim import schedule_remark
from segformer.training.sizing import written
from segformer.training.task import Task, normalization, training_crop

FIRST_BATCH = "train_batch.jpg"


def network_name(cfg: RunConfig) -> str:
    """The network of a run as papers call it: SegFormer-B0, ConvNeXt-PICO; MiT-B0 as a classifier."""
    backbone = VARIANTS[cfg.model.variant].backbone
    own = cfg.data.task == "segmentation" and backbone == "mit"
    return f"{'SegFormer' if own else BACKBONES[backbone].title}-{cfg.model.variant.upper()}"


def log_start(
    cfg: RunConfig,
    world: World,
    telemetry: Telemetry,
    shards: ShardSet | Mixture,
    order: SampleOrder | MixedOrder,
    model: nn.Module,
    state: TrainState,
) -> None:
    """Log what is trained on what, with what, and from where; all ranks."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    frozen = sum(size for size, trained in sizes if not trained)
    kept = f" ({frozen / 1e6:.2f} M of them frozen)" if frozen else ""
    train_split, eval_split = shards.split(cfg.train_split), shards.split(cfg.eval_split)
    parameters = f"{sum(size for size, _ in sizes) / 1e6:.2f} M parameters{kept}"
    telemetry.line(
        f"run {cfg.name}: {network_name(cfg)}, {parameters}, "
        f"{resolve_precision(cfg.engine, world.device)}, "
        f"ZeRO-{resolve_stage(cfg.engine, world.device)}, {world.size} x {world.device.type}"
    )
    place = cfg.data.shards or f"of {len(cfg.mixture.sets)} sets"
    telemetry.line(
        f"data {place}: {train_split.num_samples} training and {eval_split.num_samples} validation "
        f"{'tiles' if eval_split.tiled else 'images'}, {len(shards.classes)} classes{_pixels(cfg, shards)}"
    )
    if isinstance(shards, Mixture) and isinstance(order, MixedOrder):
        for line in set_lines(cfg, shards, order):
            telemetry.line(line)
    crop, batch = "x".join(map(str, training_crop(cfg))), cfg.batch_shape(world.size)
    epochs = cfg.steps * cfg.global_batch / max(1, train_split.num_samples)
    telemetry.line(f"batch {batch}, crop {crop}, {cfg.steps} steps = {written(epochs)} epochs")
    if remark := schedule_remark(cfg.optim, cfg.steps):
        telemetry.line(remark)
    loop = world.device.type == "cpu" and cfg.model.ops == "fused" and cfg.data.task == "segmentation"
    if loop and (reason := native.missing()):
        telemetry.line(f"the loss runs without its compiled loop, slower: {reason}")
    if pretrained := getattr(model, "pretrained", ""):
        telemetry.line(f"weights of {pretrained}")
    if state.step and world.is_main:
        # A start that made no step has cost none: what was to be done again then, still is.
        last = newest_row(Path(cfg.run_dir), "train", "continued")
        redone = max(0, last["step"] - state.step) if last else 0
        cost = f"; {redone} more had been logged and are done again" if redone else ""
        telemetry.line(f"continuing from step {state.step}{cost}")
        telemetry.event("continued", state.step, redone=redone, ranks=world.size)
    if world.is_main:
        telemetry.event("start", state.step, **start_row(world))
    if state.step < cfg.steps:
        telemetry.line(f"files in {cfg.run_dir}; Ctrl-C saves and stops, and the same command goes on")


def _pixels(cfg: RunConfig, shards: ShardSet | Mixture) -> str:
    """Channels and type of images that are not 8-bit RGB, and whose mean and std they are normalized by."""
    if shards.pixels == RGB:
        return ""
    own = normalization(cfg, shards) == (shards.mean, shards.std)
    whose = "the shards" if own else "the settings (augment)"
    return f"; images of {shards.pixels}, normalized by the mean and std of {whose}"


def set_lines(cfg: RunConfig, shards: Mixture, order: MixedOrder) -> Iterator[str]:
    """A line for each set of a mixture."""
    seen = order.positions(cfg.steps * cfg.global_batch)
    for name, one in shards.sets.items():
        train, held, share = one.split(cfg.train_split), one.split(cfg.eval_split), order.shares[name]
        annotated = len(shards.maps[name].annotated)
        yield (
            f"  {name} ({one.root}): {train.num_samples} training and {held.num_samples} validation images, "
            f"{100 * share:.1f} % of the samples = {written(seen[name] / train.num_samples)} epochs, "
            f"annotates {annotated} of the classes"
        )


def draw_first_batch(
    cfg: RunConfig, world: World, task: Task, telemetry: Telemetry, batches: list[Batch], step: int
) -> None:
    """Draw the first micro batch of a step as the network gets it, with its targets; rank zero.

    A picture that is there stays. Nothing is drawn from a generator that training uses.
    """
    path = Path(cfg.run_dir) / FIRST_BATCH
    if not (world.is_main and batches) or path.exists():
        return
    batch, position = batches[0], step * len(batches) * world.size
    split, classes = task.shards.split(cfg.train_split), task.shards.classes
    with torch.no_grad():
        images, targets = task.inputs(batch.to(world.device), position)
        pixels = images * task.normalize.std + task.normalize.mean
        pixels = pixels.round_().clamp_(0, 255).byte() if task.shards.pixels == RGB else pixels
    pictures = np.stack([displayed(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()])
    keys = [split.key(sample_id) for sample_id in batch.sample_ids.tolist()]
    with reported(lambda error: telemetry.line(f"no {path}: {reason_of(error)}"), on=OSError):
        write_picture(
            path, batch_picture(pictures, targets.cpu().numpy(), keys, classes, task.shards.palette)
        )
        telemetry.line(f"the first batch as the model sees it: {path}")
