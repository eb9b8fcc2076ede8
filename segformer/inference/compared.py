"""Runs that are compared: what each logged, which validation images they share, how sure a score is.

runs/x/scores/<split>-images.npz    areas of each image (evaluation/bootstrap.py), kept for the next time
"""

import contextlib
import csv
import io
import statistics
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segformer.checkpoint.atomic import MANIFEST
from segformer.checkpoint.format import TrainState, step_name
from segformer.checkpoint.reader import CONFIG, newest_state, stored_config
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.decode import decode_mask, decode_stored
from segformer.errors import CheckpointError, ConfigError, DataError, listed, printable, reraise_as, say
from segformer.evaluation.bootstrap import class_iou, image_areas, interval, mean_iou, replicates
from segformer.evaluation.metrics import SCORES
from segformer.files import sha256_of, write_atomic
from segformer.inference.pictures import history, series
from segformer.inference.predictor import Predictor
from segformer.telemetry.progress import duration, evaluated
from segformer.training.config import RunConfig, to_run_config
from segformer.training.overrides import flat

PLACES = ("name", "run_dir", "stop_at")  # settings that say nothing about what was learned
MARK = "* The interval excludes 0: the run differs from the first one on images like these."
# What numpy raises of a damaged archive.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
Span = tuple[float, float]


@dataclass
class Entry:
    """A run that is compared."""

    folder: Path
    config: RunConfig
    state: TrainState
    name: str = ""
    areas: np.ndarray | None = None
    "(N, 3, K) int64, see evaluation/bootstrap.py; None where its images were not scored."

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What it logged."""
        return history(self.folder)

    @property
    def key(self) -> str:
        """The score that compares it: miou or top1."""
        return next(iter(SCORES[self.config.data.task].NAMES))

    @property
    def step(self) -> int:
        """Steps done, as its newest checkpoint or its log says."""
        return self.state.step or max((int(row["step"]) for row in self.rows), default=0)

    @property
    def ended(self) -> bool:
        """Its last evaluation is that of its newest step: it was trained to its end."""
        return any(row["kind"] == "final" and row["step"] >= self.step for row in self.rows)

    @cached_property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, scores) of its evaluations."""
        return series(self.rows, ("eval", "final"), self.key)

    @cached_property
    def last(self) -> float | None:
        """The score of its newest checkpoint where that was computed here, else of its last evaluation."""
        if self.areas is not None:
            return float(mean_iou(self.areas.sum(0)))
        return float(self.scores[1][-1]) if len(self.scores[1]) else None

    @property
    def best(self) -> float | None:
        """The highest score of its evaluations."""
        return float(self.scores[1].max()) if len(self.scores[1]) else None

    @cached_property
    def seconds(self) -> float:
        """Time in training steps, without evaluations and breaks."""
        steps, times = series(self.rows, ("train",), "step_s")
        return float(np.sum(np.diff(steps, prepend=0) * times))

    @property
    def rate(self) -> float | None:
        """Images per second, the median of the log lines."""
        rates = series(self.rows, ("train",), "images_per_s")[1]
        return float(np.median(rates)) if len(rates) else None

    @property
    def class_scores(self) -> list[float | None]:
        """IoU of each class at the last evaluation, accuracy of a classifier; [] without one."""
        if self.areas is not None:
            return [None if iou != iou else float(iou) for iou in class_iou(self.areas.sum(0))]
        found = [row for row in self.rows if row["kind"] in ("eval", "final")]
        return list(found[-1].get("iou") or found[-1].get("acc") or []) if found else []


def open_entry(run: Path) -> Entry:
    """A run directory; CheckpointError where it is none, or damaged."""
    if not (run / CONFIG).is_file():
        if (run / "config.json").is_file():
            what = "an export, which has neither curve nor settings; give its run"
        else:
            what = "not a run directory: it has no config.yaml; give one such as runs/sample"
        raise CheckpointError(f"{run} is {what}")
    state = newest_state(run / "checkpoints") or TrainState()
    return Entry(run, to_run_config(stored_config(run, state), str(run / CONFIG)), state)


