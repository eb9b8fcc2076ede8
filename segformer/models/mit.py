"""MiT, the Mix Transformer encoder of SegFormer (arXiv 2105.15203, sections 3.1 and 3.2).

    images -> 4 x [OverlapPatchEmbed -> Block x depth -> LayerNorm] -> 4 maps
    Block:  x + attn(norm1(x)),  x + mlp(norm2(x)),  each branch under stochastic depth
    attn:   queries from all tokens, keys and values from tokens reduced by sr_ratio in each direction
    mlp:    fc1 -> depthwise 3x3 -> GELU -> fc2

Parameter names are those of the original repository (NVlabs/SegFormer). The implementation is our own.

Some child modules only hold parameters, which the operation of their parent reads: norm1, norm2, q, sr, fc1,
dwconv and fc2. They are never called, so forward hooks on them stay silent, and a module that computes
otherwise in the place of q, sr, fc1, dwconv or fc2 (LoRA, a quantized Linear) is refused with TypeError
(layers.affine). Hook or wrap a Block; weights changed in place and parametrizations have their effect.

Refuses images so small that the reduction of a stage leaves no key: a side below 29 pixels for MiT-B0..B5.

Shapes: B batch, C channels, H W map of the stage, N = H * W tokens, M reduced tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segformer.errors import DataError
from segformer.models.backbone import Backbone, Product, Stage
from segformer.models.layers import DropPath, Linear, affine
from segformer.models.ops.backend import BACKENDS, Backend
from segformer.models.variants import NORM_PROFILES, VARIANTS, ModelConfig, Variant

# (kernel, stride, padding) of the four patch embeddings
PATCH_GEOMETRY = ((7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1))


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

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, norm_eps: float, ops: Backend) -> None:
        super().__init__()
        self.ops = ops
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, ops)
        self.kv = Linear(dim, 2 * dim, ops)
        self.proj = Linear(dim, dim, ops)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, tokens: Tensor, size: tuple[int, int], norm: nn.LayerNorm) -> Tensor:
        """`norm`, then attention, of tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        parts = [*affine(self.q), *(affine(self.sr) if self.sr_ratio > 1 else ())]
        query, reduced = self.ops.norm_query_reduce(tokens, size, (norm.weight, norm.bias, norm.eps), parts)
        if self.sr_ratio > 1:
            reduced = self.norm(reduced)
        return self.proj(self.ops.sdpa(query, self.kv(reduced), self.num_heads))


