"""The pictures of a run: the curve of its training, and what the model sees beside what it should see.

    curve.png       loss (each log line, and smoothed), validation score at the right, learning rate below
    classes.png     IoU of each class over the steps
    overlays/*.jpg  image | target | prediction, with the colors of the classes that occur in either

Both are drawn for a phone as well: text is at least 1/45 of a picture's width.
"""

import io
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import printable
from segformer.evaluation.drawing import INK, grid, legend, panels, write_picture
from segformer.evaluation.metrics import SCORES
from segformer.files import write_atomic
from segformer.inference.predicting.outputs import writing
from segformer.telemetry.jsonl import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

# Okabe and Ito's colors, which color-blind readers tell apart.
LOSS, SCORE, RATE, GRID = "#0072B2", "#D55E00", "#5F6B7A", "#E4E7EB"
MOST_CURVES = 24  # classes with a curve of their own


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step; of two of one kind and step the later one counts."""
    rows = {(str(row["kind"]), int(row["step"])): row for row in read_metrics(run_dir)}
    return sorted(rows.values(), key=lambda row: int(row["step"]))


def series(rows: list[dict[str, Any]], kinds: tuple[str, ...], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the finite values of `key` in the rows of these kinds."""
    # Non-finite values are text, unknown ones null.
    known = [(row["step"], row[key]) for row in rows if row["kind"] in kinds and row.get(key) is not None]
    points = np.array(known, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0].astype(np.int64), points[:, 1]


def smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Mean under a Gaussian of standard deviation `width` values, centered so that the curve doesn't lag."""
    reach = math.ceil(3 * width)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    sums = np.convolve(values, weights)[reach:-reach]
    return np.asarray(sums / np.convolve(np.ones(len(values)), weights)[reach:-reach])


def write_curve(run_dir: Path) -> Path | None:
    """Draw metrics.jsonl as run_dir/curve.png; None where nothing has been logged yet."""
    rows = history(run_dir)
    steps, losses = series(rows, ("train",), "loss")
    if not len(steps):
        return None
    figure, (top, bottom) = _figure((9, 5.6), 2, 1, sharex=True, height_ratios=[5, 1])
    _draw_loss(top, steps, losses)
    _draw_score(top.twinx(), rows)
    rate_steps, rates = series(rows, ("train",), "lr")
    bottom.fill_between(rate_steps, rates, color=RATE, alpha=0.25, linewidth=0)
    bottom.plot(rate_steps, rates, color=RATE, linewidth=1.4)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("lr", color=RATE, fontsize=14)
    bottom.set_xlabel("optimizer step", color=INK, fontsize=14)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return _save(figure, run_dir / "curve.png")


