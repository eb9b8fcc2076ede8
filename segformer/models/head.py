"""The All-MLP decode head of SegFormer (arXiv 2105.15203, section 3.3), folded or as written.

As written:  Linear per stage -> bilinear resize to the first stage -> concat [c4, c3, c2, c1] -> 1x1 fuse
             -> BatchNorm -> ReLU -> Dropout2d -> 1x1 prediction

Folded:      nothing non-linear stands before the BatchNorm, and a 1x1 convolution commutes with a bilinear
             resize, so  fuse(cat_i(up(W_i x_i + b_i))) = sum_i up((F_i W_i) x_i) + sum_i F_i b_i
             with F_i the i-th slice of the fuse weight. Each stage is projected at its own resolution.

Both forms have the same parameters (W_i, b_i, F) and the same function; the folded one needs a third of the
operations of the as-written one for B2 (40.8 against 116.9 G for the whole model at 512 x 512, 150 classes)
and never holds the concatenation. It also takes the BatchNorm as a scale and a shift per channel (layers.py):
in training they are applied in the blocks that ReLU and prediction work on, in eval mode they are folded
into the projections.

Shapes: B batch, C_i channels of stage i, D decoder_dim, H W map of the first stage, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segformer.models.layers import BatchNorm, affine
from segformer.models.ops.decode import decode_rows, fold_projections
from segformer.models.ops.reference import upsample_to
from segformer.models.ops.suite import Ops


class LinearEmbed(nn.Module):
    """The projection of one stage; a module of its own because files name it linear_c{i}.proj."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)


class FuseConv(nn.Module):
    """The 1x1 convolution without bias over the concatenated stages, and its BatchNorm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = BatchNorm(dim, eps=1e-5, momentum=0.1)
        self.initialise()

    def initialise(self) -> None:
        """Initialise as the original: kaiming normal by fan-out, norm 1 and 0."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class AllMLPHead(nn.Module):
    """4 maps -> logits at the resolution of the first map."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        decoder_dim: int,
        num_classes: int,
        *,
        ops: Ops,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.dropout = dropout
        self.linear_c1 = LinearEmbed(embed_dims[0], decoder_dim)
        self.linear_c2 = LinearEmbed(embed_dims[1], decoder_dim)
        self.linear_c3 = LinearEmbed(embed_dims[2], decoder_dim)
        self.linear_c4 = LinearEmbed(embed_dims[3], decoder_dim)
        self.linear_fuse = FuseConv(4 * decoder_dim, decoder_dim)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) in channels-last memory -> logits (B, K, H_1, W_1), likewise."""
        stages = [stage.permute(0, 2, 3, 1) for stage in reversed(maps)]  # c4, c3, c2, c1 as (B, H, W, C)
        decode = self._decode_as_written if self.ops.name == "reference" else self._decode_folded
        return decode(stages).permute(0, 3, 1, 2)

    def _projections(self) -> list[nn.Linear]:
        return [stage.proj for stage in (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)]

    def _keep(self, batch: int) -> Tensor | None:
        """What Dropout2d multiplies the channels of each image by: (B, D) of 0 or 1 / (1 - rate), or None."""
        if not self.training or self.dropout == 0:
            return None
        keep = self.linear_pred.weight.new_empty(batch, self.linear_pred.in_channels)
        return keep.bernoulli_(1 - self.dropout).div_(1 - self.dropout)

    def _decode_folded(self, stages: list[Tensor]) -> Tensor:
        projections = self._projections()
        weights, offset = fold_projections(
            [affine(proj)[0] for proj in projections],
            [affine(proj)[1] for proj in projections],
            self.linear_fuse.conv.weight.flatten(1),
        )
        bn, (weight, bias) = self.linear_fuse.bn, affine(self.linear_pred)
        weight = weight.flatten(1)
        if not bn.training:
            scale, shift = bn.scale_shift()
            weights, offset = [part * scale[:, None] for part in weights], offset * scale + shift
        keep = self._keep(len(stages[0]))
        if keep is None and not bn.training and _rows_alone(stages[0]):
            return decode_rows(stages, weights, offset, weight, bias)
        dtype = stages[0].dtype
        # A resize keeps constants, so the offset is added where the map is smallest.
        projected = [
            self.ops.linear(stage, part.to(dtype), offset.to(dtype) if index == 0 else None)
            for index, (stage, part) in enumerate(zip(stages[:-1], weights[:-1], strict=True))
        ]
        fused = self.ops.project_sum(stages[-1], weights[-1].to(dtype), projected)
        if bn.training:
            logits, *moments = self.ops.norm_relu_linear(fused, bn.terms(), keep, weight, bias)
            bn.track(*moments)
            return logits
        hidden = fused.relu()
        return self.ops.linear(hidden if keep is None else hidden * keep[:, None, None], weight, bias)

    def _decode_as_written(self, stages: list[Tensor]) -> Tensor:
        size = (stages[-1].shape[1], stages[-1].shape[2])
        enlarged = [
            upsample_to(proj(stage).permute(0, 3, 1, 2), size)
            for proj, stage in zip(self._projections(), stages, strict=True)
        ]
        hidden = self.linear_fuse.bn(self.linear_fuse.conv(torch.cat(enlarged, dim=1))).relu()
        keep = self._keep(len(hidden))
        if keep is not None:
            hidden = hidden * keep[:, :, None, None]
        return self.linear_pred(hidden).permute(0, 2, 3, 1)


def _rows_alone(maps: Tensor) -> bool:
    """Whether the head runs band by band: on a CPU, in full precision, without gradients, not compiled."""
    return (
        maps.device.type == "cpu"
        and maps.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
