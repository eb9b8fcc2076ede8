"""What a person sees of a run: progress bar or log lines, metrics.jsonl, log.txt; wandb and TensorBoard.

Rank zero alone writes; on other ranks every method returns at once.

    metrics.jsonl   one JSON object a line, "kind" first (docs/telemetry.md says what each figure means):
                    {"kind": "train", "step", "loss", <loss parts>, "lr", "lr/<group>", "grad_norm",
                     <rates of meter.py>, "memory_gib", "host_memory_gib", "loss_spike", ...}
                    {"kind": "eval" | "final", "step", "miou", "macc", "aacc", "iou", "acc", "confusion"}
                    {"kind": "replaced" | <an event>, "step", ...}
    log.txt         the lines that were printed, with the time of day

Unknown values are null, never guesses. Non-finite numbers are written as strings, because JSON has no NaN.
A line goes to the file in one piece. A full disk or a terminal that has gone costs lines, which are counted
and named at the end, and never the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.telemetry.jsonl import LineFile
from segformer.telemetry.progress import Bar, duration, on_terminal, shown_figures
from segformer.telemetry.queue import Outbox, Tracker
from segformer.telemetry.trackers import confusion_picture, open_tensorboard, open_wandb

WANDB_MODES = ("disabled", "offline", "online")
MAX_CLASSES = 200  # with more, per-class curves go to metrics.jsonl only
FINISH_S = 10.0  # for what is local


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """Logging of a run."""

    log_every: int = 10
    "Optimiser steps between two log lines and metrics.jsonl entries."
    progress: bool | None = None
    "Progress bar; null shows it when standard error is a terminal, and prints lines otherwise."
    wandb: str = "disabled"
    "disabled, offline (files in the run directory, for `wandb sync` later) or online (needs WANDB_API_KEY)."
    wandb_project: str = "segformer"
    "wandb project."
    wandb_entity: str | None = None
    "wandb user or team; null takes the account's default."
    wandb_timeout_s: float = 15.0
    """Seconds that the start of a run waits for wandb's server, and likewise its end; in between it never
    waits."""
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
        if self.log_every < 1:
            raise ConfigError(f"telemetry.log_every={self.log_every} must be 1 or more")
        if not 0 < self.wandb_timeout_s <= 300:
            raise ConfigError(
                f"telemetry.wandb_timeout_s={self.wandb_timeout_s:g} must be above 0 and at most 300"
            )
        if self.images < 0:
            raise ConfigError(f"telemetry.images={self.images} must be 0 or more")

    @property
    def pictures(self) -> int:
        """How many validation pictures somebody will see: 0 without wandb and TensorBoard."""
        return self.images if self.wandb != "disabled" or self.tensorboard else 0

    def check_account(self) -> None:
        """ConfigError where wandb is to be online and nobody has logged in."""
        if self.wandb == "online" and not (
            "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
        ):
            raise ConfigError(
                "telemetry.wandb=online needs an account; run `wandb login`, set WANDB_API_KEY or use offline"
            )


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return value


class Telemetry:
    """The run's log; a context manager, so that bar, files and wandb are closed also when training fails."""

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
        self.world = world
        self.steps = steps
        self._cfg = cfg
        self._bar: Bar | None = None
        self._outboxes: list[Outbox] = []
        world.on_main(lambda: self._open(run_dir, name, config))

    def _open(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        cfg = self._cfg
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics, self._log = LineFile(run_dir / "metrics.jsonl"), LineFile(run_dir / "log.txt")
        self._show_bar = on_terminal() if cfg.progress is None else cfg.progress
        if cfg.tensorboard:
            self._outboxes.append(open_tensorboard(run_dir, config))
        if cfg.wandb != "disabled":
            self._outboxes.append(
                open_wandb(
                    run_dir,
                    mode=cfg.wandb,
                    timeout_s=cfg.wandb_timeout_s,
                    project=cfg.wandb_project,
                    entity=cfg.wandb_entity,
                    name=name,
                    config=config,
                )
            )
        self._tell()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Print a line (above the bar) and keep it in log.txt; rank zero."""
        if not self.world.is_main:
            return
        text = text.encode("utf-8", "backslashreplace").decode()  # file names may be no Unicode
        self._note(text)
        if self._bar is not None:
            self._bar.line(text)
            return
        with contextlib.suppress(OSError):  # nobody looks any more
            print(text, file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}")

    def start(self, step: int) -> None:
        """Begin to show progress from `step`; rank zero."""
        if not self.world.is_main:
            return
        self._send(lambda tracker: tracker.begin(step))
        if self._show_bar and step < self.steps:
            self._bar = Bar(step, self.steps)

    def advance(self) -> None:
        """One optimiser step is done; rank zero."""
        if self._bar is not None:
            self._bar.advance()

    def train(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Record a training interval that ended with `step` steps done; rank zero."""
        if not self.world.is_main:
            return
        self._record("train", step, values)
        shown = shown_figures(values)
        if self._bar is not None:
            self._bar.show(shown)
            self._note(f"step {step} {'  '.join(shown)}")
        else:
            eta = duration((self.steps - step) * (values.get("step_s") or 0.0))
            self.line(f"step {step}/{self.steps}  {'  '.join(shown)}  eta {eta}")
        self._tell()

    def scores(self, kind: str, step: int, values: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
        """Record an evaluation ("eval") or the last one ("final"); rank zero.

        The trackers get the numbers, a curve for each class, and the confusion matrix as a picture; `classes`
        are the names of the lists' entries.
        """
        if not self.world.is_main:
            return
        self._record(kind, step, values)
        if not self._outboxes:
            return
        curves: dict[str, Any] = {}
        for name, entries in values.items():
            if isinstance(entries, list) and len(entries) <= MAX_CLASSES and name != "confusion":
                names = classes if len(classes) == len(entries) else [f"{k}" for k in range(len(entries))]
                curves |= {f"{name}/{label}": v for label, v in zip(names, entries, strict=True)}
        self._scalars("eval", step, curves)
        if kind == "final":  # the last point of the curves
            self._scalars("eval", step, values)
        if values.get("confusion"):
            self._pictures(step, {"eval/confusion": confusion_picture(values["confusion"])})

    def replaced(self, step: int, sample_id: int, reason: str) -> None:
        """Say that a corrupt sample was replaced, and why; rank zero."""
        if self.world.is_main:
            self.line(f"replaced by its neighbour: {reason}")
            self._record("replaced", step, {"sample_id": sample_id, "reason": reason})

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Record something that happened at `step` as an object of its own in metrics.jsonl; rank zero."""
        if self.world.is_main:
            self._record(kind, step, values)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Give pictures, uint8 (H, W, 3) by name, to the trackers, as pictures/<name>; rank zero."""
        if self.world.is_main:
            self._pictures(step, {f"pictures/{name}": picture for name, picture in pictures.items()})

    def _pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        if pictures:
            size = sum(picture.nbytes for picture in pictures.values())
            self._send(lambda tracker: tracker.pictures(step, pictures), size)

    def _record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        entry = {"kind": kind, "step": step, **{name: _jsonable(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(entry))
        self._scalars(kind, step, values)

    def _scalars(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {f"{kind}/{name}": float(v) for name, v in values.items() if isinstance(v, int | float)}
        if numbers:
            self._send(lambda tracker: tracker.scalars(step, numbers))

    def _send(self, call: Callable[[Tracker], None], size: int = 0) -> None:
        for outbox in self._outboxes:
            outbox.put(call, size)

    def _tell(self) -> None:
        for outbox in self._outboxes:
            for text in outbox.lines():
                self.line(text)

    def stop_bar(self) -> None:
        """Take the bar away, so that what follows is printed plainly."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Close bar, trackers and files."""
        if not self.world.is_main:
            return
        self.stop_bar()
        for outbox in self._outboxes:
            outbox.finish(FINISH_S + (self._cfg.wandb_timeout_s if outbox.name == "wandb" else 0))
        self._tell()
        self._outboxes = []
        for file in (self._metrics, self._log):
            if file.lost:
                self.line(f"{file.path}: {file.lost} lines could not be written; is the disk full?")
            file.close()
