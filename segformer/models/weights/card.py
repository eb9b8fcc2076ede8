"""Model cards: what files of weights say beside the tensors.

    config.json of transformers    sizes, id2label; preprocessor_config.json: image_mean, image_std
    section "segformer" in it      our exports: variant, norm_profile, classes, palette, mean, std and more
    "meta" of a .pth               CLASSES and PALETTE (NVlabs, mmseg 0.x), dataset_meta (mmseg 1.x), and the
                                   same section "segformer" where we wrote the file

What a file does not say is None. Refuses, with CheckpointError, a damaged section and a config.json of
another network than the weights or than ours.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from segformer.errors import CheckpointError
from segformer.models.variants import VARIANTS

# The normalisation of every published SegFormer: NVlabs, transformers' default, mmsegmentation, SMP.
IMAGENET_MEAN = [123.675, 116.28, 103.53]
IMAGENET_STD = [58.395, 57.12, 57.375]

_ARCHITECTURES = {
    "segmentation": "SegformerForSemanticSegmentation",
    "classification": "SegformerForImageClassification",
    "encoder": "SegformerModel",
}


@dataclass(kw_only=True, slots=True)
class Card:
    """What the input and the output of a model mean."""

    classes: list[str] | None = None
    "Names of the K classes, in the order of the logits."
    palette: list[list[int]] | None = None
    "K colours, RGB."
    mean: list[float] | None = None
    "Subtracted from each channel of an RGB image of 0 to 255."
    std: list[float] | None = None
    "Divides each channel after that."

    def section(self) -> dict[str, Any]:
        """The card as entries of a section "segformer"."""
        return {
            "classes": self.classes,
            "palette": self.palette,
            "mean": IMAGENET_MEAN if self.mean is None else self.mean,
            "std": IMAGENET_STD if self.std is None else self.std,
        }


def card_of_section(section: Mapping[str, Any], num_classes: int | None) -> Card:
    """The card in a section "segformer" that we wrote, or are about to write.

    Raises KeyError, or ValueError that names the entry, for a damaged one.
    """
    readers: dict[str, Callable[[Any], list[Any]]] = {
        "classes": lambda names: _list_of(names, str),
        "palette": lambda palette: colours(palette, num_classes),
        "mean": lambda mean: _list_of(mean, _finite, 3),
        "std": lambda std: _list_of(std, _positive, 3),
    }
    entries: dict[str, list[Any] | None] = {}
    for key, read in readers.items():
        value = section[key]
        try:
            entries[key] = None if value is None and key in ("classes", "palette") else read(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from None
    card = Card(**entries)
    if card.classes is not None and len(card.classes) != num_classes:
        raise ValueError(f"{len(card.classes)} classes for {num_classes} logits")
    return card


def card_of_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any], num_classes: int | None) -> Card:
    """The card in the files of transformers; names that transformers made up (LABEL_0) are None."""
    card = Card()
    labels = config.get("id2label")
    if isinstance(labels, dict) and num_classes and {str(k) for k in range(num_classes)} == set(labels):
        names = [str(labels[str(k)]) for k in range(num_classes)]
        if names != default_labels(num_classes):
            card.classes = names
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    try:
        card.mean = [round(value / scale, 6) for value in _list_of(preprocessor["image_mean"], float, 3)]
        card.std = [round(value / scale, 6) for value in _list_of(preprocessor["image_std"], float, 3)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        card.mean = card.std = None
    return card


def card_of_meta(meta: Mapping[str, Any], num_classes: int | None) -> Card:
    """Class names and colours in the "meta" of a .pth file, where it has as many as classes."""
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else {}
    card = Card()
    classes = meta.get("CLASSES") or data.get("classes")
    palette = meta.get("PALETTE") or data.get("palette")
    if isinstance(classes, list | tuple) and len(classes) == num_classes:
        card.classes = [str(name) for name in classes]
    if isinstance(palette, list | tuple) and len(palette) == num_classes:
        try:
            card.palette = colours([list(colour) for colour in palette], num_classes)
        except (TypeError, ValueError):
            card.palette = None
    return card


def colours(values: Any, num_classes: int | None) -> list[list[int]]:
    """One RGB colour per class; TypeError or ValueError where `values` is anything else."""
    return [_list_of(colour, _byte, 3) for colour in _list_of(values, lambda value: value, num_classes or 0)]


def default_labels(num_classes: int) -> list[str]:
    """The names that transformers gives to classes without one."""
    return [f"LABEL_{k}" for k in range(num_classes)]


def hf_config(
    variant_name: str,
    kind: str,
    *,
    decoder_dim: int | None,
    classes: list[str] | None,
    num_classes: int | None,
    dropout: float = 0.1,
    drop_path_rate: float = 0.1,
) -> dict[str, Any]:
    """The keys of transformers' SegformerConfig; `kind` is segmentation, classification or encoder."""
    variant = VARIANTS[variant_name]
    config: dict[str, Any] = {
        "model_type": "segformer",
        "architectures": [_ARCHITECTURES[kind]],
        **_sizes(variant_name),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": dropout,
        "drop_path_rate": drop_path_rate,
        "decoder_hidden_size": decoder_dim or variant.decoder_dim,
        "layer_norm_eps": 1e-5,
        "semantic_loss_ignore_index": 255,
    }
    if num_classes:
        names = classes or default_labels(num_classes)
        config["id2label"] = {str(k): name for k, name in enumerate(names)}
        config["label2id"] = {name: k for k, name in enumerate(names)}
    return config


def check_hf_config(config: Mapping[str, Any], variant_name: str) -> None:
    """Raise CheckpointError where a config.json describes another network than `variant_name`.

    Heads and strides leave no trace in the shapes of the tensors, so nothing else would notice.
    """
    if (kind := config.get("model_type", "segformer")) != "segformer":
        raise CheckpointError(f"config.json says model_type={kind}; only segformer can be read")
    for key, ours in _sizes(variant_name).items():
        theirs = config.get(key, ours)
        if theirs != ours:
            raise CheckpointError(
                f"config.json says {key}={theirs}, but {variant_name}, which the weights are, has {ours}; "
                "it is another network, or the config of other weights"
            )


def _sizes(variant_name: str) -> dict[str, Any]:
    variant = VARIANTS[variant_name]
    return {
        "num_channels": 3,
        "num_encoder_blocks": len(variant.depths),
        "hidden_sizes": list(variant.embed_dims),
        "depths": list(variant.depths),
        "num_attention_heads": list(variant.num_heads),
        "sr_ratios": list(variant.sr_ratios),
        "mlp_ratios": list(variant.mlp_ratios),
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "hidden_act": "gelu",
        "reshape_last_stage": True,
    }


def _byte(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 255:
        raise ValueError(f"{value!r} is not a whole number from 0 to 255")
    return value


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number


def _positive(value: Any) -> float:
    if (number := _finite(value)) <= 0:
        raise ValueError(f"{value!r} is not above 0")
    return number


def _list_of(values: Any, kind: Callable[[Any], Any], length: int | None = None) -> list[Any]:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise ValueError(f"{reprlib.repr(values)} is not a list" + (f" of {length}" if length else ""))
    return [kind(value) for value in values]