def common_images(entries: list[Entry]) -> tuple[str, Split | None]:
    """(Why images are not compared, the validation images of all runs); one of the two is empty."""
    first = entries[0]
    if any(entry.config.data.task != "segmentation" for entry in entries):
        return "a classifier draws no masks", None
    if any(entry.config.mixture.sets for entry in entries):
        return "the sets of a mixture have labels of their own; launch/evaluate.py scores each of them", None
    for entry in entries:
        if not entry.state.step:
            return f"{entry.folder} has no checkpoint yet", None
        other = entry.state.data_digest != first.state.data_digest
        if other or entry.config.eval_split != first.config.eval_split:
            what = "other data (the digest differs)" if other else f"split {entry.config.eval_split}"
            return f"{entry.folder} was trained and scored on {what} than {first.folder}", None
    try:
        shards = ShardSet.open(first.config.data.shards, first.config.loader.storage)
        split = shards.split(first.config.eval_split)
    except DataError as error:
        return str(error), None
    if shards.digest != first.state.data_digest:
        return f"{first.config.data.shards} is no longer the data of the runs (its digest differs)", None
    return "", split


def read_sample(reader: ShardReader, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, C) and target uint8 (H, W) of a sample."""
    raw = reader.read(sample_id)
    return decode_stored(raw.image, reader.split.pixels), decode_mask(raw.target)


def scored(entry: Entry, split: Split, device: str) -> np.ndarray:
    """Areas of each image under the newest checkpoint, computed, or as they were kept by an earlier call.

    Raises:
        CheckpointError: the checkpoint can't be read, or a run that is being trained took it away meanwhile.
    """
    entry.state = newest_state(entry.folder / "checkpoints") or entry.state  # of a run that is being trained
    checkpoint = entry.folder / "checkpoints" / step_name(entry.state.step)
    with reraise_as(CheckpointError, f"{checkpoint} can't be read", "start the comparison again"):
        source = f"{sha256_of(checkpoint / MANIFEST)} {split.digest}"
    path = entry.folder / "scores" / f"{split.name}-images.npz"
    with contextlib.suppress(*DAMAGED), path.open("rb") as file, np.load(file) as kept:
        if str(kept["source"]) == source:
            return np.asarray(kept["areas"])
    say(f"scoring {entry.folder} at step {entry.state.step} on {split.num_samples} images", file=sys.stderr)
    predictor, reader = Predictor(entry.folder, step=str(entry.state.step), device=device), ShardReader(split)
    found = []
    with evaluated(split.num_samples, lambda line: say(line, file=sys.stderr)) as advance:
        for index in range(split.num_samples):
            image, target = read_sample(reader, index)
            found.append(image_areas(target, predictor(image).mask, len(predictor.classes)))
            advance(1)
    areas = np.stack(found)
    data = io.BytesIO()
    np.savez_compressed(data, areas=areas, source=np.array(source))
    with contextlib.suppress(OSError):  # somebody else's run is scored again the next time
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data.getvalue(), durable=False)
    return areas


class Comparison:
    """The numbers of some runs of one task, the first of which the others are held against."""

    def __init__(self, entries: list[Entry]) -> None:
        """ConfigError where they are of different tasks."""
        self.entries = entries
        if len(tasks := {entry.config.data.task for entry in entries}) > 1:
            raise ConfigError(f"the runs are of {' and '.join(sorted(tasks))}; compare those of one task")
        self.key, self.score = next(iter(SCORES[tasks.pop()].NAMES.items()))
        found = [flat(asdict(entry.config)) for entry in entries]
        keys = [key for key in dict.fromkeys(key for one in found for key in one) if key not in PLACES]
        values = {key: [one.get(key) for one in found] for key in keys}
        self.settings = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
        "Setting -> its value in each run, of those that are not the same in all."
        draws = [None if entry.areas is None else replicates(entry.areas) for entry in entries]
        self.intervals = [None if draw is None else interval(draw) for draw in draws]
        "95% interval of each score over the images."
        first = draws[0]
        pairs = [None if first is None or draw is None else interval(draw - first) for draw in draws[1:]]
        self.differences: list[Span | None] = [None, *pairs]
        "95% interval of each score less the first one, over the same images."

    def groups(self) -> list[tuple[str, list[Entry], dict[str, str]]]:
        """(Settings, a run of each seed, name -> why it is left out) of the runs that differ in their seed
        alone; [] where no two do.

        Of the runs with a score those count that have ended, or, where none has, those of the furthest step.
        """
        alike: dict[str, list[Entry]] = {}
        for index, entry in enumerate(self.entries):
            alike.setdefault(self.told(index, seed=False), []).append(entry)
        found = [(told, *_of_seeds(members)) for told, members in alike.items()]
        return found if len(found) < len(self.entries) else []

    def told(self, index: int, *, seed: bool = True, most: int = 1000) -> str:
        """The settings of a run that are not the same in all, as overrides."""
        shown = [f"{key}={row[index]}" for key, row in self.settings.items() if seed or key != "seed"]
        return listed(shown, most)

    def rows(self) -> list[dict[str, Any]]:
        """A line of plain values for each run, as comparison.csv has them."""
        rows = []
        for index, entry in enumerate(self.entries):
            low, high = self.intervals[index] or (None, None)
            below, above = self.differences[index] or (None, None)
            steps, values = entry.scores
            row = {"run": entry.name, "step": entry.step, "steps": entry.config.steps, self.key: entry.last}
            row |= {"low": low, "high": high, "best": entry.best}
            row |= {"best_step": int(steps[values.argmax()]) if len(steps) else None}
            row |= {"difference": self.difference(index), "difference_low": below, "difference_high": above}
            row |= {"seconds": round(entry.seconds, 1), "images_per_s": entry.rate}
            rows.append(row | {key: values[index] for key, values in self.settings.items()})
        return rows

    def difference(self, index: int) -> float | None:
        """The score of a run less that of the first; None for the first, and where one has none."""
        first, other = self.entries[0].last, self.entries[index].last
        return other - first if index and first is not None and other is not None else None

    def differs(self, index: int) -> bool:
        """The interval of the difference excludes 0."""
        low, high = self.differences[index] or (0, 0)
        return low > 0 or high < 0

    def csv(self) -> str:
        """`rows` as CSV."""
        text, rows = io.StringIO(), self.rows()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(Heads, lines) of the table that people read, in per cent."""
        over_images = any(self.intervals)
        sure = ["95% interval", "difference", "95% interval"] if over_images else []
        heads = ["run", "step", self.score, *sure, "best"]
        lines = []
        for index, entry in enumerate(self.entries):
            of = "" if entry.step == entry.config.steps else f" of {entry.config.steps}"
            span, paired = _span(self.intervals[index]), _span(self.differences[index], "+")
            paired += " *" if self.differs(index) else ""
            sure = [span, _signed(self.difference(index)), paired] if over_images else []
            line = [entry.name, f"{entry.step}{of}", _percent(entry.last), *sure, _percent(entry.best)]
            rate = "-" if entry.rate is None else f"{entry.rate:.1f}"
            lines.append([*line, duration(entry.seconds), rate, self.told(index, most=4)])
        return [*heads, "time", "images/s", "settings"], lines

    def seeds(self) -> tuple[list[str], list[list[str]]]:
        """(Heads, lines) of the scores over seeds; no lines where no runs differ in their seed alone."""
        lines, groups = [], self.groups()
        for told, members, left in groups:
            known = [entry.last for entry in members if entry.last is not None]
            spread = f"{100 * statistics.stdev(known):.2f}" if len(known) > 1 else "-"
            mean = _percent(statistics.mean(known) if known else None)
            why = listed((f"{name} ({reason})" for name, reason in left.items()), 1000)
            lines.append([told or "all", str(len(known)), mean, spread, why])
        heads = ["settings", "seeds", f"mean {self.score}", "standard deviation", "left out"]
        most = len(heads) if any(left for _, _, left in groups) else len(heads) - 1
        return heads[:most], [line[:most] for line in lines]

    def text(self) -> str:
        """Both tables, aligned, and what a mark in them means."""
        tables = [_aligned([heads, *lines]) for heads, lines in (self.table(), self.seeds()) if lines]
        return "\n\n".join([*tables, *([MARK] if any(map(self.differs, range(len(self.entries)))) else [])])


def _of_seeds(members: list[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """(A run of each seed, name -> why it is left out) of runs that differ in their seed alone."""
    scored = [entry for entry in members if entry.last is not None]
    ended, furthest = any(entry.ended for entry in scored), max((entry.step for entry in scored), default=0)
    taken: dict[int, Entry] = {}
    left = {}
    for entry in members:
        seed = entry.config.seed
        if entry.last is None:
            left[entry.name] = "no score"
        elif not (entry.ended if ended else entry.step == furthest):
            left[entry.name] = f"step {entry.step}"
        elif seed in taken:
            left[entry.name] = f"seed {seed} again"
        else:
            taken[seed] = entry
    return list(taken.values()), left


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+z.2f}"


def _span(span: Span | None, sign: str = "") -> str:
    return "-" if span is None else " to ".join(f"{100 * value:{sign}z.2f}" for value in span)


def _aligned(rows: list[list[str]]) -> str:
    """Rows as text: names at the left, numbers at the right, settings at the left again."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = rows[0][-1] in ("settings", "left out")
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join([*cells[:-1], row[-1] if last else cells[-1]]))
    return "\n".join(lines)
