"""Scores, all from integer counts over the whole data set.

Segmentation:

    confusion[t, p] = pixels of class t that were predicted as p, pixels with label 255 left out
    IoU_k = confusion[k, k] / (row k + column k - confusion[k, k])      accuracy_k = confusion[k, k] / row k
    precision_k = confusion[k, k] / column k      F1_k = 2 confusion[k, k] / (row k + column k), also Dice
    mIoU, mAcc, mean F1 (mDice): means over classes      aAcc: share of pixels that are right
    fwIoU = sum over classes of row k / all pixels * IoU_k

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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import DataError
from segformer.evaluation.tables import Row, aligned, percent
from segformer.models.ops.backend import BACKENDS, Backend

Count = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Counts pixels in place of `upsample_confusion`: logits, target and the numbers of their images (of a tile
the whole image's) -> the confusion matrix."""

_TOP = 5
_T = TypeVar("_T")
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
        return aligned(self.rows(classes))


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
    left_out: tuple[int, ...] = ()
    "Classes that the means over classes leave out; they are scored, and their pixels count."

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
    def from_counts(cls, counts: Tensor, left_out: Sequence[int] = ()) -> "SegmentationScores":
        """From a confusion matrix (K, K), rows labels and columns predictions. Means of nothing are NaN."""
        pixels = counts.to("cpu", torch.float64)
        hits, labeled, predicted = pixels.diag(), pixels.sum(1), pixels.sum(0)
        iou, acc = _ratios(hits, labeled + predicted - hits), _ratios(hits, labeled)
        aacc = _mean(_ratios(hits.sum()[None], pixels.sum()[None]))
        values: dict[str, Any] = {"iou": iou, "acc": acc, "confusion": counts.tolist(), "aacc": aacc}
        means = (_mean(_without(each, left_out)) for each in (iou, acc))
        return cls(miou=next(means), macc=next(means), left_out=tuple(left_out), **values)

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

    @property
    def mdice(self) -> float:
        """The mean of `f1` over classes."""
        return _mean(_without(self.f1, self.left_out))

    @property
    def fwiou(self) -> float:
        """The mean of `iou` over the labeled pixels of the classes."""
        pixels = [sum(row) for row in self.confusion]
        known = [(n, iou) for n, iou in _without(zip(pixels, self.iou, strict=True), self.left_out) if n]
        total = sum(n for n, _ in known)
        return sum(n * (iou or 0.0) for n, iou in known) / total if total else math.nan

    def summary(self) -> str:
        """See Scores; of several sets also the first score of each."""
        first, *others = self.NAMES.items()
        each = ", ".join(f"{name} {percent(means[first[0]])}" for name, means in self.sets.items())
        texts = [f"{name} {percent(getattr(self, key))}" for key, name in (first, *others)]
        return ", ".join([f"{texts[0]} ({each})" if each else texts[0], *texts[1:]])

    def to_dict(self) -> dict[str, Any]:
        """See Scores; of several sets with miou/<set>, macc/<set>, aacc/<set>."""
        found = Scores.to_dict(self)
        del found["sets"], found["left_out"]
        return found | {f"{key}/{name}": v for name, means in self.sets.items() for key, v in means.items()}

    def details(self) -> dict[str, Any]:
        """See Scores."""
        means = {name: None if math.isnan(x) else x for name, x in self.means().items()}
        found = Scores.details(self) | means
        return found | {"precision": self.precision, "recall": self.acc, "f1": self.f1}

    def means(self) -> dict[str, float]:
        """fwIoU and the mean of F1, as JSON has them."""
        return {"fwiou": self.fwiou, "mdice": self.mdice}

    def rows(self, classes: list[str]) -> list[Row]:
        """See Scores."""
        heads = ("class", "IoU", "accuracy", "precision", "F1", "pixels")
        pixels, precision, f1 = [sum(row) for row in self.confusion], self.precision, self.f1
        lines = zip(classes, self.iou, self.acc, precision, f1, pixels, strict=True)
        exact = _mean(_without(precision, self.left_out))
        mean = ("mean", self.miou, self.macc, exact, self.mdice, sum(pixels))
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
        return aligned([*rows, total])


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

    def __init__(
        self, num_classes: int, ops: Backend = BACKENDS["fused"], count: Count | None = None
    ) -> None:
        super().__init__(num_classes, num_classes)
        self.ops, self.count = ops, count

    def update(self, logits: Tensor, target: Tensor, ids: Sequence[int] = ()) -> None:
        """Count what logits (B, K, h, w), enlarged to target (B, H, W) of integers, choose for each label.

        ids: for `count`. DataError for a label that is no class nor 255.
        """
        _check_labels(target[target != IGNORE_INDEX], self.num_classes)
        if self.count is None:
            self.counts += self.ops.upsample_confusion(logits, target, IGNORE_INDEX)
        else:
            self.counts += self.count(logits, target, ids)

    def compute(self) -> SegmentationScores:
        """The scores of everything counted so far, on all ranks."""
        return SegmentationScores.from_counts(self.counts)


class ClassificationMetric(CountingMetric):
    """Images of each class, and where its logit ranks among theirs."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 3)

    def update(self, logits: Tensor, target: Tensor, ids: Sequence[int] = ()) -> None:
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


def _without(values: Iterable[_T], left_out: Sequence[int]) -> list[_T]:
    return [value for k, value in enumerate(values) if k not in left_out]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
