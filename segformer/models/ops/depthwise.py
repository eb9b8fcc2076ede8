"""GELU(3x3 depthwise convolution + bias) of tokens (B, N, C): the middle of Mix-FFN.

The convolution sees the channels-last memory of the tokens as a (B, C, H, W) view, so nothing is copied.
Only the input is kept for the backward pass, which recomputes the convolution. It is a torch.library
operation, so that torch.compile calls it whole; on CUDA it is the kernel of depthwise_triton.py.

Shapes: B batch, C channels, H W map, N = H * W tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.dispatch import first_derivative, register


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) of a map of `size` -> the same memory as (B, C, H, W)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def depthwise_gelu_reference(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the 3x3 depthwise convolution, padding 1, of tokens (B, N, C); weight (C, 1, 3, 3)."""
    maps = F.conv2d(as_map(tokens, size), weight, bias, padding=1, groups=weight.shape[0])
    return F.gelu(maps).flatten(2).transpose(1, 2)


def _convolve(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    dtype = tokens.dtype
    return F.conv2d(as_map(tokens, size), weight.to(dtype), bias.to(dtype), padding=1, groups=weight.shape[0])


def _compute(tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    maps = _convolve(tokens, (height, width), weight, bias)
    return torch.ops.aten.gelu_(maps).permute(0, 2, 3, 1).reshape(tokens.shape)


def _compute_backward(
    grad: Tensor, tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, from that of the result and the same tokens."""
    size = (height, width)
    maps = _convolve(tokens, size, weight, bias)
    outer = torch.ops.aten.gelu_backward.grad_input(as_map(grad, size), maps, grad_input=maps)
    inner, kernel, offset = torch.ops.aten.convolution_backward(
        outer,
        as_map(tokens, size),
        weight.to(tokens.dtype),
        [weight.shape[0]],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [True, True, True],
    )
    return (
        inner.permute(0, 2, 3, 1).reshape(tokens.shape),
        kernel.to(weight.dtype, memory_format=torch.contiguous_format),
        offset.to(bias.dtype),
    )


depthwise_gelu_backward = register(
    "depthwise_gelu_backward(Tensor grad, Tensor tokens, SymInt height, SymInt width, Tensor weight, "
    "Tensor bias) -> (Tensor, Tensor, Tensor)",
    _compute_backward,
    lambda _, tokens, height, width, *parameters: tuple(x.new_empty(x.shape) for x in (tokens, *parameters)),
    kernel="depthwise_triton.backward",
)


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ctx.height, ctx.width, weight, bias = inputs
    ctx.save_for_backward(tokens, weight, bias)


@first_derivative
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight, bias = ctx.saved_tensors
    inner, kernel, offset = depthwise_gelu_backward(grad, tokens, ctx.height, ctx.width, weight, bias)
    return inner, None, None, kernel, offset


_depthwise_gelu = register(
    "depthwise_gelu(Tensor tokens, SymInt height, SymInt width, Tensor weight, Tensor bias) -> Tensor",
    _compute,
    lambda tokens, *_: tokens.new_empty(tokens.shape),
    kernel="depthwise_triton.forward",
    backward=_differentiate,
    setup_context=_keep_input,
)


def depthwise_gelu(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """`depthwise_gelu_reference` in the type of the tokens, whatever that of the parameters."""
    return _depthwise_gelu(tokens, *size, weight, bias)