class DWConv(nn.Module):
    """The parameters of the depthwise 3x3 convolution; a module of its own because files name it dwconv."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class MixFFN(nn.Module):
    """Linear, depthwise 3x3 convolution (which carries the positional information), GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, ops: Backend) -> None:
        super().__init__()
        self.ops = ops
        self.fc1 = Linear(dim, hidden_dim, ops)
        self.dwconv = DWConv(hidden_dim)
        self.fc2 = Linear(hidden_dim, dim, ops)

    def forward(self, tokens: Tensor, size: tuple[int, int], norm: nn.LayerNorm) -> Tensor:
        """`norm`, then Mix-FFN, of tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        layers = (self.fc1, self.dwconv.dwconv, self.fc2)
        parts = [part for layer in layers for part in affine(layer)]
        return self.ops.prenorm_ffn(tokens, size, (norm.weight, norm.bias, norm.eps), parts)


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
        eps: tuple[float, float],
        ops: Backend,
    ) -> None:
        """`eps`: of the norms before the branches, and of that after the reduction."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps[0])
        self.attn = EfficientSelfAttention(dim, num_heads, sr_ratio, eps[1], ops)
        self.norm2 = nn.LayerNorm(dim, eps=eps[0])
        self.mlp = MixFFN(dim, mlp_ratio * dim, ops)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of a map of `size` -> (B, N, C)."""
        tokens = self.drop_path(tokens, self.attn(tokens, size, self.norm1))
        return self.drop_path(tokens, self.mlp(tokens, size, self.norm2))


class MixTransformer(Backbone):
    """The encoder: four stages at 1/4, 1/8, 1/16 and 1/32 of the image.

    Stochastic depth grows linearly from 0 in the first block to `cfg.drop_path_rate` in the last. In training
    the blocks of the stages (1 to 4) in `cfg.checkpointing` keep their inputs only and run again in the
    backward pass.
    """

    title, stem = "MiT", "patch_embed1.proj.weight"

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        sizes, eps = VARIANTS[cfg.variant], NORM_PROFILES[cfg.norm_profile]
        self.sr_ratios = sizes.sr_ratios
        self.checkpointing = frozenset(cfg.checkpointing)
        last = max(sum(sizes.depths) - 1, 1)
        index, in_dim = 0, cfg.channels
        for stage, dim in enumerate(sizes.embed_dims):
            embed = OverlapPatchEmbed(in_dim, dim, PATCH_GEOMETRY[stage], eps[1])
            blocks = nn.ModuleList(
                Block(
                    dim,
                    sizes.num_heads[stage],
                    sizes.sr_ratios[stage],
                    sizes.mlp_ratios[stage],
                    drop_path=cfg.drop_path_rate * (index + offset) / last,
                    eps=eps,
                    ops=BACKENDS[cfg.ops],
                )
                for offset in range(sizes.depths[stage])
            )
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", blocks)
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=eps[0]))
            index, in_dim = index + sizes.depths[stage], dim
        self.apply(init_encoder_weights)
        # The original begins with biases of 0. Padding is exactly 0, too, so that the first norm would meet
        # tokens without variance and divide by the root of its epsilon: on padded batches the first gradient
        # of this bias was 5e2 to 2e6 (docs/results.md). AdamW's second moment keeps it for thousands of
        # steps, and `engine.grad_clip` would turn it on all others.
        nn.init.trunc_normal_(self.get_parameter("patch_embed1.proj.bias"), std=0.02)

    def stages(self) -> list[Stage]:
        """Patch embedding, blocks and norm of each stage."""
        return [
            Stage(
                self.get_submodule(f"patch_embed{stage}"),
                list(self.get_submodule(f"block{stage}").children()),
                self.get_submodule(f"norm{stage}"),
            )
            for stage in (1, 2, 3, 4)
        ]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W), normalized -> 4 maps (B, C_i, H_i, W_i) in channels-last memory.

        H_1 = ceil(H / 4) and H_(i+1) = ceil(H_i / 2); likewise W. DataError for anything else and for images
        that are too small.
        """
        channels = self.config.channels
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise DataError(
                f"images of shape {tuple(images.shape)}, {images.dtype}; give (B, {channels}, H, W) in "
                "floating point, normalized"
            )
        maps = images.contiguous(memory_format=torch.channels_last)
        outputs = []
        for stage, (sr_ratio, (embed, blocks, norm)) in enumerate(
            zip(self.sr_ratios, self.stages(), strict=True), start=1
        ):
            tokens, size = embed(maps)
            if min(size) < sr_ratio:
                raise DataError(
                    f"images of {images.shape[2]} x {images.shape[3]} pixels are too small: stage {stage} "
                    f"reduces a map of {size[0]} x {size[1]} by {sr_ratio}; use sides of 32 pixels or more"
                )
            again = stage in self.checkpointing and self.training and torch.is_grad_enabled()
            for block in blocks:
                if again:
                    tokens = checkpoint(block, tokens, size, use_reentrant=False)
                else:
                    tokens = block(tokens, size)
            maps = norm(tokens).unflatten(1, size).permute(0, 3, 1, 2)  # a view
            outputs.append(maps)
        return outputs

    @staticmethod
    def products(variant: Variant, size: tuple[int, int], channels: int) -> list[Product]:
        """Matrix products of one image; those of a block are of tokens and `reduced` tokens."""
        found, in_dim = [], channels
        for stage, dim in enumerate(variant.embed_dims):
            kernel, stride, _ = PATCH_GEOMETRY[stage]
            ratio, hidden = variant.sr_ratios[stage], variant.mlp_ratios[stage] * dim
            pixels, size = size[0] * size[1], (-(-size[0] // stride), -(-size[1] // stride))
            tokens, reduced = size[0] * size[1], (size[0] // ratio) * (size[1] // ratio)
            found.append(
                Product.conv(f"embed{stage + 1}", pixels, in_dim, tokens, dim, kernel, leads=stage == 0)
            )
            for block in range(variant.depths[stage]):
                place = f"block{stage + 1}.{block}"
                if ratio > 1:
                    found.append(Product.conv(f"{place}.sr", tokens, dim, reduced, dim, ratio))
                found += [
                    Product.linear(f"{place}.q", tokens, dim, dim),
                    Product.linear(f"{place}.kv", reduced, dim, 2 * dim),
                    Product(f"{place}.attention", 2 * tokens * reduced * dim, 2 * (tokens + reduced) * dim),
                    Product.linear(f"{place}.proj", tokens, dim, dim),
                    Product.linear(f"{place}.fc1", tokens, dim, hidden),
                    Product(f"{place}.dwconv", 9 * tokens * hidden, 2 * tokens * hidden, 10 * hidden),
                    Product.linear(f"{place}.fc2", tokens, hidden, dim),
                ]
            in_dim = dim
        return found


def init_encoder_weights(module: nn.Module) -> None:
    """Initialize as the original: Linear trunc_normal 0.02, Conv normal sqrt(2 / fan_out), norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
