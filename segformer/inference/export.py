"""Trained models, opened for use and exported: a run or an export -> one `Weights` with all its metadata.

    <out>/model.safetensors          fp32 parameters and buffers under the names of Hugging Face's files
    <out>/config.json                a SegformerConfig with a section "segformer" (models/weights/write.py)
    <out>/preprocessor_config.json   how transformers is to show images to it, which it can of 8-bit RGB alone

`SegformerForSemanticSegmentation.from_pretrained(out)` loads an export, or
`SegformerForImageClassification`, which config.json names as well. transformers runs every LayerNorm with eps
1e-5, so its logits are those of our model only for norm_profile=hf; config.json says which case it is.

to=onnx and the like write a file for another runtime, which `open_checkpoint` and `build` open like any
model (exports/).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segformer.checkpoint.reader import CONFIG, is_run, run_folder
from segformer.data.loading.classification import ClassificationAugment
from segformer.data.shards.format import ShardSet
from segformer.data.shards.storage import StorageConfig
from segformer.data.sources.dataset import DatasetConfig, class_palette
from segformer.errors import CheckpointError, ConfigError, listed, reraise_as, say
from segformer.evaluation.metrics import SCORES
from segformer.evaluation.tables import percent
from segformer.inference.exports.runtime import Exported, is_exported, read_exported
from segformer.inference.exports.write import FileConfig, write
from segformer.models.segformer import MiTClassifier, SegFormer, build_classifier, build_model
from segformer.models.weights.bundle import Weights
from segformer.models.weights.load import check_weights
from segformer.models.weights.read import read_weights
from segformer.models.weights.tensor_files import CONFIG_FILE, SUFFIXES
from segformer.models.weights.write import images_of, normalization, shown, write_export
from segformer.telemetry.jsonl import read_metrics

_SCORES = ("miou", "macc", "aacc", "iou", "top1", "top5")  # what an export keeps of an evaluation
# Ends of names that people give to files: a folder of that name is a misunderstanding.
_FILES = (
    *SUFFIXES,
    *(".onnx", ".engine", ".plan", ".trt", ".torchscript", ".pt2", ".tflite", ".mlmodel", ".pb", ".h5"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".pdf", ".html", ".json", ".csv"),
    *(".npy", ".npz", ".zip", ".tar", ".gz", ".tgz", ".mp4"),
)
_TARGETS = {".onnx": "onnx", ".engine": "onnx", ".plan": "onnx", ".trt": "onnx"}
_UNFIT = "get the whole file again, or take the encoder alone, where that is sound, with encoder_only=true"


@dataclass(kw_only=True, slots=True)
class ExportConfig(FileConfig):
    """Which run to export, and where to."""

    checkpoint: str = "???"
    "Directory of the run, or of one of its checkpoints."
    output: str = ""
    "Folder to write; empty means <run>/export, of the others <run>/export_<to>."
    step: str = "newest"
    "Checkpoint: newest, best (by its validation score) or the number of its step."

    def __post_init__(self) -> None:
        FileConfig.__post_init__(self)
        check_output(self.output, "an export is a folder of weights and config.json", self.checkpoint)


def unshown(weights: Weights) -> str:
    """Why an export has no preprocessor_config.json."""
    channels, dtype = images_of(weights)
    return (
        f"no preprocessor_config.json: transformers' image processors show 8-bit RGB alone, not {channels} "
        f"channels of {dtype}; Predictor and launch/predict.py do"
    )


def check_output(output: str, what: str, checkpoint: str = "") -> None:
    """ConfigError where `output` is no place for a new folder; `what` says what it is to be.

    Raises:
        ConfigError: it is a file or named like one, or lies among the checkpoints of a run, which are swept.
    """
    place = Path(output)
    if os.path.isfile(place) or (place.suffix.lower() in _FILES and not os.path.isdir(place)):
        way = ""
        if checkpoint and (to := _TARGETS.get(place.suffix.lower())):
            way = (
                f", or python launch/export.py checkpoint={checkpoint} to={to} output={place.with_suffix('')}"
            )
        elif checkpoint and place.suffix.lower() in (".pth", ".pt"):
            way = f", or python launch/convert.py checkpoint={checkpoint} output={output} to=nvlabs"
        raise ConfigError(f"output={output} is the name of a file, but {what}; give a folder{way}")
    for folder in (whole := Path(os.path.realpath(place)), *whole.parents):
        if folder.name == "checkpoints" and (folder.parent / CONFIG).is_file():
            raise ConfigError(f"output={output} lies among the checkpoints of a run; choose another folder")


def export(cfg: ExportConfig) -> Path:
    """Write the checkpoint of a run that `cfg.step` names as an export; returns its folder."""
    path = Path(cfg.checkpoint)
    if not is_run(path):
        raise CheckpointError(
            f"{path} is not a run directory: it has no config.yaml; give one such as runs/sample"
        )
    run = run_folder(path)
    out = Path(cfg.output) if cfg.output else run / ("export" if cfg.to == "hf" else f"export_{cfg.to}")
    weights = open_checkpoint(path, cfg.step)
    check_network(weights)
    if cfg.to != "hf":
        parity = write(weights, build(weights), out, cfg)
        say(f"exported step {weights.provenance['step']} of {run} to {out}; {parity}")
        return out
    write_export(weights, out)
    name, title = next(iter(SCORES[weights.arch.kind].NAMES.items()))
    scores = weights.provenance["scores"] or {}
    scored = f", {title} {percent(scores[name])}" if isinstance(scores.get(name), float) else ""
    say(f"exported step {weights.provenance['step']} of {run} to {out}{scored}")
    if not shown(weights):
        say(unshown(weights))
    return out


def open_checkpoint(path: str | Path, step: str = "newest", storage: StorageConfig | None = None) -> Weights:
    """The model of an export directory, or of a run directory, with all of its metadata.

    Of a run: its newest good checkpoint, its best one, or that of a step (a number). The folder of a
    checkpoint stands for that step of its run. `storage` reads the shards of a run that leaves the names of
    its classes to them.

    Raises:
        CheckpointError: the path is neither, what it holds is damaged, or the run has no such checkpoint.
        ConfigError: `step` is none of the three, contradicts `path`, or is given for an export.
    """
    source = Path(path)
    if not source.exists() and not is_run(source):
        beside = sorted(map(str, filter(is_run, source.parent.glob("*"))))
        such = f", such as {listed(beside)}" if beside else ""
        raise CheckpointError(f"{path} does not exist; give a run, one of its checkpoints or an export{such}")
    if source.is_dir() and not is_run(source) and not (source / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} is neither a run (it has no config.yaml) nor an export (it has no config.json); give a "
            "directory such as runs/sample or runs/sample/export"
        )
    if is_exported(source):
        if step != "newest":
            raise ConfigError(f"step={step} asks for a checkpoint of a run, but {source} is an export")
        return complete(read_exported(source), storage)
    weights = read_weights(source, step=step)
    if weights.format not in ("run", "ours"):
        raise CheckpointError(
            f'{path} has no section "segformer" in a config.json: it is no run and no export of ours; '
            f"make one: python launch/convert.py checkpoint={path} output=... to=ours (to train from it, "
            "model.pretrained=... takes it as it is)"
        )
    if weights.arch.kind == "encoder":
        raise CheckpointError(
            f"{path} holds an encoder without a head, which predicts nothing; give a run or an export of one"
        )
    return complete(weights, storage)


def complete(weights: Weights, storage: StorageConfig | None = None) -> Weights:
    """Fill in what a run says elsewhere (scores, the classes of its shards), and names and colors."""
    metadata, arch = weights.metadata, weights.arch
    if weights.format == "run":
        run = run_folder(Path(weights.source))
        weights.provenance["scores"] = _scores_at(run, weights.provenance["step"])
        if not metadata.classes and "shards" in weights.provenance:
            shards = ShardSet.open(weights.provenance["shards"], storage or StorageConfig())
            metadata.classes, metadata.palette = list(shards.classes), shards.palette.tolist()
    metadata.classes = metadata.classes or [f"class {k}" for k in range(arch.num_classes)]
    metadata.mean, metadata.std = normalization(weights)
    if not metadata.palette:
        numbers = [str(k) for k in range(arch.num_classes)]
        metadata.palette = class_palette(DatasetConfig(task=arch.kind, classes=numbers)).tolist()
    if arch.kind == "classification":
        metadata.view = _view(weights.source, metadata.view)
    return weights


def _network(weights: Weights) -> SegFormer | MiTClassifier:
    build_kind = build_classifier if weights.arch.kind == "classification" else build_model
    return build_kind(weights.config(), weights.arch.num_classes or 1)


def build(weights: Weights) -> nn.Module:
    """The network with its weights, in evaluation mode on the CPU; of an exported file, in its runtime."""
    if weights.runtime:
        return Exported(weights)
    return _network(weights).load(weights)


def check_network(weights: Weights) -> None:
    """Raise CheckpointError naming every tensor that is missing or of another shape than the network has."""
    with torch.device("meta"):
        network = _network(weights)
    check_weights(network, weights, _UNFIT)


def _scores_at(run: Path, step: int) -> dict[str, Any] | None:
    """The last evaluation that metrics.jsonl has of `step`."""
    found = [row for row in read_metrics(run, "eval", "final") if row["step"] == step]
    return {key: found[-1][key] for key in _SCORES if key in found[-1]} if found else None


def _view(source: str, view: list[int]) -> list[int]:
    """The view of a classifier, or the usual one where `save_pretrained` has left it out."""
    usual = ClassificationAugment()
    size, short = view or (usual.size, usual.eval_resize)
    damaged = f"{source} is damaged: its view={view}"
    with reraise_as(CheckpointError, damaged, "export it again", on=ConfigError):
        ClassificationAugment(size=size, eval_resize=short)
    return [size, short]
