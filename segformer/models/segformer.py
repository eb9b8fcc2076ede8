"""SegFormer and the ImageNet classifier of its encoder: the variants, their configuration and how they are
built.

    images (B, 3, H, W) -> backbone (MiT) -> 4 maps -> decode_head (All-MLP) -> logits (B, K, ceil(H/4),
    ceil(W/4))

Sizes are those of the code and weights of NVlabs/SegFormer: the MLP ratio is 4 in every stage (Table 6 of the
paper prints 8, 8, 4, 4). Refuses unknown variants and settings with ConfigError and weights of another
architecture with CheckpointError.

Shapes: B batch, K classes, H W image.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segformer.errors import CheckpointError, ConfigError
from segformer.models.backbone import Backbone, DropPath
from segformer.models.encoders import build_encoder
from segformer.models.head import AllMLPHead, FuseConv
from segformer.models.mit import init_encoder_weights
from segformer.models.ops.backend import BACKENDS
from segformer.models.variants import NORM_PROFILES, VARIANTS, ModelConfig
from segformer.models.weights.card import Card
from segformer.models.weights.convert import Weights, read_weights
from segformer.models.weights.names import listed
from segformer.models.weights.save import check_savable, write_hf
from segformer.models.weights.sizes import find_sizes


class SegFormer(nn.Module):
    """The segmentation network."""

    def __init__(self, backbone: Backbone, decode_head: AllMLPHead, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.card = Card()  # names and colours of the classes, normalisation: what a file said
        self.pretrained = ""  # in words, what was loaded from where
        self.backbone = backbone
        self.decode_head = decode_head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, K, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.backbone(images))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        num_classes: int | None = None,
        class_map: Mapping[Any, Any] | None = None,
        ops: str = "fused",
        norm_profile: str | None = None,
        encoder_only: bool = False,
    ) -> "SegFormer":
        """The model of a file or directory of any known format (docs/weights.md), in evaluation mode.

        Args:
            path: export, Hugging Face directory, .pth of NVlabs or SMP, or the encoder of any of them.
            num_classes: needed where the file has only an encoder; the head is then random.
            class_map: target class -> class of the file, or None for a fresh one; see models/remap.py.
            ops: fused or reference.
            norm_profile: LayerNorm epsilons, in place of those that the format is run with.
            encoder_only: leave the head of the file out.

        Raises:
            CheckpointError: the file can't be read, is damaged or of another network.
            ConfigError: the number of classes is missing or differs, or the class map doesn't fit.
        """
        weights = read_weights(path, encoder_only=encoder_only)
        if class_map is not None:
            weights = weights.mapped(class_map)
        classes = weights.sizes.num_classes if weights.sizes.kind == "segmentation" else num_classes
        if classes is None:
            raise ConfigError(f"{path} has no segmentation head; give num_classes for a fresh one")
        if num_classes not in (None, classes):
            raise ConfigError(
                f"{path} has {classes} classes, num_classes={num_classes}; give class_map, such as "
                f"{{k: None for k in range({num_classes})}} for {num_classes} fresh ones"
            )
        model = build_model(weights.config(norm_profile, ops), classes)
        _load(model, weights, keep_head=weights.sizes.kind == "segmentation")
        model.card = weights.card
        return model.eval()

    def save_pretrained(self, path: str | Path, card: Card | None = None) -> None:
        """Write a directory that `from_pretrained`, the commands of launch/ and transformers load.

        `card` says what the classes are called and how images were normalised; without, it is what a file
        said that the model was loaded from, or nothing, and the normalisation of ImageNet. Weights are saved
        as float32. What could not be read back is not written, and replaces nothing.

        Raises:
            ConfigError: `path` holds other files or can't be written, or the card doesn't fit.
            CheckpointError: weights are not finite, on the meta device or float64.
        """
        check_savable(self.state_dict())
        weights = replace(_weights_of(self, self.backbone), card=card or self.card)
        write_hf(
            weights,
            Path(path),
            section={},
            dropout=self.decode_head.dropout,
            drop_path_rate=_drop_path_rate_of(self.backbone),
        )


class MiTClassifier(nn.Module):
    """The ImageNet classifier: the encoder, the mean over the tokens of the last stage, one Linear."""

    def __init__(self, backbone: Backbone, num_classes: int = 1000) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.card = Card()  # as in SegFormer
        self.pretrained = ""
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims[-1], num_classes)
        init_encoder_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> class scores (B, K)."""
        return self.head(self.backbone(images)[-1].mean(dim=(2, 3)))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, ops: str = "fused", norm_profile: str | None = None
    ) -> "MiTClassifier":
        """The ImageNet classifier of a file or directory of any known format, in evaluation mode.

        Raises CheckpointError where it can't be read, is damaged or no classifier.
        """
        weights = read_weights(path)
        if weights.sizes.kind != "classification" or weights.sizes.num_classes is None:
            raise CheckpointError(f"{path} holds no classifier ({weights.sizes.kind}); use SegFormer")
        model = cls(build_encoder(weights.config(norm_profile, ops)), weights.sizes.num_classes)
        load_strict(model, weights.state, source=str(path))
        model.card = weights.card
        return model.eval()

    def save_pretrained(self, path: str | Path, card: Card | None = None) -> None:
        """Write a directory that `from_pretrained` and transformers load; see SegFormer.save_pretrained."""
        check_savable(self.state_dict())
        weights = replace(_weights_of(self, self.backbone), card=card or self.card)
        write_hf(weights, Path(path), section={}, drop_path_rate=_drop_path_rate_of(self.backbone))


