"""Exports: a trained model as two files that this project, and transformers, can load.

    <out>/model.safetensors   fp32 parameters and buffers under the names of Hugging Face's files
    <out>/config.json         a SegformerConfig, and beside its keys one section "segformer":
                              {variant, folded, norm_profile, decoder_dim, num_classes, classes, palette,
                               mean, std, shards, digest (of the shards), step, scores, weights_sha256,
                               exact_in_transformers, note}

`SegformerForSemanticSegmentation.from_pretrained(out)` loads it. transformers runs every LayerNorm with eps
1e-5, so its logits are those of our model only for norm_profile=hf; config.json says which case it is.

`open_checkpoint` reads an export or the newest checkpoint of a run into the same `Trained`. Nothing that is
read is executed. Refuses a damaged or foreign export, an output folder with other files in it, and weights
that don't fit.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from segformer.checkpoint import load_model_state
from segformer.config import RunConfig, load_config
from segformer.data.dataset import class_palette
from segformer.data.shards import ShardSet
from segformer.errors import CheckpointError, ConfigError, SegformerError
from segformer.models.convert import load_hf_directory, to_hf
from segformer.models.segformer import VARIANTS, ModelConfig, SegFormer, build_model, load_strict

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_NOTES = {
    True: "transformers computes the same logits: it uses LayerNorm eps 1e-5 everywhere, as this model does",
    False: "exact in segformer only: transformers uses LayerNorm eps 1e-5 everywhere, whatever its config "
    "says, and its logits differ slightly",
}


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Which run to export, and where to."""

    run: str = "???"
    "Directory of the run."
    out: str = ""
    "Folder to write; empty means <run>/export."
    step: int | None = None
    "Step of the checkpoint; null takes the newest good one."


@dataclass(kw_only=True, slots=True)
class Trained:
    """A model as it was trained, and what its input and output mean."""

    state: dict[str, Tensor]
    "Parameters and buffers under our names, fp32."
    model: ModelConfig
    "How to build the network; `pretrained` is empty."
    classes: list[str]
    "Names of the K classes, in the order of the logits."
    palette: list[list[int]]
    "K colours, RGB."
    mean: list[float]
    "Subtracted from each channel of an RGB image of 0 to 255."
    std: list[float]
    "Divides each channel after that."
    shards: str = ""
    "Folder of the shards it was trained on, as its configuration names it."
    digest: str = ""
    "Digest of those shards."
    step: int | None = None
    "Optimiser steps."
    scores: dict[str, Any] | None = None
    "Validation scores at that step, where they were measured."

    def build(self) -> SegFormer:
        """The network with its weights, in evaluation mode on the CPU."""
        model = build_model(self.model, len(self.classes))
        load_strict(model, self.state, source="the checkpoint")
        return model.eval()


def export(cfg: ExportConfig) -> Path:
    """Write the newest good checkpoint of a run, or that of `cfg.step`, as an export; returns its folder."""
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run / "export"
    trained = read_run(run, cfg.step)
    write_export(
        trained.state,
        trained.model,
        num_classes=len(trained.classes),
        classes=trained.classes,
        palette=trained.palette,
        mean=trained.mean,
        std=trained.std,
        out=out,
        extra={key: getattr(trained, key) for key in ("shards", "digest", "step", "scores")},
    )
    print(f"exported step {trained.step} of {run} to {out}")
    return out


