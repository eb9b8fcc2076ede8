"""Exports: a trained model as two files that this project, and transformers, can load.

    <out>/model.safetensors   fp32 parameters and buffers under the names of Hugging Face's files
    <out>/config.json         a SegformerConfig, and beside its keys one section "segformer":
                              {variant, norm_profile, decoder_dim, num_classes, classes, palette,
                               mean, std, view (of a classifier), shards, digest (of the shards), step,
                               scores, weights_sha256, exact_in_transformers, note}

`SegformerForSemanticSegmentation.from_pretrained(out)` loads it, or `SegformerForImageClassification`, which
config.json names as well. transformers runs every LayerNorm with eps
1e-5, so its logits are those of our model only for norm_profile=hf; config.json says which case it is.

`open_checkpoint` reads an export or a checkpoint of a run into the same `Trained`. Nothing that is read is
executed. Refuses a damaged or foreign export, an output folder with other files in it, and weights
that don't fit.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer.checkpoint.format import TrainState
from segformer.checkpoint.reader import load_model_state
from segformer.data.loading.classification import ClassificationAugment
from segformer.data.shards.format import ShardSet
from segformer.data.sources.dataset import DatasetConfig, class_palette
from segformer.errors import CheckpointError, ConfigError
from segformer.models.segformer import (
    MiTClassifier,
    SegFormer,
    build_classifier,
    build_model,
    check_strict,
    load_strict,
)
from segformer.models.variants import ModelConfig
from segformer.models.weights.card import Card
from segformer.models.weights.convert import Weights, read_weights
from segformer.models.weights.files import CONFIG_FILE
from segformer.models.weights.save import write_hf
from segformer.models.weights.sizes import find_sizes
from segformer.telemetry.jsonl import read_metrics
from segformer.training.config import RunConfig, load_config

_SCORES = ("miou", "macc", "aacc", "iou", "top1", "top5")  # what an export keeps of an evaluation
BUILDERS: dict[str, Callable[[ModelConfig, int], SegFormer | MiTClassifier]] = {
    "segmentation": build_model,
    "classification": build_classifier,
}


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Which run to export, and where to."""

    checkpoint: str = "???"
    "Directory of the run, or of one of its checkpoints."
    output: str = ""
    "Folder to write; empty means <run>/export."
    step: str = "newest"
    "Checkpoint: newest, best (by its validation score) or the number of its step."


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
    view: list[int] | None = None
    "A classifier's: [side of the square it is shown, short side of the image before that is cut out]."
    shards: str = ""
    "Folder of the shards it was trained on, as its configuration names it."
    digest: str = ""
    "Digest of those shards."
    step: int | None = None
    "Optimiser steps."
    scores: dict[str, Any] | None = None
    "Validation scores at that step, where they were measured."

    @property
    def task(self) -> str:
        """segmentation or classification."""
        return "segmentation" if self.view is None else "classification"

    def build(self) -> SegFormer | MiTClassifier:
        """The network with its weights, in evaluation mode on the CPU."""
        build = BUILDERS[self.task]
        model = build(self.model, len(self.classes))
        load_strict(model, self.state, source="the checkpoint")
        return model.eval()


def export(cfg: ExportConfig) -> Path:
    """Write the checkpoint of a run that `cfg.step` names as an export; returns its folder."""
    run, step = _locate(Path(cfg.checkpoint), cfg.step)
    out = Path(cfg.output) if cfg.output else run / "export"
    trained = read_run(run, step)
    write_export(
        trained.state,
        trained.model,
        num_classes=len(trained.classes),
        classes=trained.classes,
        palette=trained.palette,
        mean=trained.mean,
        std=trained.std,
        out=out,
        extra={key: getattr(trained, key) for key in ("view", "shards", "digest", "step", "scores")},
    )
    print(f"exported step {trained.step} of {run} to {out}")
    return out