def _check_classes(cfg: ModelConfig, num_classes: int) -> None:
    if cfg.num_classes is not None and cfg.num_classes != num_classes:
        raise ConfigError(
            f"model.num_classes={cfg.num_classes}, but the data set has {num_classes} classes; use null"
        )


def build_model(cfg: ModelConfig, num_classes: int) -> SegFormer:
    """SegFormer for `num_classes` classes, with random weights or those of `cfg.pretrained`.

    Raises ConfigError where `cfg.num_classes` is set and differs, CheckpointError for unfit pretrained
    weights.
    """
    _check_classes(cfg, num_classes)
    variant = VARIANTS[cfg.variant]
    head = AllMLPHead(
        variant.embed_dims,
        cfg.decoder_dim or variant.decoder_dim,
        num_classes,
        dropout=cfg.dropout,
        ops=BACKENDS[cfg.ops],
    )
    model = SegFormer(build_encoder(cfg), head, num_classes)
    if cfg.pretrained:
        model.pretrained = load_pretrained(model, cfg.pretrained, cfg.variant)
    return model


def build_classifier(cfg: ModelConfig, num_classes: int) -> MiTClassifier:
    """The classifier of `cfg.variant`, with random weights or those of `cfg.pretrained`; as build_model."""
    _check_classes(cfg, num_classes)
    model = MiTClassifier(build_encoder(cfg), num_classes)
    if cfg.pretrained:
        model.pretrained = load_pretrained(model, cfg.pretrained, cfg.variant)
    return model


def initialize(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give a model built on the meta device its memory on `device` and new random weights.

        with torch.device("meta"):
            model = build_model(ModelConfig(variant="b5_w4"), 150)  # 1.3 billion parameters, no memory

    The weights have the distributions of a model built directly, drawn in another order.
    """
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Backbone | FuseConv):
            module.initialize()
        elif isinstance(module, MiTClassifier):
            init_encoder_weights(module.head)


def load_pretrained(model: SegFormer | MiTClassifier, path: str | Path, variant: str = "") -> str:
    """Load the encoder of a file into `model`, and its head where it is of the same kind and as many classes.

    `path` is a file or directory of any format that `read_weights` knows. SegFormer takes the encoder of an
    ImageNet classifier and the other way round. Returns in words what was loaded.

    Raises:
        CheckpointError: the weights are not of `variant`, where it is given; or naming what is missing or of
            another shape.
    """
    weights = read_weights(path)
    sizes = weights.sizes
    if variant and sizes.variant != variant:
        raise CheckpointError(
            f"{path} is {sizes.variant}, this model is {variant}; use model={sizes.variant} or other weights"
        )
    same_kind = sizes.kind == ("segmentation" if isinstance(model, SegFormer) else "classification")
    keep_head = same_kind and sizes.num_classes == model.num_classes
    _load(model, weights, keep_head=keep_head)
    what = f"{sizes.variant} of {path} ({weights.title}): encoder"
    if keep_head:
        what += " and head"
    else:
        there = f", which has {sizes.num_classes} classes there," if same_kind else ""
        what += f"; the head{there} is new, for {model.num_classes} classes"
    own = _profile_of(model.backbone)
    if weights.norm_profile not in (own, None):
        what += f"; LayerNorm epsilons are those of {own}, the weights had those of {weights.norm_profile}"
    return what


def _load(model: SegFormer | MiTClassifier, weights: Weights, *, keep_head: bool) -> None:
    prefixes = ("backbone.", "decode_head.", "head.") if keep_head else ("backbone.",)
    state = {name: tensor for name, tensor in weights.state.items() if name.startswith(prefixes)}
    source = f"{weights.source}, which is {weights.sizes.variant},"
    load_strict(model, state, source=source, prefixes=prefixes)


def _weights_of(model: nn.Module, backbone: Backbone) -> Weights:
    """A model as `read_weights` would find it in an export."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return Weights(
        source="the model",
        state=state,
        sizes=find_sizes(state),
        format="ours",
        norm_profile=_profile_of(backbone),
    )


def _profile_of(backbone: Backbone) -> str | None:
    eps = {name: norm.eps for name, norm in backbone.named_modules() if isinstance(norm, nn.LayerNorm)}
    found = (eps["norm1"], eps["patch_embed1.norm"])
    return next((name for name, pair in NORM_PROFILES.items() if pair == found), None)


def _drop_path_rate_of(backbone: Backbone) -> float:
    rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
    return round(rates[-1], 12)  # that of the last block, without what its ramp rounded


def load_strict(
    model: nn.Module, state: dict[str, Tensor], *, source: str, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Load `state` into the parameters and buffers of `model` whose names start with one of `prefixes`, all
    of them.

    Raises CheckpointError naming every tensor that is missing, unexpected or of another shape.
    """
    check_strict(model, state, source=source, prefixes=prefixes)
    model.load_state_dict(state, strict=False)


def check_strict(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    prefixes: tuple[str, ...] = ("",),
    do: str = "check model.variant and model.decoder_dim",
) -> None:
    """What `load_strict` refuses, without loading; `model` may be on the meta device. `do`: what helps."""
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
        problems.append(do)
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}")
