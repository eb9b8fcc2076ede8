"""The interface between an encoder and everything around it.

    images (B, C, H, W) -> 4 maps (B, C_i, H_i, W_i), H_1 = ceil(H / 4), H_(i+1) = ceil(H_i / 2), likewise W

Head, optimizer, weights, operation counts and memory forecast know of an encoder what a Backbone says.
Another one is a file beside mit.py with a subclass, and a row of BACKBONES (encoders.py); a size is a row of
VARIANTS.

Shapes: B batch, C channels, H W image or map.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from segformer.models.variants import VARIANTS, ModelConfig, Variant


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product: of an image (macs, elements in and out), and what all images share."""

    name: str
    macs: int
    moved: int
    weights: int = 0
    shared: int = 0  # macs of a step, whatever its batch
    leads: bool = False  # its input is the image: no gradient

    @classmethod
    def linear(cls, name: str, tokens: int, dim: int, out: int, *, bias: bool = True) -> "Product":
        """A linear map of `tokens` x `dim` to `tokens` x `out`."""
        return cls(name, tokens * dim * out, tokens * (dim + out), dim * out + bias * out)

    @classmethod
    def conv(
        cls, name: str, tokens: int, dim: int, out_tokens: int, out: int, kernel: int, leads: bool = False
    ) -> "Product":
        """A convolution of a map of `tokens` x `dim` to `out_tokens` x `out`."""
        weights = kernel * kernel * dim * out
        return cls(name, out_tokens * weights, tokens * dim + out_tokens * out, weights + out, leads=leads)


class Stage(NamedTuple):
    """The modules of one of the four stages; together they hold all of its parameters."""

    embed: nn.Module
    blocks: Sequence[nn.Module]
    norm: nn.Module


class Backbone(nn.Module, ABC):
    """An encoder of `cfg.variant` with random weights. Its stochastic depth is made of DropPath modules."""

    title: str
    "Name in logs and reports."
    stem: str
    "Parameter (D, C, k, k) that meets the C channels of the image: the weight of the first convolution."

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.config = cfg
        self.embed_dims = VARIANTS[cfg.variant].embed_dims  # channels of the four maps

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W), normalized -> 4 maps in channels-last memory; DataError for anything else."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The four stages, for `optim.frozen_stages` and `optim.layer_decay`."""

    @staticmethod
    @abstractmethod
    def products(variant: Variant, size: tuple[int, int], channels: int) -> list[Product]:
        """Every matrix product of one image of `size` (height, width) and `channels`, in closed form."""
