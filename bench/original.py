"""SegFormer as the paper describes it (arXiv 2105.15203, sections 3.1 to 3.3), operation by operation.

This is what the faster forms are checked with and measured against, so nothing in it is fused, folded or
laid out for speed: tokens (B, N, C) for Linear and LayerNorm, maps (B, C, H, W) for convolutions, and a
copy between them; attention as two matrix products around a softmax; a head that enlarges four maps of
decoder_dim channels and concatenates them; a loss that enlarges the logits.

Parameters have the names and shapes of the published files, so every such state loads strictly.

Shapes: B batch, C channels, H W map, N = H * W tokens, M reduced tokens, d channels of a head, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.models.variants import Variant

IGNORED = 255


def to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) -> map (B, C, H, W), copied."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *size).contiguous()


def to_tokens(maps: Tensor) -> Tensor:
    """Map (B, C, H, W) -> tokens (B, N, C), a view."""
    return maps.flatten(2).transpose(1, 2)


class Embedding(nn.Module):
    """Overlapping patches: a strided convolution and a LayerNorm (section 3.1)."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Maps (B, C, H, W) -> tokens (B, N, C), their (H, W)."""
        maps = self.proj(maps)
        return self.norm(to_tokens(maps)), (maps.shape[2], maps.shape[3])


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with keys and values of a map shortened by `ratio` (equations 1 and 2)."""

    def __init__(self, dim: int, heads: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, ratio)
            self.norm = nn.LayerNorm(dim, eps=eps)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        short = tokens
        if self.ratio > 1:
            short = self.norm(to_tokens(self.sr(to_map(tokens, size))))  # (B, M, C)
        key, value = self.kv(short).chunk(2, dim=-1)
        query, key, value = self._split(self.q(tokens)), self._split(key), self._split(value)
        scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5  # (B, heads, N, M)
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Depthwise(nn.Module):
    """The 3x3 depthwise convolution; a module of its own because files name it dwconv.dwconv."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)


class MixFFN(nn.Module):
    """MLP(GELU(Conv3x3(MLP(x)))) (equation 3)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = Depthwise(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        hidden = to_tokens(self.dwconv.dwconv(to_map(self.fc1(tokens), size)))
        return self.fc2(F.gelu(hidden))


class Block(nn.Module):
    """Attention and Mix-FFN, each behind a LayerNorm and beside an identity that may skip it (`drop`)."""

    def __init__(
        self, dim: int, heads: int, ratio: int, mlp: int, drop: float, eps: tuple[float, float]
    ) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(dim, eps=eps[0])
        self.attn = Attention(dim, heads, ratio, eps[1])
        self.norm2 = nn.LayerNorm(dim, eps=eps[0])
        self.mlp = MixFFN(dim, mlp * dim)

    def _skip(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch / (1 - self.drop) * keep.to(branch.dtype)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        tokens = tokens + self._skip(self.attn(self.norm1(tokens), size))
        return tokens + self._skip(self.mlp(self.norm2(tokens), size))


class Encoder(nn.Module):
    """Four stages at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, variant: Variant, drop: float, eps: tuple[float, float]) -> None:
        super().__init__()
        last, index, in_dim = max(sum(variant.depths) - 1, 1), 0, 3
        for stage, dim in enumerate(variant.embed_dims):
            kernel, stride = (7, 4) if stage == 0 else (3, 2)
            blocks = []
            for _ in range(variant.depths[stage]):
                shape = (dim, variant.num_heads[stage], variant.sr_ratios[stage], variant.mlp_ratios[stage])
                blocks.append(Block(*shape, drop * index / last, eps))
                index += 1
            self.add_module(f"patch_embed{stage + 1}", Embedding(in_dim, dim, kernel, stride, eps[1]))
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=eps[0]))
            in_dim = dim

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> 4 maps (B, C_i, H_i, W_i)."""
        found = []
        for stage in range(1, 5):
            tokens, size = self.get_submodule(f"patch_embed{stage}")(maps)
            for block in self.get_submodule(f"block{stage}").children():
                tokens = block(tokens, size)
            maps = to_map(self.get_submodule(f"norm{stage}")(tokens), size)
            found.append(maps)
        return found


class Projection(nn.Module):
    """A Linear; a module of its own because files name it linear_c{i}.proj."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)


class Fusion(nn.Module):
    """1x1 convolution, BatchNorm, ReLU."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)


class Head(nn.Module):
    """The All-MLP decoder (section 3.2, equation 4)."""

    def __init__(self, variant: Variant, num_classes: int, dropout: float) -> None:
        super().__init__()
        dim = variant.decoder_dim
        for stage, channels in enumerate(variant.embed_dims, start=1):
            self.add_module(f"linear_c{stage}", Projection(channels, dim))
        self.linear_fuse = Fusion(4 * dim, dim)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """4 maps (B, C_i, H_i, W_i) -> logits (B, K, H_1, W_1)."""
        sizes = [(stage.shape[2], stage.shape[3]) for stage in maps]
        enlarged = []
        for stage in (3, 2, 1, 0):
            project = self.get_submodule(f"linear_c{stage + 1}.proj")
            wide = to_map(project(to_tokens(maps[stage])), sizes[stage])
            enlarged.append(F.interpolate(wide, size=sizes[0], mode="bilinear", align_corners=False))
        fused = self.linear_fuse.bn(self.linear_fuse.conv(torch.cat(enlarged, dim=1)))
        return self.linear_pred(self.dropout(F.relu(fused)))


class Original(nn.Module):
    """The segmentation network; `eps` are those of (block and stage norms, norms after convolutions)."""

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        *,
        drop: float = 0.0,
        eps: tuple[float, float] = (1e-6, 1e-5),
    ) -> None:
        super().__init__()
        self.backbone = Encoder(variant, drop, eps)
        self.decode_head = Head(variant, num_classes, drop)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.backbone(images))


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, K, h, w), enlarged to target (B, H, W), where that isn't 255."""
    size = (target.shape[1], target.shape[2])
    enlarged = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return F.cross_entropy(enlarged, target, ignore_index=IGNORED)
