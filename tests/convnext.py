"""A second backbone, ConvNeXt (arXiv 2201.03545), as somebody would add it: this file, one row, one size.

python tests/convnext.py <overrides>    launch/train.py with it
"""

import sys

import torch
from torch import Tensor, nn

from segformer.job import run_job
from segformer.models.backbone import Backbone, Product, Stage
from segformer.models.encoders import BACKBONES
from segformer.models.layers import DropPath
from segformer.models.variants import VARIANTS, ModelConfig, Variant
from segformer.training.config import RunConfig, compose

WIDTHS = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride of the embeddings


class Embed(nn.Module):
    """Strided convolution and LayerNorm: maps (B, C, H, W) -> (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(self.proj(maps).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, two linear maps, layer scale."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.norm(self.dwconv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.drop_path(maps, self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(out))))


class ConvNeXt(Backbone):
    title, stem = "ConvNeXt", "embeds.0.proj.weight"

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        widths, depths = self.embed_dims, VARIANTS[cfg.variant].depths
        rates = iter(torch.linspace(0, cfg.drop_path_rate, sum(depths), device="cpu").tolist())
        dims = zip((cfg.channels, *widths), widths, WIDTHS, strict=False)
        self.embeds = nn.ModuleList(Embed(in_dim, dim, *width) for in_dim, dim, width in dims)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, next(rates)) for _ in range(depth))
            for dim, depth in zip(widths, depths, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                nn.init.ones_(module.gamma)

    def stages(self) -> list[Stage]:
        return [Stage(*parts) for parts in zip(self.embeds, self.blocks, self.norms, strict=True)]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, outputs = images, []
        for embed, blocks, norm in self.stages():
            out = embed(maps)
            for block in blocks:
                out = block(out)
            maps = norm(out).permute(0, 3, 1, 2)
            outputs.append(maps)
        return outputs

    @staticmethod
    def products(variant: Variant, size: tuple[int, int], channels: int) -> list[Product]:
        found, in_dim = [], channels
        for stage, dim in enumerate(variant.embed_dims):
            kernel, stride = WIDTHS[stage]
            before, size = size[0] * size[1], (-(-size[0] // stride), -(-size[1] // stride))
            tokens = size[0] * size[1]
            found.append(Product.conv("embed", before, in_dim, tokens, dim, kernel, leads=stage == 0))
            for _ in range(variant.depths[stage]):
                found += [
                    Product("dwconv", 49 * tokens * dim, 2 * tokens * dim, 50 * dim),
                    Product.linear("pwconv1", tokens, dim, 4 * dim),
                    Product.linear("pwconv2", tokens, 4 * dim, dim),
                ]
            in_dim = dim
        return found


ROW = ("convnext", ConvNeXt)
SIZE = ("pico", Variant(backbone="convnext", embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), decoder_dim=16))

if __name__ == "__main__":
    BACKBONES.update([ROW])
    VARIANTS.update([SIZE])
    run_job(compose(RunConfig, "config", sys.argv[1:]))
