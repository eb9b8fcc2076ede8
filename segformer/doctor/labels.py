"""Samples ranked by how strongly a trained model disagrees with their labels: those to look at first.

    output/labels.csv   a line a sample, the strongest disagreement first
    output/labels.png   contact sheet of the first: image | label | prediction | what is doubted, in red

    disagreement   1 - the mean over the labelled classes of the mean probability that the model gives their
                   pixels: each class counts alike, so that a wrong small one shows. 1 = all labels denied
    worst          the class that is believed least, worst_disagreement: 1 - the mean of its pixels alone
    taken_for      the class that the model sees there instead, where it sees another
    wrong          share of the labelled pixels where the prediction is another class
    tiny           regions of the label of at most TINY pixels: specks of a brush or of a lossy export
    border         sides, 0 to 4, whose outermost line has one label though the lines inside have others

The mean probability of the label is the self-confidence of confident learning (Northcutt, Jiang and Chuang,
JAIR 70, 2021). Images go through the model by the inference mode; of a split of tiles each is a sample. A
model that has learnt wrong labels by heart agrees with them: a short training ranks better than a long one.

Shapes: K classes, H W image.
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import io
import sys
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from segformer.data.loading.loader import LoaderConfig, eval_batches
from segformer.data.loading.mixture import LabelMap
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet, Split
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig
from segformer.errors import ConfigError, at_least, printable, reraise_as, say
from segformer.evaluation.drawing import beside, displayed, grid, legend, panels, resized, write_picture
from segformer.evaluation.inference_mode import InferenceMode, InferenceModeConfig
from segformer.files import write_atomic
from segformer.inference.evaluated import EvaluateConfig, mode_for, open_scored
from segformer.inference.export import build
from segformer.models.weights.bundle import Weights
from segformer.telemetry.progress import evaluated

TINY = 8  # pixels
INSIDE = 3  # lines from the border that a border is compared with
MIXED = 0.1  # share of such a line that another label must have
CELL, COLUMNS, FONT = 220, 2, 18
PRINTED = 10  # samples that are named on the terminal


@dataclass(kw_only=True, slots=True)
class LabelsConfig(InferenceModeConfig):
    """Which model is asked, about which labels, and how it sees the images."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    data: DatasetConfig = field(default_factory=DatasetConfig)
    "data.shards: a folder, or a set of the run's mixture by name; empty takes those of the training."
    splits: list[str] = field(default_factory=list)
    "Splits whose samples are ranked, together; empty = all of the shards."
    batch: int = 1
    "Images per forward, of one size each."
    pictures: int = 24
    "Samples on the contact sheet, the first of the ranking; 0 = none."
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    "Worker processes."
    output: str = "runs/doctor"
    "Folder for labels.csv and labels.png."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        at_least(self, "", batch=1, pictures=0)


@dataclass(frozen=True, slots=True)
class Doubt:
    """What the model says of the labels of one sample; see the top of this file."""

    split: str
    key: str
    disagreement: float
    worst: str
    worst_disagreement: float
    taken_for: str
    wrong: float
    tiny: int
    border: int


def rank_labels(cfg: LabelsConfig) -> list[Doubt]:
    """Rank the samples, write the files and print the first; the ranking."""
    trained, shards, labels = _opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    doubts: list[Doubt] = []
    first: list[tuple[float, int, str, np.ndarray]] = []  # a heap, the weakest on top
    drawn: set[int] = set()
    for name in cfg.splits or list(shards.splits):
        split = shards.split(name)
        with evaluated(split.num_samples, lambda line: say(line, file=sys.stderr)) as advance:
            for key, pixels, target, probabilities in _predicted(cfg, trained, split, labels, device):
                found = judge(probabilities, target, name, key, shards.classes)
                doubts.append(found)
                advance(1)
                place = (found.disagreement, -len(doubts))
                if cfg.pictures and (len(first) < cfg.pictures or place > first[0][:2]):
                    picture, seen = _picture(pixels, target, probabilities, shards.palette)
                    drawn |= seen
                    caption = f"{name}/{key}  {found.disagreement:.2f}  {_said(found)}"
                    push = heapq.heappush if len(first) < cfg.pictures else heapq.heapreplace
                    push(first, (*place, caption, picture))
    doubts.sort(key=lambda doubt: -doubt.disagreement)
    _write(cfg, doubts, first, legend([np.array(sorted(drawn))], shards.classes, shards.palette))
    return doubts


def _opened(cfg: LabelsConfig) -> tuple[Weights, ShardSet, LabelMap | None]:
    """The model, the shards and what their labels are in its classes, looked at as by an evaluation."""
    mode: dict[str, Any] = {key.name: getattr(cfg, key.name) for key in fields(InferenceModeConfig)}
    model = EvaluateConfig(
        checkpoint=cfg.checkpoint, step=cfg.step, shards=cfg.data.shards, loader=cfg.loader, **mode
    )
    trained, shards, labels = open_scored(model, cfg.splits, "data.shards")
    if trained.arch.kind != "segmentation":
        raise ConfigError(
            f"{cfg.checkpoint} is a classifier; labels are ranked by a model for segmentation, so give one"
        )
    return trained, shards, labels


