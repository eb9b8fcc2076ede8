"""Three steps of the real network on this device: seconds, memory, and the hours of the whole run.

Network, loss, optimizer, batches and crops are those of the run: one rank's share of a step, with its
accumulation. DeepSpeed and torch.compile, which need a start of their own, stay out, and so do the other
ranks, for which a rank also waits: hours are an estimate. An evaluation is measured on the median validation
image and taken to cost in proportion to pixels.
"""

import contextlib
import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from segformer.checkpoint.format import TrainState
from segformer.data.loading.loader import train_batches
from segformer.data.loading.mixture import Mixture
from segformer.data.loading.order import BatchShape
from segformer.data.loading.samples import Samples
from segformer.data.shards.format import ShardSet, Split
from segformer.data.sources.content import OK, WARN, Finding
from segformer.distributed.engine import resolve_precision
from segformer.distributed.world import World
from segformer.models.ops.backend import BACKENDS
from segformer.telemetry.progress import duration
from segformer.training.config import RunConfig
from segformer.training.optim import build_optimizer, freeze_stages
from segformer.training.run import sample_order
from segformer.training.step import enough_memory, too_large
from segformer.training.task import Task, make_task, training_crop

WARMUP, STEPS = 1, 3
LONG_H = 48.0  # a run above it is worth a second thought


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What three steps and the forward of an image tell of a run."""

    device: str
    ranks: int
    step_s: float
    images_per_s: float
    "Over all ranks."
    memory_gib: float
    "Peak of the device's allocator; on a CPU of the process."
    train_h: float
    evaluate_h: float

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.train_h + self.evaluate_h

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"hours": self.hours}


def measure(cfg: RunConfig, shards: ShardSet | Mixture, batch: BatchShape) -> Measured:
    """Measure a run that is to have `batch.world_size` ranks like this device.

    Raises:
        ConfigError: a step or an evaluation doesn't fit into memory; it says what to lower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=device)
    torch.manual_seed(cfg.seed)
    task = make_task(cfg, shards, world)
    model: nn.Module = task.build_model(cfg.model)
    freeze_stages(model, cfg.optim.frozen_stages)
    model.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bf16 = resolve_precision(cfg.engine, device) == "bf16"
    with enough_memory(0, lambda: too_large(cfg, 0, batch.micro_batch)):
        step_s = _step_seconds(cfg, task, model, batch, bf16, device)
    where = f"in evaluation (eval_batch={cfg.eval_batch}); lower eval_batch"
    with enough_memory(0, lambda: where):
        evaluation_s = _evaluation_seconds(cfg, task, model, bf16, device) / batch.world_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU",
        ranks=batch.world_size,
        step_s=step_s,
        images_per_s=cfg.global_batch / step_s,
        memory_gib=peak / 2**30,
        train_h=step_s * cfg.steps / 3600,
        evaluate_h=evaluation_s * -(-cfg.steps // cfg.eval_every) / 3600,
    )


def judge_measured(cfg: RunConfig, found: Measured) -> Finding:
    """The measurement in words; a WARN for a run of days."""
    crop, count = "x".join(map(str, training_crop(cfg))), -(-cfg.steps // cfg.eval_every)
    many = f"{found.ranks} such devices, without what they wait for each other" if found.ranks > 1 else ""
    text = (
        f"{found.step_s:.3g} s a step of {cfg.global_batch} crops of {crop} on {many or found.device} "
        f"({found.images_per_s:.3g} img/s), {found.memory_gib:.2f} GiB; the run about "
        f"{duration(3600 * found.hours)}: {cfg.steps} steps {duration(3600 * found.train_h)}, "
        f"{count} evaluations {duration(3600 * found.evaluate_h)}"
    )
    if found.hours <= LONG_H:
        return Finding(OK, "measured", text)
    steps = max(1, int(cfg.steps * LONG_H / found.hours))
    return Finding(WARN, "measured", f"{text}; in {LONG_H:.0f} h it makes steps={steps}")


def _step_seconds(
    cfg: RunConfig, task: Task, model: nn.Module, batch: BatchShape, bf16: bool, device: torch.device
) -> float:
    """The mean time of an optimizer step of one rank, after a first one."""
    split = task.shards.split(cfg.train_split)
    order = sample_order(cfg, split, TrainState())
    stream = train_batches(
        split, order, task.augment, cfg.loader, batch=batch, seed=cfg.seed, rank=0, start_step=0
    )
    optimizer = build_optimizer(model, cfg.optim)
    start = 0.0
    model.train()
    with contextlib.closing(iter(stream)) as batches:
        for step in range(WARMUP + STEPS):
            if step == WARMUP:
                start = _now(device)
            for index in range(batch.accumulation):
                micro = next(batches).to(device, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss, _ = task.loss(model, micro, step * batch.accumulation + index)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (_now(device) - start) / STEPS


@torch.no_grad()
def _evaluation_seconds(
    cfg: RunConfig, task: Task, model: nn.Module, bf16: bool, device: torch.device
) -> float:
    """The time of a whole evaluation on one device; of a mixture that of all sets."""
    split = task.shards.split(cfg.eval_split)
    if isinstance(split, Split):
        return _split_seconds(cfg, task, model, bf16, device, split, None)
    parts = zip(split.parts, split.tables, strict=True)
    return sum(_split_seconds(cfg, task, model, bf16, device, *part) for part in parts)


def _split_seconds(
    cfg: RunConfig,
    task: Task,
    model: nn.Module,
    bf16: bool,
    device: torch.device,
    split: Split,
    table: np.ndarray | None,
) -> float:
    pixels = split.heights.astype(np.int64) * split.widths
    median = int(np.argsort(pixels, kind="stable")[len(pixels) // 2])
    images = Samples(split, task.view, table=table).batch([(median, 0)]).to(device)
    model.eval()
    ops, taken = BACKENDS[cfg.model.ops], 0.0
    for _ in range(2):  # the first one warms up
        start = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(task.normalize(images.images, None))
        if task.view is None:
            ops.upsample_confusion(logits, images.targets, 255)
        taken = _now(device) - start
    share = pixels.sum() / pixels[median] if task.view is None else len(pixels)
    return float(taken * share)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
