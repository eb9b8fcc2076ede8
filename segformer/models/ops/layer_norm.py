"""LayerNorm whose result is not kept: what begins with one recomputes it in its backward pass.

Statistics in float32 at least; the result is in the autocast type where there is one, cast once for all that
read it.

Shapes: B batch, N tokens, C channels.
"""

import torch
from torch import Tensor

Norm = tuple[Tensor, Tensor, float]  # weight (C,), bias (C,), eps


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The type that matrix products of `tokens` run in."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def normalize(tokens: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of tokens (B, N, C) in `dtype`, and its means and inverse deviations (B, N, 1)."""
    gamma, beta, eps = norm
    wide = tokens.to(torch.promote_types(tokens.dtype, gamma.dtype))
    out, mean, inverse = torch.native_layer_norm(wide, (tokens.shape[-1],), gamma, beta, eps)
    return out.to(dtype), mean, inverse


def normalize_backward(
    grad: Tensor, tokens: Tensor, norm: Norm, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, weight and bias, from that of the result."""
    gamma, beta, _ = norm
    wide = torch.promote_types(tokens.dtype, gamma.dtype)
    inner, own_gamma, own_beta = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), tokens.to(wide), [tokens.shape[-1]], mean, inverse, gamma, beta, [True, True, True]
    )
    return inner.to(tokens.dtype), own_gamma, own_beta
