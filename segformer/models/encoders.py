"""The encoders to choose from: a row of BACKBONES and a file each, with their sizes in VARIANTS."""

from segformer.models.backbone import Backbone
from segformer.models.mit import MixTransformer
from segformer.models.variants import VARIANTS, ModelConfig

BACKBONES: dict[str, type[Backbone]] = {"mit": MixTransformer}


def build_encoder(cfg: ModelConfig) -> Backbone:
    """The encoder of `cfg.variant` with random weights."""
    return BACKBONES[VARIANTS[cfg.variant].backbone](cfg)


def stem_of(variant: str) -> str:
    """Name, in a network of `variant`, of the parameter that meets the channels of the image."""
    return f"backbone.{BACKBONES[VARIANTS[variant].backbone].stem}"