def _predicted(
    cfg: LabelsConfig, trained: Weights, split: Split, labels: LabelMap | None, device: torch.device
) -> Any:
    """(key, image (H, W, C), target (H, W), probabilities (K, H, W)) of each sample in its labels."""
    metadata = trained.metadata
    model = InferenceMode(build(trained).to(device), mode_for(cfg, trained, split))
    normalize = Normalize(metadata.mean, metadata.std).to(device)
    batches = eval_batches(split, cfg.loader, rank=0, world_size=1, batch_size=cfg.batch)
    with contextlib.closing(iter(batches)) as iterator:
        for batch in iterator:
            size = (batch.targets.shape[1], batch.targets.shape[2])
            with torch.no_grad():
                out = model(normalize(batch.images.to(device), None))
                found = model.probabilities(out, size)
            if labels is not None:
                found, batch.targets = labels.probabilities(found), labels.known(batch.targets)
            images = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
            for sample_id, pixels, target, one in zip(
                batch.sample_ids.tolist(), images, batch.targets, found, strict=True
            ):
                yield split.key(sample_id), pixels, target, one


def judge(probabilities: Tensor, target: Tensor, split: str, key: str, classes: list[str]) -> Doubt:
    """How far a model agrees with the labels of one sample.

    probabilities: float (K, H, W). target: uint8 (H, W), class ids and IGNORE_INDEX.
    """
    device, number = probabilities.device, len(probabilities)
    label = target.to(device).long()
    valid = label != IGNORE_INDEX
    labels, predicted = label[valid], probabilities.argmax(0)[valid]
    own = probabilities.gather(0, label.clamp(max=number - 1)[None])[0][valid]
    pixels = torch.bincount(labels, minlength=number)
    trust = torch.bincount(labels, own.double(), minlength=number) / pixels.clamp(min=1)
    specks, sides = tiny_regions(target.numpy()), flat_sides(target.numpy())
    if not len(labels):
        return Doubt(split, key, 0.0, "", 0.0, "", 0.0, specks, sides)
    worst = int(torch.where(pixels > 0, trust, 2).argmin())
    seen = predicted[(labels == worst) & (predicted != worst)]
    return Doubt(
        split,
        key,
        disagreement=float(1 - trust[pixels > 0].mean()),
        worst=classes[worst],
        worst_disagreement=float(1 - trust[worst]),
        taken_for=classes[int(torch.bincount(seen).argmax())] if len(seen) else "",
        wrong=float((predicted != labels).double().mean()),
        tiny=specks,
        border=sides,
    )


def tiny_regions(mask: np.ndarray) -> int:
    """Connected regions (with diagonals) of at most TINY pixels; mask: uint8 (H, W)."""
    count = 0
    for label in np.unique(mask).tolist():
        areas = cv2.connectedComponentsWithStats((mask == label).astype(np.uint8), connectivity=8)[2]
        count += int((areas[1:, cv2.CC_STAT_AREA] <= TINY).sum())
    return count


def flat_sides(mask: np.ndarray) -> int:
    """Sides whose outermost line has one label, though MIXED of the line INSIDE of it has others."""
    if min(mask.shape) <= 2 * INSIDE:
        return 0
    lines = ((turned[0], turned[INSIDE]) for turned in (mask, mask[::-1], mask.T, mask.T[::-1]))
    return sum(
        bool((outer == outer[0]).all() and (inner != outer[0]).mean() >= MIXED) for outer, inner in lines
    )


def _picture(
    pixels: np.ndarray, target: Tensor, probabilities: Tensor, palette: np.ndarray
) -> tuple[np.ndarray, set[int]]:
    """image | label | prediction | doubt, and the ids in both masks."""
    label = target.numpy()
    prediction = probabilities.argmax(0).cpu().numpy().astype(np.uint8)
    index = target.to(probabilities.device).long().clamp(max=len(probabilities) - 1)
    doubt = 1 - probabilities.gather(0, index[None])[0].cpu().numpy()
    doubt[label == IGNORE_INDEX] = 0
    shown = panels(displayed(pixels), [label, prediction], palette, CELL, 0.7)
    gray = shown[0].mean(2, keepdims=True) / 2
    share = resized(np.repeat((255 * doubt).astype(np.uint8)[..., None], 3, 2), CELL)[..., :1] / 255
    red = np.array([255.0, 40.0, 20.0])
    shown.append((gray * (1 - share) + red * share).round().astype(np.uint8))
    return beside(shown), {*np.unique(label).tolist(), *np.unique(prediction).tolist()}


def _said(doubt: Doubt) -> str:
    """The class that is doubted, and what it is taken for."""
    taken = f" seen as {doubt.taken_for}" if doubt.taken_for else ""
    return f"{doubt.worst}{taken}"


def _write(cfg: LabelsConfig, doubts: list[Doubt], first: list[Any], entries: Any) -> None:
    """Write the table and the sheet, and print the first lines."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", *(key.name for key in fields(Doubt))])
    for rank, doubt in enumerate(doubts, 1):
        table.writerow([rank, *(f"{v:.4f}" if isinstance(v, float) else v for v in astuple(doubt))])
    output = Path(cfg.output)
    with reraise_as(ConfigError, f"output={output} can't be written", "choose another"):
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "labels.csv", text.getvalue(), durable=False)
        if first:
            cells = [one[2:] for one in sorted(first, key=lambda one: one[:2], reverse=True)]
            sheet = grid(cells, entries, columns=COLUMNS, font_size=FONT)
            write_picture(output / "labels.png", sheet)
    for rank, doubt in enumerate(doubts[:PRINTED], 1):
        name = f"{doubt.split}/{doubt.key}"
        print(printable(f"{rank:>4}  {doubt.disagreement:.2f}  {name}  {_said(doubt)}"))
    files = " and ".join(str(output / name) for name in ("labels.csv", "labels.png")[: 1 + bool(first)])
    say(f"{len(doubts)} samples ranked, the most doubtful labels first; look at {files}")
