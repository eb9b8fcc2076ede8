"""The two branches of a transformer block, each from its LayerNorm on, which keep their input only.

    norm_query_reduce    LayerNorm, then queries of all tokens, and the tokens that the sr convolution (kernel
                         = stride = r) leaves for keys and values: one matmul on r x r patches
    sdpa                 multi-head scaled dot-product attention
    prenorm_ffn          LayerNorm, then Mix-FFN: Linear, 3x3 depthwise convolution, GELU, Linear

The normalized tokens are recomputed in the backward pass, and some hidden channels at a time the two hidden
tensors of the Mix-FFN, each four times as wide: one more matmul of the first Linear for most of what autograd
would keep of a block. Statistics are in float32 at least; the normalized tokens are in the autocast type
where there is one, cast once for all that read them. The patches are the one copy of an activation that
changes its layout.

Shapes: B batch, C D channels, E hidden channels, H W map, N = H * W tokens, M reduced tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.depthwise import (
    as_map,
    depthwise_gelu,
    depthwise_gelu_backward,
    depthwise_gelu_reference,
)
from segformer.models.ops.dispatch import CPU_BLOCK_BYTES, first_derivative, fused
from segformer.models.ops.linear import linear, linear_backward

Size = tuple[int, int]
Norm = tuple[Tensor, Tensor, float]  # weight (C,), bias (C,), eps
Parameters = Sequence[Tensor]
# (normalized tokens, size, parameters) -> result; (its gradients, normalized tokens, size, parameters) ->
# gradient of the normalized tokens, gradients of the parameters
Forward = Callable[[Tensor, Size, Parameters], Any]
Backward = Callable[[Sequence[Tensor], Tensor, Size, Parameters], tuple[Tensor, list[Tensor]]]


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    """The type that matrix products of `tokens` run in."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def _normalize(tokens: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of tokens (B, N, C) in `dtype`, and its means and inverse deviations (B, N, 1)."""
    gamma, beta, eps = norm
    wide = tokens.to(torch.promote_types(tokens.dtype, gamma.dtype))
    out, mean, inverse = torch.native_layer_norm(wide, (tokens.shape[-1],), gamma, beta, eps)
    return out.to(dtype), mean, inverse


def _normalize_backward(
    grad: Tensor, tokens: Tensor, norm: Norm, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, from that of the result."""
    gamma, beta, _ = norm
    wide = torch.promote_types(tokens.dtype, gamma.dtype)
    inner, own_gamma, own_beta = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), tokens.to(wide), [tokens.shape[-1]], mean, inverse, gamma, beta, [True, True, True]
    )
    return inner.to(tokens.dtype), own_gamma, own_beta


class _Prenorm(torch.autograd.Function):
    """LayerNorm and `forward`, of which the tokens alone are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        backward: Backward,
        tokens: Tensor,
        size: Size,
        eps: float,
        *parameters: Tensor,
    ) -> Any:
        ctx.inner_backward, ctx.size, ctx.eps, dtype = backward, size, eps, _compute_dtype(tokens)
        gamma, beta, *others = parameters
        with torch.autocast(tokens.device.type, enabled=False):
            values, mean, inverse = _normalize(tokens, (gamma, beta, eps), dtype)
            ctx.save_for_backward(tokens, mean, inverse, *parameters)
            return forward(values, size, others)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, mean, inverse, *parameters = ctx.saved_tensors
        norm = (*parameters[:2], ctx.eps)
        with torch.autocast(tokens.device.type, enabled=False):
            values = _normalize(tokens, norm, grads[0].dtype)[0]
            inner, found = ctx.inner_backward(grads, values, ctx.size, parameters[2:])
            inner, *own = _normalize_backward(inner, tokens, norm, mean, inverse)
        own = [part.to(parameter.dtype) for part, parameter in zip(own + found, parameters, strict=True)]
        return None, None, inner, None, None, *own


def _prenorm(forward: Forward, backward: Backward) -> Callable[[Tensor, Size, Norm, Parameters], Any]:
    """The operation that is LayerNorm and then `forward`, whose gradient is `backward`."""

    def eager(tokens: Tensor, size: Size, norm: Norm, parameters: Parameters) -> Any:
        gamma, beta, eps = norm
        return _Prenorm.apply(forward, backward, tokens, size, eps, gamma, beta, *parameters)

    def traced(tokens: Tensor, size: Size, norm: Norm, parameters: Parameters) -> Any:
        return forward(_normalize(tokens, norm, _compute_dtype(tokens))[0], size, parameters)

    return fused(eager=eager, traced=traced)


