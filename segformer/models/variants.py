"""The sizes of every SegFormer, and the configuration that chooses one.

b0 to b5 are those of the code and weights of NVlabs/SegFormer: the MLP ratio is 4 in every stage (Table 6 of
the paper prints 8, 8, 4, 4). b6, b5_w2 and b5_w4 are ours, for models that need ZeRO-3: the same rules, heads
of 64 channels, wider. Refuses unknown variants and settings with ConfigError.
"""

from dataclasses import dataclass, field

from segformer.errors import ConfigError, at_least, within


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The sizes of one network: a row of VARIANTS is all that a new one needs."""

    backbone: str = "mit"
    "Row of BACKBONES (encoders.py)."
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_dim: int
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4)


_WIDE = (64, 128, 320, 512)

VARIANTS = {
    "b0": Variant(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), decoder_dim=256),
    "b1": Variant(embed_dims=_WIDE, depths=(2, 2, 2, 2), decoder_dim=256),
    "b2": Variant(embed_dims=_WIDE, depths=(3, 4, 6, 3), decoder_dim=768),
    "b3": Variant(embed_dims=_WIDE, depths=(3, 4, 18, 3), decoder_dim=768),
    "b4": Variant(embed_dims=_WIDE, depths=(3, 8, 27, 3), decoder_dim=768),
    "b5": Variant(embed_dims=_WIDE, depths=(3, 6, 40, 3), decoder_dim=768),
    # b3's depths, twice as wide
    "b6": Variant(
        embed_dims=(128, 256, 640, 1024), depths=(3, 4, 18, 3), decoder_dim=1024, num_heads=(2, 4, 10, 16)
    ),
    # b5's depths, twice and four times as wide
    "b5_w2": Variant(
        embed_dims=(128, 256, 640, 1024), depths=(3, 6, 40, 3), decoder_dim=1536, num_heads=(2, 4, 10, 16)
    ),
    "b5_w4": Variant(
        embed_dims=(256, 512, 1280, 2048), depths=(3, 6, 40, 3), decoder_dim=2048, num_heads=(4, 8, 20, 32)
    ),
}

# (block and stage norms, norms after patch embedding and after reduction). transformers uses 1e-5 everywhere
# whatever its config says; mmsegmentation 1e-6 everywhere.
NORM_PROFILES = {"original": (1e-6, 1e-5), "hf": (1e-5, 1e-5), "mmseg": (1e-6, 1e-6)}
OPS = ("fused", "reference")
# Decode head -> its last layer, which predicts the classes.
HEADS = {"segformer": "linear_pred", "mmseg": "conv_seg"}
_MMSEG_DIM = 256  # of all its models
RGB = 3  # channels of the images that published weights take
STEMS = ("zero", "mean", "repeat")
LEAST_SIDE = 32  # pixels of an image that a network takes: the encoder reduces by 32


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which network to build."""

    variant: str = "b0"
    """Size of the network: b0 to b5, or one of the wider b6, b5_w2, b5_w4."""
    num_classes: int | None = None
    """Classes predicted; null takes the number of the data set."""
    in_channels: int | None = None
    """Channels of the images; null takes the number of the data set."""
    stem: str = "zero"
    """How a first convolution that was trained on RGB begins on images of other channels: zero (0 for every
    channel after the third), mean (of the three, everywhere) or repeat (R, G, B, R, G ...); docs/weights.md
    has the rules."""
    head: str = "segformer"
    """Decode head: segformer (the paper's), or mmseg (that of mmsegmentation's models: a BatchNorm and a ReLU
    more at each stage), to go on from weights that have it."""
    decoder_dim: int | None = None
    """Channels of the decode head; null takes the variant's (256 for b0 and b1, 768 above), 256 for mmseg."""
    ops: str = "fused"
    """fused: folded head and fused operations (same function and parameters, a third of the work of b2);
    reference: the network as the paper writes it, one library call at a time."""
    norm_profile: str = "original"
    """LayerNorm epsilons: original, hf (to compare with transformers) or mmseg."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0 in the first."""
    dropout: float = 0.1
    """Share of channels of the decode head dropped per image before the prediction, in training."""
    checkpointing: list[int] = field(default_factory=list)
    """Stages (1 to 4) whose blocks are run again in the backward pass instead of kept: less memory, about a
    third more time in those stages."""
    pretrained: str = ""
    """File or directory of weights of any known format (docs/weights.md) to start from; empty starts from
    random weights, `required` (in a recipe) refuses to. The encoder is always loaded, the head where the file
    has one with as many classes."""

    def __post_init__(self) -> None:
        known: tuple[str, ...]
        choices = {"variant": (*VARIANTS,), "norm_profile": (*NORM_PROFILES,), "ops": OPS, "stem": STEMS}
        choices["head"] = (*HEADS,)
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"model.{name}={value} is unknown; use one of {', '.join(known)}")
        if self.pretrained == "required":
            raise ConfigError(
                "model.pretrained must be given, because this recipe starts from trained weights; add "
                "model.pretrained=<file or directory> (any format of docs/weights.md)"
            )
        if wrong := sorted(set(self.checkpointing) - {1, 2, 3, 4}):
            raise ConfigError(f"model.checkpointing has {wrong}; give stages from 1 to 4, as [1,2]")
        at_least(self, "model.", num_classes=1)
        within(self, "model.", decoder_dim=(1, 2**16), in_channels=(1, 2**10))
        for name in ("drop_path_rate", "dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ConfigError(f"model.{name}={value} must be at least 0 and below 1")

    @property
    def channels(self) -> int:
        """Channels of the images that the network takes: RGB where nothing says otherwise."""
        return self.in_channels or RGB

    @property
    def head_dim(self) -> int:
        """Channels of the decode head."""
        usual = _MMSEG_DIM if self.head == "mmseg" else VARIANTS[self.variant].decoder_dim
        return self.decoder_dim or usual
