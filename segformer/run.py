"""A run: its directory, its parts, and how they are made or continued.

    runs/<name>/config.yaml      the configuration; later starts agree in the frozen part (config.FROZEN)
    runs/<name>/checkpoints/     checkpoint.py
    runs/<name>/metrics.jsonl    telemetry.py
    runs/<name>/log.txt

Everything that can be wrong is found here, before the first step: directory, shards, classes, batch
arithmetic, checkpoint. Rank zero looks first, so that a mistake is reported once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segformer.checkpoint import TrainState, clean, load_checkpoint
from segformer.config import RunConfig, frozen_difference, load_config, save_config
from segformer.data.loader import Batch, corrupt_budget, train_batches, worker_count
from segformer.data.order import OrderSpec, SampleOrder, make_order_spec
from segformer.data.prepare import over_budget
from segformer.data.shards import ShardSet, Split
from segformer.data.transforms import Normalize
from segformer.data.workers import start_server
from segformer.dist import StopFlag, World, derive_seed
from segformer.engine import build_engine, prepare_model, resolve_precision
from segformer.errors import CheckpointError, ConfigError, DataError, SegformerError
from segformer.losses import SegmentationLoss
from segformer.models.segformer import SegFormer, build_model
from segformer.optim import build_optimizer
from segformer.partition import restore_optimizer
from segformer.telemetry import Telemetry


@dataclass(kw_only=True, slots=True)
class Run:
    """What the loop works with."""

    cfg: RunConfig
    world: World
    shards: ShardSet
    engine: Any
    criterion: nn.Module
    normalize: nn.Module
    batches: Iterator[Batch]
    state: TrainState
    micro_batch: int
    telemetry: Telemetry
    stop: StopFlag
    corrupt_budget: int
    "Corrupt samples that the run may replace."
    failure: SegformerError | None = None
    "An error that this rank has met and that the ranks have not agreed on yet."
    replaced: dict[int, str] = field(default_factory=dict)
    "Corrupt samples that this rank has met and why, not yet told to the others."

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
        "crop": cfg.augment.crop,
        "lr": cfg.optim.lr,
        "zero_stage": cfg.engine.zero_stage,
        "seed": cfg.seed,
    }


def prepare_run_dir(cfg: RunConfig) -> None:
    """Make the run directory, or check that the one that exists belongs to this configuration; rank zero."""
    cfg.telemetry.check_account()
    run_dir = Path(cfg.run_dir)
    saved = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        trained = any(run_dir.glob("checkpoints/step-*")) or any(run_dir.glob("checkpoints/bad-*"))
        if trained and saved.exists():  # before its first checkpoint a run may still be corrected
            changed = frozen_difference(load_config(saved), cfg)
            if changed:
                raise ConfigError(
                    f"{run_dir} belongs to a run of another configuration ({'; '.join(changed)}); "
                    "choose another name=..., or delete the directory"
                )
        elif trained:
            raise ConfigError(f"{run_dir} has checkpoints but no config.yaml; choose another name=...")
        save_config(cfg, saved)
        clean(run_dir / "checkpoints")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} can't be used: {error.strerror}; choose another one") from error


def open_shards(cfg: RunConfig, *, verify: bool = True) -> ShardSet:
    """The shards of the run, checked against its configuration; `verify` as in ShardSet.open."""
    shards = ShardSet.open(cfg.data.shards, cfg.loader.storage, verify=verify)
    if shards.task != "segmentation":
        raise ConfigError(
            f"{cfg.data.shards} is a set for {shards.task}; launch/train.py trains segmentation"
        )
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
    cfg.micro_batch_for(world_size)
    open_shards(cfg)


def _check_corrupt(state: TrainState, budget: int) -> None:
    """A run that ended because of too many corrupt samples does not go on with them; rank zero."""
    if len(state.corrupt) > budget:
        last = f"sample {state.corrupt[-1]} of {len(state.corrupt)} in the checkpoint"
        raise DataError(over_budget(len(state.corrupt), budget, last))


def set_up(cfg: RunConfig, world: World, telemetry: Telemetry, stop: StopFlag) -> Run:
    if worker_count(cfg.loader, world.local_size):
        start_server()
    world.on_main(lambda: _check(cfg, world.size))
    micro_batch = cfg.micro_batch_for(world.size)
    shards = open_shards(cfg, verify=not world.is_main and world.local_rank == 0)  # once on every node
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    resumed = _load(cfg, world, telemetry)
    # A run that goes on has its weights, and doesn't need the file that it started from.
    network = cfg.model if resumed is None else replace(cfg.model, pretrained="")
    model = build_model(network, len(shards.classes))
    prepare_model(model, cfg.engine, world)
    state = TrainState(data_digest=shards.digest)
    if resumed is not None:
        weights, moments, state = resumed
        if state.data_digest != shards.digest:
            raise CheckpointError(
                f"{cfg.data.shards} is not the data that {cfg.run_dir} was trained on (its digest differs); "
                "restore the old shards or choose another name=..."
            )
        model.load_state_dict(weights)
    split = shards.split(cfg.train_split)
    budget = corrupt_budget(cfg.loader, split)
    world.on_main(lambda: _check_corrupt(state, budget))
    spec = make_order_spec(split.shard_sizes, seed=cfg.seed, global_batch=cfg.global_batch)
    order = SampleOrder(OrderSpec.from_dict(state.order_spec) if state.order_spec else spec)
    state.order_spec = order.spec.to_dict()
    engine = build_engine(
        model,
        build_optimizer(model, cfg.optim),
        cfg.engine,
        world,
        global_batch=cfg.global_batch,
        micro_batch=micro_batch,
    )
    if resumed is not None:
        restore_optimizer(engine, moments, state.step)
    _announce(cfg, world, telemetry, shards, model, state)
    return Run(
        cfg=cfg,
        world=world,
        shards=shards,
        engine=engine,
        criterion=SegmentationLoss(cfg.loss, len(shards.classes)).to(world.device),
        normalize=Normalize(cfg.augment).to(world.device),
        batches=_batches(cfg, world, split, order, state.step),
        state=state,
        corrupt_budget=budget,
        micro_batch=micro_batch,
        telemetry=telemetry,
        stop=stop,
    )


def _batches(
    cfg: RunConfig, world: World, split: Split, order: SampleOrder, start_step: int
) -> Iterator[Batch]:
    """This rank's micro batches from an optimiser step on."""
    return iter(
        train_batches(
            split,
            order,
            cfg.augment,
            cfg.loader,
            seed=cfg.seed,
            rank=world.rank,
            world_size=world.size,
            local_world_size=world.local_size,
            global_batch=cfg.global_batch,
            micro_batch=cfg.micro_batch_for(world.size),
            start_step=start_step,
        )
    )


