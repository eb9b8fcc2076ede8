"""Scores, all from integer counts over the whole data set.

Segmentation:

    confusion[t, p] = pixels of class t that were predicted as p, pixels with label 255 left out
    IoU_k = confusion[k, k] / (row k + column k - confusion[k, k])      accuracy_k = confusion[k, k] / row k
    mIoU, mAcc: means over classes      aAcc: share of pixels that are right

Classification:

    counts[k] = images of class k, those with k ranked first, those with k among the first five
    top-1, top-5: shares of all images (with fewer than five classes top-5 is 1)
    accuracy_k: top-1 of the images of class k      mAcc: its mean over classes

A class absent from labels and predictions has no IoU, one absent from the labels no accuracy: they are None
and left out of the means, as in mmsegmentation's nan_to_num=None evaluation. Counts are int64, so that sums
over ranks and batches are exact and do not depend on their order. Refuses labels that are neither a class nor
255.

Shapes: B batch, h w logits, H W label, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import DataError, printable
from segformer.models.ops.backend import BACKENDS, Backend

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
        """One line for the log."""
        return ", ".join(f"{name} {getattr(self, key):.4f}" for key, name in self.NAMES.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the pictures are left out."""
        values = asdict(replace(self, pictures={}))
        del values["pictures"]
        return values

    def table(self, classes: list[str]) -> str:
        """Aligned text, one line a class, the means last; percent, `-` where there is no score."""
        raise NotImplementedError


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

    @classmethod
    def from_counts(cls, counts: Tensor) -> "SegmentationScores":
        """From a confusion matrix (K, K), rows labels and columns predictions. Means of nothing are NaN."""
        pixels = counts.to("cpu", torch.float64)
        hits, labeled, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, acc = _ratios(hits, labeled + predicted - hits), _ratios(hits, labeled)
        aacc = _mean(_ratios(hits.sum()[None], pixels.sum()[None]))
        confusion = counts.tolist()
        return cls(miou=_mean(iou), macc=_mean(acc), aacc=aacc, iou=iou, acc=acc, confusion=confusion)

    def table(self, classes: list[str]) -> str:
        """See Scores."""
        pixels = [sum(row) for row in self.confusion]
        rows = [
            (name, _percent(iou), _percent(acc), f"{count:,}")
            for name, iou, acc, count in zip(classes, self.iou, self.acc, pixels, strict=True)
        ]
        mean = ("mean", _percent(self.miou), _percent(self.macc), f"{sum(pixels):,}")
        return _aligned([("class", "IoU", "accuracy", "pixels"), *rows, mean])


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

    def table(self, classes: list[str]) -> str:
        """See Scores; of more than 60 classes, the 20 that are recognized worst."""
        rows = list(zip(classes, self.acc, self.counts, strict=True))
        if len(rows) > _MAX_ROWS:
            known = [row for row in rows if row[1] is not None]
            rows = sorted(known, key=lambda row: row[1] or 0.0)[: _MAX_ROWS // 3]
        lines = [
            (name, _percent(acc), _percent(among / images if images else None), f"{images:,}")
            for name, acc, (images, _, among) in rows
        ]
        images = sum(row[0] for row in self.counts)
        total = (f"all {len(classes)}", _percent(self.top1), _percent(self.top5), f"{images:,}")
        return _aligned([("class", "top-1", "top-5", "images"), *lines, total])


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


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text, names at the left and numbers at the right, a rule below the first, above the last."""
    rows = [(printable(name), *figures) for name, *figures in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
