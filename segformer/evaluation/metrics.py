"""Scores, all from integer counts over the whole data set.

Segmentation:

    confusion[t, p] = pixels of class t that were predicted as p, pixels with label 255 left out
    IoU_k = confusion[k, k] / (row k + column k - confusion[k, k])      accuracy_k = confusion[k, k] / row k
    precision_k = confusion[k, k] / column k      F1_k = 2 confusion[k, k] / (row k + column k), also Dice
    mIoU, mAcc: means over classes      aAcc: share of pixels that are right

The recall of a class is its accuracy.

Classification:

    counts[k] = images of class k, those with k ranked first, those with k among the first five
    top-1, top-5: shares of all images (with fewer than five classes top-5 is 1)
    accuracy_k: top-1 of the images of class k      mAcc: its mean over classes

A class absent from labels and predictions has no IoU, precision and F1, one absent from the labels no
accuracy: they are None and left out of the means, as in mmsegmentation's nan_to_num=None evaluation. The
precision of a class with labels that is never predicted is 0, as of torchmetrics' zero_division=0.
Counts are int64, so that sums over ranks and batches are exact and do not depend on their order. Refuses
labels that are neither a class nor 255.

Shapes: B batch, h w logits, H W label, K classes.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import DataError, printable
from segformer.models.ops.backend import BACKENDS, Backend

Row = dict[str, str | float | int | None]
"A line of a table of scores: title of the column -> name, share from 0 to 1, or count."

_TOP = 5
_MAX_ROWS = 60  # classes in a table of classification; of more, the hardest third of that


@dataclass(kw_only=True, slots=True)
class Scores:
    """Scores of a model on a data set, every share between 0 and 1. Base of the two kinds below."""

    NAMES: ClassVar[dict[str, str]]
    "Field -> name of the scores of a line; the first compares models."

    pictures: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    "Validation pictures: key of an image -> uint8 (H, W, 3). Segmentation, rank zero only."

    @property
    def score(self) -> float:
        """The score that compares models."""
        return float(getattr(self, next(iter(self.NAMES))))

    def summary(self) -> str:
        """One line for the log, in per cent."""
        return ", ".join(f"{name} {percent(getattr(self, key))}" for key, name in self.NAMES.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the pictures are left out."""
        values = asdict(replace(self, pictures={}))
        del values["pictures"]
        return values

    def details(self) -> dict[str, Any]:
        """`to_dict` with what follows from the counts, for JSON: null where nothing was measured."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in self.to_dict().items()
        }

    def rows(self, classes: list[str]) -> list[Row]:
        """The scores of every class, those of all together last."""
        raise NotImplementedError

    def table(self, classes: list[str]) -> str:
        """`rows` as aligned text; percent, `-` where there is no score."""
        return _aligned(self.rows(classes))


@dataclass(kw_only=True, slots=True)
class SegmentationScores(Scores):
    """Scores of a segmentation model."""

    NAMES: ClassVar[dict[str, str]] = {"miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]
    acc: list[float | None]
    confusion: list[list[int]]
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    "Name of a data set of several -> its miou, macc and aacc; those of all together are the means of these."

    @classmethod
    def together(cls, sets: Mapping[str, "SegmentationScores"]) -> "SegmentationScores":
        """Of several data sets, each in its own labels: lists one after the other, means over the sets."""
        counts = [torch.tensor(one.confusion, dtype=torch.int64) for one in sets.values()]
        found = cls.from_counts(torch.block_diag(*counts))
        found.sets = {name: {key: getattr(one, key) for key in cls.NAMES} for name, one in sets.items()}
        for name, one in sets.items():
            found.pictures |= {f"{name}/{key}": picture for key, picture in one.pictures.items()}
        for key in cls.NAMES:
            setattr(found, key, _mean([float(means[key]) for means in found.sets.values()]))
        return found

    @classmethod
    def from_counts(cls, counts: Tensor) -> "SegmentationScores":
        """From a confusion matrix (K, K), rows labels and columns predictions. Means of nothing are NaN."""
        pixels = counts.to("cpu", torch.float64)
        hits, labeled, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, acc = _ratios(hits, labeled + predicted - hits), _ratios(hits, labeled)
        aacc = _mean(_ratios(hits.sum()[None], pixels.sum()[None]))
        confusion = counts.tolist()
        return cls(miou=_mean(iou), macc=_mean(acc), aacc=aacc, iou=iou, acc=acc, confusion=confusion)

    @property
    def precision(self) -> list[float | None]:
        """Share of the pixels predicted as each class that are labeled so; 0 where a label is never met."""
        found = torch.tensor(self.confusion, dtype=torch.float64)
        labeled, predicted = found.sum(1), found.sum(0)
        return _ratios(found.diag(), torch.where(labeled > 0, predicted.clamp(min=1), predicted))

    @property
    def f1(self) -> list[float | None]:
        """Harmonic mean of precision and accuracy of each class."""
        pixels = torch.tensor(self.confusion, dtype=torch.float64)
        return _ratios(2 * pixels.diag(), pixels.sum(0) + pixels.sum(1))

    def summary(self) -> str:
        """See Scores; of several sets also the first score of each."""
        first, *others = self.NAMES.items()
        each = ", ".join(f"{name} {percent(means[first[0]])}" for name, means in self.sets.items())
        texts = [f"{name} {percent(getattr(self, key))}" for key, name in (first, *others)]
        return ", ".join([f"{texts[0]} ({each})" if each else texts[0], *texts[1:]])

    def to_dict(self) -> dict[str, Any]:
        """See Scores; of several sets with miou/<set>, macc/<set>, aacc/<set>."""
        found = Scores.to_dict(self)
        del found["sets"]
        return found | {f"{key}/{name}": v for name, means in self.sets.items() for key, v in means.items()}

    def details(self) -> dict[str, Any]:
        """See Scores."""
        found = Scores.details(self)
        return found | {"precision": self.precision, "recall": self.acc, "f1": self.f1}

    def rows(self, classes: list[str]) -> list[Row]:
        """See Scores."""
        heads = ("class", "IoU", "accuracy", "precision", "F1", "pixels")
        pixels, precision, f1 = [sum(row) for row in self.confusion], self.precision, self.f1
        lines = zip(classes, self.iou, self.acc, precision, f1, pixels, strict=True)
        mean = ("mean", self.miou, self.macc, _mean(precision), _mean(f1), sum(pixels))
        each = [(f"mean of {name}", m["miou"], m["macc"], None, None, None) for name, m in self.sets.items()]
        return [dict(zip(heads, line, strict=True)) for line in [*lines, *each, mean]]


@dataclass(kw_only=True, slots=True)
class ClassificationScores(Scores):
    """Scores of a classifier."""

    NAMES: ClassVar[dict[str, str]] = {"top1": "top-1", "top5": "top-5", "macc": "mAcc"}

    top1: float
    top5: float
    macc: float
    acc: list[float | None]
    counts: list[list[int]]
    "By class: images, right ones, and those with the class among the first five."

    @classmethod
    def from_counts(cls, counts: Tensor) -> "ClassificationScores":
        """From counts (K, 3), see the module's docstring. Shares of nothing are NaN."""
        images, first, among = counts.to("cpu", torch.float64).unbind(1)
        acc = _ratios(first, images)
        top1, top5 = (_mean(_ratios(hits.sum()[None], images.sum()[None])) for hits in (first, among))
        return cls(top1=top1, top5=top5, macc=_mean(acc), acc=acc, counts=counts.tolist())

    def rows(self, classes: list[str]) -> list[Row]:
        """See Scores."""
        heads = ("class", "top-1", "top-5", "images")
        counts = zip(classes, self.acc, self.counts, strict=True)
        lines = [
            (name, acc, five / images if images else None, images) for name, acc, (images, _, five) in counts
        ]
        total = (f"all {len(classes)}", self.top1, self.top5, sum(row[0] for row in self.counts))
        return [dict(zip(heads, line, strict=True)) for line in [*lines, total]]

    def table(self, classes: list[str]) -> str:
        """See Scores; of more than 60 classes, the 20 that are recognized worst."""
        *rows, total = self.rows(classes)
        if len(rows) > _MAX_ROWS:
            known = [(acc, k) for k, acc in enumerate(self.acc) if acc is not None]
            rows = [rows[k] for _, k in sorted(known)[: _MAX_ROWS // 3]]
        return _aligned([*rows, total])


SCORES: dict[str, type[Scores]] = {
    "segmentation": SegmentationScores,
    "classification": ClassificationScores,
}


class CountingMetric(Metric):
    """Adds up integer counts of every class; `compute` sums them over the ranks."""

    counts: Tensor

    def __init__(self, num_classes: int, columns: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        zeros = torch.zeros(num_classes, columns, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")


class SegmentationMetric(CountingMetric):
    """The confusion matrix of pixels."""

    def __init__(self, num_classes: int, ops: Backend = BACKENDS["fused"]) -> None:
        super().__init__(num_classes, num_classes)
        self.ops = ops

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count what logits (B, K, h, w), enlarged to target (B, H, W) of integers, choose for each label.

        DataError for a label that is no class nor 255.
        """
        _check_labels(target[target != IGNORE_INDEX], self.num_classes)
        self.counts += self.ops.upsample_confusion(logits, target, IGNORE_INDEX)

    def compute(self) -> SegmentationScores:
        """The scores of everything counted so far, on all ranks."""
        return SegmentationScores.from_counts(self.counts)


class ClassificationMetric(CountingMetric):
    """Images of each class, and where its logit ranks among theirs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 3)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count where logits (B, K) rank the classes of target (B,), int64. DataError for a class beyond K.

        Of equal logits the lower class comes first, as in argmax, and a class whose logit is NaN comes last:
        constant or broken logits are not right by accident.
        """
        _check_labels(target, self.num_classes)
        own = logits.gather(1, target[:, None])
        lower = torch.arange(self.num_classes, device=logits.device) < target[:, None]
        place = (~(logits <= own) | ((logits == own) & lower)).sum(1)  # (B,), 0 = ranked first
        seen = torch.stack([torch.ones_like(place), place < 1, place < _TOP], 1)
        self.counts.index_add_(0, target, seen.to(self.counts.dtype))

    def compute(self) -> ClassificationScores:
        """The scores of everything counted so far, on all ranks."""
        return ClassificationScores.from_counts(self.counts)


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() and (int(labels.max()) >= num_classes or int(labels.min()) < 0):
        wrong = sorted(set(labels.unique().tolist()) - set(range(num_classes)))
        raise DataError(
            f"the target holds labels {wrong[:6]}, but the model has {num_classes} classes (0 to "
            f"{num_classes - 1}, 255 to ignore); check the label map of the data set"
        )


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    return [
        part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)
    ]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def figure(value: str | float | int | None) -> str:
    """A share as per cent, a count with commas; `-` where there is no score."""
    if isinstance(value, str | int):
        return printable(value) if isinstance(value, str) else f"{value:,}"
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def percent(share: float) -> str:
    """A share as it stands in a line of text: 57.26%."""
    return f"{100 * share:.2f}%"


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, shares from 0 to 1 with all digits; an empty field where there is no score."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Rows as a table of Markdown, with the figures of `table`."""
    heads = list(rows[0])
    cells = [[figure(value).replace("|", "\\|") for value in row.values()] for row in rows]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _aligned(rows: Sequence[Row]) -> str:
    """Rows as text, names at the left and numbers at the right, a rule below the first, above the last."""
    cells = [list(rows[0]), *([figure(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