def _load(
    cfg: RunConfig, world: World, telemetry: Telemetry
) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainState] | None:
    """The newest good checkpoint, the same on all ranks; rank zero judges which one that is."""
    folder = Path(cfg.run_dir) / "checkpoints"

    def newest() -> int | None:
        found = load_checkpoint(folder, quarantine=True, warn=telemetry.line)
        return None if found is None else found[2].step

    step = world.on_main(newest)
    return None if step is None else load_checkpoint(folder, step=step)


def _announce(
    cfg: RunConfig, world: World, telemetry: Telemetry, shards: ShardSet, model: SegFormer, state: TrainState
) -> None:
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    precision = resolve_precision(cfg.engine, world.device)
    micro_batch = cfg.micro_batch_for(world.size)
    accumulation = cfg.global_batch // (micro_batch * world.size)
    train_split, eval_split = shards.split(cfg.train_split), shards.split(cfg.eval_split)
    telemetry.line(
        f"run {cfg.name}: MiT-{cfg.model.variant.upper()}, {parameters / 1e6:.2f} M parameters, {precision}, "
        f"ZeRO-{cfg.engine.zero_stage}, {world.size} x {world.device.type}"
    )
    telemetry.line(
        f"data {cfg.data.shards}: {train_split.num_samples} training and {eval_split.num_samples} validation "
        f"images, {len(shards.classes)} classes"
    )
    telemetry.line(
        f"batch {cfg.global_batch} = {micro_batch} a forward x {accumulation} accumulated x "
        f"{world.size} ranks, crop {'x'.join(map(str, cfg.augment.crop))}, {cfg.steps} steps"
    )
    if state.step:
        telemetry.line(f"continuing from step {state.step}")
    elif model.pretrained:
        telemetry.line(f"weights of {model.pretrained}")
