"""From the encoder's four maps to logits: the All-MLP decode head (arXiv 2105.15203, section 3.3).

reference:   Linear per stage -> bilinear resize to the first stage -> concat [c4, c3, c2, c1] -> 1x1 fuse
             -> BatchNorm -> ReLU -> Dropout2d -> 1x1 prediction

folded:      nothing non-linear stands before the BatchNorm, and a 1x1 convolution commutes with a bilinear
             resize, so  fuse(cat_i(up(W_i x_i + b_i))) = sum_i up((F_i W_i) x_i) + sum_i F_i b_i
             with F_i the i-th slice of the fuse weight. Each stage is projected at its own resolution.

Both have the same parameters (W_i, b_i, F) and the same function; folded, the whole of B2 needs a third of
the operations (40.8 against 116.9 G at 512 x 512, 150 classes) and never holds the concatenation. The
BatchNorm is a scale and a shift per channel: in training they are applied in the blocks that ReLU and
prediction work on (batch_norm.py), in eval mode they are folded into the projections. Without gradients the
head runs band by band on a CPU, so that only the logits are ever whole.

Shapes: B batch, C_i channels of stage i, D decoder_dim, H W map of the first stage, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.batch_norm import BatchNorm, norm_relu_linear
from segformer.models.ops.dispatch import exact_on_cpu, fused
from segformer.models.ops.linear import Affine, linear
from segformer.models.ops.resize import add_bands, band_rows, project_sum, upsample_to, widen


class Head(NamedTuple):
    """Parameters of the head, stages in the order c4, c3, c2, c1."""

    projections: Sequence[Affine]  # weight (D, C_i) and bias (D,) of each stage; none where C_i = D
    fuse: Tensor  # weight (D, 4 D, 1, 1) of the fuse convolution
    norm: BatchNorm
    keep: Tensor | None  # factors (B, D) of the channels of each image
    prediction: Affine  # weight (K, D, 1, 1) and bias (K,)


def decode_reference(stages: Sequence[Tensor], head: Head) -> Tensor:
    """Maps (B, h_i, w_i, C_i), the last one the largest -> logits (B, H, W, K)."""
    size = (stages[-1].shape[1], stages[-1].shape[2])
    if head.projections:
        stages = [F.linear(stage, *own) for own, stage in zip(head.projections, stages, strict=True)]
    enlarged = [upsample_to(stage.permute(0, 3, 1, 2), size) for stage in stages]
    hidden = head.norm(F.conv2d(torch.cat(enlarged, dim=1), head.fuse)).relu()
    if head.keep is not None:
        hidden = hidden * head.keep[:, :, None, None]
    return F.conv2d(hidden, *head.prediction).permute(0, 2, 3, 1)


def fold_projections(projections: Sequence[Affine], fuse: Tensor) -> tuple[list[Tensor], Tensor]:
    """Fold the projections W_i (D, C_i), b_i (D,) into the slices of `fuse` (D, len * D), in the order given.

    Returns F_i W_i (D, C_i) and sum_i F_i b_i (D,), in float32 (or wider) whatever autocast says: they are
    products of weights, and their rounding would act on every pixel alike.
    """
    with torch.autocast(fuse.device.type, enabled=False):
        dtype = torch.promote_types(fuse.dtype, torch.float32)
        slices = fuse.to(dtype).chunk(len(projections), dim=1)
        folded = [part @ weight.to(dtype) for part, (weight, _) in zip(slices, projections, strict=True)]
        bias = fuse.to(dtype) @ torch.cat([bias.to(dtype) for _, bias in projections])
    return folded, bias


def _fold(head: Head) -> tuple[list[Tensor], Tensor]:
    """`fold_projections`, with the BatchNorm of eval mode."""
    fuse = head.fuse.flatten(1)
    if head.projections:
        weights, offset = fold_projections(head.projections, fuse)
    else:
        weights, offset = list(fuse.split(len(fuse), dim=1)), fuse.new_zeros(len(fuse))
    if head.norm.training:
        return weights, offset
    scale, shift = head.norm.scale_shift()
    return [part * scale[:, None] for part in weights], offset * scale + shift


def _decode_folded(stages: Sequence[Tensor], head: Head) -> Tensor:
    weights, offset = _fold(head)
    weight, bias = head.prediction[0].flatten(1), head.prediction[1]
    dtype = stages[0].dtype
    # A resize keeps constants, so the offset is added where the map is smallest.
    projected = [
        linear(stage, part.to(dtype), offset.to(dtype) if index == 0 else None)
        for index, (stage, part) in enumerate(zip(stages[:-1], weights[:-1], strict=True))
    ]
    hidden = project_sum(stages[-1], weights[-1].to(dtype), projected)
    if head.norm.training:
        return norm_relu_linear(hidden, head.norm, head.keep, weight, bias)
    hidden = hidden.relu()
    return linear(hidden if head.keep is None else hidden * head.keep[:, None, None], weight, bias)


def decode_bands(
    stages: Sequence[Tensor],
    projections: Sequence[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """relu(sum of the enlarged projections + offset), then the linear map weight (K, D), bias (K,).

    stages (B, h_i, w_i, C_i), the last one the largest, projections (D, C_i), offset (D,) -> (B, H, W, K).
    Without gradients.
    """
    largest, dim = stages[-1], len(offset)
    batch, height, width, _ = largest.shape
    step = band_rows(largest.device, width * dim * largest.element_size())
    small = widen(map(linear, stages[:-1], projections[:-1]), (height, width), step)
    out = largest.new_empty(batch, height, width, len(bias))
    for image in range(batch):
        for index, top in enumerate(range(0, height, step)):
            rows = slice(top, min(top + step, height))
            hidden = linear(largest[image, rows], projections[-1], offset)
            add_bands(hidden.view(-1, width * dim), index, small, image)
            out[image, rows] = linear(hidden.relu_(), weight, bias)
    return out


def _decode_eager(stages: Sequence[Tensor], head: Head) -> Tensor:
    trains = head.norm.training or head.keep is not None or torch.is_grad_enabled()
    if trains or not exact_on_cpu(stages[0]):
        return _decode_folded(stages, head)
    return decode_bands(stages, *_fold(head), head.prediction[0].flatten(1), head.prediction[1])


decode = fused(eager=_decode_eager, traced=_decode_folded)
