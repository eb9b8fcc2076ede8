"""The All-MLP decode head of SegFormer (arXiv 2105.15203, section 3.3), folded or as written.

As written:  Linear per stage -> bilinear resize to the first stage -> concat [c4, c3, c2, c1] -> 1x1 fuse
             -> BatchNorm -> ReLU -> Dropout2d -> 1x1 prediction

Folded:      nothing non-linear stands before the BatchNorm, and a 1x1 convolution commutes with a bilinear
             resize, so  fuse(cat_i(up(W_i x_i + b_i))) = sum_i up((F_i W_i) x_i) + sum_i F_i b_i
             with F_i the i-th slice of the fuse weight. Each stage is projected at its own resolution.

Both forms have the same parameters (W_i, b_i, F) and the same function; the folded one needs a third of the
operations of the as-written one for B2 (40.8 against 116.9 G for the whole model at 512 x 512, 150 classes)
and never holds the concatenation. The BatchNorm is called as a module, so that it can be replaced by a
synchronised one.

Shapes: B batch, C_i channels of stage i, D decoder_dim, H W map of the first stage, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.models import ops


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
        self.bn = nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class AllMLPHead(nn.Module):
    """4 maps -> logits at the resolution of the first map."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        decoder_dim: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        folded: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.folded = folded
        self.linear_c1 = LinearEmbed(embed_dims[0], decoder_dim)
        self.linear_c2 = LinearEmbed(embed_dims[1], decoder_dim)
        self.linear_c3 = LinearEmbed(embed_dims[2], decoder_dim)
        self.linear_c4 = LinearEmbed(embed_dims[3], decoder_dim)
        self.linear_fuse = FuseConv(4 * decoder_dim, decoder_dim)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) in channels-last memory -> logits (B, K, H_1, W_1), likewise."""
        stages = [stage.permute(0, 2, 3, 1) for stage in reversed(maps)]  # c4, c3, c2, c1 as (B, H, W, C)
        fused = self._fuse_folded(stages) if self.folded else self._fuse_as_written(stages)
        hidden = F.relu(self.linear_fuse.bn(fused.permute(0, 3, 1, 2)), inplace=True).permute(0, 2, 3, 1)
        weight, bias = self.linear_pred.weight.flatten(1), self.linear_pred.bias
        assert bias is not None
        rate = self.dropout if self.training else 0.0
        return ops.channel_dropout_linear(hidden, weight, bias, rate).permute(0, 3, 1, 2)

    def _projections(self) -> list[nn.Linear]:
        return [stage.proj for stage in (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)]

    def _fuse_folded(self, stages: list[Tensor]) -> Tensor:
        projections = self._projections()
        weights, bias = ops.fold_projections(
            [proj.weight for proj in projections],
            [proj.bias for proj in projections],
            self.linear_fuse.conv.weight.flatten(1),
        )
        # A resize keeps constants, so the bias is added where the map is smallest.
        offsets = [bias.to(stages[0].dtype), None, None, None]
        projected = [
            F.linear(stage, weight.to(stage.dtype), offset)
            for stage, weight, offset in zip(stages, weights, offsets, strict=True)
        ]
        return ops.upsample_sum(projected[-1], projected[:-1])

    def _fuse_as_written(self, stages: list[Tensor]) -> Tensor:
        size = (stages[-1].shape[1], stages[-1].shape[2])
        enlarged = [
            ops.upsample_to(proj(stage).permute(0, 3, 1, 2), size)
            for proj, stage in zip(self._projections(), stages, strict=True)
        ]
        return self.linear_fuse.conv(torch.cat(enlarged, dim=1)).permute(0, 2, 3, 1)
