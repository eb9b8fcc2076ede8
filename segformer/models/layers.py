"""Layers whose operation is chosen: Linear, and the batch norm of the decode head.

Linear is nn.Linear through `ops.linear`. `affine` is what an operation takes of a layer that isn't called.

BatchNorm is nn.BatchNorm2d whose statistics may be those of all ranks, on any device and however unequal
their batches, and which gives what a fused operation needs: its terms in training, a scale and a shift in
eval mode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segformer.models.ops.reference import global_moments
from segformer.models.ops.suite import Ops


class Linear(nn.Linear):
    """nn.Linear, with the same parameters and function, through `ops.linear`."""

    def __init__(self, in_dim: int, dim: int, ops: Ops) -> None:
        super().__init__(in_dim, dim)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        """Values (..., in_dim) -> (..., dim)."""
        return self.ops.linear(input, self.weight, self.bias)


def affine(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that the network computes with and doesn't call.

    TypeError where something that computes otherwise has taken its place (LoRA, quantisation): it would have
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


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, with the same parameters, buffers and function."""

    reduce: Callable[[Tensor], Tensor] | None = None
    "Sum of a vector over all ranks, with gradient; None for the statistics of this rank alone."

    def terms(self) -> tuple[Tensor, Tensor, float, Callable[[Tensor], Tensor] | None]:
        """What an operation needs that normalises by the statistics of its input."""
        return self.weight, self.bias, self.eps, self.reduce

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The function in eval mode: scale and shift (D,)."""
        mean, variance = self._running()
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards mean and biased variance (D,) of count (1,) pixels."""
        running_mean, running_var = self._running()
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        running_mean.lerp_(mean.to(running_mean.dtype), self.momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var.dtype), self.momentum)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise maps (B, D, H, W)."""
        if not self.training or self.reduce is None:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            maps = input.permute(0, 2, 3, 1)
            mean, variance, count = global_moments(maps.flatten(0, 2), self.reduce)
            self.track(mean, variance, count)
            out = (maps - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return out.to(input.dtype).permute(0, 3, 1, 2)

    def _running(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var


def synchronize_batch_norm(model: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
    """Give every batch norm below `model` the statistics of all ranks' batches, however unequal they are.

    reduce: the sum of a vector over all ranks, with gradient. torch.nn.SyncBatchNorm refuses CPU tensors in
    training, and the tests of this system run on gloo ranks.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.reduce = reduce
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"{type(module).__name__} can't be synchronized; use models.layers.BatchNorm")
