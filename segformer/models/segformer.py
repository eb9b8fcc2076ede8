"""SegFormer and the ImageNet classifier of its encoder: the variants, their configuration and how they are
built.

    images (B, 3, H, W) -> backbone (MiT) -> 4 maps -> decode_head (All-MLP) -> logits (B, K, ceil(H/4),
    ceil(W/4))

Sizes are those of the code and weights of NVlabs/SegFormer: the MLP ratio is 4 in every stage (Table 6 of the
paper prints 8, 8, 4, 4). Refuses unknown variants and settings with ConfigError and weights of another
architecture with CheckpointError.

Shapes: B batch, K classes, H W image.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from segformer.errors import CheckpointError, ConfigError
from segformer.models.convert import listed, load_hf_directory, load_hf_file
from segformer.models.head import AllMLPHead
from segformer.models.mit import MixTransformer, init_encoder_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The sizes of one SegFormer."""

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
}

# (block and stage norms, norms after patch embedding and after reduction). transformers uses 1e-5 everywhere
# whatever its config says; mmsegmentation 1e-6 everywhere.
NORM_PROFILES = {"original": (1e-6, 1e-5), "hf": (1e-5, 1e-5), "mmseg": (1e-6, 1e-6)}


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which network to build."""

    variant: str = "b0"
    """Size of the network: b0, b1, b2, b3, b4 or b5."""
    num_classes: int | None = None
    """Classes predicted; null takes the number of the data set."""
    decoder_dim: int | None = None
    """Channels of the decode head; null takes the variant's (256 for b0 and b1, 768 above)."""
    folded: bool = True
    """Run the decode head folded (same function and parameters, a third of the work) or as written."""
    norm_profile: str = "original"
    """LayerNorm epsilons: original, hf (to compare with transformers) or mmseg."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last block, growing linearly from 0 in the first."""
    dropout: float = 0.1
    """Share of channels of the decode head dropped per image before the prediction, in training."""
    pretrained: str = ""
    """Export or Hugging Face directory, or its safetensors file, to start from; empty starts from random
    weights. The encoder is always loaded, the head where the file has one with the same number of classes."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"model.variant={self.variant} is unknown; use one of {', '.join(VARIANTS)}")
        if self.norm_profile not in NORM_PROFILES:
            raise ConfigError(
                f"model.norm_profile={self.norm_profile} is unknown; use one of {', '.join(NORM_PROFILES)}"
            )
        for name in ("num_classes", "decoder_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}={value} must be 1 or more, or null")
        for name in ("drop_path_rate", "dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"model.{name}={value} must be at least 0 and below 1")


class SegFormer(nn.Module):
    """The segmentation network."""

    def __init__(self, backbone: MixTransformer, decode_head: AllMLPHead, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.decode_head = decode_head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, K, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.backbone(images))


class MiTClassifier(nn.Module):
    """The ImageNet classifier: the encoder, the mean over the tokens of the last stage, one Linear."""

    def __init__(self, backbone: MixTransformer, num_classes: int = 1000) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims[-1], num_classes)
        init_encoder_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class scores (B, K)."""
        return self.head(self.backbone(images)[-1].mean(dim=(2, 3)))


def build_encoder(cfg: ModelConfig) -> MixTransformer:
    """The encoder of `cfg.variant` with random weights."""
    variant = VARIANTS[cfg.variant]
    norm_eps, embed_norm_eps = NORM_PROFILES[cfg.norm_profile]
    return MixTransformer(
        variant.embed_dims,
        variant.depths,
        variant.num_heads,
        variant.sr_ratios,
        variant.mlp_ratios,
        drop_path_rate=cfg.drop_path_rate,
        norm_eps=norm_eps,
        embed_norm_eps=embed_norm_eps,
    )


def build_model(cfg: ModelConfig, num_classes: int) -> SegFormer:
    """SegFormer for `num_classes` classes, with random weights or those of `cfg.pretrained`.

    Raises ConfigError where `cfg.num_classes` is set and differs, CheckpointError for unfit pretrained
    weights.
    """
    if cfg.num_classes is not None and cfg.num_classes != num_classes:
        raise ConfigError(
            f"model.num_classes={cfg.num_classes}, but the data set has {num_classes} classes; use null"
        )
    variant = VARIANTS[cfg.variant]
    head = AllMLPHead(
        variant.embed_dims,
        cfg.decoder_dim or variant.decoder_dim,
        num_classes,
        dropout=cfg.dropout,
        folded=cfg.folded,
    )
    model = SegFormer(build_encoder(cfg), head, num_classes)
    if cfg.pretrained:
        load_pretrained(model, cfg.pretrained)
    return model


def load_pretrained(model: SegFormer, path: str | Path) -> None:
    """Load the encoder of a file into `model`, and its decode head where that has as many classes.

    `path` is a directory with config.json and model.safetensors, or a safetensors file with Hugging Face
    names. The head of an ImageNet classifier is left out. Raises CheckpointError naming what is missing or of
    another shape.
    """
    state = load_hf_directory(path)[0] if Path(path).is_dir() else load_hf_file(path)
    predictor = state.get("decode_head.linear_pred.weight")
    keep_head = predictor is not None and predictor.shape[0] == model.num_classes
    wanted = ("backbone.", "decode_head.") if keep_head else ("backbone.",)
    load_strict(
        model,
        {name: tensor for name, tensor in state.items() if name.startswith(wanted)},
        source=str(path),
        prefixes=wanted,
    )


def load_strict(
    model: nn.Module, state: dict[str, Tensor], *, source: str, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Load `state` into the parameters and buffers of `model` whose names start with one of `prefixes`, all
    of them.

    Raises CheckpointError naming every tensor that is missing, unexpected or of another shape.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    if unexpected := [name for name in state if name not in own]:
        problems.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    other = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if other:
        problems.append(f"{len(other)} of another shape: {listed(other)}")
    if problems:
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}; check model.variant")
    model.load_state_dict(state, strict=False)
