"""A run: its directory, its parts, and how they are made or continued.

    runs/<name>/config.yaml      the configuration; later starts agree in the frozen part (config.FROZEN)
    runs/<name>/checkpoints/     checkpoint.py
    runs/<name>/metrics.jsonl    telemetry.py, and log.txt beside it
    runs/<name>/stacks/          where every rank was when one of them hung (watchdog.py)
    runs/<name>/profile/         profiling.py

Everything that can be wrong is found here, before the first step: directory, shards, classes, batch
arithmetic, checkpoint. Rank zero looks first, so that a mistake is reported once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segformer.checkpoint.checkpointer import Checkpointer
from segformer.checkpoint.format import Loaded, TrainState
from segformer.checkpoint.lease import Lease
from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.loading.loader import corrupt_budget, start_server, train_batches, worker_count
from segformer.data.loading.order import BatchShape, OrderSpec, SampleOrder, make_order_spec
from segformer.data.loading.samples import Batch, over_budget
from segformer.data.shards.format import ShardSet, Split
from segformer.distributed.ema import Average
from segformer.distributed.engine import EngineConfig, build_engine
from segformer.distributed.watchdog import Watchdog
from segformer.distributed.world import StopFlag, SumOverRanks, World, derive_seed
from segformer.distributed.zero_state import restore_optimizer, write_model
from segformer.errors import CheckpointError, ConfigError, DataError, SegformerError
from segformer.models.macs import training_flops
from segformer.models.ops.batch_norm import synchronize_batch_norm
from segformer.telemetry.jsonl import Ledger
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.meter import LossSpike, Meter
from segformer.telemetry.profiling import Profiler
from segformer.training.config import RunConfig
from segformer.training.log_header import announce
from segformer.training.optim import build_optimizer, freeze_stages
from segformer.training.task import Task, check_task, make_task, training_crop


@dataclass(kw_only=True, slots=True)
class Run:
    """What the loop works with."""

    cfg: RunConfig
    world: World
    shards: ShardSet
    task: Task
    engine: Any
    average: Average | None
    order: SampleOrder
    batches: Generator[Batch, None, None]
    state: TrainState
    checkpoints: Checkpointer
    batch: BatchShape
    telemetry: Telemetry
    ledger: Ledger | None
    meter: Meter
    spike: LossSpike
    profiler: Profiler
    stop: StopFlag
    watchdog: Watchdog
    corrupt_budget: int
    "Corrupt samples that the run may replace."
    lease: Lease | None = None
    "The right to write into the run's directory; rank zero."
    failure: SegformerError | None = None
    "An error that this rank has met and that the ranks have not agreed on yet."
    replaced: dict[int, str] = field(default_factory=dict)
    "Corrupt samples that this rank has met and why, not yet told to the others."
    skipped: list[dict[str, Any]] = field(default_factory=list)
    "The skipped steps in a row: step, ranks, samples."
    agreeing: float = 0.0
    "Seconds that this rank waited for others before the last step."

    def fail(self, error: SegformerError) -> None:
        """Keep an error until the ranks agree to stop: raised, it would leave the others in a collective."""
        self.failure = error

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints are."""
        return Path(self.cfg.run_dir) / "checkpoints"


def config_summary(cfg: RunConfig) -> dict[str, Any]:
    """The settings that tell runs apart, flat, for the log and wandb."""
    return {
        "name": cfg.name,
        "data": cfg.data.name,
        "model": cfg.model.variant,
        "steps": cfg.steps,
        "global_batch": cfg.global_batch,
        "crop": training_crop(cfg),
        "lr": cfg.optim.lr,
        "zero_stage": cfg.engine.zero_stage,
        "seed": cfg.seed,
    }


