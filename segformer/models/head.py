"""The All-MLP decode head of SegFormer: its parameters under the names of the original repository.

What is computed with them stands in ops/decode.py.

Shapes: B batch, C_i channels of stage i, D decoder_dim, H W map of the first stage, K classes.
"""

from collections.abc import Sequence

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


class FuseConv(nn.Module):
    """The 1x1 convolution without bias over the concatenated stages, and its BatchNorm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = BatchNorm(dim, eps=1e-5, momentum=0.1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # as the original


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
        self.linear_fuse = FuseConv(4 * decoder_dim, decoder_dim)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) in channels-last memory -> logits (B, K, H_1, W_1), likewise."""
        keep = None
        if self.training and self.dropout > 0:  # Dropout2d: factors (B, D) of the channels of each image
            keep = self.linear_pred.weight.new_empty(len(maps[0]), self.linear_pred.in_channels)
            keep.bernoulli_(1 - self.dropout).div_(1 - self.dropout)
        stages = [stage.permute(0, 2, 3, 1) for stage in reversed(maps)]  # c4, c3, c2, c1 as (B, H, W, C)
        projections = (self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1)
        head = Head(
            projections=[affine(stage.proj) for stage in projections],
            fuse=self.linear_fuse.conv.weight,
            norm=self.linear_fuse.bn,
            keep=keep,
            prediction=affine(self.linear_pred),
        )
        return self.ops.decode(stages, head).permute(0, 3, 1, 2)
