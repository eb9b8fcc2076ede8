"""The decode heads of SegFormer: their parameters under the names of the original repositories.

    AllMLPHead   of the paper and NVlabs          MMSegHead   of mmsegmentation, another function

What is computed with them stands in ops/decode.py.

Shapes: B batch, C_i channels of stage i, D decoder_dim, H W map of the first stage, K classes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from segformer.models.layers import affine
from segformer.models.ops.backend import Backend
from segformer.models.ops.batch_norm import BatchNorm
from segformer.models.ops.decode import Head


class LinearEmbed(nn.Module):
    """The projection of one stage; a module of its own because files name it linear_c{i}.proj."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)


class ConvNorm(nn.Module):
    """A 1x1 convolution without bias, and its BatchNorm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = BatchNorm(dim, eps=1e-5, momentum=0.1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # as both originals


def _kept(batch: int, prediction: nn.Conv2d, rate: float) -> Tensor | None:
    """Dropout2d: factors (B, D) of the channels of each image; None where none are dropped."""
    if rate == 0:
        return None
    return prediction.weight.new_empty(batch, prediction.in_channels).bernoulli_(1 - rate).div_(1 - rate)


class AllMLPHead(nn.Module):
    """4 maps -> logits at the resolution of the first map."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        decoder_dim: int,
        num_classes: int,
        *,
        ops: Backend,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.dropout = dropout
        self.linear_c1 = LinearEmbed(embed_dims[0], decoder_dim)
        self.linear_c2 = LinearEmbed(embed_dims[1], decoder_dim)
        self.linear_c3 = LinearEmbed(embed_dims[2], decoder_dim)
        self.linear_c4 = LinearEmbed(embed_dims[3], decoder_dim)
        self.linear_fuse = ConvNorm(4 * decoder_dim, decoder_dim)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) in channels-last memory -> logits (B, K, H_1, W_1), likewise."""
        stages = [stage.permute(0, 2, 3, 1) for stage in reversed(maps)]  # c4, c3, c2, c1 as (B, H, W, C)
        projections = (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)
        head = Head(
            projections=[affine(stage.proj) for stage in projections],
            fuse=self.linear_fuse.conv.weight,
            norm=self.linear_fuse.bn,
            keep=_kept(maps[0].shape[0], self.linear_pred, self.dropout * self.training),
            prediction=affine(self.linear_pred),
        )
        return self.ops.decode(stages, head).permute(0, 3, 1, 2)


class MMSegHead(nn.Module):
    """mmsegmentation's head, under its names: norm and ReLU also at each stage, before the resize.

    The ReLU stands between the two convolutions, so that they don't fold into one. What comes behind it does:
    fuse(cat_i(up(x_i))) = sum_i up(F_i x_i), and in eval mode every BatchNorm folds into its convolution.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        decoder_dim: int,
        num_classes: int,
        *,
        ops: Backend,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.dropout = dropout
        self.convs: Iterable[ConvNorm] = nn.ModuleList(ConvNorm(dim, decoder_dim) for dim in embed_dims)  # type: ignore[assignment]
        self.fusion_conv = ConvNorm(len(embed_dims) * decoder_dim, decoder_dim)
        self.conv_seg = nn.Conv2d(decoder_dim, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.constant_(self.conv_seg.bias, 0)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) in channels-last memory -> logits (B, K, H_1, W_1), likewise."""
        stages = [self._activate(conv, stage) for conv, stage in zip(self.convs, maps, strict=True)]
        slices = self.fusion_conv.conv.weight.chunk(len(stages), dim=1)  # c1 first
        head = Head(
            projections=(),
            fuse=torch.cat(slices[::-1], dim=1),
            norm=self.fusion_conv.bn,
            keep=_kept(maps[0].shape[0], self.conv_seg, self.dropout * self.training),
            prediction=affine(self.conv_seg),
        )
        return self.ops.decode(stages[::-1], head).permute(0, 3, 1, 2)

    def _activate(self, layer: ConvNorm, stage: Tensor) -> Tensor:
        """A map (B, C_i, H_i, W_i) -> relu(norm(conv(map))) as (B, H_i, W_i, D)."""
        stage, weight = stage.permute(0, 2, 3, 1), layer.conv.weight.flatten(1)
        if layer.bn.training or not self.ops.fused:
            hidden = self.ops.linear(stage, weight, None).permute(0, 3, 1, 2)
            return layer.bn(hidden).relu().permute(0, 2, 3, 1)
        scale, shift = layer.bn.scale_shift()
        folded, shift = (weight * scale[:, None]).to(stage.dtype), shift.to(stage.dtype)
        return self.ops.linear(stage, folded, shift).relu_()
