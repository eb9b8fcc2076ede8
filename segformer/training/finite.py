"""Losses that are not finite: found by all ranks in one step, which is then skipped, and named for the user.

A loss that is not finite makes every gradient NaN (`poisoned`), so that whichever rank met it, the averaged
gradients show it to all ranks, and nobody takes the step (engine.take_step). It is counted; the data moves
on, the optimizer and the EMA don't (recovery.py). BatchNorm's buffers are restored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself where it is finite; where it isn't, one whose every gradient is NaN. No wait."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Statistics:
    """A copy of a model's buffers (batch norm's statistics), to undo what a bad batch does to them."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the statistics of the moment when this copy was made."""
        for buffer, copy in self._kept:
            buffer.copy_(copy)


def name_samples(found: list[dict[str, Any]], limit: int = 8) -> str:
    """The samples of skipped steps for a message: shard and key, the first few."""
    names = list(dict.fromkeys(name for step in found for name in step["samples"]))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
