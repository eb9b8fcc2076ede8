"""A run: its parts, and how they are made or continued; its directory is directory.py.

Everything that can be wrong is found here, before the first step: directory, shards, classes, batch
arithmetic, checkpoint. Rank zero looks first, so that a mistake is reported once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segformer.checkpoint.checkpointer import Checkpointer
from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.checkpoint.lease import Lease
from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.loading.loader import spent_budget, train_batches, worker_count
from segformer.data.loading.mixture import MixedSplit, Mixture
from segformer.data.loading.order import (
    PERIOD,
    BatchShape,
    MixedOrder,
    OrderSpec,
    SampleOrder,
    make_order_spec,
    shared_slots,
)
from segformer.data.loading.samples import Batch, over_budget
from segformer.data.loading.workers import WorkerStream, start_server
from segformer.data.shards.format import ShardSet, Split
from segformer.data.sources.dataset import RGB
from segformer.distributed.engine import EngineConfig, build_engine
from segformer.distributed.world import SumOverRanks, World, derive_seed
from segformer.errors import CheckpointError, DataError, reraise_as
from segformer.models.macs import training_flops
from segformer.models.ops.backend import BACKENDS
from segformer.models.ops.batch_norm import synchronize_batch_norm
from segformer.models.ops.dispatch import take_plain
from segformer.models.ops.native import keep_freed_memory
from segformer.models.ops.trial import failing_kernels
from segformer.telemetry.jsonl import Ledger
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.meter import LossSpike, Meter
from segformer.telemetry.profiling import Profiler
from segformer.training.config import RunConfig
from segformer.training.directory import check_schedule_start, free_name
from segformer.training.header import log_start
from segformer.training.optim import build_optimizer, freeze_stages
from segformer.training.step import ModelState
from segformer.training.stopping import Stopping
from segformer.training.task import Task, check_data, check_task, make_task, open_shards, training_crop


@dataclass(kw_only=True, slots=True)
class Services:
    """The parts of a run beside the step: data, checkpoints, logs."""

    stream: Callable[..., WorkerStream[Batch]]
    "start_step -> this rank's micro batches from that optimizer step on."
    batches: Generator[Batch, None, None]
    checkpoints: Checkpointer
    saved: TrainState
    "The state as it was last handed over to be saved, or loaded."
    lease: Lease | None
    "The right to write into the run's directory; rank zero."
    telemetry: Telemetry
    ledger: Ledger | None
    meter: Meter
    spike: LossSpike
    profiler: Profiler
    stopping: Stopping
    split: Split | MixedSplit
    "The split that is trained on."
    order: SampleOrder | MixedOrder
    "The order in which its samples come."
    replaced: dict[int, str] = field(default_factory=dict)
    "Corrupt samples that this rank has met and why, not yet reported to the others."
    skipped: list[dict[str, Any]] = field(default_factory=list)
    "The skipped steps in a row: step, samples."

    def close(self) -> None:
        """End workers, profiler and the save in flight, before the lease is given back."""
        with contextlib.ExitStack() as stack:  # the last one first; an error of one keeps none of the others
            stack.callback(self.checkpoints.wait)
            stack.callback(self.profiler.close)
            stack.callback(self.batches.close)


def config_summary(cfg: RunConfig) -> dict[str, Any]:
    """The settings that tell runs apart, flat, for the log and wandb."""
    plain = {key: getattr(cfg, key) for key in ("name", "steps", "global_batch", "seed")}
    chosen = {"data": cfg.data.name, "model": cfg.model.variant, "crop": training_crop(cfg)}
    return plain | chosen | {"lr": cfg.optim.lr, "zero_stage": cfg.engine.zero_stage}


def set_up(
    cfg: RunConfig, world: World, telemetry: Telemetry, stopping: Stopping, lease: Lease | None
) -> tuple[Task, ModelState, Services]:
    """Make every part of the run, or continue it from its newest good checkpoint; all ranks."""
    if worker_count(cfg.loader, world.local_size):
        start_server()
    batch = world.on_main(lambda: _check(cfg, world.size))
    shards = open_shards(cfg, verify=not world.is_main and world.local_rank == 0)  # once on every node
    task = make_task(cfg, shards, world)
    if BACKENDS[cfg.model.ops].fused:
        agree_on_kernels(world, failing_kernels(world.device), telemetry.line)
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    saved = newest_checkpoint(cfg, world, telemetry.line)
    state = TrainState(data_digest=shards.digest) if saved is None else saved.state
    world.on_main(lambda: _check_resumed(cfg, shards, state))
    _describe(state, shards, task)
    model = _make_model(cfg, world, task, saved, state, batch)
    split, run_dir = shards.split(cfg.train_split), Path(cfg.run_dir)
    order = sample_order(cfg, split, state)
    samples = (split, order, task.augment, cfg.loader)
    stream = partial(
        train_batches,
        *samples,
        batch=batch,
        seed=cfg.seed,
        rank=world.rank,
        local_world_size=world.local_size,
        warn=telemetry.of_rank,
    )
    checkpoints = Checkpointer(
        cfg.checkpoint,
        run_dir / "checkpoints",
        world.on_main,
        warn=telemetry.line,
        failed=lambda step, reason: telemetry.event("checkpoint_failed", step, reason=reason),
        fence=(lambda: None) if lease is None else lease.check,
        progress=stopping.watchdog.progress,
        round_s=min(5.0, cfg.engine.timeout_s / 4),
        last_saved=state.step or None,
        best_step=state.best_step,
    )
    network, crop = replace(cfg.model, in_channels=shards.channels), training_crop(cfg)
    flops = training_flops(network, crop, task.num_classes, task=task.name)
    log_start(cfg, world, telemetry, shards, order, model.engine.module, state)
    services = Services(
        stream=stream,
        batches=iter(stream(start_step=state.step)),
        checkpoints=checkpoints,
        saved=replace(state),
        lease=lease,
        telemetry=telemetry,
        ledger=Ledger(run_dir / "ledger", world.rank, state.step) if cfg.telemetry.ledger else None,
        meter=Meter(world, flops_per_image=float(flops)),
        spike=LossSpike(),
        profiler=Profiler(cfg.profile, run_dir, world, telemetry.line),
        stopping=stopping,
        split=split,
        order=order,
    )
    return task, model, services


def _describe(state: TrainState, shards: ShardSet | Mixture, task: Task) -> None:
    """What whoever opens the checkpoint must know of the images, so that it needs no shards."""
    state.long_side = shards.long_side
    if shards.pixels != RGB:
        state.pixels = {"dtype": shards.dtype, "mean": task.mean, "std": task.std}


def _make_model(
    cfg: RunConfig, world: World, task: Task, saved: Checkpoint | None, state: TrainState, batch: BatchShape
) -> ModelState:
    """The network, its optimizer and EMA, new or as they were saved; all ranks."""
    # A run that goes on has its weights, and doesn't need the file that it started from.
    model = task.build_model(cfg.model if saved is None else replace(cfg.model, pretrained=""))
    freeze_stages(model, cfg.optim.frozen_stages)
    prepare_model(model, cfg.engine, world)
    if saved is not None:
        model.load_state_dict(saved.model)
    engine = build_engine(model, build_optimizer(model, cfg.optim), cfg.engine, world, batch)
    trained = ModelState(engine, cfg, state)
    if saved is not None:
        trained.restore(saved)
    return trained


def prepare_model(model: nn.Module, cfg: EngineConfig, world: World) -> None:
    """Put the model on the rank's device, with synchronized batch norm where there are several ranks."""
    if cfg.sync_batchnorm and world.size > 1:
        synchronize_batch_norm(model, SumOverRanks.apply)
    model.to(world.device)
    if world.device.type == "cpu":
        keep_freed_memory()


