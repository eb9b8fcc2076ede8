"""Batch norm whose statistics may be those of all ranks, alone or with the ReLU and the linear map behind it.

    BatchNorm          nn.BatchNorm2d, on any device and however unequal the batches of the ranks are
    norm_relu_linear   batch norm in training, ReLU, dropped channels, 1x1 convolution: in blocks of pixels,
                       recomputed in the backward pass, so that its input is all that is kept

Of a head of 768 channels at 128 x 128, 50 MB an image in fp32, autograd would keep two tensors and hold three
more in its backward pass; here it is one and one.

Shapes: B batch, D channels, H W map, n = B * H * W, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.models.ops.dispatch import first_derivative, fused
from segformer.models.ops.linear import linear
from segformer.models.ops.resize import band_rows

Reduce = Callable[[Tensor], Tensor] | None


def _global_moments(values: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (D,) and count (1,) of values (n, D), over all ranks where `reduce` sums so."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    count = values.new_full((1,), len(values))
    sums = torch.cat([values.sum(dim=0), count])
    if reduce is not None:
        sums = reduce(sums)
        count = sums[-1:].detach()
    mean = sums[:-1] / count
    squares = (values - mean).square().sum(dim=0)
    return mean, (squares if reduce is None else reduce(squares)) / count, count


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, with the same parameters, buffers and function."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    reduce: Reduce = None
    "Sum of a vector over all ranks, with gradient; None for the statistics of this rank alone."

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """The function in eval mode: scale and shift (D,)."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards mean and biased variance (D,) of count (1,) pixels."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    def normalize(self, maps: Tensor) -> Tensor:
        """Normalize maps (B, H, W, D) by their own statistics, in float32 at least, and track these."""
        mean, variance, count = _global_moments(maps.flatten(0, 2), self.reduce)
        self.track(mean, variance, count)
        return (maps - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Normalize maps (B, D, H, W)."""
        if not self.training or self.reduce is None:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            out = self.normalize(input.permute(0, 2, 3, 1))
        return out.to(input.dtype).permute(0, 3, 1, 2)


def synchronize_batch_norm(model: nn.Module, reduce: Callable[[Tensor], Tensor]) -> None:
    """Give every batch norm below `model` the statistics of all ranks' batches, however unequal they are.

    reduce: the sum of a vector over all ranks, with gradient. torch.nn.SyncBatchNorm refuses CPU tensors in
    training, and the tests of this system run on gloo ranks.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.reduce = reduce
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise TypeError(
                f"{type(module).__name__} can't be synchronized; use {BatchNorm.__module__}.BatchNorm"
            )


def _pixels(values: Tensor) -> int:
    """Pixels of values (..., D) that a block holds."""
    return band_rows(values.device, values.shape[-1] * 4)


def _moments(maps: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """`_global_moments` of maps (B, N, D) in blocks, without gradient.

    Two passes: the one-pass form E[x^2] - E[x]^2 loses digits in fp32.
    """
    values = maps.flatten(0, 1)
    dtype = torch.promote_types(values.dtype, torch.float32)
    sums = values.sum(dim=0, dtype=dtype)
    sums = torch.cat([sums, sums.new_full((1,), len(values))])
    if reduce is not None:
        sums = reduce(sums)
    count, mean = sums[-1:], sums[:-1] / sums[-1:]
    squares = torch.zeros_like(mean)
    for block in values.split(_pixels(values)):
        squares += (block - mean).square_().sum(dim=0)
    return mean, (squares if reduce is None else reduce(squares)) / count, count


class _NormReluLinear(torch.autograd.Function):
    """Batch norm, ReLU and linear map of maps (B, N, D) -> (B, N, K), mean, variance (D,), count (1,)."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        reduce: Reduce,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _moments(maps, reduce)
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(maps, gamma, beta, weight, mean, inverse, count)
        ctx.reduce, ctx.bias_dtype = reduce, bias.dtype
        scale = gamma * inverse
        shift = beta - mean * scale
        out = maps.new_empty(*maps.shape[:2], len(bias))
        weights, offset = weight.to(maps.dtype).expand(len(maps), -1, -1), bias.to(maps.dtype)
        step = _pixels(maps)
        for image, logits, matrix in zip(maps, out, weights, strict=True):
            for block, part in zip(image.split(step), logits.split(step), strict=True):
                part.copy_(linear(_activate(block, scale, shift), matrix, offset))
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        maps, gamma, beta, weight, mean, inverse, count = ctx.saved_tensors
        scale = gamma * inverse
        shift = beta - mean * scale
        inner, step = torch.empty_like(maps), _pixels(maps)
        kernel = torch.zeros_like(weight, dtype=mean.dtype)
        weights, kernels = weight.to(maps.dtype).expand(len(maps), -1, -1), kernel.expand(len(maps), -1, -1)
        sums = mean.new_zeros(2, len(mean))  # of dz and of dz * (x - mean), z = x * scale + shift
        for index, image in enumerate(maps):
            blocks = zip(image.split(step), grad[index].split(step), inner[index].split(step), strict=True)
            for block, outer, result in blocks:
                hidden = _activate(block, scale, shift)
                kernels[index] += outer.t() @ hidden
                torch.mul(linear(outer, weights[index].t()), hidden > 0, out=result)
                sums[0] += result.sum(dim=0, dtype=mean.dtype)
                sums[1] += (result * (block - mean)).sum(dim=0)
        own_beta, own_gamma = sums[0], sums[1] * inverse
        means = (sums if ctx.reduce is None else ctx.reduce(sums)) / count
        # dx = scale * (dz - mean(dz) - (x - mean) * mean(dz * (x - mean)) / variance), means over all ranks
        slope = -scale * means[1] * inverse.square()
        offset = -scale * means[0] - mean * slope
        for result, block in zip(
            inner.flatten(0, 1).split(step), maps.flatten(0, 1).split(step), strict=True
        ):
            result.mul_(scale).add_(torch.addcmul(offset, block, slope))
        grad_bias = grad.sum(dim=(0, 1), dtype=mean.dtype)
        return (
            *(inner, own_gamma.to(gamma.dtype), own_beta.to(beta.dtype), None, None),
            *(kernel.to(weight.dtype), grad_bias.to(ctx.bias_dtype)),
        )


def _activate(block: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(block * scale + shift) in the type of the block."""
    return torch.addcmul(shift, block, scale).relu_().to(block.dtype)


def _eager(maps: Tensor, norm: BatchNorm, keep: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm of maps (B, H, W, D) by their own statistics, ReLU, dropped channels, linear map.

    keep (B, D): factors of the channels of each image, or None; weight (K, D), bias (K,). Returns
    (B, H, W, K) in the type of the maps. Statistics in float32 at least.

    A dropped channel of an image is a zero column in the weight that this image sees, so `keep` multiplies
    B x K x D weights and not B x H x W x D activations.
    """
    batch, height, width, dim = maps.shape
    terms = (norm.weight, norm.bias, norm.eps, norm.reduce)
    seen = weight[None] if keep is None else weight * keep[:, None]
    with torch.autocast(maps.device.type, enabled=False):
        out, *moments = _NormReluLinear.apply(maps.reshape(batch, -1, dim).contiguous(), *terms, seen, bias)
    norm.track(*moments)
    return out.unflatten(1, (height, width))


def norm_relu_linear_reference(
    maps: Tensor, norm: BatchNorm, keep: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """The same in library calls."""
    with torch.autocast(maps.device.type, enabled=False):
        hidden = norm.normalize(maps).relu()
        if keep is not None:
            hidden = hidden * keep[:, None, None]
        return F.linear(hidden.to(maps.dtype), weight.to(maps.dtype), bias.to(maps.dtype))


norm_relu_linear = fused(eager=_eager, traced=norm_relu_linear_reference)