def open_checkpoint(path: str | Path, step: int | None = None) -> Trained:
    """The model of a run directory (newest good checkpoint, or `step`) or of an export directory.

    Raises:
        CheckpointError: the path is neither, or what it holds is damaged.
    """
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return read_run(folder, step)
    if (folder / CONFIG_FILE).is_file():
        return read_export(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give a run directory or an export directory")
    raise CheckpointError(
        f"{folder} is neither a run (it has no config.yaml) nor an export (it has no config.json); "
        "give a directory such as runs/sample or runs/sample/export"
    )


def read_run(run: Path, step: int | None = None) -> Trained:
    """The newest good checkpoint of a run, or that of `step`."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run} is not a run directory: it has no config.yaml; give one such as runs/sample"
        )
    cfg = load_config(run / "config.yaml", RunConfig)
    state, train_state = load_model_state(run, step)
    if cfg.data.classes:
        classes, palette = list(cfg.data.classes), class_palette(cfg.data)
    else:  # a configuration that leaves the classes to the shards
        shards = ShardSet.open(cfg.data.shards, cfg.loader.storage)
        classes, palette = list(shards.classes), shards.palette
    return Trained(
        state=state,
        model=replace(cfg.model, pretrained="", num_classes=None),
        classes=classes,
        palette=palette.tolist(),
        mean=list(cfg.augment.mean),
        std=list(cfg.augment.std),
        shards=cfg.data.shards,
        digest=train_state.data_digest,
        step=train_state.step,
        scores=_scores_at(run / "metrics.jsonl", train_state.step),
    )


def _scores_at(metrics: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation that metrics.jsonl has of `step`."""
    found = None
    for line in metrics.read_text("utf-8").splitlines() if metrics.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that a crash tore
        if row.get("kind") in ("eval", "final") and row.get("step") == step:
            found = {key: row[key] for key in ("miou", "macc", "aacc", "iou") if key in row}
    return found


def write_export(
    state: dict[str, Tensor],
    model: ModelConfig,
    *,
    num_classes: int,
    classes: list[str],
    palette: list[list[int]],
    mean: list[float],
    std: list[float],
    out: Path,
    extra: dict[str, Any],
) -> Path:
    """Write model.safetensors and config.json to the folder `out`, replacing an older export there.

    Args:
        state: parameters and buffers under our names.
        extra: further entries of the "segformer" section, such as digest, step and scores.

    Raises:
        CheckpointError: the state doesn't fit the model.
        ConfigError: `out` is a file, holds something else or can't be written.
    """
    if not len(classes) == len(palette) == num_classes:
        raise ConfigError(
            f"{num_classes} classes, but {len(classes)} names and {len(palette)} colours; give as many"
        )
    architecture = replace(model, pretrained="", num_classes=None)
    load_strict(build_model(architecture, num_classes), state, source="the state to export")
    weights = save(
        {name: tensor.contiguous() for name, tensor in to_hf(state).items()}, metadata={"format": "pt"}
    )
    exact = model.norm_profile == "hf"
    section = {
        **{key: getattr(model, key) for key in ("variant", "folded", "norm_profile", "decoder_dim")},
        "num_classes": num_classes,
        "classes": list(classes),
        "palette": [list(map(int, colour)) for colour in palette],
        "mean": list(map(float, mean)),
        "std": list(map(float, std)),
        **extra,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "exact_in_transformers": exact,
        "note": _NOTES[exact],
    }
    config = {**_hf_config(model, classes), "segformer": section}
    _write_files(out, weights, json.dumps(config, indent=2).encode("utf-8"))
    return out


def _write_files(out: Path, weights: bytes, config: bytes) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder")
    others = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
    if set(others) - {MODEL_FILE, CONFIG_FILE}:
        raise ConfigError(
            f"out={out} holds other files ({', '.join(others[:3])}); give a new folder or an old export"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The weights first: a crash in between leaves a pair that weights_sha256 refuses.
        _replace_file(out / MODEL_FILE, weights)
        _replace_file(out / CONFIG_FILE, config)
    except OSError as error:
        raise ConfigError(f"out={out} can't be written: {error.strerror}; choose another folder") from error


def _hf_config(model: ModelConfig, classes: list[str]) -> dict[str, Any]:
    """The keys of transformers' SegformerConfig."""
    variant = VARIANTS[model.variant]
    names = {str(k): name for k, name in enumerate(classes)}
    return {
        "model_type": "segformer",
        "architectures": ["SegformerForSemanticSegmentation"],
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
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": model.dropout,
        "drop_path_rate": model.drop_path_rate,
        "decoder_hidden_size": model.decoder_dim or variant.decoder_dim,
        "layer_norm_eps": 1e-5,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255,
        "id2label": names,
        "label2id": {name: int(k) for k, name in names.items()},
    }


def _replace_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_export(folder: Path) -> Trained:
    """The model that `write_export` wrote to `folder`.

    Raises:
        CheckpointError: the folder is not an export of this project, or is damaged.
    """
    state, config = load_hf_directory(folder)
    section = config.get("segformer")
    if not isinstance(section, dict):
        raise CheckpointError(
            f'{folder / CONFIG_FILE} has no section "segformer": its classes and normalisation are unknown; '
            "give an export of this project (to train from other weights, use model.pretrained=...)"
        )
    digest = hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
    if section.get("weights_sha256") != digest:
        raise CheckpointError(
            f"{folder / MODEL_FILE} is damaged or of another export (sha256); export the run again"
        )
    try:
        trained = Trained(
            state=state,
            model=ModelConfig(
                variant=section["variant"],
                folded=section["folded"],
                norm_profile=section["norm_profile"],
                decoder_dim=section["decoder_dim"],
            ),
            classes=_listed(section["classes"], str),
            palette=[_listed(colour, _byte, 3) for colour in section["palette"]],
            mean=_listed(section["mean"], float, 3),
            std=_listed(section["std"], float, 3),
            shards=section.get("shards", ""),
            digest=section.get("digest", ""),
            step=section.get("step"),
            scores=section.get("scores"),
        )
        if len(trained.palette) != len(trained.classes):
            raise ValueError(f"{len(trained.classes)} classes, but {len(trained.palette)} colours")
        return trained
    except (KeyError, TypeError, ValueError, SegformerError) as error:
        raise CheckpointError(f'{folder / CONFIG_FILE}: section "segformer" is damaged ({error})') from error


def _byte(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value <= 255:
        raise ValueError(f"{value!r} is not from 0 to 255")
    return value


def _listed(values: Any, kind: Callable[[Any], Any], length: int | None = None) -> list[Any]:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise ValueError(f"{values!r} is not a list" + (f" of {length}" if length else ""))
    return [kind(value) for value in values]
