"""What follows from Measures, as lines, as values for JSON and as tables (printed, CSV, Markdown)."""

from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.format import Split
from segformer.evaluation.bootstrap import class_iou, interval, mean_iou, replicates
from segformer.evaluation.calibration import calibration, write_reliability
from segformer.evaluation.drawing import grid, legend, write_picture
from segformer.evaluation.measures import Measures
from segformer.evaluation.metrics import SegmentationScores
from segformer.evaluation.tables import Row, aligned, as_csv, as_markdown, percent
from segformer.files import write_atomic


class Findings:
    """Lines, record and tables of one evaluation; rank zero."""

    def __init__(
        self, scores: SegmentationScores, measures: Measures, split: Split, classes: list[str], worst: int
    ) -> None:
        """worst: how many images are listed, those that differ most and those with the lowest mIoU."""
        self.lines: list[str] = []
        self.record: dict[str, Any] = {}
        self.tables: dict[str, list[Row]] = {}
        self._measures, self._classes, self._worst = measures, classes, worst
        tiled = split.tiled
        self._key = (lambda index: tiled.images[index].key) if tiled else split.key
        low, high = interval(replicates(measures.meant(measures.areas)))
        self.record["miou_interval"] = [low, high]
        span = f"95% over {len(measures.areas):,} images: {_span(low, high)}"
        more = f"fwIoU {percent(scores.fwiou)}, mDice {percent(scores.mdice)}"
        self.lines.append(f"mIoU {percent(scores.miou)} ({span}), {more}")
        if names := [classes[k] for k in measures.left_out]:
            self.record["ignore_classes"] = names
            self.lines.append(f"the means leave out {', '.join(names)}")
        if measures.boundary is not None:
            self._boundary(measures.boundary)
        if measures.calibration is not None:
            error, rows = calibration(measures.calibration)
            self.record["calibration"] = {"ece": error, "counts": measures.calibration.tolist()}
            self.tables["calibration"] = rows
            self.lines.append(f"expected calibration error {percent(error)} (15 bins)")
        if worst:
            found = measures.scores()
            order = [int(k) for k in np.argsort(found, kind="stable")[:worst] if found[k] == found[k]]
            self.tables["worst"] = [{"image": self._key(k), "mIoU": float(found[k])} for k in order]
            self.record["worst"] = self.tables["worst"]

    def _boundary(self, areas: np.ndarray) -> None:
        iou, mean = class_iou(areas), float(mean_iou(self._measures.meant(areas)))
        self.record["boundary"] = {
            "miou": _number(mean),
            "areas": areas.tolist(),
            "iou": [_number(x) for x in iou],
        }
        rows: list[Row] = [
            {"class": name, "boundary IoU": _number(x), "pixels": int(n)}
            for name, x, n in zip(self._classes, iou, areas[1], strict=True)
        ]
        last: Row = {"class": "mean", "boundary IoU": _number(mean), "pixels": int(areas[1].sum())}
        self.tables["boundary"] = [*rows, last]
        self.lines.append(f"boundary IoU {percent(mean)}, of the pixels near the edges of each class")

    def against(self, other: Measures, name: str, base: str) -> None:
        """Hold the scores against those of another model on the same images: these less the other's."""
        mine, theirs = self._measures, other
        ours, others = (mine.meant(one.areas) for one in (mine, theirs))
        difference = float(mean_iou(ours.sum(0)) - mean_iou(others.sum(0)))
        low, high = interval(replicates(ours) - replicates(others))
        pairs = replicates(mine.areas, score=class_iou) - replicates(theirs.areas, score=class_iou)
        rows: list[Row] = []
        both = (class_iou(one.areas.sum(0)) for one in (mine, theirs))
        for k, (a, b) in enumerate(zip(*both, strict=True)):
            spans = map(_number, interval(pairs[:, k]))
            values = (self._classes[k], _number(a), _number(b), _number(a - b), *spans)
            heads = ("class", "IoU", "against", "difference", "low", "high")
            rows.append(dict(zip(heads, values, strict=True)))
        own, their = mine.scores(), mine.scores(theirs.areas)
        order = np.argsort(-np.nan_to_num(np.abs(own - their), nan=-1.0), kind="stable")
        most: list[Row] = [
            {"image": self._key(k), "mIoU": own[k], "against": their[k], "difference": own[k] - their[k]}
            for k in order[: self._worst or 10].tolist()
        ]
        self.tables |= {"against": rows, "differ": most}
        self.record["against"] = {"checkpoint": base, "difference": difference, "interval": [low, high]}
        self.record["against"] |= {"classes": rows, "images": most}
        clear = "" if low > 0 or high < 0 else "; it includes 0: images like these don't tell them apart"
        text = f"95% over the same images: {_span(low, high, '+')}{clear}"
        self.lines.append(f"{name} less {base}: mIoU {100 * difference:+z.2f} points ({text})")

    def text(self) -> str:
        """What is printed below the table of classes."""
        parts = ["\n".join(self.lines), *map(aligned, self.tables.values())]
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """The same as Markdown."""
        return "\n".join(["", *(f"{line}  " for line in self.lines), *self._tables()])

    def _tables(self) -> list[str]:
        return [f"\n{name}\n\n{as_markdown(rows)}" for name, rows in self.tables.items()]

    def write(self, folder: Path, name: str) -> None:
        """<name>-<table>.csv, <name>-calibration.png and <name>-worst.jpg."""
        for table, rows in self.tables.items():
            write_atomic(folder / f"{name}-{table}.csv", as_csv(rows), durable=False)
        if self._measures.calibration is not None:
            write_reliability(self._measures.calibration, folder / f"{name}-calibration.png")
        if (drawn := self._measures.worst) and self._measures.palette is not None:
            cells = [(f"{self._key(index)}  {percent(score)}", picture) for score, index, picture, _ in drawn]
            names = legend([shown for *_, shown in drawn], self._classes, self._measures.palette)
            picture = grid(cells, names, columns=1)
            write_picture(folder / f"{name}-worst.jpg", picture, quality=88)


def _number(value: float) -> float | None:
    return float(value) if value == value else None


def _span(low: float, high: float, sign: str = "") -> str:
    return f"{100 * low:{sign}z.2f} to {100 * high:{sign}z.2f}"
