"""The operations of SegFormer that are more than one library call, each as one function on one memory layout.

Everything between the patch embedding and the logits is channels-last: tokens (B, N, C), or the same memory
seen as a map (B, H, W, C). Convolutions see that memory as a channels-last (B, C, H, W) view, so no operation
here copies an activation to change its layout; `reduce_tokens` gathers patches, which is the one copy it
cannot avoid.

    depthwise_conv     3x3 depthwise convolution, the positional encoding of Mix-FFN
    reduce_tokens      the sr convolution (kernel = stride = r) as one matmul on r x r patches
    attend             softmax attention of all tokens on the reduced ones
    fold_projections   F_i W_i, the linear map that per-stage Linear and fuse convolution are together
    upsample_sum       base + sum of bilinearly enlarged maps
    channel_dropout_linear   Dropout2d and a 1x1 convolution in one matmul
    upsample_to, upsample_argmax   bilinear resize of logits; its argmax without the enlarged logits
    upsampled_cross_entropy        cross entropy of the resized logits, likewise; checked against
                                   reference_cross_entropy

Bilinear resizing is align_corners=False throughout, as in every published SegFormer.

The last two make the enlarged logits in blocks of rows, as two small matmuls; the cross entropy forms its
gradient while the block is in the cache. For (8, 150, 64, 64) -> 256 x 256, forward and backward take 0.13 s
on two CPU cores where F.interpolate + F.cross_entropy take 1.1 s, with 2 MB of enlarged logits instead of 315
MB. Classes are the outermost dimension of a block: that is 1.2 times slower than classes innermost for 150
classes and 6 times faster for 2.

Shapes: B batch, C D channels, H W map, N = H * W tokens, M reduced tokens, K classes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of the enlarged logits are made in blocks of about this size, so that a block stays in the cache of a
# CPU core and a GPU gets enough work per launch.
_CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
_TINY = 1e-30  # below it, log(softmax) is taken by log_softmax


def depthwise_conv(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 depthwise convolution, padding 1, of tokens (B, N, C) of a map of `size`; weight (C, 1, 3, 3)."""
    batch, count, channels = tokens.shape
    view = tokens.reshape(batch, *size, channels).permute(0, 3, 1, 2)
    out = F.conv2d(view, weight, bias, padding=1, groups=channels)
    return out.permute(0, 2, 3, 1).reshape(batch, count, channels)