def open_shards(cfg: RunConfig, *, verify: bool = True) -> ShardSet:
    """The shards of the run, checked against its configuration; `verify` as in ShardSet.open."""
    shards = ShardSet.open(cfg.data.shards, cfg.loader.storage, verify=verify)
    if cfg.data.classes and list(cfg.data.classes) != list(shards.classes):
        raise ConfigError(
            f"data.classes has {len(cfg.data.classes)} classes, but {cfg.data.shards} was sharded with "
            f"{len(shards.classes)} ({', '.join(shards.classes[:4])} ...); shard it again or change data"
        )
    if cfg.model.num_classes not in (None, len(shards.classes)):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}, but {cfg.data.shards} has {len(shards.classes)} "
            "classes; leave model.num_classes null"
        )
    for split in (cfg.train_split, cfg.eval_split):
        shards.split(split)
    return shards


def _check(cfg: RunConfig, world_size: int) -> None:
    """What can be wrong with batch and data; rank zero, so that it is said once."""
    cfg.batch_shape(world_size)
    check_task(cfg, open_shards(cfg))


def _check_data(cfg: RunConfig, shards: ShardSet, state: TrainState) -> None:
    if state.data_digest != shards.digest:
        raise CheckpointError(
            f"{cfg.data.shards} is not the data that {cfg.run_dir} was trained on (its digest differs); "
            "restore the old shards or choose another name=..."
        )


def _check_corrupt(state: TrainState, budget: int) -> None:
    """A run that ended because of too many corrupt samples does not go on with them; rank zero."""
    if len(state.corrupt) > budget:
        last = f"sample {state.corrupt[-1]} of {len(state.corrupt)} in the checkpoint"
        raise DataError(over_budget(len(state.corrupt), budget, last))


def set_up(
    cfg: RunConfig,
    world: World,
    telemetry: Telemetry,
    stop: StopFlag,
    watchdog: Watchdog,
    lease: Lease | None = None,
) -> Run:
    """Make every part of the run, or continue it from its newest good checkpoint; all ranks."""
    if worker_count(cfg.loader, world.local_size):
        start_server()
    world.on_main(lambda: _check(cfg, world.size))
    batch = cfg.batch_shape(world.size)
    shards = open_shards(cfg, verify=not world.is_main and world.local_rank == 0)  # once on every node
    task = make_task(cfg, shards, world)
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    resumed = newest_checkpoint(cfg, world, telemetry)
    # A run that goes on has its weights, and doesn't need the file that it started from.
    network = cfg.model if resumed is None else replace(cfg.model, pretrained="")
    model = task.build_model(network)
    freeze_stages(model, cfg.optim.frozen_stages)
    prepare_model(model, cfg.engine, world)
    state = TrainState(data_digest=shards.digest)
    if resumed is not None:
        state = resumed.state
        _check_data(cfg, shards, state)
        model.load_state_dict(resumed.model)
    split = shards.split(cfg.train_split)
    budget = corrupt_budget(cfg.loader, split)
    world.on_main(lambda: _check_corrupt(state, budget))
    order = _sample_order(cfg, split, state)
    engine = build_engine(model, build_optimizer(model, cfg.optim), cfg.engine, world, batch)
    average = Average(engine, cfg.optim.ema) if cfg.optim.ema else None
    if resumed is not None:
        _restore_optimizer(engine, average, resumed)
    announce(cfg, world, telemetry, shards, model, state)
    return Run(
        cfg=cfg,
        world=world,
        shards=shards,
        task=task,
        engine=engine,
        average=average,
        order=order,
        batches=make_batches(cfg, world, task, split, order, state.step),
        state=state,
        checkpoints=_checkpointer(cfg, world, telemetry, state, watchdog, lease),
        lease=lease,
        corrupt_budget=budget,
        batch=batch,
        telemetry=telemetry,
        ledger=_ledger(cfg, world, state.step),
        meter=Meter(world, flops_per_image=_flops(cfg, task)),
        spike=LossSpike(),
        profiler=Profiler(cfg.profile, Path(cfg.run_dir), world, telemetry.line),
        stop=stop,
        watchdog=watchdog,
    )


def prepare_model(model: nn.Module, cfg: EngineConfig, world: World) -> None:
    """Put the model on the rank's device, with synchronized batch norm where there are several ranks."""
    if cfg.sync_batchnorm and world.size > 1:
        synchronize_batch_norm(model, SumOverRanks.apply)
    model.to(world.device)