def _figure(size: tuple[float, float], rows: int, columns: int, **options: Any) -> tuple["Figure", Any]:
    """A figure of `size` inches and its axes, which have a grid and no frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, **options)
    for axes in panels.flat:
        axes.grid(True, color=GRID, linewidth=0.9)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=INK, labelsize=12, length=0)
    return figure, panels


def _save(figure: "Figure", path: Path) -> Path:
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a class's name
        figure.savefig(drawn, format="png")
    with writing(path):
        write_atomic(path, drawn.getvalue())
    return path


def _draw_loss(axes: "Axes", steps: np.ndarray, losses: np.ndarray) -> None:
    few = len(losses) < 12
    axes.plot(steps, losses, color=LOSS, alpha=1 if few else 0.3, linewidth=1.2, marker="o" if few else None)
    if not few:
        mean = smoothed(losses, max(1.0, len(losses) / 40))
        axes.plot(steps, mean, color=LOSS, linewidth=2.4)
        # One spike must not flatten the rest.
        low, high = losses.min(), max(mean.max(), np.percentile(losses, 98))
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.set_ylabel("training loss", color=LOSS, fontsize=14)


def _draw_score(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """What models are compared by: top-1 of a classifier, else mIoU; the best value is written out."""
    axes.spines[:].set_visible(False)
    names = [next(iter(scores.NAMES.items())) for scores in SCORES.values()]
    key, name = next((pair for pair in names if any(pair[0] in row for row in rows)), names[0])
    steps, values = series(rows, ("eval", "final"), key)
    if not len(steps):
        axes.set_yticks([])
        return
    values = 100 * values
    mark: dict[str, Any] = {"marker": "o", "markersize": 7, "markeredgecolor": "white"}
    axes.plot(steps, values, color=SCORE, linewidth=2.0, clip_on=False, **mark)  # 100 keeps its whole mark
    axes.set_ylim(0, 100)
    axes.set_ylabel(f"validation {name}, %", color=SCORE, fontsize=14)
    axes.tick_params(colors=SCORE, labelsize=12, length=0)
    best = int(np.argmax(values))
    place: dict[str, Any] = {"xytext": (0, 9 if values[best] < 90 else -22), "textcoords": "offset points"}
    place["ha"] = "right" if best == len(values) - 1 and best else "center"
    text = f"{values[best]:.2f}"
    axes.annotate(text, (steps[best], values[best]), color=SCORE, fontsize=14, fontweight="bold", **place)


def write_class_curves(run_dir: Path, classes: list[str]) -> Path | None:
    """Draw the IoU of each class over the steps as run_dir/classes.png; None before a second evaluation.

    Of more than MOST_CURVES classes those whose last IoU is lowest.
    """
    rows = [row for row in history(run_dir) if row["kind"] in ("eval", "final") and row.get("iou")]
    if len(rows) < 2:
        return None
    steps = [int(row["step"]) for row in rows]
    ious = 100 * np.array([[np.nan if v is None else v for v in row["iou"]] for row in rows], np.float64)
    shown = sorted(np.argsort(ious[-1], kind="stable")[:MOST_CURVES].tolist())
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, panels = _figure((9, 0.5 + 2.2 * down), down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, k in zip(panels.flat, shown, strict=False):
        axes.plot(steps, ious[:, k], color=SCORE, linewidth=2, marker="o", markersize=4)
        axes.set_ylim(0, 100)
        last = "-" if np.isnan(ious[-1, k]) else f"{ious[-1, k]:.0f}"
        name = printable(classes[k] if k < len(classes) else f"class {k}")
        axes.set_title(f"{name[:18]} {last}", fontsize=15, color=INK, parse_math=False)
    return _save(figure, run_dir / "classes.png")


def mean_iou(target: np.ndarray, prediction: np.ndarray) -> float | None:
    """Mean IoU of one picture over the classes in target or prediction; None where every pixel is ignored."""
    valid = target != IGNORE_INDEX
    target, prediction = target[valid], prediction[valid]
    ious = [
        np.logical_and(target == k, prediction == k).sum() / np.logical_or(target == k, prediction == k).sum()
        for k in np.union1d(target, prediction)
    ]
    return float(np.mean(ious)) if ious else None


def write_overlays(
    samples: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
    out: Path,
    *,
    classes: list[str],
    palette: np.ndarray,
) -> None:
    """Draw (key, image, target, prediction) tuples into the folder `out`, in place of the drawings in it.

    Image (H, W, 3) uint8 RGB; target and prediction (H, W) uint8, class ids, in the target also IGNORE_INDEX.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("[0-9][0-9]*_*.jpg"):
            old.unlink()
        for index, (key, image, target, prediction) in enumerate(samples):
            path = out / f"{index:04d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', key)[-80:]}.jpg"
            picture = comparison(image, target, prediction, classes=classes, palette=palette)
            write_picture(path, picture, quality=90, subsampling=0)


def comparison(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, *, classes: list[str], palette: np.ndarray
) -> "Image.Image":
    """One picture: image | target | prediction with captions above and the classes below."""
    score = mean_iou(target, prediction)
    captions = ["image", "target", "prediction" if score is None else f"prediction, mIoU {100 * score:.0f}%"]
    cells = zip(captions, panels(image, [target, prediction], palette, alpha=0.55), strict=True)
    return grid(list(cells), legend([target, prediction], classes, palette), columns=3)
