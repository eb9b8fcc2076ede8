"""SegFormer and the ImageNet classifier of its encoder, and how they are built.

    images (B, C, H, W) -> backbone (MiT) -> 4 maps -> decode_head -> logits (B, K, ceil(H/4), ceil(W/4))

Shapes: B batch, C channels, K classes, H W image.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from segformer.errors import CheckpointError
from segformer.models.backbone import Backbone
from segformer.models.encoders import build_encoder
from segformer.models.head import AllMLPHead, MMSegHead
from segformer.models.mit import init_encoder_weights
from segformer.models.ops.backend import BACKENDS
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.bundle import Metadata, Weights
from segformer.models.weights.class_map import map_classes
from segformer.models.weights.key_maps import ALIGNED
from segformer.models.weights.load import classes_of, load_pretrained, load_weights, weights_of
from segformer.models.weights.read import read_weights
from segformer.models.weights.stem import adapt_stem
from segformer.models.weights.write import write_export


class Network(nn.Module):
    """An encoder for which a subclass has the head."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.metadata = Metadata()  # of the file that it was loaded from
        self.pretrained = ""  # in words, what was loaded from where
        self.backbone = backbone

    def save_pretrained(
        self, path: str | Path, metadata: Metadata | None = None, *, card: Metadata | None = None
    ) -> None:
        """Write a directory that `from_pretrained`, the commands of launch/ and transformers load.

        `metadata` says what the classes are called and how images were normalized; without, it is that of
        the file that the model was loaded from, or the normalization of ImageNet. Weights are saved as
        float32. `card` is its old name.

        Raises:
            ConfigError: `path` holds other files or can't be written, or the metadata doesn't fit.
            CheckpointError: weights are not finite, on the meta device or float64.
        """
        write_export(weights_of(self, self.backbone, metadata or card or self.metadata), Path(path))

    def load(self, weights: Weights) -> Self:
        """The network with these weights and their metadata, in evaluation mode."""
        load_weights(self, weights)
        self.metadata = weights.metadata
        return self.eval()


class SegFormer(Network):
    """The segmentation network."""

    def __init__(self, backbone: Backbone, decode_head: AllMLPHead | MMSegHead, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.decode_head = decode_head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalized -> logits (B, K, ceil(H / 4), ceil(W / 4))."""
        return self.decode_head(self.backbone(images))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        num_classes: int | None = None,
        in_channels: int | None = None,
        stem: str = "zero",
        class_map: Mapping[Any, Any] | None = None,
        ops: str = "fused",
        norm_profile: str | None = None,
        encoder_only: bool = False,
    ) -> "SegFormer":
        """The model of a file, directory or run of any known format (docs/weights.md), in evaluation mode.

        Args:
            path: run, export, Hugging Face directory, .pth of NVlabs or SMP, or the encoder of any of them.
            num_classes: needed where the file has only an encoder; the head is then random.
            in_channels: of the images, where they are others than those of the file, which are RGB then.
            stem: how the first convolution begins on them: zero, mean or repeat; see weights/stem.py.
            class_map: target class -> class of the file, or None for a fresh one; see weights/class_map.py.
            ops: fused or reference.
            norm_profile: LayerNorm epsilons, in place of those that the format is run with.
            encoder_only: leave the head of the file out.

        Raises:
            CheckpointError: the file can't be read, is damaged, of another network or other channels.
            ConfigError: the number of classes is missing or differs, or the class map doesn't fit.
        """
        weights = read_weights(path, encoder_only=encoder_only)
        if class_map is not None:
            weights = map_classes(weights, class_map)
        if weights.arch.kind == "classification":
            weights = weights.encoder()
        if in_channels is not None:
            weights = adapt_stem(weights, in_channels, stem)
        if ALIGNED in weights.notes and weights.arch.kind == "segmentation":
            warnings.warn(f"{path}: {ALIGNED}", stacklevel=2)
        cfg = weights.config(norm_profile, ops)
        return build_model(cfg, classes_of(weights, num_classes)).load(weights)


class MiTClassifier(Network):
    """The ImageNet classifier: the encoder, the mean over the tokens of the last stage, one Linear."""

    def __init__(self, backbone: Backbone, num_classes: int = 1000) -> None:
        super().__init__(backbone, num_classes)
        self.head = nn.Linear(backbone.embed_dims[-1], num_classes)
        init_encoder_weights(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalized -> class scores (B, K)."""
        return self.head(self.backbone(images)[-1].mean(dim=(2, 3)))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, ops: str = "fused", norm_profile: str | None = None
    ) -> "MiTClassifier":
        """The classifier of a file, directory or run of any known format; see SegFormer.from_pretrained."""
        weights = read_weights(path)
        if weights.arch.kind != "classification":
            raise CheckpointError(f"{path} holds no classifier ({weights.arch.kind}); use SegFormer")
        return build_classifier(weights.config(norm_profile, ops), weights.arch.num_classes).load(weights)


def build_model(cfg: ModelConfig, num_classes: int) -> SegFormer:
    """SegFormer for `num_classes` classes, with random weights or those of `cfg.pretrained`.

    Raises ConfigError where `cfg.num_classes` is set and differs, CheckpointError for unfit pretrained
    weights.
    """
    kind, sizes = (MMSegHead if cfg.head == "mmseg" else AllMLPHead), VARIANTS[cfg.variant]
    head = kind(sizes.embed_dims, cfg.head_dim, num_classes, dropout=cfg.dropout, ops=BACKENDS[cfg.ops])
    model = SegFormer(build_encoder(cfg), head, num_classes)
    model.pretrained = load_pretrained(model, cfg, "segmentation", num_classes)
    return model


def build_classifier(cfg: ModelConfig, num_classes: int) -> MiTClassifier:
    """The classifier of `cfg.variant`, with random weights or those of `cfg.pretrained`; as build_model."""
    model = MiTClassifier(build_encoder(cfg), num_classes)
    model.pretrained = load_pretrained(model, cfg, "classification", num_classes)
    return model