def _ledger(cfg: RunConfig, world: World, step: int) -> Ledger | None:
    return Ledger(Path(cfg.run_dir) / "ledger", world.rank, step) if cfg.telemetry.ledger else None


def _sample_order(cfg: RunConfig, split: Split, state: TrainState) -> SampleOrder:
    """The order that the checkpoint was trained in, or a new one, which the state keeps from now on."""
    if state.order_spec:
        return SampleOrder(OrderSpec.from_dict(state.order_spec))
    spec = make_order_spec(split.shard_sizes, seed=cfg.seed, global_batch=cfg.global_batch)
    state.order_spec = spec.to_dict()
    return SampleOrder(spec)


def _flops(cfg: RunConfig, task: Task) -> float:
    height, width = training_crop(cfg)
    return float(training_flops(cfg.model, (height, width), task.num_classes, task=task.name))


def _checkpointer(
    cfg: RunConfig,
    world: World,
    telemetry: Telemetry,
    state: TrainState,
    watchdog: Watchdog,
    lease: Lease | None,
) -> Checkpointer:
    def failed(step: int, reason: str) -> None:
        telemetry.event("checkpoint_failed", step, reason=reason)

    folder = Path(cfg.run_dir) / "checkpoints"
    checkpoints = Checkpointer(
        cfg.checkpoint,
        folder,
        world,
        warn=telemetry.line,
        failed=failed,
        fence=(lambda: None) if lease is None else lease.check,
        progress=watchdog.progress,
        round_s=min(5.0, cfg.engine.timeout_s / 4),
    )
    checkpoints.last_saved = state.step or None
    return checkpoints


def _restore_optimizer(engine: Any, average: Average | None, resumed: Loaded) -> None:
    restore_optimizer(engine, resumed.optimizer, resumed.state.step - resumed.state.skipped)
    if average is not None:
        average.restore(resumed.ema)


def go_back(run: Run) -> bool:
    """Continue from the newest good checkpoint that is not of the middle of a row of skipped steps.

    In the same process, all ranks; False where there is none.
    """
    resumed = newest_checkpoint(run.cfg, run.world, run.telemetry, calm=True)
    if resumed is None:
        return False
    write_model(run.engine, resumed.model)
    _restore_optimizer(run.engine, run.average, resumed)
    run.state = resumed.state
    run.checkpoints.last_saved = run.state.step
    split = run.shards.split(run.cfg.train_split)
    run.batches.close()
    run.batches = make_batches(run.cfg, run.world, run.task, split, run.order, run.state.step)
    return True


def make_batches(
    cfg: RunConfig, world: World, task: Task, split: Split, order: SampleOrder, start_step: int
) -> Generator[Batch, None, None]:
    """This rank's micro batches from an optimiser step on."""
    return iter(
        train_batches(
            split,
            order,
            task.augment,
            cfg.loader,
            batch=cfg.batch_shape(world.size),
            seed=cfg.seed,
            rank=world.rank,
            local_world_size=world.local_size,
            start_step=start_step,
        )
    )


def newest_checkpoint(
    cfg: RunConfig, world: World, telemetry: Telemetry, *, calm: bool = False
) -> Loaded | None:
    """The newest good checkpoint, the same on all ranks; rank zero judges which one that is. All ranks.

    calm: pass over those that were saved after a skipped step, whose weights may be what is wrong.
    """
    folder = Path(cfg.run_dir) / "checkpoints"

    def newest() -> int | None:
        found = load_checkpoint(folder, quarantine=True, warn=telemetry.line)
        while calm and found is not None and found.state.skipped_in_a_row:
            before = [step for step in list_steps(folder) if step < found.state.step]
            found = load_checkpoint(folder, step=before[-1]) if before else None
        return None if found is None else found.state.step

    step = world.on_main(newest)
    return None if step is None else load_checkpoint(folder, step=step, verify=False)
