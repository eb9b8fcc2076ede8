"""The log of a run: progress bar or lines, metrics.jsonl, log.txt, wandb and TensorBoard.

Rank zero alone writes; on other ranks every method returns at once.

    metrics.jsonl   one JSON object a line, "kind" first (docs/telemetry.md explains each figure):
                    {"kind": "train", "step", "loss", <loss parts>, "lr", "lr/<group>", "grad_norm",
                     <rates of meter.py>, "memory_gib", "host_memory_gib", "loss_spike", ...}
                    {"kind": "eval" | "final", "step", "miou", "macc", "aacc", "iou", "acc", "confusion",
                     "protocol"}
                    {"kind": "start" | "end" | "replaced" | <an event>, "step", ...}
    log.txt         the lines that were printed, with the time of day

Unknown values are null, never guesses. Non-finite numbers are written as strings, because JSON has no NaN.
A line goes to the file in one piece. A full disk or a terminal that has gone costs lines, which are counted
and named at the end, and never the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.distributed.world import World
from segformer.errors import (
    ConfigError,
    SegformerError,
    at_least,
    error_line,
    printable,
    reason_of,
    reported,
    say,
)
from segformer.telemetry.confusion import confusion_picture
from segformer.telemetry.jsonl import LineFile
from segformer.telemetry.machine import now
from segformer.telemetry.progress import duration, on_terminal, open_bar, train_figures
from segformer.telemetry.trackers import Tensorboard, Wandb, without_secrets

WANDB_MODES = ("disabled", "offline", "online")
Tracker = Wandb | Tensorboard
MAX_CLASSES = 200  # with more, per-class curves go to metrics.jsonl only


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """Logging of a run."""

    log_every: int = 10
    "Optimizer steps between two log lines and metrics.jsonl entries."
    progress: bool | None = None
    "Progress bar; null shows it when standard error is a terminal, and prints lines otherwise."
    wandb: str = "disabled"
    "disabled, offline (files in the run directory, for `wandb sync` later) or online (needs WANDB_API_KEY)."
    wandb_project: str = "segformer"
    "Project of wandb that the run belongs to."
    wandb_entity: str | None = None
    "wandb user or team; null takes the account's default."
    wandb_timeout_s: float = 15.0
    """Seconds that the start of a run waits for wandb's server, and likewise its end; no step waits."""
    tensorboard: bool = False
    "Event files in the run directory's folder tensorboard (needs the package tensorboard)."
    images: int = 4
    "Validation pictures at each evaluation for wandb and TensorBoard."
    ledger: bool = False
    "Every rank writes down which samples each step used: ledger/rank-00000.jsonl in the run directory."

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ConfigError(
                f"telemetry.wandb={self.wandb!r} is unknown; use one of {', '.join(WANDB_MODES)}"
            )
        at_least(self, "telemetry.", log_every=1, images=0)
        if not 0 < self.wandb_timeout_s <= 300:
            raise ConfigError(
                f"telemetry.wandb_timeout_s={self.wandb_timeout_s:g} must be above 0 and at most 300"
            )

    @property
    def pictures(self) -> int:
        """Number of validation pictures that somebody will see: 0 without wandb and TensorBoard."""
        return self.images if self.wandb != "disabled" or self.tensorboard else 0

    def check_trackers(self) -> None:
        """ConfigError for wandb online without an account, and for TensorBoard without its package."""
        if self.wandb == "online" and not (
            "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
        ):
            raise ConfigError(
                "telemetry.wandb=online needs an account; run `wandb login`, set WANDB_API_KEY or use offline"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "telemetry.tensorboard=true needs the package tensorboard, which is not installed; "
                "run `pip install tensorboard` or set it to false"
            )


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return value