def open_checkpoint(path: str | Path, step: str = "newest") -> Trained:
    """The model of an export directory, or of a run directory.

    Of a run: its newest good checkpoint, its best one, or that of a step (a number). The folder of a
    checkpoint stands for that step of its run.

    Raises:
        CheckpointError: the path is neither, what it holds is damaged, or the run has no such checkpoint.
        ConfigError: `step` is none of the three, contradicts `path`, or is given for an export.
    """
    folder, step = _locate(Path(path), step)
    if (folder / "config.yaml").is_file():
        return read_run(folder, step)
    if (folder / CONFIG_FILE).is_file():
        if step != "newest":
            raise ConfigError(
                f"step={step} asks for a checkpoint, but {folder} is an export, which holds one model; "
                "leave step out, or give the directory of the run"
            )
        return read_export(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; give a run directory or an export directory")
    raise CheckpointError(
        f"{folder} is neither a run (it has no config.yaml) nor an export (it has no config.json); "
        "give a directory such as runs/sample or runs/sample/export"
    )


def read_run(run: Path, step: str = "newest") -> Trained:
    """A checkpoint of a run directory: the newest good one, the best, or that of a step (a number)."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run} is not a run directory: it has no config.yaml; give one such as runs/sample"
        )
    cfg = load_config(run / "config.yaml", RunConfig)
    state, train_state = _load(run, step)
    named = cfg.data.classes or cfg.data.class_dirs
    if named:
        classes, palette = list(named), class_palette(replace(cfg.data, classes=named))
    else:  # a configuration that leaves the classes to the shards
        shards = ShardSet.open(cfg.data.shards, cfg.loader.storage)
        classes, palette = list(shards.classes), shards.palette
    classifies = cfg.data.task == "classification"
    augment = cfg.classification if classifies else cfg.augment
    return Trained(
        state=state,
        model=replace(cfg.model, pretrained="", num_classes=None),
        classes=classes,
        palette=palette.tolist(),
        mean=list(augment.mean),
        std=list(augment.std),
        view=[cfg.classification.size, cfg.classification.eval_resize] if classifies else None,
        shards=cfg.data.shards,
        digest=train_state.data_digest,
        step=train_state.step,
        scores=_scores_at(run, train_state.step),
    )


def _locate(path: Path, step: str) -> tuple[Path, str]:
    """(<run>, "20") for <run>/checkpoints/step-00000020, what is given for every other path."""
    found = re.fullmatch(r"step-([0-9]{8,})", path.name)
    run = path.parent.parent
    if not found or path.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return path, step
    number = str(int(found[1]))
    if step not in ("newest", number):
        raise ConfigError(f"step={step} is another checkpoint than {path}; give {run}, or leave step out")
    return run, number


def _load(run: Path, step: str) -> tuple[dict[str, Tensor], TrainState]:
    if re.fullmatch(r"[0-9]{1,18}", step):
        return load_model_state(run, int(step))
    if step not in ("newest", "best"):
        raise ConfigError(f"step={step!r} is unknown; use newest, best or the number of a step")
    newest = load_model_state(run)
    best = newest[1].best_step
    if step == "newest" or best == newest[1].step:
        return newest
    if best is None:
        raise CheckpointError(f"{run} has no best checkpoint, it has not been evaluated yet; use step=newest")
    return load_model_state(run, best)


def _scores_at(run: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation that metrics.jsonl has of `step`."""
    found = [row for row in read_metrics(run, "eval", "final") if row["step"] == step]
    return {key: found[-1][key] for key in _SCORES if key in found[-1]} if found else None


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
        state: parameters and buffers under our names, of a segmentation model or a classifier.
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
    sizes = find_sizes(state)
    with torch.device("meta"):
        network = BUILDERS.get(sizes.kind, build_model)(architecture, num_classes)
    check_strict(network, state, source="the state to export")
    card = Card(
        classes=list(classes),
        palette=[list(map(int, colour)) for colour in palette],
        mean=list(map(float, mean)),
        std=list(map(float, std)),
    )
    weights = Weights(
        source="the state to export",
        state=state,
        sizes=sizes,
        format="ours",
        norm_profile=model.norm_profile,
        card=card,
    )
    write_hf(weights, out, section=extra, dropout=model.dropout, drop_path_rate=model.drop_path_rate)
    return out


def read_export(folder: Path) -> Trained:
    """The model that `write_export` or `SegFormer.save_pretrained` wrote to `folder`.

    Raises:
        CheckpointError: the folder is not an export of this project, or is damaged.
    """
    weights = read_weights(folder)
    section, card = weights.section, weights.card
    if section is None:
        raise CheckpointError(
            f'{folder / CONFIG_FILE} has no section "segformer": it is no export of this project; make one: '
            f"python launch/convert.py checkpoint={folder} output=... to=ours (to train from it, "
            "model.pretrained=... takes it as it is)"
        )
    if weights.sizes.kind not in BUILDERS or card.mean is None or card.std is None:
        raise CheckpointError(
            f"{folder} holds an encoder without a head, which predicts nothing; give an export of a "
            "trained model"
        )
    classes = card.classes or [f"class {k}" for k in range(weights.sizes.num_classes or 0)]
    numbers = [str(k) for k in range(len(classes))]
    generated = class_palette(DatasetConfig(task=weights.sizes.kind, classes=numbers))
    return Trained(
        state=weights.state,
        model=weights.config(),
        classes=classes,
        palette=card.palette or generated.tolist(),
        mean=card.mean,
        std=card.std,
        view=_view(folder, section) if weights.sizes.kind == "classification" else None,
        shards=section.get("shards", ""),
        digest=section.get("digest", ""),
        step=section.get("step"),
        scores=section.get("scores"),
    )


def _view(folder: Path, section: dict[str, Any]) -> list[int]:
    """The view of a classifier's export, or the usual one where `save_pretrained` has left it out."""
    usual = ClassificationAugment()
    try:
        size, short = map(int, section.get("view") or (usual.size, usual.eval_resize))
        ClassificationAugment(size=size, eval_resize=short)
    except (TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f'{folder / CONFIG_FILE} is damaged: its section "segformer" says view={section.get("view")!r}; '
            "export it again"
        ) from error
    return [size, short]
