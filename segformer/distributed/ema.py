"""EMA of the weights, kept in the parts that each rank's optimizer holds.

    ema <- ema + (1 - d_t) (weights - ema)      after every step that was taken
    d_t = min(decay, (1 + t) / (10 + t))        t steps were taken before

Each rank averages what it updates: at ZeRO-1 to 3 that is 1/R of the fp32 weights, with no communication. For
an evaluation the whole EMA is swapped in for the weights, which are swapped back afterwards. Buffers (batch
norm's statistics) are averages already and stay the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from segformer.distributed.engine import Engine
from segformer.distributed.world import World
from segformer.distributed.zero_state import flat_tensors, keep_own, set_parameters, whole_values


class EMA:
    """EMA of an engine's weights; every rank has its part."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._held = {flat: flat.detach().clone() for flat in flat_tensors(engine)}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after a step; `steps` steps were taken before it."""
        weight = 1 - min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(list(self._held.values()), list(self._held), weight)

    def gather(self, world: World) -> dict[str, Tensor]:
        """The EMA by parameter, fp32 and whole, on the CPU of rank zero; elsewhere {}. All ranks."""
        values = whole_values(self._engine, self._held, world)
        return {name: value.to("cpu", copy=True) for name, value in values if world.is_main}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `gather` gave on rank zero; the same on all ranks, no communication."""
        keep_own(self._engine, state, self._held)

    @contextlib.contextmanager
    def swapped_in(self, world: World) -> Iterator[None]:
        """Let the model compute with the EMA inside; all ranks.

        An error inside ends the run, and the EMA stays in its place: what swaps the weights back is a
        collective, which the rank that failed would enter alone.
        """
        engine = self._engine
        own = {flat: flat.detach().clone() for flat in self._held}  # at stage 0 they are the parameters
        set_parameters(engine, whole_values(engine, self._held, world))
        yield
        set_parameters(engine, whole_values(engine, own, world))
