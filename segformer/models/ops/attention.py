"""Efficient self-attention: queries of all tokens, keys and values of tokens reduced by the sr convolution.

    reduce_tokens        the sr convolution (kernel = stride = r) as one matmul on r x r patches
    norm_query_reduce    LayerNorm, then the query projection and `reduce_tokens`; keeps its input only
    sdpa                 multi-head scaled dot-product attention

The patches are the one copy of an activation that changes its layout.

Shapes: B batch, C D channels, H W map, N = H * W tokens, M reduced tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.depthwise import as_map
from segformer.models.ops.dispatch import first_derivative, fused
from segformer.models.ops.layer_norm import Norm, compute_dtype, normalize, normalize_backward
from segformer.models.ops.linear import Affine, linear, linear_backward


def _patches(tokens: Tensor, size: tuple[int, int], ratio: int) -> Tensor:
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


def reduce_tokens_reference(
    tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Convolve tokens (B, H * W, C) with weight (D, C, r, r) at stride r -> (B, M, D).

    M = (H // r) * (W // r): the last H % r rows and W % r columns are left out, as by the original.
    """
    return F.conv2d(as_map(tokens, size), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def reduce_tokens(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reduce_tokens_reference` as a matmul."""
    return linear(_patches(tokens, size, weight.shape[-1]), _kernel(weight), bias)


def _reduce_backward(
    grad: Tensor, tokens: Tensor, size: tuple[int, int], weight: Tensor, total: Tensor
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
    tokens: Tensor, size: tuple[int, int], norm: Norm, query: Affine, reduction: Affine | None
) -> tuple[Tensor, Tensor]:
    """LayerNorm of tokens (B, N, C); its queries (B, N, C), and its reduced tokens (B, M, C) or itself.

    query: weight (C, C) and bias; reduction: weight (C, C, r, r) and bias of the sr convolution, None for
    r = 1.
    """
    gamma, beta, eps = norm
    values = F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps)
    reduced = values if reduction is None else reduce_tokens_reference(values, size, *reduction)
    return F.linear(values, *query), reduced


class _NormQueryReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, size: tuple[int, int], eps: float, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.size, ctx.eps, dtype = size, eps, compute_dtype(tokens)
        gamma, beta = parameters[:2]
        with torch.autocast(tokens.device.type, enabled=False):
            values, mean, inverse = normalize(tokens, (gamma, beta, eps), dtype)
            query, key, *reduction = (parameter.to(dtype) for parameter in parameters[2:])
            reduced = reduce_tokens(values, size, *reduction) if reduction else values
            ctx.save_for_backward(tokens, mean, inverse, *parameters)
            return linear(values, query, key), reduced

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor, grad_reduced: Tensor) -> tuple[Tensor | None, ...]:
        tokens, mean, inverse, *parameters = ctx.saved_tensors
        norm = (*parameters[:2], ctx.eps)
        with torch.autocast(tokens.device.type, enabled=False):
            values = normalize(tokens, norm, grad.dtype)[0]
            inner, weight, bias = linear_backward(grad, values, parameters[2].to(grad.dtype))
            found = [weight, bias]
            if len(parameters) > 4:
                kernel = parameters[4].to(grad.dtype)
                found += _reduce_backward(grad_reduced, values, ctx.size, kernel, inner)
            else:
                inner += grad_reduced
            inner, *own = normalize_backward(inner, tokens, norm, mean, inverse)
        own = [part.to(parameter.dtype) for part, parameter in zip(own + found, parameters, strict=True)]
        return inner, None, None, *own


def _eager(
    tokens: Tensor, size: tuple[int, int], norm: Norm, query: Affine, reduction: Affine | None
) -> tuple[Tensor, Tensor]:
    """`norm_query_reduce_reference`, in the autocast type where there is one."""
    gamma, beta, eps = norm
    return _NormQueryReduce.apply(tokens, size, eps, gamma, beta, *query, *(reduction or ()))


def _traced(
    tokens: Tensor, size: tuple[int, int], norm: Norm, query: Affine, reduction: Affine | None
) -> tuple[Tensor, Tensor]:
    values = normalize(tokens, norm, compute_dtype(tokens))[0]
    reduced = values if reduction is None else reduce_tokens(values, size, *reduction)
    return linear(values, *query), reduced


norm_query_reduce = fused(eager=_eager, traced=_traced)


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
