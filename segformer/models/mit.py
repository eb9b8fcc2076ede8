"""MiT, the Mix Transformer encoder of SegFormer (arXiv 2105.15203, sections 3.1 and 3.2).

    images -> 4 x [OverlapPatchEmbed -> Block x depth -> LayerNorm] -> 4 maps
    Block:  x + attn(norm1(x)),  x + mlp(norm2(x)),  each branch under stochastic depth
    attn:   queries from all tokens, keys and values from tokens reduced by sr_ratio in each direction
    mlp:    fc1 -> depthwise 3x3 -> GELU -> fc2

Parameter names are those of the original repository (NVlabs/SegFormer). The implementation is our own.
Refuses images so small that the reduction of a stage leaves no key: a side below 29 pixels for MiT-B0..B5.

Shapes: B batch, C channels, H W map of the stage, N = H * W tokens, M reduced tokens.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segformer.errors import DataError
from segformer.models import ops

# (kernel, stride, padding) of the four patch embeddings
PATCH_GEOMETRY = ((7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1))


class DropPath(nn.Module):
    """Stochastic depth: residual + branch, the branch dropped per sample at `rate` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """Both (B, N, C). The kept branches are scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return residual + branch
        keep = 1 - self.rate
        scale = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep).div_(keep)
        return torch.addcmul(residual, branch, scale)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping windows, then LayerNorm."""

    def __init__(self, in_dim: int, dim: int, geometry: tuple[int, int, int], norm_eps: float) -> None:
        super().__init__()
        kernel, stride, padding = geometry
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Maps (B, C, H, W) in channels-last memory -> tokens (B, N, C) and their (H, W)."""
        out = self.proj(maps)
        size = (out.shape[2], out.shape[3])
        return self.norm(out.permute(0, 2, 3, 1).flatten(1, 2)), size


class EfficientSelfAttention(nn.Module):
    """Attention whose keys and values come from sr_ratio x sr_ratio times fewer tokens."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        reduced = tokens
        if self.sr_ratio > 1:
            reduced = self.norm(ops.reduce_tokens(tokens, size, self.sr.weight, self.sr.bias))  # (B, M, C)
        return self.proj(ops.attend(self.q(tokens), self.kv(reduced), self.num_heads))


class DWConv(nn.Module):
    """Depthwise 3x3 convolution on tokens; it carries the positional information of the network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        return ops.depthwise_conv(tokens, size, self.dwconv.weight, self.dwconv.bias)


class MixFFN(nn.Module):
    """Linear, depthwise convolution, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DWConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.act = nn.GELU()

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        return self.fc2(self.act(self.dwconv(self.fc1(tokens), size)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: int,
        *,
        drop_path: float,
        norm_eps: float,
        reduction_norm_eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = EfficientSelfAttention(dim, num_heads, sr_ratio, reduction_norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MixFFN(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        tokens = self.drop_path(tokens, self.attn(self.norm1(tokens), size))
        return self.drop_path(tokens, self.mlp(self.norm2(tokens), size))


class MixTransformer(nn.Module):
    """The encoder: four stages at 1/4, 1/8, 1/16 and 1/32 of the image.

    `norm_eps` is the epsilon of block and stage norms, `embed_norm_eps` that of the norms after the patch
    embeddings and after the reduction; the original has 1e-6 and 1e-5. Stochastic depth grows linearly from 0
    in the first block to `drop_path_rate` in the last.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        sr_ratios: Sequence[int],
        mlp_ratios: Sequence[int],
        *,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-6,
        embed_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.embed_dims = tuple(embed_dims)
        self.sr_ratios = tuple(sr_ratios)
        last = max(sum(depths) - 1, 1)
        index, in_dim = 0, 3
        for stage, dim in enumerate(embed_dims):
            embed = OverlapPatchEmbed(in_dim, dim, PATCH_GEOMETRY[stage], embed_norm_eps)
            blocks = nn.ModuleList(
                Block(
                    dim,
                    num_heads[stage],
                    sr_ratios[stage],
                    mlp_ratios[stage],
                    drop_path=drop_path_rate * (index + offset) / last,
                    norm_eps=norm_eps,
                    reduction_norm_eps=embed_norm_eps,
                )
                for offset in range(depths[stage])
            )
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=norm_eps))
            index, in_dim = index + depths[stage], dim
        self.apply(init_encoder_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), normalised -> 4 maps (B, C_i, H_i, W_i) in channels-last memory.

        H_1 = ceil(H / 4) and H_(i+1) = ceil(H_i / 2); likewise W. DataError where an image is too small.
        """
        maps = images.contiguous(memory_format=torch.channels_last)
        outputs = []
        for stage, sr_ratio in enumerate(self.sr_ratios, start=1):
            tokens, size = self.get_submodule(f"patch_embed{stage}")(maps)
            if min(size) < sr_ratio:
                raise DataError(
                    f"images of {images.shape[2]} x {images.shape[3]} pixels are too small: stage {stage} "
                    f"reduces a map of {size[0]} x {size[1]} by {sr_ratio}; use sides of 32 pixels or more"
                )
            for block in self.get_submodule(f"block{stage}").children():
                tokens = block(tokens, size)
            tokens = self.get_submodule(f"norm{stage}")(tokens)
            maps = tokens.unflatten(1, size).permute(0, 3, 1, 2)  # a view
            outputs.append(maps)
        return outputs


def init_encoder_weights(module: nn.Module) -> None:
    """Initialise as the original: Linear trunc_normal 0.02, Conv normal sqrt(2 / fan_out), norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
