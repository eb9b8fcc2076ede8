"""Layers: Linear through the operations of a backend, stochastic depth, and layers that are not called."""

from typing import Any

import torch
from torch import Tensor, nn

from segformer.models.ops.backend import Backend
from segformer.models.ops.linear import Affine


class Linear(nn.Linear):
    """nn.Linear, with the same parameters and function, through `ops.linear`."""

    def __init__(self, in_dim: int, dim: int, ops: Backend) -> None:
        super().__init__(in_dim, dim)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        """Values (..., in_dim) -> (..., dim)."""
        return self.ops.linear(input, self.weight, self.bias)


class DropPath(nn.Module):
    """Stochastic depth: residual + branch, the branch dropped per sample at `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Both (B, ...). The kept branches are scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return residual + branch
        keep = 1 - self.rate
        scale = residual.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep).div_(keep)
        return torch.addcmul(residual, branch, scale)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def affine(layer: nn.Linear | nn.Conv2d) -> Affine:
    """Weight and bias of a layer that the network computes with and doesn't call.

    TypeError where something that computes otherwise has taken its place (LoRA, quantization): it would have
    no effect.
    """
    kind: Any = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    if not isinstance(layer, kind) or type(layer).forward not in (kind.forward, Linear.forward):
        raise TypeError(
            f"{type(layer).__name__} in the place of a layer whose weight and bias are read, so that its own "
            "forward would not be called; wrap blocks, change weights in place, or use parametrizations"
        )
    assert layer.bias is not None
    return layer.weight, layer.bias
