"""Scores of a segmentation, all from one integer confusion matrix over the whole data set.

    confusion[t, p] = pixels of class t that were predicted as p, pixels with label 255 left out
    IoU_k = confusion[k, k] / (row k + column k - confusion[k, k])      accuracy_k = confusion[k, k] / row k
    mIoU, mAcc: means over classes      aAcc: share of pixels that are right

A class absent from labels and predictions has no IoU, one absent from the labels no accuracy: they are None
and left out of the means, as in mmsegmentation's nan_to_num=None evaluation. Counts are int64, so that sums
over ranks and batches are exact and do not depend on their order. Refuses labels that are neither a class nor
255.

Shapes: B batch, h w logits, H W label, K classes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from segformer.data.dataset import IGNORE_INDEX
from segformer.errors import DataError
from segformer.models.ops.argmax import upsample_confusion


@dataclass(kw_only=True, slots=True)
class Scores:
    """What a model reached on a data set; every value between 0 and 1."""

    miou: float
    macc: float
    aacc: float
    iou: list[float | None]
    acc: list[float | None]
    confusion: list[list[int]]

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

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return asdict(self)

    def table(self, classes: list[str]) -> str:
        """An aligned text table, one line a class, the means last; percent, `-` where there is no score."""
        if len(classes) != len(self.iou):
            raise ValueError(f"{len(classes)} class names for scores of {len(self.iou)} classes")
        pixels = [sum(row) for row in self.confusion]
        rows = [("class", "IoU", "accuracy", "pixels")]
        rows += [
            (name, _percent(iou), _percent(acc), f"{count:,}")
            for name, iou, acc, count in zip(classes, self.iou, self.acc, pixels, strict=True)
        ]
        rows.append(("mean", _percent(self.miou), _percent(self.macc), f"{sum(pixels):,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


class SegmentationMetric(Metric):
    """Adds up the confusion matrix; `compute` sums it over the ranks."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count what logits (B, K, h, w), enlarged to target (B, H, W) of integers, choose for each label.

        DataError for a label that is no class nor 255.
        """
        label = target[target != IGNORE_INDEX]
        if label.numel() and (int(label.max()) >= self.num_classes or int(label.min()) < 0):
            wrong = sorted(set(label.unique().tolist()) - set(range(self.num_classes)))
            raise DataError(
                f"the target holds labels {wrong[:6]}, but the model has {self.num_classes} classes (0 to "
                f"{self.num_classes - 1}, 255 to ignore); check the label map of the data set"
            )
        self.confusion += upsample_confusion(logits, target, IGNORE_INDEX)

    def compute(self) -> Scores:
        """The scores of everything counted so far, on all ranks."""
        return Scores.from_confusion(self.confusion)


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return [part / whole if whole else None for part, whole in pairs]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
