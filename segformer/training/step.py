"""The optimizer step, and the state that it changes.

A loss that is not finite makes every gradient NaN (`propagate_nan`), so that whichever rank met it, the
averaged gradients show it to all ranks, and nobody takes the step (engine.take_step). The weights, the
optimizer's state, the EMA and BatchNorm's buffers then stay as they were.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.data.loading.samples import Batch
from segformer.distributed.ema import EMA
from segformer.distributed.engine import Engine, take_step
from segformer.distributed.world import World, derive_seed
from segformer.distributed.zero_state import gather_model, gather_optimizer, restore_optimizer
from segformer.errors import ConfigError
from segformer.training.config import RunConfig, as_yaml, frozen
from segformer.training.optim import OPTIMIZERS, set_learning_rate
from segformer.training.task import Task, crop_key, training_crop

_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory")


class Outcome(NamedTuple):
    """The result of an optimizer step."""

    norm: float | None
    "Norm of the averaged gradients before clipping."
    taken: bool
    "The weights moved; the same on all ranks."
    finite: bool
    "All losses of this rank were finite; where the step was taken they were."


class ModelState:
    """All that a step changes and a checkpoint keeps: weights, optimizer, EMA and the TrainState."""

    def __init__(self, engine: Engine, cfg: RunConfig, state: TrainState) -> None:
        self.engine, self.state = engine, state
        self.ema = EMA(engine, cfg.optim.ema) if cfg.optim.ema else None
        self.buffers = list(engine.module.buffers())
        "BatchNorm's statistics."
        self._optimizer = OPTIMIZERS[cfg.optim.name]
        self._settings = as_yaml(frozen(cfg))

    def gather(self, world: World) -> Checkpoint:
        """The content of a checkpoint, with {} for tensors off rank zero; all ranks."""
        ema = {} if self.ema is None else self.ema.gather(world)
        optimizer = gather_optimizer(self.engine, self._optimizer.states, world)
        state = replace(self.state, settings=self._settings)
        return Checkpoint(gather_model(self.engine), optimizer, ema, state)

    def restore(self, saved: Checkpoint) -> None:
        """Take a checkpoint's optimizer, EMA and TrainState, the same on all ranks; no communication."""
        steps = saved.state.step - saved.state.skipped if self._optimizer.counts_steps else None
        restore_optimizer(self.engine, self._optimizer.states, saved.optimizer, steps)
        if self.ema is not None:
            self.ema.restore(saved.ema)
        self.state = saved.state


class LossSum:
    """Sums of the loss and its parts on the device, so that only a log line waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Start a new interval."""
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Count one micro batch."""
        for name, value in {"loss": loss, **parts}.items():
            value = value.detach().float()
            finite = value.isfinite()
            entry = torch.stack([torch.where(finite, value, 0.0), finite.float()])
            self._sums[name] = self._sums.get(name, torch.zeros(2, device=self._device)) + entry

    def means(self, world: World) -> dict[str, float | None]:
        """Mean of the finite values of the interval over all ranks, then a new interval; all ranks."""
        names = sorted(self._sums)
        total = world.sum(torch.stack([self._sums[name] for name in names])).tolist()
        self.clear()
        pairs = zip(names, total, strict=True)
        return {name: value / count if count else None for name, (value, count) in pairs}


def train_step(
    cfg: RunConfig, world: World, task: Task, model: ModelState, batches: list[Batch], losses: LossSum
) -> Outcome:
    """Take one optimizer step over the rank's micro batches; all ranks."""
    engine, step = model.engine, model.state.step
    set_learning_rate(engine.optimizer.param_groups, cfg.optim, step, cfg.steps)
    engine.train()
    buffers = [buffer.clone() for buffer in model.buffers]
    seen: list[Tensor] = []
    with enough_memory(world.rank, lambda: too_large(cfg, step, len(batches[0].images))):
        for index, batch in enumerate(batches):
            torch.manual_seed(derive_seed(cfg.seed, "step", step, index, world.rank))
            batch = batch.to(world.device, non_blocking=True)
            position = (step * len(batches) + index) * world.size + world.rank
            loss, parts = task.loss(engine, batch, position)
            engine.backward(propagate_nan(loss))
            norm, taken = take_step(engine, cfg.engine.grad_clip)  # after the last micro batch
            losses.add(loss, parts)
            seen.append(loss.detach())
    model.state.step += 1
    if not taken:
        for buffer, before in zip(model.buffers, buffers, strict=True):
            buffer.copy_(before)
        return Outcome(norm, False, bool(torch.stack(seen).isfinite().all()))
    if model.ema is not None:
        model.ema.update(step - model.state.skipped)
    return Outcome(norm, True, True)


def propagate_nan(loss: Tensor) -> Tensor:
    """The loss itself where it is finite; where it isn't, one whose every gradient is NaN. No wait."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@contextlib.contextmanager
def enough_memory(rank: int, describe: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that fails into a ConfigError; `describe` says where, and what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _MEMORY.search(str(error)):
            raise
        raise ConfigError(f"rank {rank} is out of memory {describe()}") from error


def too_large(cfg: RunConfig, step: int, micro_batch: int) -> str:
    """Where memory ran out in a step, and what to use instead; for `enough_memory`."""
    crop = "x".join(map(str, training_crop(cfg)))
    lower = [size for size in range(1, micro_batch) if micro_batch % size == 0]
    use = f"a smaller {crop_key(cfg)}, model.checkpointing=[1,2], or engine.zero_stage=3"
    if lower:
        use = f"micro_batch={lower[-1]} (gradients are accumulated, batch norm sees fewer images), {use}"
    return f"in step {step + 1} (micro_batch={micro_batch}, crop {crop}); use {use}"
