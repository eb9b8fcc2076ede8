"""The runs of a sweep: composed, how far each is by its directory, and which go on at a rung."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from segformer.checkpoint.reader import newest_state
from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet
from segformer.errors import ConfigError
from segformer.evaluation.metrics import SCORES
from segformer.files import read_json
from segformer.sweep.plan import Rung, SweepConfig, Trial, best, rungs, trials
from segformer.telemetry.jsonl import newest_row, read_metrics
from segformer.training.config import RunConfig, compose
from segformer.training.directory import check_start, settled
from segformer.training.task import open_shards


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is to be trained to a step, or to its end."""

    trial: Trial
    folder: Path
    config: RunConfig
    stop_at: int | None = None
    steps: int | None = None
    "Its steps, where a sweep by rungs has worked them out."

    @property
    def overrides(self) -> list[str]:
        """What launch/train.py is started with."""
        given = self.trial.overrides
        if self.steps:
            given = [
                *(one for one in given if one.lstrip("+").partition("=")[0] != "epochs"),
                f"steps={self.steps}",
            ]
        place = [f"name={self.trial.name}", f"run_dir={self.folder}"]
        return [*given, *place, *([f"stop_at={self.stop_at}"] if self.stop_at else [])]

    def of(self, steps: int) -> Job:
        """The job with the steps that the sweep has for it, wherever they were worked out."""
        return replace(self, config=replace(self.config, steps=steps), steps=self.steps and steps)

    def done(self) -> bool:
        """The run has been trained that far, evaluated there and saved."""
        if _ended(self.folder):
            return True
        state = newest_state(self.folder / "checkpoints")
        return bool(self.stop_at and state and state.step >= self.stop_at and self._rows(self.stop_at))

    def score(self) -> float | None:
        """The score that compares models, as last measured on the way to the step; None without one."""
        rows = self._rows()
        value = rows[-1].get(next(iter(SCORES[self.config.data.task].NAMES))) if rows else None
        return value if isinstance(value, float) else None

    def _rows(self, step: int | None = None) -> list[dict[str, object]]:
        rows = read_metrics(self.folder, "eval", "final")
        last = self.stop_at or math.inf
        return [row for row in rows if row["step"] <= last and step in (None, row["step"])]


def _ended(run_dir: Path) -> bool:
    """The run has made its last evaluation, exported the model of that step, and written its report of it."""
    final, export = newest_row(run_dir, "final"), run_dir / "export" / "config.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        step = read_json(export)["segformer"]["step"]
        told = f", step {step}<" in (run_dir / "report.html").read_text("utf-8")
        return told and final is not None and final["step"] == step
    return False


def plan_of(
    cfg: SweepConfig, overrides: list[str], device: str = "", world_size: int = 1
) -> tuple[list[Job], list[Rung]]:
    """The runs of a sweep, each composed and checked, and the rungs.

    device, world_size: what each run will have; empty takes what is here.

    Raises:
        ConfigError: of the plan, or as for launch/train.py of the first run that is wrong.
    """
    if taken := [one for one in overrides if one.split("=")[0] in ("run_dir", "stop_at")]:
        raise ConfigError(f"{taken[0]} is refused: the sweep sets it for each run; leave it out")
    planned = trials(overrides, cfg.sweep)
    stages = rungs(len({trial.setting for trial in planned}), cfg.sweep.halving)
    jobs, device = [], device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened: dict[str, ShardSet | Mixture] = {}

    def shards_of(run: RunConfig) -> ShardSet | Mixture:
        """The shards of a run, opened once for all runs that ask the same of them."""
        data, splits = (run.data, run.mixture), (run.train_split, run.eval_split)
        asked = (data, run.loader.storage, run.model.num_classes, splits)
        if str(asked) not in opened:
            opened[str(asked)] = open_shards(run)
        return opened[str(asked)]

    for trial in planned:
        folder = Path("runs", cfg.name, trial.name)
        run = compose(RunConfig, "config", [*trial.overrides, f"name={trial.name}", f"run_dir={folder}"])
        check_start(run)
        by_rungs = len(stages) > 1 and ("steps" in run.auto or run.epochs is not None)
        run, _ = settled(run, device=device, world_size=world_size, opened=shards_of)
        jobs.append(Job(trial, folder, run, steps=run.steps if by_rungs else None))
    return jobs, stages


def summary(jobs: list[Job], stages: list[Rung]) -> str:
    """Runs, settings and rungs in a line."""
    steps = [f"{rung.settings} to {100 * rung.share:.3g}% of the steps" for rung in stages[:-1]]
    ladder = f": {', '.join([*steps, f'{stages[-1].settings} to the end'])}" if steps else ""
    return f"{len(jobs)} runs of {stages[0].settings} settings{ladder}"


def to_rung(rung: Rung, job: Job) -> Job:
    """The job of a run at a rung."""
    steps = max(1, round(rung.share * job.config.steps))
    return replace(job, stop_at=steps if steps < job.config.steps else None)


def of_rung(jobs: list[Job], rung: Rung, first: bool) -> list[Job]:
    """The jobs of the settings that are trained in a rung, of those of the rung before."""
    survivors = list(_means(jobs)) if first else best(_means(jobs), rung.settings)
    return [to_rung(rung, job) for job in jobs if job.trial.setting in survivors]


def _means(jobs: list[Job]) -> dict[str, float | None]:
    """Setting -> mean score over its seeds; None where one of them has none."""
    scores: dict[str, list[float | None]] = {}
    for job in jobs:
        scores.setdefault(job.trial.setting, []).append(job.score())
    known = {setting: [value for value in values if value is not None] for setting, values in scores.items()}
    return {
        setting: sum(known[setting]) / len(values) if len(known[setting]) == len(values) else None
        for setting, values in scores.items()
    }


def ranked(jobs: list[Job]) -> list[Job]:
    """The jobs whose setting has a score, best first."""
    means = _means(jobs)
    order = best(means, len(means))
    scored = [job for job in jobs if job.trial.setting in order]
    return sorted(scored, key=lambda job: order.index(job.trial.setting))