def agree_on_kernels(world: World, found: dict[str, str], warn: Callable[[str], None]) -> None:
    """Leave out the kernels that fail on any rank's GPU, where `found` says why; all ranks."""
    reasons: dict[str, str] = {}
    for rank, failing in enumerate(world.gather(found)):
        reasons |= {name: f"rank {rank}: {why}" for name, why in failing.items() if name not in reasons}
    take_plain(reasons)
    if reasons:
        name = min(reasons)
        warn(
            f"without the Triton kernels of {', '.join(sorted(reasons))}, which fail here ({name} on "
            f"{reasons[name]}): all ranks take the plain forms, which are slower"
        )


def _check(cfg: RunConfig, world_size: int) -> BatchShape:
    """Find what is wrong with batch and data; rank zero, so that it is reported once."""
    batch = cfg.batch_shape(world_size)
    shards = open_shards(cfg)
    check_task(cfg, shards)
    check_data(cfg, shards)
    return batch


def _check_resumed(cfg: RunConfig, shards: ShardSet | Mixture, state: TrainState) -> None:
    """Refuse other data, and a run that ended because of too many corrupt samples; rank zero."""
    if state.data_digest != shards.digest:
        place = cfg.data.shards
        if isinstance(shards, Mixture):
            changed = set(shards.digest.split()) - set(state.data_digest.split())
            names = sorted(one.partition(":")[0] for one in changed) or [*shards.sets]
            place = ", ".join(f"mixture.sets.{name}.shards={cfg.mixture.sets[name].shards}" for name in names)
        raise CheckpointError(
            f"{place} is not the data that {cfg.run_dir} was trained on (its digest differs); "
            f"restore the old shards or give another {free_name(cfg)}"
        )
    if spent := spent_budget(cfg.loader, shards.split(cfg.train_split), state.corrupt):
        last = f"sample {state.corrupt[-1]} of {len(state.corrupt)} in the checkpoint"
        raise DataError(over_budget(*spent, last))