def _ended_by(error: BaseException) -> str:
    """What ended a run, on one line."""
    if isinstance(error, SegformerError):
        return error_line(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once by Ctrl-C; the same command continues from the newest checkpoint"
    if isinstance(error, SystemExit):  # of the rank that has the error
        return f"ended by {'; '.join(getattr(error, '__notes__', [])) or 'another rank'}"
    return f"ended by a bug: {type(error).__name__}: {printable(reason_of(error))}"


class Telemetry:
    """The log of a run; a context manager, which closes bar, files and trackers also when training fails."""

    def __init__(
        self,
        cfg: TelemetryConfig,
        run_dir: Path,
        world: World,
        *,
        name: str,
        steps: int,
        config: dict[str, Any],
    ):
        self.world, self.steps = world, steps
        self._cfg = cfg
        self._step = 0
        self._bar: Any = None
        self._trackers: dict[str, Tracker] = {}
        self._missed: Counter[str] = Counter()
        world.on_main(lambda: self._open(run_dir, name, without_secrets(config)))

    def _open(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        cfg = self._cfg
        self._metrics, self._log = LineFile(run_dir / "metrics.jsonl"), LineFile(run_dir / "log.txt")
        self._show_bar = on_terminal() if cfg.progress is None else cfg.progress
        if cfg.tensorboard:
            with self._counted("TensorBoard"):
                self._trackers["TensorBoard"] = Tensorboard(run_dir, config)
        if cfg.wandb != "disabled":
            account = {"project": cfg.wandb_project, "entity": cfg.wandb_entity}
            options = {**account, "name": name, "config": config}
            with self._counted("wandb"):
                self._trackers["wandb"] = Wandb(run_dir, self.line, cfg.wandb, cfg.wandb_timeout_s, **options)

    def _counted(self, tracker: str) -> contextlib.AbstractContextManager[None]:
        """Around a call of a tracker: what it raises is counted, and logged the first time."""

        def count(error: Exception) -> None:
            if not self._missed[tracker]:
                self.line(f"{tracker}: {reason_of(error)}")
            self._missed[tracker] += 1

        return reported(count, on=Exception)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        reason = "" if error is None else _ended_by(error)  # it is printed where the command ends
        if reason:
            self._ended(reason)
        self.close(reason)

    def end(self, reason: str) -> None:
        """Say why this start ends where no error does it, and record it; rank zero."""
        self.line(reason)
        self._ended(reason)

    def _ended(self, reason: str) -> None:
        self.event("end", self._step, time=now(), reason=reason)

    def line(self, text: str) -> None:
        """Print a line (above the bar) and keep it in log.txt; rank zero."""
        if not self.world.is_main:
            return
        text = printable(text)
        self.keep(text)
        with contextlib.suppress(OSError):  # a terminal that has gone does not take the run with it
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def keep(self, text: str) -> None:
        """A line for log.txt alone; rank zero."""
        if self.world.is_main:
            self._log.write(f"{time.strftime('%H:%M:%S')} {text}")

    def of_rank(self, text: str) -> None:
        """A line about this rank alone: log.txt has that of rank zero, the others print theirs; any rank."""
        self.line(text)
        if not self.world.is_main:
            with contextlib.suppress(OSError):
                say(f"[rank {self.world.rank}] {text}", file=sys.stderr)

    def start(self, step: int) -> None:
        """Begin to show progress from `step`; rank zero."""
        self._step = step
        self._send(lambda tracker: tracker.begin(step))
        if self.world.is_main and self._show_bar and step < self.steps:
            self._bar = open_bar(step, self.steps)

    def advance(self) -> None:
        """One optimizer step is done; rank zero."""
        self._step += 1
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(1)

    def train(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Record a training interval that ended with `step` steps done; rank zero."""
        if not self.world.is_main:
            return
        self.event("train", step, **values)
        figures = train_figures(values)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str(", ".join(figures))
            self.keep(f"step {step} {'  '.join(figures)}")
        else:
            eta = duration((self.steps - step) * (values.get("step_s") or 0.0))
            self.line(f"step {step}/{self.steps}  {'  '.join(figures)}  eta {eta}")

    def scores(self, kind: str, step: int, values: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
        """Record an evaluation ("eval") or the last one ("final"); rank zero.

        The trackers get the numbers, a curve for each class, and the confusion matrix as a picture; `classes`
        are the names of the lists' entries.
        """
        self.event(kind, step, **values)
        if not self._trackers:
            return
        curves = dict(values) if kind == "final" else {}  # the last point of the curves
        for name, entries in values.items():
            if isinstance(entries, list) and len(entries) <= MAX_CLASSES and name != "confusion":
                names = classes if len(classes) == len(entries) else [f"{k}" for k in range(len(entries))]
                curves |= {f"{name}/{label}": v for label, v in zip(names, entries, strict=True)}
        self._scalars("eval", step, curves)
        if values.get("confusion"):
            picture = np.asarray(confusion_picture(values["confusion"], classes))
            self._send(lambda tracker: tracker.pictures(step, {"eval/confusion": picture}))

    def replaced(self, step: int, sample_id: int, reason: str) -> None:
        """Record that a corrupt sample was replaced, and why; rank zero."""
        self.line(f"replaced by its neighbor: {reason}")
        self.event("replaced", step, sample_id=sample_id, reason=reason)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Record something that happened at `step` as an object of its own in metrics.jsonl; rank zero."""
        if self.world.is_main:
            entry = {"kind": kind, "step": step} | {name: _jsonable(value) for name, value in values.items()}
            self._metrics.write(json.dumps(entry))
            self._scalars(kind, step, values)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Give validation pictures, uint8 (H, W, 3) by name, to the trackers; rank zero."""
        if pictures:
            named = {f"pictures/{name}": picture for name, picture in pictures.items()}
            self._send(lambda tracker: tracker.pictures(step, named))

    def _scalars(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {f"{kind}/{name}": float(v) for name, v in values.items() if isinstance(v, int | float)}
        if numbers:
            self._send(lambda tracker: tracker.scalars(step, numbers))

    def _send(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            with self._counted(name):
                call(tracker)

    def stop_bar(self) -> None:
        """Take the bar away, so that what follows is printed plainly."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def close(self, last: str = "") -> None:
        """Close bar, trackers and files; `last` is the last line of log.txt."""
        if not self.world.is_main:
            return
        self.stop_bar()
        self._send(lambda tracker: tracker.close())
        for name, count in self._missed.items():
            self.line(f"{name} missed {count} entries; metrics.jsonl has them all")
        if last:
            self.keep(last)
        for file in (self._metrics, self._log):
            if file.lost:
                self.line(f"{file.path}: {file.lost} lines could not be written; is the disk full?")
            file.close()
