"""Operations of the decode head between the encoder's maps and the logits.

    fold_projections   F_i W_i, the linear map that per-stage Linear and fuse convolution are together
    norm_relu_linear   batch norm, ReLU, dropped channels, 1x1 convolution: in blocks of pixels, which it
                       forms again in the backward pass, so that its input is all that is kept
    decode_rows        without gradients: projections, enlargement, sum, ReLU and prediction band by band, so
                       that only the logits are ever whole

Of a head of 768 channels at 128 x 128, 50 MB an image in fp32, autograd would keep two tensors and hold three
more in its backward pass; here it is one and one.

Shapes: B batch, D channels, H W map, n = B * H * W, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segformer.models.ops import reference
from segformer.models.ops.dispatch import first_derivative
from segformer.models.ops.linear import linear
from segformer.models.ops.resize import add_bands, band_rows, bilinear_matrix, row_bands, widen

Reduce = Callable[[Tensor], Tensor] | None


def fold_projections(
    weights: list[Tensor], biases: list[Tensor], fuse: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Fold the projections W_i (D, C_i), b_i (D,) into the slices of `fuse` (D, len * D), in the order given.

    Returns F_i W_i (D, C_i) and sum_i F_i b_i (D,), in float32 (or wider) whatever autocast says: they are
    products of weights, and their rounding would act on every pixel alike.
    """
    with torch.autocast(fuse.device.type, enabled=False):
        dtype = torch.promote_types(fuse.dtype, torch.float32)
        slices = fuse.to(dtype).chunk(len(weights), dim=1)
        folded = [part @ weight.to(dtype) for part, weight in zip(slices, weights, strict=True)]
        bias = fuse.to(dtype) @ torch.cat([bias.to(dtype) for bias in biases])
    return folded, bias


def _pixels(values: Tensor) -> int:
    """How many pixels of values (..., D) a block holds."""
    return band_rows(values.device, values.shape[-1] * 4)


def _moments(maps: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (D,) of maps (B, N, D) and their number of pixels (1,), over all ranks.

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


def norm_relu_linear(
    maps: Tensor,
    norm: tuple[Tensor, Tensor, float, Reduce],
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of maps (B, H, W, D) by their own statistics, ReLU, dropped channels, linear map.

    norm: weight and bias (D,) of the batch norm, its eps, and what sums a vector over all ranks or None.
    keep (B, D): what the channels of each image are multiplied by, or None. weight (K, D), bias (K,).
    Returns (B, H, W, K) in the type of the maps and, without gradient, mean and biased variance (D,) and the
    number of pixels (1,) that they are of. Statistics in float32 at least.

    A dropped channel of an image is a zero column in the weight that this image sees, so `keep` multiplies
    B x K x D weights and not B x H x W x D activations.
    """
    if torch.compiler.is_compiling():
        return reference.norm_relu_linear(maps, norm, keep, weight, bias)
    batch, height, width, dim = maps.shape
    seen = weight[None] if keep is None else weight * keep[:, None]
    with torch.autocast(maps.device.type, enabled=False):
        out, *moments = _NormReluLinear.apply(maps.reshape(batch, -1, dim).contiguous(), *norm, seen, bias)
    return out.unflatten(1, (height, width)), *moments


def decode_rows(
    stages: list[Tensor],
    projections: list[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """relu(sum of the enlarged projections + offset), then the linear map weight (K, D), bias (K,).

    stages (B, h_i, w_i, C_i), the last one the largest, projections (D, C_i), offset (D,) -> (B, H, W, K).
    Without gradients.
    """
    largest, dtype = stages[-1], stages[-1].dtype
    batch, height, width, _ = largest.shape
    dim = len(offset)
    step = band_rows(largest.device, width * dim * largest.element_size())
    small = []
    for stage, projection in zip(stages[:-1], projections[:-1], strict=True):
        matrix = bilinear_matrix(stage.shape[1], height, dtype=dtype, device=largest.device)
        small.append((widen(linear(stage, projection), width), row_bands(matrix, step)))
    out = largest.new_empty(batch, height, width, len(bias))
    for image in range(batch):
        for index, top in enumerate(range(0, height, step)):
            rows = slice(top, min(top + step, height))
            hidden = linear(largest[image, rows], projections[-1], offset)
            add_bands(hidden.view(-1, width * dim), index, small, image)
            out[image, rows] = linear(hidden.relu_(), weight, bias)
    return out
