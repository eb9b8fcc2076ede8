"""A sweep at work: its runs as processes on free devices, rung by rung, and the comparison at the end.

    runs/<name>/sweep.json       the plan (plan.py)
    runs/<name>/<run>/           a run directory as any other
    runs/<name>/<run>.out        what its process printed
    runs/<name>/comparison/      the comparison of the runs, best first

How far a run is, its directory says: a sweep that was stopped or killed goes on with the same command, trains
nothing twice and ends with the same weights and ranking. Runs that a killed sweep has left at work hold
.running locked, and are waited for. A run that fails is named and left where it is; the others go on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from segformer.checkpoint.lease import Lease
from segformer.checkpoint.reader import CONFIG
from segformer.distributed.world import StopFlag
from segformer.errors import START_ALONE, ConfigError, Preempted, SegformerError, listed, reraise_as, say
from segformer.evaluation.metrics import SCORES
from segformer.evaluation.tables import percent
from segformer.files import lock
from segformer.inference.compare import CompareConfig, compare
from segformer.sweep.plan import Rung, SweepConfig, keep_plan
from segformer.sweep.runs import Job, of_rung, plan_of, ranked, summary, to_rung
from segformer.telemetry.progress import duration

POLL_S = 0.2
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check(cfg: SweepConfig, overrides: list[str]) -> None:
    """What --check does: all runs are composed and checked, and a line says what the sweep would do."""
    say(summary(*plan_of(cfg, overrides)))


def describe(cfg: SweepConfig, overrides: list[str]) -> None:
    """Print the commands of a sweep's runs, in the form that a shell takes."""
    jobs, stages = plan_of(cfg, overrides)
    for job in jobs:
        say(shlex.join(["python", "launch/train.py", *to_rung(stages[0], job).overrides]))
    say(summary(jobs, stages), file=sys.stderr)
    if jobs[0].steps:
        where = "a GPU" if torch.cuda.is_available() else "a CPU"
        say(f"steps and stop_at are worked out for this machine, with {where}", file=sys.stderr)


