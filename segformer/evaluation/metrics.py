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
from segformer.errors import DataError
from segformer.models.ops.backend import BACKENDS, Backend

_TOP = 5
_MAX_ROWS = 60  # classes in a table of classification; of more, the hardest third of that


@dataclass(kw_only=True, slots=True)
class Scores:
    """What a segmentation model reached on a data set; every value between 0 and 1."""

    score_name: ClassVar[str] = "mIoU"

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]
    acc: list[float | None]
    confusion: list[list[int]]
    pictures: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    "Key of an image -> uint8 (H, W, 3): image, target and prediction side by side. Rank zero only."

    @classmethod
    def from_confusion(cls, confusion: Tensor) -> "Scores":
        """From counts (K, K), rows labels and columns predictions. Means of nothing are NaN."""
        counts = confusion.to("cpu", torch.float64)
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou = _ratios(hits, labelled + predicted - hits)
        acc = _ratios(hits, labelled)
        return cls(
            miou=_mean(iou),
            macc=_mean(acc),
            aacc=_mean(_ratios(hits.sum()[None], counts.sum()[None])),
            iou=iou,
            acc=acc,
            confusion=confusion.tolist(),
        )

    @property
    def score(self) -> float:
        """What models are compared by."""
        return self.miou

    def summary(self) -> str:
        """One line for the log."""
        return f"mIoU {self.miou:.4f}, mAcc {self.macc:.4f}, aAcc {self.aacc:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the pictures are left out."""
        return _plain(self)

    def table(self, classes: list[str]) -> str:
        """An aligned text table, one line a class, the means last; percent, `-` where there is no score."""
        _check_names(classes, len(self.iou))
        pixels = [sum(row) for row in self.confusion]
        rows = [
            (name, _percent(iou), _percent(acc), f"{count:,}")
            for name, iou, acc, count in zip(classes, self.iou, self.acc, pixels, strict=True)
        ]
        mean = ("mean", _percent(self.miou), _percent(self.macc), f"{sum(pixels):,}")
        return _aligned([("class", "IoU", "accuracy", "pixels"), *rows, mean])


@dataclass(kw_only=True, slots=True)
class ClassScores:
    """What a classifier reached on a data set; every share between 0 and 1."""

    score_name: ClassVar[str] = "top-1"

    top1: float
    top5: float
    macc: float
    acc: list[float | None]
    counts: list[list[int]]
    "By class: images, right ones, and those with the class among the first five."
    pictures: dict[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    "As in Scores; a classifier's are not drawn."

    @classmethod
    def from_counts(cls, counts: Tensor) -> "ClassScores":
        """From counts (K, 3), see the module's docstring. Shares of nothing are NaN."""
        images, first, among = counts.to("cpu", torch.float64).unbind(1)
        acc = _ratios(first, images)
        return cls(
            top1=_mean(_ratios(first.sum()[None], images.sum()[None])),
            top5=_mean(_ratios(among.sum()[None], images.sum()[None])),
            macc=_mean(acc),
            acc=acc,
            counts=counts.tolist(),
        )

    @property
    def score(self) -> float:
        """What models are compared by."""
        return self.top1

    def summary(self) -> str:
        """One line for the log."""
        return f"top-1 {self.top1:.4f}, top-5 {self.top5:.4f}, mAcc {self.macc:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the pictures are left out."""
        return _plain(self)

    def table(self, classes: list[str]) -> str:
        """An aligned text table, one line a class, all images last; percent, `-` where there is no score.

        Of more than 60 classes, the 20 that are recognised worst.
        """
        _check_names(classes, len(self.acc))
        shown = list(range(len(classes)))
        if len(classes) > _MAX_ROWS:
            known = [k for k in shown if self.acc[k] is not None]
            shown = sorted(known, key=lambda k: self.acc[k] or 0.0)[: _MAX_ROWS // 3]
        rows = [
            (classes[k], _percent(self.acc[k]), _percent(_ratio(among, images)), f"{images:,}")
            for k, (images, _, among) in ((k, self.counts[k]) for k in shown)
        ]
        images = sum(row[0] for row in self.counts)
        total = (f"all {len(classes)}", _percent(self.top1), _percent(self.top5), f"{images:,}")
        return _aligned([("class", "top-1", "top-5", "images"), *rows, total])


AnyScores = Scores | ClassScores


def _plain(scores: AnyScores) -> dict[str, Any]:
    values = asdict(replace(scores, pictures={}))
    del values["pictures"]
    return values


class SegmentationMetric(Metric):
    """Adds up the confusion matrix; `compute` sums it over the ranks."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, ops: Backend = BACKENDS["fused"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ops = num_classes, ops
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count what logits (B, K, h, w), enlarged to target (B, H, W) of integers, choose for each label.

        DataError for a label that is no class nor 255.
        """
        _check_labels(target[target != IGNORE_INDEX], self.num_classes)
        self.confusion += self.ops.upsample_confusion(logits, target, IGNORE_INDEX)

    def compute(self) -> Scores:
        """The scores of everything counted so far, on all ranks."""
        return Scores.from_confusion(self.confusion)


class ClassificationMetric(Metric):
    """Adds up the counts of every class; `compute` sums them over the ranks."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        zeros = torch.zeros(num_classes, 3, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count where logits (B, K) rank the classes of target (B,), int64. DataError for a class beyond K.

        Of equal logits the lower class comes first, as in argmax, and a class whose logit is NaN comes last:
        a model that says nothing is not right by accident.
        """
        _check_labels(target, self.num_classes)
        own = logits.gather(1, target[:, None])
        lower = torch.arange(self.num_classes, device=logits.device) < target[:, None]
        place = (~(logits <= own) | ((logits == own) & lower)).sum(1)  # (B,), 0 = ranked first
        seen = torch.stack([torch.ones_like(place), place < 1, place < _TOP], 1)
        self.counts.index_add_(0, target, seen.to(self.counts.dtype))

    def compute(self) -> ClassScores:
        """The scores of everything counted so far, on all ranks."""
        return ClassScores.from_counts(self.counts)


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.numel() and (int(labels.max()) >= num_classes or int(labels.min()) < 0):
        wrong = sorted(set(labels.unique().tolist()) - set(range(num_classes)))
        raise DataError(
            f"the target holds labels {wrong[:6]}, but the model has {num_classes} classes (0 to "
            f"{num_classes - 1}, 255 to ignore); check the label map of the data set"
        )


def _check_names(classes: list[str], num_classes: int) -> None:
    if len(classes) != num_classes:
        raise ValueError(f"{len(classes)} class names for scores of {num_classes} classes")


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    return [_ratio(part, whole) for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text, names at the left and numbers at the right, a rule below the first, above the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
