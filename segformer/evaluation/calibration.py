"""Expected calibration error (Guo et al. 2017): is what is said with 70% right 7 times in 10?

    confidence   the highest probability of a pixel; pixels labeled 255 are left out
    bins         15 of equal width, ]0, 1/15] to ]14/15, 1]
    ECE          sum over bins of pixels in it / all pixels * |share that is right - mean confidence|

Counts are integers, and so is each confidence, in units of 2^-24: sums are exact in any order, on any ranks.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.evaluation.drawing import INK
from segformer.evaluation.tables import Row
from segformer.files import write_atomic
from segformer.models.ops.resize import Enlargement

BINS, UNIT = 15, 1 << 24


def calibration_counts(logits: Tensor, target: Tensor, *, probabilities: bool = False) -> Tensor:
    """Counts (3, BINS) int64: pixels, right ones, sum of confidences in units of 1 / UNIT.

    Args:
        logits: (B, K, h, w), enlarged to the target tile by tile.
        target: (B, H, W), class ids and IGNORE_INDEX.
        probabilities: the logits are already probabilities, the mean of several views.
    """
    counts = torch.zeros(3, BINS, dtype=torch.int64)
    size = (target.shape[1], target.shape[2])
    enlargement = Enlargement(logits, size, torch.float32)
    for image, labels in zip(logits.float().permute(0, 2, 1, 3), target, strict=True):
        small = image.contiguous()
        for row, column in enlargement.tiles():
            tile = enlargement.tile(small, row, column)
            confidence, found = (tile if probabilities else tile.softmax(1)).max(1)
            label = labels[row.rows, column.rows]
            known = label != IGNORE_INDEX
            units = (confidence[known].double() * UNIT).round().long().clamp(1, UNIT)
            place = (units * BINS + UNIT - 1) // UNIT - 1  # the upper edge belongs to a bin
            right = (found[known] == label[known]).long()
            for total, weights in zip(counts, (torch.ones_like(units), right, units), strict=True):
                sums = torch.zeros(BINS, dtype=torch.int64, device=units.device)
                total += sums.index_add_(0, place, weights).cpu()
    return counts


def calibration(counts: np.ndarray) -> tuple[float, list[Row]]:
    """(ECE, a line for each bin) of counts (3, BINS); NaN without a pixel."""
    pixels, right, units = counts.astype(np.float64)
    with np.errstate(invalid="ignore"):
        accuracy, confidence = right / pixels, units / pixels / UNIT
        error = np.nansum(pixels * np.abs(accuracy - confidence)) / pixels.sum()
    bins = [f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}" for b in range(BINS)]
    columns = [[float(x) if x == x else None for x in values] for values in (confidence, accuracy)]
    heads = ("probability", "mean probability", "right", "pixels")
    lines: Any = zip(bins, *columns, counts[0].tolist(), strict=True)
    return float(error), [dict(zip(heads, line, strict=True)) for line in lines]


def write_reliability(counts: np.ndarray, path: Path) -> None:
    """Draw what share is right over the probability, and where the pixels are, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    error, rows = calibration(counts)
    drawn = Figure(figsize=(6, 6), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    left, total = np.arange(BINS) / BINS, max(1, int(counts[0].sum()))
    right = [100 * float(row["right"] or 0) for row in rows]
    axes.bar(100 * left, right, 100 / BINS, align="edge", color="#0072B2", edgecolor="white", label="right")
    axes.step(100 * np.append(left, 1), 100 * np.append(counts[0], counts[0][-1]) / total, where="post")
    axes.lines[0].set(color="#D55E00", label="share of the pixels")
    axes.plot([0, 100], [0, 100], color=INK, linestyle="--", label="calibrated")
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="probability of the class chosen, %", ylabel="%")
    axes.set_title(f"Expected calibration error {100 * error:.2f}%", color=INK)
    axes.legend(loc="upper left", frameon=False)
    data = io.BytesIO()
    drawn.savefig(data, format="png")
    write_atomic(path, data.getvalue(), durable=False)
