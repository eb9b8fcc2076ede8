"""Pre-norm Mix-FFN (LayerNorm, Linear, 3x3 depthwise convolution, GELU, Linear), which keeps its input only.

The normalized tokens and the two hidden tensors, each four times as wide as the tokens, are recomputed in the
backward pass, some hidden channels at a time: one more matmul of the first Linear for most of what autograd
would keep of a block.

Shapes: B batch, C channels, E hidden channels, H W map, N = H * W tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.depthwise import (
    depthwise_gelu,
    depthwise_gelu_backward,
    depthwise_gelu_reference,
)
from segformer.models.ops.dispatch import CPU_BLOCK_BYTES, first_derivative, fused
from segformer.models.ops.layer_norm import Norm, compute_dtype, normalize, normalize_backward
from segformer.models.ops.linear import linear, linear_backward


def prenorm_ffn_reference(
    tokens: Tensor, size: tuple[int, int], norm: Norm, parameters: list[Tensor]
) -> Tensor:
    """LayerNorm and Mix-FFN of tokens (B, N, C) of a map of `size` -> (B, N, C).

    parameters: weight (E, C) and bias of the first Linear, weight (E, 1, 3, 3) and bias of the convolution,
    weight (C, E) and bias of the second Linear.
    """
    gamma, beta, eps = norm
    weight1, bias1, kernel, offset, weight2, bias2 = parameters
    hidden = F.linear(F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps), weight1, bias1)
    return F.linear(depthwise_gelu_reference(hidden, size, kernel, offset), weight2, bias2)


def _forward(values: Tensor, size: tuple[int, int], parameters: list[Tensor]) -> Tensor:
    weight1, bias1, kernel, offset, weight2, bias2 = parameters
    dtype = values.dtype
    hidden = linear(values, weight1.to(dtype), bias1.to(dtype))
    return linear(depthwise_gelu(hidden, size, kernel, offset), weight2.to(dtype), bias2.to(dtype))


class _PrenormFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, size: tuple[int, int], eps: float, *parameters: Tensor) -> Tensor:
        ctx.size, ctx.eps, dtype = size, eps, compute_dtype(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            gamma, beta = parameters[:2]
            values, mean, inverse = normalize(tokens, (gamma, beta, eps), dtype)
            ctx.save_for_backward(tokens, mean, inverse, *parameters)
            return _forward(values, size, list(parameters[2:]))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, mean, inverse, *parameters = ctx.saved_tensors
        norm, parameters = (*parameters[:2], ctx.eps), parameters[2:]
        found = [torch.empty_like(parameter) for parameter in parameters]
        with torch.autocast(tokens.device.type, enabled=False):
            values = normalize(tokens, norm, grad.dtype)[0]
            inner, step = torch.zeros_like(values), _channels_at_once(values, len(parameters[1]))
            for first in range(0, len(parameters[1]), step):
                part = slice(first, first + step)
                inner += _part_backward(values, grad, ctx.size, parameters, found, part)
            inner, gamma, beta = normalize_backward(inner, tokens, norm, mean, inverse)
        return inner, None, None, gamma, beta, *found


def _channels_at_once(values: Tensor, hidden_dim: int) -> int:
    """Hidden channels that the backward pass recomputes at once: on a CPU, tensors of about one block."""
    if values.device.type != "cpu":
        return hidden_dim
    pixels = values.numel() // values.shape[-1]
    return max(16, 2 * CPU_BLOCK_BYTES // (pixels * values.element_size()))


def _part_backward(
    values: Tensor,
    grad: Tensor,
    size: tuple[int, int],
    parameters: list[Tensor],
    found: list[Tensor],
    part: slice,
) -> Tensor:
    """The share of some hidden channels in the gradient of values; writes those of the parameters to `found`.

    A depthwise convolution keeps channels apart, so hidden channels only meet in the sum that is returned.
    """
    weight1, bias1, kernel, offset = (parameter[part] for parameter in parameters[:4])
    weight1, bias1, weight2 = (x.to(values.dtype) for x in (weight1, bias1, parameters[4][:, part]))
    hidden = linear(values, weight1, bias1)
    active = depthwise_gelu(hidden, size, kernel, offset)
    grad, found[4][:, part], found[5][:] = linear_backward(grad, active, weight2.contiguous())
    del active
    grad, found[2][part], found[3][part] = depthwise_gelu_backward(grad, hidden, *size, kernel, offset)
    del hidden
    grad, found[0][part], found[1][part] = linear_backward(grad, values, weight1)
    return grad


def _eager(tokens: Tensor, size: tuple[int, int], norm: Norm, parameters: list[Tensor]) -> Tensor:
    """`prenorm_ffn_reference`, in the autocast type where there is one."""
    gamma, beta, eps = norm
    return _PrenormFFN.apply(tokens, size, eps, gamma, beta, *parameters)


def _traced(tokens: Tensor, size: tuple[int, int], norm: Norm, parameters: list[Tensor]) -> Tensor:
    return _forward(normalize(tokens, norm, compute_dtype(tokens))[0], size, parameters)


prenorm_ffn = fused(eager=_eager, traced=_traced)
