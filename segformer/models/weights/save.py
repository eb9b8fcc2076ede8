"""How weights are written: what transformers, NVlabs, mmsegmentation and SMP read, and our exports.

    write_hf(weights, out)            <out>/model.safetensors, config.json and preprocessor_config.json;
                                      an export has the section "segformer" instead of the last
    write_pth(weights, out, format)   one .pth: nvlabs and mmseg {"state_dict", "meta"}, smp the bare state

Every file appears whole or not at all: written beside its place, synced, renamed. Refuses, with ConfigError,
a folder with other files or a model that we did not write, a .pth that exists, a place that can't be written,
a card that could not be read back, and a model that the target can't hold; with CheckpointError, tensors that
are not finite, have no data or are float64. Nothing is written then, and what was there stays.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segformer.errors import CheckpointError, ConfigError
from segformer.models.weights.card import Card, card_of_section, hf_config
from segformer.models.weights.convert import Weights
from segformer.models.weights.files import (
    CONFIG_FILE,
    MODEL_FILE,
    PREPROCESSOR_FILE,
    check_tensors,
    read_json,
    reason_of,
    sha256_of,
)
from segformer.models.weights.names import TITLES, from_ours, listed

_MARK = "norm_profile"  # in the header of every model.safetensors that we write
_NO_PLACE: dict[str, dict[str, str]] = {  # kind of model -> why the format can't hold it
    "nvlabs": {},
    "smp": {"classification": "its models segment"},
    "mmseg": {
        "segmentation": "its decode head is another network",
        "classification": "its models segment",
    },
}
_SMP_VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
_NOTES = {
    True: "transformers computes the same logits: it uses LayerNorm eps 1e-5 everywhere, as this model does",
    False: "exact in segformer only: transformers uses LayerNorm eps 1e-5 everywhere, whatever its config "
    "says, and its logits differ slightly",
}


def write_hf(
    weights: Weights,
    out: Path,
    *,
    section: dict[str, Any] | None,
    dropout: float | None = None,
    drop_path_rate: float | None = None,
) -> list[Path]:
    """Write a directory that transformers loads; returns its files.

    With `section`, its further entries, it is an export: config.json says everything that building the same
    network here takes. Without, it is a directory of transformers only, which runs with eps 1e-5.
    `dropout` and `drop_path_rate` are those of the weights, or 0.1, where they are None. Raises ConfigError
    where `out` holds other files or a model that is not ours, or can't be written, or the card could not be
    read back; CheckpointError where the tensors could not.
    """
    sizes = weights.sizes
    rates = weights.config("hf")
    card = _sound_card(weights)
    _check_sound(weights)
    profile = weights.config().norm_profile if section is not None else "hf"
    described = card.section()
    config = hf_config(
        sizes.variant,
        sizes.kind,
        decoder_dim=sizes.decoder_dim,
        classes=card.classes,
        num_classes=sizes.num_classes,
        dropout=rates.dropout if dropout is None else dropout,
        drop_path_rate=rates.drop_path_rate if drop_path_rate is None else drop_path_rate,
    )
    named = from_ours(weights.state, "hf", bare=sizes.kind == "encoder")  # as transformers does

    def write_weights(file: Path) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
        file.touch()
        mode = file.stat().st_mode  # as the umask says; save_file leaves a file that only its owner can read
        save_file(contiguous, file, {"format": "pt", _MARK: profile})
        file.chmod(mode)
        if section is not None:
            config["segformer"] = {
                **_architecture(weights),
                **described,
                **section,
                "weights_sha256": sha256_of(file),
                "exact_in_transformers": profile == "hf",
                "note": _NOTES[profile == "hf"],
            }

    writers: dict[str, Callable[[Path], object]] = {MODEL_FILE: write_weights}
    if section is None:
        preprocessor = _preprocessor(described["mean"], described["std"])
        writers[PREPROCESSOR_FILE] = lambda file: _write_json(file, preprocessor)
    writers[CONFIG_FILE] = lambda file: _write_json(file, config)
    _claim_folder(out)
    _write_together(out, writers, stale=(CONFIG_FILE, PREPROCESSOR_FILE))
    return [out / name for name in writers]


def write_pth(weights: Weights, out: Path, format_: str) -> list[Path]:
    """Write a .pth as NVlabs, segmentation_models_pytorch or mmsegmentation read it.

    nvlabs and mmseg: {"state_dict", "meta"}; smp: a plain state dictionary, for load_state_dict. What is no
    segmentation has bare names, as the published ImageNet encoders have. Raises ConfigError where the target
    can't hold the model (mmseg: encoders only, smp: no classifier, b0 to b5), or `out` exists or can't be
    written; as write_hf where the card or the tensors could not be read back.
    """
    sizes = weights.sizes
    if out.suffix not in (".pth", ".pt"):
        raise ConfigError(f"output={out} must be the name of a .pth file for to={format_}")
    if format_ == "smp" and sizes.variant not in _SMP_VARIANTS:
        raise ConfigError(
            f"segmentation_models_pytorch has no encoder of {sizes.variant}; use another target"
        )
    if reason := _NO_PLACE[format_].get(sizes.kind):
        raise ConfigError(
            f"{TITLES[format_]} can't hold the head of this model ({sizes.kind}): {reason}; write the "
            "encoder alone, with encoder_only=true"
        )
    _check_sound(weights)
    bare = sizes.kind != "segmentation"
    named = {name: _alone(tensor) for name, tensor in from_ours(weights.state, format_, bare=bare).items()}
    content: dict[str, Any] = named
    if format_ != "smp":
        card = _sound_card(weights)
        meta: dict[str, Any] = {"segformer": {**_architecture(weights), **card.section()}}
        if card.classes:
            meta |= {"CLASSES": card.classes, "PALETTE": card.palette}
        content = {"state_dict": named, "meta": meta}
    try:
        exists = out.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"output={out} can't be written: {reason_of(error)}; choose another name") from None
    if exists:
        raise ConfigError(f"output={out} exists; give a new name, or delete it")
    _write_together(out.parent, {out.name: lambda file: torch.save(content, file)})
    return [out]


def check_savable(state: Mapping[str, Tensor], source: str = "the model") -> None:
    """Raise CheckpointError naming tensors that a file of float32 can't hold: without data, or of float64."""
    if hollow := [name for name, tensor in state.items() if tensor.is_meta]:
        raise CheckpointError(
            f"{source} can't be saved: {len(hollow)} tensors are on the meta device, without data: "
            f"{listed(hollow)}; load or initialize its weights first"
        )
    if wide := [name for name, tensor in state.items() if tensor.dtype == torch.float64]:
        raise CheckpointError(
            f"{source} can't be saved: {len(wide)} tensors are float64 and would be cut to float32: "
            f"{listed(wide)}; if that is meant, call model.float() first"
        )