def sample_order(cfg: RunConfig, split: Split | MixedSplit, state: TrainState) -> SampleOrder | MixedOrder:
    """The order that the checkpoint was trained in, or a new one, which the state keeps from now on."""
    if isinstance(split, MixedSplit):
        return _mixed_order(cfg, split, state)
    if state.order_spec:
        return SampleOrder(OrderSpec.from_dict(state.order_spec))
    spec = make_order_spec(split.shard_sizes, seed=cfg.seed, global_batch=cfg.global_batch)
    state.order_spec = spec.to_dict()
    return SampleOrder(spec)


def _mixed_order(cfg: RunConfig, split: MixedSplit, state: TrainState) -> MixedOrder:
    """The order of a mixture; each set has seeds of its own."""
    done = state.step * cfg.global_batch
    if state.order_spec:
        what = f"{cfg.run_dir}: the sample order in the checkpoint is damaged"
        with reraise_as(CheckpointError, what, on=(DataError, KeyError, TypeError, AttributeError)):
            return MixedOrder.from_dict(state.order_spec["sets"], done)
    parts = dict(zip(split.names, split.parts, strict=True))
    slots = shared_slots(cfg.mixture.weights({name: part.num_samples for name, part in parts.items()}))
    orders = {}
    for name, part in parts.items():
        batch = -(-cfg.global_batch * slots[name] // PERIOD)  # its samples in a step, for the number of lanes
        seed = derive_seed(cfg.seed, "mixture", name)
        orders[name] = SampleOrder(make_order_spec(part.shard_sizes, seed=seed, global_batch=batch))
    order = MixedOrder(orders, list(slots.values()))
    state.order_spec = {"sets": order.to_dict(done)}
    return order


def newest_checkpoint(
    cfg: RunConfig, world: World, warn: Callable[[str], None], *, calm: bool = False
) -> Checkpoint | None:
    """The newest good checkpoint, the same on all ranks; rank zero judges which one that is. All ranks.

    calm: pass over those that were saved after a skipped step, whose weights may be what is wrong.
    """
    folder = Path(cfg.run_dir) / "checkpoints"

    def newest() -> int | None:
        found = load_checkpoint(folder, quarantine=True, warn=warn)
        while calm and found is not None and found.state.skipped_in_a_row:
            before = [step for step in list_steps(folder) if step < found.state.step]
            found = load_checkpoint(folder, step=before[-1]) if before else None
        check_schedule_start(cfg, None if found is None else found.state)
        return None if found is None else found.state.step

    step = world.on_main(newest)
    return None if step is None else load_checkpoint(folder, step=step, verify=False)