def reduce_tokens_reference(tokens: Tensor, size: Size, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve tokens (B, H * W, C) with weight (D, C, r, r) at stride r -> (B, M, D).

    M = (H // r) * (W // r): the last H % r rows and W % r columns are left out, as by the original.
    """
    return F.conv2d(as_map(tokens, size), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def _patches(tokens: Tensor, size: Size, ratio: int) -> Tensor:
    """Tokens (B, H * W, C) -> patches (B, M, ratio * ratio * C)."""
    batch, _, channels = tokens.shape
    rows, columns = size[0] // ratio, size[1] // ratio
    maps = tokens.reshape(batch, *size, channels)[:, : rows * ratio, : columns * ratio]
    # Views of any strides up to the one copy.
    patches = maps.unflatten(2, (columns, ratio)).unflatten(1, (rows, ratio)).transpose(2, 3)
    return patches.reshape(batch, rows * columns, ratio * ratio * channels)


def _kernel(weight: Tensor) -> Tensor:
    """Weight (D, C, r, r) of the convolution -> (D, r * r * C) of the matmul on patches."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def reduce_tokens(tokens: Tensor, size: Size, weight: Tensor, bias: Tensor) -> Tensor:
    """`reduce_tokens_reference` as a matmul."""
    return linear(_patches(tokens, size, weight.shape[-1]), _kernel(weight), bias)


def _reduce_backward(
    grad: Tensor, tokens: Tensor, size: Size, weight: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of `reduce_tokens`; that of the tokens is added to `total`."""
    ratio, (batch, _, channels) = weight.shape[-1], tokens.shape
    rows, columns = size[0] // ratio, size[1] // ratio
    inner, kernel, offset = linear_backward(grad, _patches(tokens, size, ratio), _kernel(weight))
    inner = inner.reshape(batch, rows, columns, ratio, ratio * channels).transpose(2, 3)
    part = total.view(batch, *size, channels)[:, : rows * ratio, : columns * ratio]
    part += inner.reshape(part.shape)
    return kernel.reshape(-1, ratio, ratio, channels).permute(0, 3, 1, 2), offset


def norm_query_reduce_reference(
    tokens: Tensor, size: Size, norm: Norm, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """LayerNorm of tokens (B, N, C); its queries (B, N, C), and its reduced tokens (B, M, C) or itself.

    parameters: weight (C, C) and bias of the queries, and for r > 1 weight (C, C, r, r) and bias of the sr
    convolution.
    """
    gamma, beta, eps = norm
    weight, bias, *reduction = parameters
    values = F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps)
    reduced = reduce_tokens_reference(values, size, *reduction) if reduction else values
    return F.linear(values, weight, bias), reduced


def _query_reduce(values: Tensor, size: Size, parameters: Parameters) -> tuple[Tensor, Tensor]:
    weight, bias, *reduction = (parameter.to(values.dtype) for parameter in parameters)
    reduced = reduce_tokens(values, size, *reduction) if reduction else values
    return linear(values, weight, bias), reduced


def _query_reduce_backward(
    grads: Sequence[Tensor], values: Tensor, size: Size, parameters: Parameters
) -> tuple[Tensor, list[Tensor]]:
    weight, _, *reduction = parameters
    inner, *found = linear_backward(grads[0], values, weight.to(values.dtype))
    if reduction:
        found += _reduce_backward(grads[1], values, size, reduction[0].to(values.dtype), inner)
    else:
        inner += grads[1]
    return inner, found


norm_query_reduce = _prenorm(_query_reduce, _query_reduce_backward)


def sdpa_reference(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention; query (B, N, C), key_value (B, M, 2 C) holding keys then values -> (B, N, C)."""
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in key_value.chunk(2, dim=-1)]
    key, value = heads  # (B, heads, M, C / heads)
    queries = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = queries @ key.transpose(-2, -1) * key.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def sdpa(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """`sdpa_reference` through F.scaled_dot_product_attention, which copies none of its inputs."""
    batch, count, channels = query.shape
    heads = query.reshape(batch, count, num_heads, channels // num_heads).transpose(1, 2)
    pairs = key_value.reshape(batch, key_value.shape[1], 2, num_heads, channels // num_heads)
    key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(heads, key, value)
    return out.transpose(1, 2).reshape(batch, count, channels)


def prenorm_ffn_reference(tokens: Tensor, size: Size, norm: Norm, parameters: Parameters) -> Tensor:
    """LayerNorm and Mix-FFN of tokens (B, N, C) of a map of `size` -> (B, N, C).

    parameters: weight (E, C) and bias of the first Linear, weight (E, 1, 3, 3) and bias of the convolution,
    weight (C, E) and bias of the second Linear.
    """
    gamma, beta, eps = norm
    weight1, bias1, kernel, offset, weight2, bias2 = parameters
    hidden = F.linear(F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps), weight1, bias1)
    return F.linear(depthwise_gelu_reference(hidden, size, kernel, offset), weight2, bias2)


def _ffn(values: Tensor, size: Size, parameters: Parameters) -> Tensor:
    weight1, bias1, kernel, offset, weight2, bias2 = parameters
    dtype = values.dtype
    hidden = linear(values, weight1.to(dtype), bias1.to(dtype))
    return linear(depthwise_gelu(hidden, size, kernel, offset), weight2.to(dtype), bias2.to(dtype))


def _ffn_backward(
    grads: Sequence[Tensor], values: Tensor, size: Size, parameters: Parameters
) -> tuple[Tensor, list[Tensor]]:
    found = [torch.empty_like(parameter) for parameter in parameters]
    inner, hidden_dim = torch.zeros_like(values), len(parameters[1])
    step = hidden_dim
    if values.device.type == "cpu":  # tensors of about one block
        step = max(16, 2 * CPU_BLOCK_BYTES // (values[..., 0].numel() * values.element_size()))
    for first in range(0, hidden_dim, step):
        inner += _part_backward(values, grads[0], size, parameters, found, slice(first, first + step))
    return inner, found


def _part_backward(
    values: Tensor, grad: Tensor, size: Size, parameters: Parameters, found: list[Tensor], part: slice
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


prenorm_ffn = _prenorm(_ffn, _ffn_backward)