def _check_sound(weights: Weights) -> None:
    check_savable(weights.state, weights.source)
    check_tensors(weights.state, f"{weights.source} can't be saved")


def _sound_card(weights: Weights) -> Card:
    """The card as whoever reads the file will find it; ConfigError where reading would refuse it."""
    card, num_classes = weights.card, weights.sizes.num_classes
    try:
        for what, values in (("names", card.classes), ("colours", card.palette)):
            if values is not None and len(values) != num_classes:
                raise ConfigError(
                    f"{num_classes} classes, but the card has {len(values)} {what}; give as many"
                )
        section = json.loads(json.dumps(card.section(), default=_plain))
        return card_of_section(section, num_classes)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the card of {weights.source} can't be saved: {error}; give names as classes, RGB of 0 to 255 "
            "as palette, three numbers as mean and as std"
        ) from None


def _plain(value: Any) -> Any:
    """An array or tensor as the lists and numbers that JSON has."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no list or number")


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: torch.save writes whole storages."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _preprocessor(mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value / 255, 9) for value in mean],
        "image_std": [round(value / 255, 9) for value in std],
    }


def _architecture(weights: Weights) -> dict[str, Any]:
    config = weights.config()
    return {
        "variant": config.variant,
        "norm_profile": config.norm_profile,
        "decoder_dim": config.decoder_dim,
        "num_classes": weights.sizes.num_classes,
    }


def _claim_folder(out: Path) -> None:
    ours = {MODEL_FILE, CONFIG_FILE, PREPROCESSOR_FILE}
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"output={out} is a file; give a folder")
        present = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"output={out} can't be read: {reason_of(error)}; choose another folder") from None
    if others := [name for name in present if name not in ours and not name.startswith(".")]:
        raise ConfigError(
            f"output={out} holds other files ({', '.join(others[:3])}); give a new folder or an old export"
        )
    if (models := [name for name in present if name in ours]) and not _is_ours(out):
        raise ConfigError(
            f"output={out} holds a model that this project has not written ({', '.join(models)}); give a new "
            "folder or an old export, or delete it"
        )


def _is_ours(folder: Path) -> bool:
    """The weights in `folder` bear our mark, or its config.json is that of an export as we wrote it."""
    try:
        with safe_open(folder / MODEL_FILE, framework="pt") as opened:
            if _MARK in (opened.metadata() or {}):
                return True
    except (SafetensorError, OSError):
        pass  # missing or damaged: the description decides
    try:
        config = read_json(folder / CONFIG_FILE) or {}
    except CheckpointError:
        return False
    return isinstance(config.get("segformer"), dict) and "transformers_version" not in config


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_together(
    folder: Path, writers: dict[str, Callable[[Path], object]], *, stale: tuple[str, ...] = ()
) -> None:
    """Write all files beside their places, sync, and only then put them there, in this order.

    A full disk leaves the older files as they were. `stale` are removed before the first is put in place: a
    crash then leaves no description of other weights.
    """
    temporary = {name: folder / f".tmp-{name}" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(temporary[name])
            _sync(temporary[name])
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        for name in writers:
            temporary[name].replace(folder / name)
        _sync(folder)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        # RuntimeError: torch.save on a full disk; ValueError: a name with a NUL
        with contextlib.suppress(OSError, ValueError):
            for path in temporary.values():
                path.unlink(missing_ok=True)
        raise ConfigError(
            f"output={folder} can't be written: {reason_of(error)}; choose another folder, or free space"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
