"""Every operation of this package in plain library calls: what the fused forms are tested against.

Same signatures, same layouts, same results up to rounding; `model.ops=reference` runs the network on them.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) of a map of `size` -> the same memory as (B, C, H, W)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """values (..., C), weight (D, C), bias (D,) -> values @ weight.T + bias (..., D)."""
    return F.linear(values, weight, bias)


def depthwise_gelu(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the 3x3 depthwise convolution, padding 1, of tokens (B, N, C); weight (C, 1, 3, 3)."""
    maps = F.conv2d(as_map(tokens, size), weight, bias, padding=1, groups=weight.shape[0])
    return F.gelu(maps).flatten(2).transpose(1, 2)


def mix_ffn(
    tokens: Tensor, size: tuple[int, int], norm: tuple[Tensor, Tensor, float], parameters: list[Tensor]
) -> Tensor:
    """LayerNorm, Linear, depthwise convolution, GELU, Linear on tokens (B, N, C); see ffn.py."""
    gamma, beta, eps = norm
    weight1, bias1, kernel, offset, weight2, bias2 = parameters
    hidden = linear(F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps), weight1, bias1)
    return linear(depthwise_gelu(hidden, size, kernel, offset), weight2, bias2)


def reduce_tokens(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve tokens (B, H * W, C) with weight (D, C, r, r) at stride r -> (B, M, D)."""
    return F.conv2d(as_map(tokens, size), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def attention_inputs(
    tokens: Tensor,
    size: tuple[int, int],
    norm: tuple[Tensor, Tensor, float],
    query: tuple[Tensor, Tensor],
    reduction: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of tokens (B, N, C), its queries, and its reduced tokens; see attention.py."""
    gamma, beta, eps = norm
    values = F.layer_norm(tokens, tokens.shape[-1:], gamma, beta, eps)
    reduced = values if reduction is None else reduce_tokens(values, size, *reduction)
    return linear(values, *query), reduced


def attend(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention; query (B, N, C), key_value (B, M, 2 C) holding keys then values -> (B, N, C)."""
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in key_value.chunk(2, dim=-1)]
    key, value = heads  # (B, heads, M, C / heads)
    queries = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scores = queries @ key.transpose(-2, -1) * key.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def upsample_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, C, H, W) bilinearly to `size`, align_corners=False."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def upsample_sum(base: Tensor, others: list[Tensor]) -> Tensor:
    """base (B, H, W, D) + every map of `others` (B, h_i, w_i, D) enlarged to H x W."""
    size = (base.shape[1], base.shape[2])
    for maps in others:
        base = base + upsample_to(maps.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return base


def project_sum(maps: Tensor, weight: Tensor, others: list[Tensor]) -> Tensor:
    """maps (B, H, W, C) times weight (D, C) + every map of `others` (B, h_i, w_i, D) enlarged to H x W."""
    return upsample_sum(F.linear(maps, weight), others)


def global_moments(values: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, ...]:
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


def norm_relu_linear(
    maps: Tensor,
    norm: tuple[Tensor, Tensor, float, Callable[[Tensor], Tensor] | None],
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm of maps (B, H, W, D), ReLU, dropped channels, linear map; see decode.py."""
    gamma, beta, eps, reduce = norm
    with torch.autocast(maps.device.type, enabled=False):
        mean, variance, count = global_moments(maps.flatten(0, 2), reduce)
        hidden = ((maps - mean) * torch.rsqrt(variance + eps) * gamma + beta).relu()
        if keep is not None:
            hidden = hidden * keep[:, None, None]
        out = F.linear(hidden.to(maps.dtype), weight.to(maps.dtype), bias.to(maps.dtype))
    return out, mean.detach(), variance.detach(), count


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over classes of logits (B, K, h, w) enlarged to `size` -> (B, *size)."""
    labels = upsample_to(logits.to(torch.promote_types(logits.dtype, torch.float32)), size).argmax(dim=1)
    return labels.to(torch.uint8) if logits.shape[1] <= 256 else labels


def upsample_confusion(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """confusion[t, p] of target (B, H, W) and enlarged logits (B, K, h, w); see argmax.py."""
    classes = logits.shape[1]
    predicted = upsample_argmax(logits, (target.shape[1], target.shape[2]))
    counted = (target != ignore_index) & (target >= 0) & (target < classes)
    pairs = torch.stack([target[counted].long(), predicted[counted].long()])
    out = torch.zeros(classes, classes, dtype=torch.int64, device=logits.device)
    return out.index_put_((pairs[0], pairs[1]), torch.ones_like(pairs[0]), accumulate=True)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (B, K, h, w) enlarged to target (B, H, W); see cross_entropy.py."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    enlarged = upsample_to(logits, (target.shape[1], target.shape[2]))
    plain = partial(F.cross_entropy, ignore_index=ignore_index, reduction="none")
    losses = plain(enlarged, target.long(), class_weights, label_smoothing=label_smoothing)
    weighted = losses if pixel_weights is None else losses * pixel_weights
    return weighted.sum(), plain(enlarged, target.long()).detach()