class Queue:
    """Starts runs on the devices that are free, and says how each of them ends."""

    def __init__(self, train: list[str], running: int, stop: StopFlag, again: str) -> None:
        """running: the descriptor that the runs keep open. again: how the user goes on after a stop."""
        self.failed: list[str] = []
        "Names of the runs that ended with an error."
        self._train, self._running, self._stop, self._again = train, running, stop, again

    def work(self, jobs: list[Job], slots: list[dict[str, str]]) -> None:
        """Train what is not yet trained that far; `slots`: the environment of each run that works at a time.

        Raises:
            Preempted: a signal came, and the runs have ended.
        """
        self._wait_for_others()
        waiting = deque(job for job in jobs if job.trial.name not in self.failed and not job.done())
        at_work: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
        told = False
        try:
            while at_work or (waiting and self._stop.signal is None):
                for slot, environment in enumerate(slots):
                    if slot not in at_work and waiting and self._stop.signal is None:
                        job = waiting.popleft()
                        at_work[slot] = (job, self._start(job, environment), time.monotonic())
                if self._stop.signal is not None and not told:
                    told = True
                    for _, process, _ in at_work.values():
                        process.terminate()
                time.sleep(POLL_S)
                for slot, (job, process, since) in list(at_work.items()):
                    if (code := process.poll()) is not None:
                        del at_work[slot]
                        self._report(job, code, time.monotonic() - since)
                        say(f"{sum(one.done() for one in jobs)} of {len(jobs)} done")
        finally:  # a second Ctrl-C, or a bug
            for _, process, _ in at_work.values():
                process.kill()
        self._check()

    def _start(self, job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a run in a session of its own: Ctrl-C reaches it by us alone, and once."""
        say(shlex.join(["python", "launch/train.py", *job.overrides]))
        say(f"log: {_output(job)}")
        own = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
        with _output(job).open("ab") as output:
            return subprocess.Popen(
                [*self._train, *job.overrides],
                env=own | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self._running],
            )

    def _report(self, job: Job, code: int, seconds: float) -> None:
        name, took = job.trial.name, duration(seconds)
        if code == 0 and job.done():
            score, where = job.score(), f"at step {job.stop_at}" if job.stop_at else "at the end"
            metric = next(iter(SCORES[job.config.data.task].NAMES.values()))
            shown = "no score" if score is None else f"{metric} {percent(score)}"
            say(f"{name}: {shown} {where} ({took})")
        elif self._stop.signal is None:
            self.failed.append(name)
            lines = _output(job).read_text("utf-8", "replace").splitlines() or [""]
            say(f"{name} failed with exit code {code} after {took}: {lines[-1]} (all of it: {_output(job)})")

    def _wait_for_others(self) -> None:
        """Wait for the runs that a sweep which was killed has left at work."""
        if lock(self._running):
            return
        say("waiting for runs that a killed start of this sweep has left at work")
        while not lock(self._running):
            self._check()
            time.sleep(POLL_S)

    def _check(self) -> None:
        if self._stop.signal is not None:
            name = signal.Signals(self._stop.signal).name
            raise Preempted(f"stopped by {name}; the runs have saved their states; {self._again}")


def _output(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.out")


def _slots(at_once: int | None) -> list[dict[str, str]]:
    """What the environment of each run that works at a time says of its device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    runs = at_once or max(1, count)
    if count:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(index) for index in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": names[index % count]} for index in range(runs)]
    if "OMP_NUM_THREADS" in os.environ or runs == 1:
        return [{} for _ in range(runs)]
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // runs))} for _ in range(runs)]


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[int]:
    """The folder of a sweep, for this process alone; yields a descriptor for its runs to keep open."""
    lease = Lease.take(folder)
    descriptor = os.open(folder / ".running", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        lease.release()


def sweep(cfg: SweepConfig, overrides: list[str], train: list[str]) -> list[Job]:
    """Work through a sweep, or go on with it, and compare its runs; those that were trained to the end, best
    first.

    train: the command that trains a run; its overrides are appended.

    Raises:
        Preempted: a signal stopped it; the runs have saved their states.
        SegformerError: the plan is wrong or another than before; runs failed, once all others are done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"a sweep is one process that starts its runs; {START_ALONE}")
    if cfg.dry_run:
        describe(cfg, overrides)
        return []
    jobs, stages = plan_of(cfg, overrides)
    with begun(cfg, overrides, jobs) as (jobs, folder, running):
        say(f"{folder}: {summary(jobs, stages)}")
        with StopFlag() as stop:
            queue = Queue(train, running, stop, f"the same command goes on with {folder}")
            finalists = _by_rungs(queue, jobs, stages, cfg.sweep.jobs)
        return concluded(cfg, folder, jobs, finalists, queue.failed)


@contextlib.contextmanager
def begun(cfg: SweepConfig, overrides: list[str], jobs: list[Job]) -> Iterator[tuple[list[Job], Path, int]]:
    """A sweep, begun or gone on with, for this process alone: its runs with the steps of its first start, its
    folder, and a descriptor for the runs to keep open.

    Raises:
        ConfigError: another sweep or a run is there, or somebody works on it.
    """
    folder = Path("runs", cfg.name)
    if (folder / CONFIG).exists() or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} is a run, and a sweep is a folder of runs; choose another name=...")
    with reraise_as(ConfigError, f"{folder} can't be used", "choose another name=..."):
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    with _taken(folder) as running:
        steps = [job.config.steps for job in jobs]
        steps = keep_plan(folder, overrides, cfg.sweep, [job.trial for job in jobs], steps)
        yield [job.of(count) for job, count in zip(jobs, steps, strict=True)], folder, running


def concluded(
    cfg: SweepConfig, folder: Path, jobs: list[Job], finalists: list[Job], failed: list[str]
) -> list[Job]:
    """Compare the runs of a sweep; the finalists again. SegformerError where runs have failed."""
    others = [job for job in jobs if job.trial not in [finalist.trial for finalist in finalists]]
    scored = [str(job.folder) for job in [*finalists, *ranked(others)]]
    left = [str(job.folder) for job in others]
    if len(scored) > 1:
        shown = CompareConfig(runs=scored, output=str(folder / "comparison"), images=cfg.images)
        compare(shown, logged=left)
    if failed:
        raise SegformerError(
            f"{len(failed)} of {len(jobs)} runs failed: {listed(failed)}; the same command tries them again"
        )
    if not scored:
        raise SegformerError(f"none of the {len(jobs)} runs has a score that is a number; see {folder}/*.out")
    return finalists


def _by_rungs(queue: Queue, jobs: list[Job], stages: list[Rung], at_once: int | None) -> list[Job]:
    """Train the settings that go on, rung by rung; those of the last one, best first."""
    slots = _slots(at_once)
    for rung in stages:
        jobs = of_rung(jobs, rung, rung is stages[0])
        queue.work(jobs, slots)
    return ranked(jobs)