def reduce_tokens(tokens: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve tokens (B, H * W, C) with weight (D, C, r, r) at stride r -> (B, M, D), M = (H // r) * (W //
    r).

    The last H % r rows and W % r columns are left out, as the original convolution does.
    """
    batch, _, channels = tokens.shape
    ratio = weight.shape[-1]
    rows, columns = size[0] // ratio, size[1] // ratio
    maps = tokens.reshape(batch, *size, channels)[:, : rows * ratio, : columns * ratio]
    patches = maps.reshape(batch, rows, ratio, columns, ratio * channels).transpose(2, 3)
    flat = patches.reshape(batch, rows * columns, ratio * ratio * channels)
    return F.linear(flat, weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1), bias)


def attend(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention; query (B, N, C), key_value (B, M, 2 C) holding keys then values -> (B, N, C)."""
    batch, count, channels = query.shape
    heads = query.reshape(batch, count, num_heads, channels // num_heads).transpose(1, 2)
    pairs = key_value.reshape(batch, -1, 2, num_heads, channels // num_heads)
    key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(heads, key, value)
    return out.transpose(1, 2).reshape(batch, count, channels)


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


def bilinear_matrix(source: int, target: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (target, source) that resizes a line of pixels bilinearly, align_corners=False."""
    centre = (torch.arange(target, dtype=dtype, device=device) + 0.5) * (source / target) - 0.5
    distance = centre.clamp(0, source - 1)[:, None] - torch.arange(source, dtype=dtype, device=device)
    return (1 - distance.abs()).clamp_(min=0)


def upsample_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, C, H, W) bilinearly to `size`, align_corners=False."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class _UpsampleSum(torch.autograd.Function):
    """base (B, H, W, D), in place, + maps (B, h_i, w_i, D) enlarged: rows widened, then one matmul."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, *others: Tensor) -> Tensor:
        batch, height, width, dim = base.shape
        verticals, rows = [], []
        for maps in others:
            horizontal = bilinear_matrix(maps.shape[2], width, dtype=base.dtype, device=base.device)
            verticals.append(bilinear_matrix(maps.shape[1], height, dtype=base.dtype, device=base.device))
            rows.append((horizontal @ maps).reshape(batch, maps.shape[1], width * dim))
        matrix = torch.cat(verticals, dim=1).expand(batch, -1, -1)  # (B, H, sum h_i)
        base.view(batch, height, width * dim).baddbmm_(matrix, torch.cat(rows, dim=1))
        ctx.sizes = [maps.shape[1:3] for maps in others]
        ctx.mark_dirty(base)
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        batch, height, width, dim = grad.shape
        view = grad.permute(0, 3, 1, 2)
        shrunk = [
            torch.ops.aten.upsample_bilinear2d_backward(view, (height, width), (batch, dim, *size), False)
            for size in ctx.sizes
        ]
        return grad, *(maps.permute(0, 2, 3, 1) for maps in shrunk)


def upsample_sum(base: Tensor, others: list[Tensor]) -> Tensor:
    """base (B, H, W, D) + every map of `others` (B, h_i, w_i, D) enlarged to H x W; may overwrite base.

    On a CPU one matmul enlarges and adds all maps and so touches the large result once: 35 instead of 80 ms
    for (8, 64, 64, 256) and its three coarser maps on one core. torch.compile fuses the sums of the plain
    form itself.
    """
    fast = base.device.type == "cpu" and base.dtype in (torch.float32, torch.float64) and base.is_contiguous()
    if not fast or torch.compiler.is_compiling():
        return reference_upsample_sum(base, others)
    return _UpsampleSum.apply(base, *others)


def reference_upsample_sum(base: Tensor, others: list[Tensor]) -> Tensor:
    """The same function as `upsample_sum` map by map."""
    size = (base.shape[1], base.shape[2])
    for maps in others:
        base = base + upsample_to(maps.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return base


def channel_dropout_linear(maps: Tensor, weight: Tensor, bias: Tensor, rate: float) -> Tensor:
    """Dropout2d(rate), then the linear map weight (K, D), on maps (B, H, W, D) -> (B, H, W, K).

    A dropped channel of an image is a zero column in the weight that this image sees, so the mask multiplies
    B x K x D weights and not B x H x W x D activations.
    """
    if rate == 0:
        return F.linear(maps, weight, bias)
    batch, height, width, dim = maps.shape
    keep = weight.new_empty(batch, 1, dim).bernoulli_(1 - rate).div_(1 - rate)
    out = torch.baddbmm(bias, maps.reshape(batch, height * width, dim), (weight * keep).transpose(1, 2))
    return out.reshape(batch, height, width, -1)


@dataclass(frozen=True, slots=True)
class Band:
    """Rows of an enlarged map, the rows of the small map they depend on, and the matrix between the two."""

    rows: slice
    source: slice
    matrix: Tensor


def bilinear_bands(maps: Tensor, size: tuple[int, int]) -> tuple[list[Band], Tensor]:
    """How to enlarge an image of maps (B, C, h, w) to `size`: its bands, and the matrix (w, W) that widens
    its rows.

    A band holds about one block of enlarged rows. 16 rows at a factor of 4 depend on 6, so the product with
    the bands is a small part of the product with the dense matrix.
    """
    dtype, device = maps.dtype, maps.device
    source, target = maps.shape[2], size[0]
    matrix = bilinear_matrix(source, target, dtype=dtype, device=device)
    budget = _CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(1, budget // (maps.shape[1] * size[1] * maps.element_size()))
    scale, slack = source / target, 1e-3  # slack: the matrix may have rounded a centre across a pixel
    bands = []
    for top in range(0, target, step):
        bottom = min(top + step, target)
        first = max(0, math.floor((top + 0.5) * scale - 0.5 - slack))
        last = min(source, math.floor((bottom - 0.5) * scale - 0.5 + slack) + 2)
        block = matrix[top:bottom, first:last].contiguous()
        bands.append(Band(slice(top, bottom), slice(first, last), block))
    return bands, bilinear_matrix(maps.shape[3], size[1], dtype=dtype, device=device).t().contiguous()


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over classes of logits (B, K, h, w) enlarged to `size`, block by block -> (B, *size).

    uint8 up to 256 classes, int64 beyond. The enlarged logits exist for one block of rows at a time, in
    float32 whatever autocast says.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bands, horizontal = bilinear_bands(logits, size)
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    out = torch.empty(len(logits), *size, dtype=dtype, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for labels, image in zip(out, logits, strict=True):
            wide = image.contiguous() @ horizontal  # (K, h, W)
            for band in bands:
                labels[band.rows] = (band.matrix @ wide[:, band.source]).argmax(dim=0)
    return out


def _block_loss_and_grad(
    enlarged: Tensor,
    target: Tensor,
    pixel_weights: Tensor | None,
    class_weights: Tensor | None,
    smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the pixels of one block: logits (K, n), target (n,), pixel_weights (n,) or None, class_weights
    (K,).

    Returns the weighted sum, its gradient (K, n) and the plain -log p_t (n,), 0 where the pixel is ignored.
    With smoothing e, class weights c and label y the loss of a pixel is, as in torch,
        (1 - e) c_y (lse - z_y) + e / K sum_k c_k (lse - z_k)
    """
    ignored = target == ignore_index
    label = target.masked_fill(ignored, 0).long()[None]
    grad = enlarged.softmax(dim=0)
    hit = grad.gather(0, label)
    # The short ways are for CPUs: on a GPU the question whether one is open would wait for the device.
    cpu = enlarged.device.type == "cpu"
    underflow = not cpu or bool((hit <= _TINY).any())
    nll = -enlarged.log_softmax(dim=0).gather(0, label) if underflow else -hit.log()
    plain = pixel_weights is None and class_weights is None and smoothing == 0
    if cpu and plain and not bool(ignored.any()):
        return nll.sum(), grad.scatter_(0, label, hit - 1), nll[0]
    counted = (~ignored).to(nll.dtype)[None]
    pixel = counted if pixel_weights is None else counted * pixel_weights
    own = (1 - smoothing) * (pixel if class_weights is None else pixel * class_weights[label])
    loss, factor = (own * nll).sum(), own
    if smoothing > 0:
        classes = enlarged.new_ones(len(enlarged)) if class_weights is None else class_weights
        spread = smoothing / len(enlarged) * classes
        lse = nll + enlarged.gather(0, label)
        loss = loss + (pixel * (spread.sum() * lse - spread @ enlarged)).sum()
        factor = own + spread.sum() * pixel
    grad.mul_(factor).scatter_(0, label, hit * factor - own)
    if smoothing > 0:
        grad.sub_(spread[:, None] * pixel)
    return loss, grad, (nll * counted)[0]


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Logits (B, K, h, w), target (B, H, W) -> weighted sum of the pixel losses, -log p_t (B, H, W)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        pixel_weights: Tensor | None,
        class_weights: Tensor | None,
        smoothing: float,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        height, width = target.shape[1:]
        bands, horizontal = bilinear_bands(logits, (height, width))
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total, losses = logits.new_zeros(()), logits.new_empty(target.shape)
        for index, image in enumerate(logits):
            wide = image.contiguous() @ horizontal  # (K, h, W)
            grad_wide = torch.zeros_like(wide)
            for band in bands:
                pixels = (index, band.rows)
                loss, grad_block, nll = _block_loss_and_grad(
                    (band.matrix @ wide[:, band.source]).flatten(1),  # (K, rows * W)
                    target[pixels].flatten(),
                    None if pixel_weights is None else pixel_weights[pixels].flatten(),
                    class_weights,
                    smoothing,
                    ignore_index,
                )
                total += loss
                losses[pixels] = nll.unflatten(0, (-1, width))
                if ctx.needs_input_grad[0]:
                    grad_wide[:, band.source] += band.matrix.t() @ grad_block.unflatten(1, (-1, width))
            if ctx.needs_input_grad[0]:
                torch.matmul(grad_wide, horizontal.t(), out=grad[index])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total, None, None, None, None, None


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (B, K, h, w) enlarged to target (B, H, W), ignoring `ignore_index`.

    Returns the sum over pixels of pixel_weights (B, H, W) * loss, and the plain -log p_t (B, H, W) of every
    pixel, without gradient. float32 at least, whatever autocast says.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if class_weights is not None:
            class_weights = class_weights.to(logits.dtype)
        return _UpsampledCrossEntropy.apply(
            logits, target, pixel_weights, class_weights, label_smoothing, ignore_index
        )


def reference_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same function as `upsampled_cross_entropy` in two library calls that hold the enlarged logits."""
    enlarged = upsample_to(logits, (target.shape[1], target.shape[2]))
    plain = partial(F.cross_entropy, ignore_index=ignore_index, reduction="none")
    losses = plain(enlarged, target.long(), class_weights, label_smoothing=label_smoothing)
    weighted = losses if pixel_weights is None else losses * pixel_weights
    return weighted.sum(), plain(enlarged, target.long()).detach()
