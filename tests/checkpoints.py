"""Checkpoints as a run writes them: tensors, a checkpointer, and one checkpoint written at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from segformer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from segformer.checkpoint.format import Checkpoint, TrainState, step_name
from segformer.training.config import RunConfig, as_yaml, compose, frozen, save_config

Tensors = dict[str, Tensor]


def alone(function: Callable[[], Any]) -> Any:
    """`World.on_main` of a world of one."""
    return function()


def nobody(*what: object) -> None:
    """A callback that is not to be called."""
    pytest.fail(str(what))


def tensors(seed: int = 0) -> tuple[Tensors, Tensors, Tensors]:
    """Model, optimizer and EMA that differ from those of every other seed."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randn(5, 7, generator=generator) for _ in range(3))
    model = {"a.weight": first, "bn.num_batches_tracked": torch.tensor(3)}
    return model, {"exp_avg.a.weight": second}, {"a.weight": third}


def make_checkpointer(
    folder: Path, *, warn: Any = nobody, failed: Any = nobody, fence: Any = lambda: None, **settings: Any
) -> Checkpointer:
    """The checkpointer of a world of one."""
    return Checkpointer(CheckpointConfig(**settings), folder, alone, warn=warn, failed=failed, fence=fence)


def write_checkpoint(
    model: Tensors,
    optimizer: Tensors,
    state: TrainState,
    folder: Path,
    ema: Tensors | None = None,
    cfg: CheckpointConfig | None = None,
) -> Path:
    """Save one checkpoint into `folder` and return its place."""
    checkpointer = Checkpointer(cfg or CheckpointConfig(), folder, alone, warn=print, failed=lambda *_: None)
    checkpointer.save(Checkpoint(model, optimizer, ema or {}, state), last=True)
    return folder / step_name(state.step)


def make_run(
    folder: Path,
    weights: dict[int, Tensors],
    *overrides: str,
    ema: dict[int, Tensors] | None = None,
    old: bool = False,
    digest: str = "d",
) -> Path:
    """A run directory with a configuration, and a checkpoint of each step: its weights, and their EMA.

    old: of a version whose checkpoints did not hold the settings.
    """
    folder.mkdir()
    cfg = compose(RunConfig, "config", [*overrides, f"run_dir={folder}"])
    save_config(cfg, folder / "config.yaml")
    for step, model in weights.items():
        state = TrainState(step=step, data_digest=digest, settings="" if old else as_yaml(frozen(cfg)))
        write_checkpoint(model, {}, state, folder / "checkpoints", ema=(ema or {}).get(step))
    return folder
