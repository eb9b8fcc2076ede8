"""The directory of a run (docs/architecture.md draws it): who works in it, and the settings that it keeps.

A run keeps the settings in FROZEN (config.py) for its life, from its first checkpoint on, but for an
extension: docs/training.md has the table. What is left to be worked out (sizing.py) is decided here, by rank
zero, once: a run that goes on has its numbers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from segformer.checkpoint.atomic import clean
from segformer.checkpoint.format import TrainState, step_name
from segformer.checkpoint.lease import Lease
from segformer.checkpoint.reader import CONFIG, at_state, newest_state
from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet
from segformer.distributed.rendezvous import find_place
from segformer.distributed.world import World
from segformer.errors import CheckpointError, ConfigError, reraise_as
from segformer.training.config import (
    SCHEDULE,
    RunConfig,
    frozen_difference,
    is_frozen,
    load_config,
    save_config,
    to_run_config,
)
from segformer.training.sizing import kept, needs_sizing, sized
from segformer.training.task import check_settings, open_shards


class Start(NamedTuple):
    """A run whose directory is taken."""

    cfg: RunConfig
    "Its configuration in plain numbers."
    lines: list[str]
    "What was worked out, and why."
    lease: Lease | None
    "The right to write into the directory; rank zero."


@contextlib.contextmanager
def leased(cfg: RunConfig, world: World) -> Iterator[Start]:
    """The run directory, made or taken by rank zero, which alone holds the lease; all ranks."""
    with contextlib.ExitStack() as held:
        leases: list[Lease] = []
        cfg, lines = world.on_main(lambda: _take(cfg, world, held, leases))
        yield Start(cfg, lines, leases[0] if leases else None)


def _take(
    cfg: RunConfig, world: World, held: contextlib.ExitStack, leases: list[Lease]
) -> tuple[RunConfig, list[str]]:
    """Make the run directory, or take the one that exists and belongs to this configuration; rank zero."""
    check_start(cfg)
    run_dir, what = Path(cfg.run_dir), f"run_dir={cfg.run_dir} can't be used"
    with reraise_as(ConfigError, what, "choose another one"):
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        leases.append(Lease.take(run_dir))
        held.callback(leases[0].release)
        clean(run_dir / "checkpoints")
    cfg, lines = settled(cfg, device=world.device.type, world_size=world.size)
    with reraise_as(ConfigError, what, "choose another one"):
        keep_config(cfg, run_dir)
    return cfg, lines


def check_start(cfg: RunConfig) -> None:
    """ConfigError where a run could not begin whatever the data is."""
    if not cfg.data.shards and not cfg.mixture.sets:
        raise ConfigError("data.shards is empty; give data.shards=<folder or URL of shards>")
    for name in [name for name, one in cfg.mixture.sets.items() if not one.shards]:
        raise ConfigError(f"mixture.sets.{name}.shards is empty; give a folder or URL of shards")
    if cfg.data.shards and cfg.mixture.sets:
        raise ConfigError(
            f"data.shards={cfg.data.shards} and mixture.sets both say what to train on; leave one out "
            "(data=folder has none)"
        )
    if (Path(cfg.run_dir) / "sweep.json").exists():
        raise ConfigError(f"{cfg.run_dir} is the folder of a sweep, which holds runs; give {free_name(cfg)}")
    check_settings(cfg)


def check_run(cfg: RunConfig) -> None:
    """What --check does: `check_start`, and a line for each setting that would be worked out here."""
    check_start(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for line in settled(cfg, device=device, world_size=find_place().size)[1]:
        print(line)


def settled(
    cfg: RunConfig,
    *,
    device: str,
    world_size: int,
    opened: Callable[[RunConfig], ShardSet | Mixture] = open_shards,
) -> tuple[RunConfig, list[str]]:
    """The configuration in plain numbers: those that its run has already, else as `sized` works them out.

    opened: gives the shards, where they are needed.
    """
    cfg = as_begun(cfg)
    if cfg.mixture.sets and not cfg.data.classes:
        cfg = replace(cfg, data=replace(cfg.data, classes=opened(cfg).classes))
    if not needs_sizing(cfg):
        return cfg, []
    cfg, lines = sized(cfg, opened(cfg), device=device, world_size=world_size)
    head = f"worked out for this data and {world_size} x {device}; what is given with the command stays:"
    return cfg, [head, *lines]


def as_begun(cfg: RunConfig) -> RunConfig:
    """The configuration with the numbers that its run has already for what is left to be worked out."""
    run_dir = Path(cfg.run_dir)
    if cfg.auto and (saved := saved_config(cfg, run_dir)) is not None:
        cfg = kept(cfg, saved, [key for key in cfg.auto if is_frozen(key)])
        with contextlib.suppress(ConfigError, CheckpointError):  # of a damaged one they are worked out again
            cfg = kept(cfg, load_config(run_dir / CONFIG), cfg.auto)
    return cfg


def saved_config(cfg: RunConfig, run_dir: Path) -> RunConfig | None:
    """The settings that the checkpoints of a run were trained with; None before its first one, until which a
    run may still be corrected."""
    if not (any(run_dir.glob("checkpoints/step-*")) or any(run_dir.glob("checkpoints/bad-*"))):
        return None
    state = newest_state(run_dir / "checkpoints")
    if state is not None and state.settings:  # whatever has become of config.yaml
        return to_run_config(at_state({}, state), f"{run_dir}/checkpoints/{step_name(state.step)}")
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} has checkpoints but no config.yaml; give another {free_name(cfg)}")
    return load_config(run_dir / CONFIG)


def keep_config(cfg: RunConfig, run_dir: Path) -> None:
    """Compare the configuration with that of the run and write it down."""
    before = saved_config(cfg, run_dir)
    if before is not None and (changed := frozen_difference(before, cfg)):
        state = newest_state(run_dir / "checkpoints")
        _check_extension(cfg, run_dir, changed, 0 if state is None else state.step)
    save_config(cfg, run_dir / CONFIG)


def _check_extension(cfg: RunConfig, run_dir: Path, changed: list[str], step: int) -> None:
    """ConfigError unless all that the run has learned up to `step` is what both configurations say: only the
    length of a constant schedule changes, or a new schedule begins here."""
    keys, does = {line.partition(":")[0] for line in changed}, "give what it has"
    if step and keys <= set(SCHEDULE):
        if cfg.steps < step:
            does = f"it has come to step {step} already: give what it has, or more steps"
        elif cfg.optim.schedule_start == step or (keys == {"steps"} and cfg.optim.schedule == "constant"):
            return
        elif cfg.steps > step:
            does += f", add optim.schedule_start={step} for a new schedule from that step on"
    export = run_dir / "export"
    weights = export if (export / "model.safetensors").is_file() else run_dir
    raise ConfigError(
        f"{run_dir} belongs to a run of another configuration ({'; '.join(changed)}); {does}, or begin a new "
        f"run from its weights: {free_name(cfg)} model.pretrained={weights}"
    )


def check_schedule_start(cfg: RunConfig, state: TrainState | None) -> None:
    """CheckpointError where the checkpoint to go on from is older than the schedule, and had another."""
    step, start = 0 if state is None else state.step, cfg.optim.schedule_start
    if step >= start:
        return
    if state is None or not state.settings:
        raise CheckpointError(f"{cfg.run_dir} has not come to optim.schedule_start={start} yet; leave it out")
    before = to_run_config(at_state({}, state), f"{cfg.run_dir}/checkpoints/{step_name(step)}")
    old = [f"{key}={reduce(getattr, key.split('.'), before)}" for key in SCHEDULE]
    new = [f"{key}={reduce(getattr, key.split('.'), cfg)}" for key in SCHEDULE]
    own = " ".join(one for one in old if one not in new)
    raise CheckpointError(
        f"the newest good checkpoint of {cfg.run_dir} is of step {step}, before "
        f"optim.schedule_start={start}: first bring it there again, with {own}"
    )


def free_name(cfg: RunConfig) -> str:
    """The override by which the same settings become a run of another directory."""
    key = "name" if cfg.run_dir == f"runs/{cfg.name}" else "run_dir"
    base = Path(str(getattr(cfg, key)))
    places = (base.with_name(f"{base.name[:60]}_{number}") for number in itertools.count(2))  # a name has 64
    return f"{key}=" + str(next(p for p in places if not (Path("runs", p) if key == "name" else p).exists()))
