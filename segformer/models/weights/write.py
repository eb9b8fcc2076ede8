"""Weights, written: exports, and what transformers, NVlabs, mmsegmentation and SMP read.

    write_export(weights, out)        <out>/model.safetensors, config.json and preprocessor_config.json, which
                                      transformers loads; the section "segformer" of config.json says all that
                                      the same network here takes:
                                      {variant, norm_profile, decoder_dim, num_classes, classes, palette,
                                       mean, std, dtype, view, long_side, shards, digest, step, averaged,
                                       scores, weights_sha256, exact_in_transformers, note}
    write_hf(weights, out)            the same without the section
    write_pth(weights, out, format)   one .pth: nvlabs and mmseg {"state_dict", "meta"}, smp the bare state

transformers.pipeline("image-segmentation", out) shows images to the model as evaluations do here, whole and
at their own size, and pipeline("image-classification", out) the center of each. It can't reduce larger images
to the long_side of the training; the note in config.json says so. Its processors show 8-bit RGB alone: a
model of other images has no preprocessor_config.json. An export of another backbone than MiT, or with the
head of mmsegmentation ("head" in the section), has our names and that section alone.

Every file appears whole or not at all. Refuses, with ConfigError, a folder with other files or a model that
we did not write, a .pth that exists, a place that can't be written, metadata that does not fit or does not
say mean and std of other images than 8-bit RGB, and a model that the target can't hold; with CheckpointError,
tensors that are not finite, have no data or are float64.
Nothing is written then, and what was there stays.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segformer.checkpoint.format import write_tensors
from segformer.errors import ConfigError, listed, reraise_as
from segformer.files import regular, sha256_of, staged, sync
from segformer.models.variants import RGB, VARIANTS
from segformer.models.weights.bundle import Weights, check_tensors
from segformer.models.weights.key_maps import TITLES, from_ours
from segformer.models.weights.read import default_labels, hf_sizes
from segformer.models.weights.tensor_files import CONFIG_FILE, MODEL_FILE, PREPROCESSOR_FILE, read_json

# The normalization of every published SegFormer: NVlabs, transformers' default, mmsegmentation, SMP.
IMAGENET_MEAN = [123.675, 116.28, 103.53]
IMAGENET_STD = [58.395, 57.12, 57.375]

_USUAL_VIEW = (224, 256)  # of a classifier that does not say its own, as every ImageNet score is measured

_ARCHITECTURES = {
    "segmentation": "SegformerForSemanticSegmentation",
    "classification": "SegformerForImageClassification",
    "encoder": "SegformerModel",
}
_MARK = "norm_profile"  # in the header of every model.safetensors that we write
_NO_PLACE = {  # (format, kind of model) -> why the format can't hold it
    ("smp", "classification"): "its models segment",
    ("mmseg", "classification"): "its models segment",
}
_SMP_VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
_UNSHOWN = (
    "; transformers can't show it images of {} channels of {}: give pixel_values, normalized by mean and std"
)
_REDUCED = (
    "; it was trained and scored on images of at most {} pixels a side: give transformers no larger ones"
)
_NOTES = {
    None: "segformer alone runs it: transformers has no such backbone or decode head",
    True: "transformers computes the same logits: it uses LayerNorm eps 1e-5 everywhere, as this model does",
    False: "exact in segformer only: transformers uses LayerNorm eps 1e-5 everywhere, whatever its config "
    "says, and its logits differ slightly",
}


def write_export(weights: Weights, out: Path, **extra: Any) -> list[Path]:
    """Write an export, with `extra` entries in its section; returns its files."""
    profile, theirs = weights.config().norm_profile, in_transformers(weights)
    section = {**section_of(weights), **weights.provenance, **extra}

    def config_of(model_file: Path) -> dict[str, Any]:
        exact, side = theirs and profile == "hf", weights.metadata.long_side
        note = _NOTES[exact if theirs else None]
        if theirs:
            note += _REDUCED.format(side) if side else ""
            note += "" if shown(weights) else _UNSHOWN.format(*images_of(weights))
        end = {"weights_sha256": sha256_of(model_file), "exact_in_transformers": exact, "note": note}
        sizes = _hf_config(weights) if theirs else {}
        return {**sizes, "segformer": {**section, **end}}

    return _write_directory(weights, out, profile, config_of, theirs=theirs)


def images_of(weights: Weights) -> tuple[int, str]:
    """Channels of the images that a model takes, and the type of their values."""
    return weights.arch.in_channels, weights.metadata.dtype or "uint8"


def shown(weights: Weights) -> bool:
    """An image processor of transformers can show the model its images."""
    return images_of(weights) == (RGB, "uint8")


def write_hf(weights: Weights, out: Path) -> list[Path]:
    """Write a directory of transformers, which runs every LayerNorm with eps 1e-5; returns its files."""
    _check_place(weights, "hf")
    return _write_directory(weights, out, "hf", lambda _: _hf_config(weights), theirs=True)


def write_pth(weights: Weights, out: Path, format_: str) -> list[Path]:
    """Write a .pth as NVlabs, segmentation_models_pytorch or mmsegmentation read it.

    What is no segmentation has bare names, as the published ImageNet encoders have. mmseg holds its own
    decode head, the others the paper's; mmseg and smp no classifier, smp b0 to b5.
    """
    arch = weights.arch
    if out.suffix not in (".pth", ".pt"):
        raise ConfigError(f"output={out} must be the name of a .pth file for to={format_}")
    if format_ == "smp" and arch.variant not in _SMP_VARIANTS:
        raise ConfigError(f"segmentation_models_pytorch has no encoder of {arch.variant}; use another target")
    if format_ == "smp" and arch.in_channels != RGB:
        raise ConfigError(
            f"segmentation_models_pytorch has no mit encoder of {arch.in_channels} channels; take another to="
        )
    _check_place(weights, format_)
    with _writing(weights, out):
        if out.exists():
            raise ConfigError(f"output={out} exists; give a new name, or delete it")
        named = from_ours(weights.state, format_, bare=arch.kind != "segmentation")
        named = {name: _alone(tensor) for name, tensor in named.items()}
        content: dict[str, Any] = named
        if format_ != "smp":
            meta: dict[str, Any] = {"segformer": section_of(weights)}
            if weights.metadata.classes:
                meta |= {"CLASSES": weights.metadata.classes, "PALETTE": weights.metadata.palette or None}
            content = {"state_dict": named, "meta": meta}
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged(out) as place:
            torch.save(content, place)
    return [out]


def _check_place(weights: Weights, format_: str) -> None:
    """ConfigError where a format has no head such as that of the model."""
    arch = weights.arch
    reason = _NO_PLACE.get((format_, arch.kind))
    if arch.kind == "segmentation" and (arch.head == "mmseg") != (format_ == "mmseg"):
        reason = "its decode head is another network"
    if reason:
        raise ConfigError(
            f"{TITLES[format_]} can't hold the head of this model ({arch.kind}): {reason}; write the "
            "encoder alone, with encoder_only=true"
        )


def _preprocessor(weights: Weights) -> dict[str, Any]:
    """How transformers' image processor makes of an image what an evaluation here shows to the model.

    Its SegformerImageProcessor can't cut out a center, which a classifier sees; BiT's does all of it.
    """
    section = section_of(weights)
    view: dict[str, Any] = {"image_processor_type": "SegformerImageProcessor", "do_resize": False}
    if weights.arch.kind == "classification":
        size, short = weights.metadata.view or _USUAL_VIEW
        view = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": short},
            "resample": 2,  # PIL's bilinear, which averages where it shrinks
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
        }
    return view | {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 9) for value in section["mean"]],
        "image_std": [round(value / 255, 9) for value in section["std"]],
    }


def _write_directory(
    weights: Weights, out: Path, profile: str, config_of: Callable[[Path], dict[str, Any]], *, theirs: bool
) -> list[Path]:
    """Write all files beside their places, sync, and only then put them there, config.json last.

    A full disk leaves the older files as they were; a crash leaves no description of other weights.
    """
    processed = theirs and shown(weights)
    names = [CONFIG_FILE, *([PREPROCESSOR_FILE] if processed else []), MODEL_FILE]
    with _writing(weights, out):
        _claim_folder(out)
        named = weights.state
        if theirs:
            named = from_ours(named, "hf", bare=weights.arch.kind == "encoder")  # as transformers does
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            places = {name: stack.enter_context(staged(out / name)) for name in names}
            whole = {name: tensor.cpu().contiguous() for name, tensor in named.items()}
            write_tensors(whole, places[MODEL_FILE], {"format": "pt", _MARK: profile})
            contents = {CONFIG_FILE: config_of(places[MODEL_FILE])}
            contents |= {PREPROCESSOR_FILE: _preprocessor(weights)} if processed else {}
            for name, content in contents.items():
                places[name].write_text(json.dumps(content, indent=2), encoding="utf-8")
            for place in places.values():
                sync(place)
            for name in (CONFIG_FILE, PREPROCESSOR_FILE):
                (out / name).unlink(missing_ok=True)
    return [out / name for name in reversed(names)]


@contextlib.contextmanager
def _writing(weights: Weights, out: Path) -> Iterator[None]:
    """Check what is written before the block, and say on one line why the disk did not take it."""
    check_tensors(weights.state, f"{weights.source} can't be saved", wide=False)
    do, full = "choose another place, or free space", RuntimeError  # of torch.save on a full disk
    with reraise_as(ConfigError, f"output={out} can't be written", do, on=(OSError, full, ValueError)):
        yield


def section_of(weights: Weights) -> dict[str, Any]:
    """Architecture and metadata, as whoever reads the file will find them."""
    config = weights.config()
    metadata = replace(weights.metadata)  # checked anew
    metadata.check(weights.arch.num_classes, weights.arch.in_channels)
    mean, std = normalization(weights)
    return {
        "variant": config.variant,
        "norm_profile": config.norm_profile,
        "decoder_dim": config.decoder_dim,
        **({"head": config.head} if config.head != "segformer" else {}),
        "num_classes": weights.arch.num_classes or None,
        **{
            key: value or None
            for key, value in asdict(metadata).items()
            if value or key not in ("image_range", "dtype")  # few have them
        },
        "mean": mean,
        "std": std,
    }


def normalization(weights: Weights) -> tuple[list[float], list[float]]:
    """Mean and std of the images, ImageNet's of 8-bit RGB; ConfigError where others' are not said."""
    mean, std = weights.metadata.mean, weights.metadata.std
    if not (mean and std) and not shown(weights):
        channels, dtype = images_of(weights)
        raise ConfigError(
            f"{weights.source} does not say mean and std of its images of {channels} channels of {dtype}; "
            "give them from Python: model.save_pretrained(output, Metadata(mean=[...], std=[...]))"
        )
    return mean or IMAGENET_MEAN, std or IMAGENET_STD


def in_transformers(weights: Weights) -> bool:
    """transformers has the network."""
    arch = weights.arch
    return VARIANTS[arch.variant].backbone == "mit" and arch.head == "segformer"


def _hf_config(weights: Weights) -> dict[str, Any]:
    """The keys of transformers' SegformerConfig."""
    arch = weights.arch
    config: dict[str, Any] = {
        "model_type": "segformer",
        "architectures": [_ARCHITECTURES[arch.kind]],
        **hf_sizes(arch),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": arch.dropout,
        "drop_path_rate": arch.drop_path_rate,
        "decoder_hidden_size": arch.decoder_dim or VARIANTS[arch.variant].decoder_dim,
        "layer_norm_eps": 1e-5,
        "semantic_loss_ignore_index": 255,
    }
    if arch.num_classes:
        names = weights.metadata.classes or default_labels(arch.num_classes)
        config["id2label"] = {str(k): name for k, name in enumerate(names)}
        config["label2id"] = {name: k for k, name in enumerate(names)}
    return config


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: torch.save writes whole storages."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _claim_folder(out: Path) -> None:
    """ConfigError where `out` is more than a folder for, or of, a model of ours."""
    ours = {MODEL_FILE, CONFIG_FILE, PREPROCESSOR_FILE}
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output={out} is a file; give a folder")
    present = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if others := [name for name in present if name not in ours and not name.startswith(".")]:
        raise ConfigError(
            f"output={out} holds other files ({listed(others, 3)}); give a new folder or an old export"
        )
    if (models := [name for name in present if name in ours]) and not _is_ours(out):
        raise ConfigError(
            f"output={out} holds a model that this project has not written ({', '.join(models)}); give a new "
            "folder or an old export, or delete it"
        )


def _is_ours(folder: Path) -> bool:
    """The weights in `folder` bear our mark, or its config.json is that of an export as we wrote it."""
    missing = contextlib.suppress(SafetensorError, OSError)  # or damaged: the description decides
    with missing, safe_open(regular(folder / MODEL_FILE), framework="pt") as opened:
        if _MARK in (opened.metadata() or {}):
            return True
    config = read_json(folder / CONFIG_FILE) or {}
    return isinstance(config.get("segformer"), dict) and "transformers_version" not in config
