"""A real cluster and runs on it; everything here is skipped, with the reason, where none can be started."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm.real.cluster import Cluster

from segformer.slurm.attempts import attempts
from segformer.telemetry.jsonl import read_metrics

ROOT = Path(__file__).resolve().parents[3]
STEPS = 80
JOB = ("gpus_per_node=0", "cpus_per_task=2", "mem=2G", "time=20m", "signal_delay_s=60")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    cluster: Cluster
    run_dir: Path
    id: str

    def lines(self, kind: str = "train") -> list[dict]:
        """Its lines of one kind so far."""
        return list(read_metrics(self.run_dir, kind))

    @property
    def step(self) -> int:
        """The newest step that was logged."""
        return max((line["step"] for line in self.lines()), default=0)

    @property
    def attempts(self) -> list[dict]:
        """Its starts."""
        return attempts(self.run_dir)

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        """Wait until a step has been logged."""
        self.cluster.wait(lambda: self.step >= step, timeout_s, f"step {step} of {self.run_dir.name}")

    def wait_for_attempt(self, count: int, timeout_s: float = 120) -> None:
        """Wait until the run has begun `count` times."""
        self.cluster.wait(lambda: len(self.attempts) >= count, timeout_s, f"attempt {count}")

    def gone_on(self, times: int) -> bool:
        """Whether the run has been continued so many times, and has made ten steps since."""
        continued, lines = self.lines("continued"), self.lines()
        begin = continued[-1]["step"] if continued else 0
        return len(continued) >= times and bool(lines) and lines[-1]["step"] >= begin + 10

    def wait_until_gone_on(self, times: int, timeout_s: float = 150) -> None:
        """Wait for `gone_on`."""
        self.cluster.wait(lambda: self.gone_on(times), timeout_s, f"continuation {times}")

    def end(self, timeout_s: float = 180) -> str:
        """Wait for the end; the state."""
        self.cluster.wait_for_state(self.id, *ENDED, timeout_s=timeout_s)
        return self.cluster.job(self.id)["JobState"]

    def logs(self) -> str:
        """Everything that was printed."""
        paths = sorted(self.run_dir.glob("slurm/*/logs/*"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)


def _kill(job: Job) -> None:
    job.cluster.run("scancel", "--signal=KILL", "--full", job.id, check=False)
    job.cluster.run("scancel", job.id, check=False)


@pytest.fixture(scope="session", autouse=True)
def _available() -> None:
    if reason := Cluster.missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def _one_thread() -> Iterator[None]:
    """One thread a rank, here and there: sums of floats depend on their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Iterator[Cluster]:
    """Three nodes, and two apart."""
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=3, apart=2) as found:
        yield found


@pytest.fixture(scope="session")
def overrides(
    tiny_in: Callable[[Path], Callable[..., list[str]]], calm: list[str]
) -> Callable[..., list[str]]:
    """A run of 4 images a step that logs every step and writes down its samples."""
    kept = (*calm, "optim.eps=1e-3", f"steps={STEPS}", "telemetry.progress=false", "telemetry.ledger=true")
    return lambda run_dir, *more: tiny_in(run_dir.parent)(run_dir.name, *kept, *more)


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch/slurm.py on the login node of a cluster."""

    def run(cluster: Cluster, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return cluster.run(sys.executable, ROOT / "launch/slurm.py", *arguments, check=check)

    return run


@pytest.fixture(scope="session")
def start(
    cluster: Cluster, overrides: Callable[..., list[str]], launch: Callable[..., object]
) -> Callable[..., Job]:
    """Submit a run by launch/slurm.py: (its directory, *settings)."""

    def of(run_dir: Path, *settings: str) -> Job:
        given = {setting.partition("=")[0] for setting in settings}
        shape = [s for s in ("nodes=2", "tasks_per_node=2", *JOB) if s.partition("=")[0] not in given]
        printed = launch(cluster, *shape, *overrides(run_dir, *settings)).stdout
        return Job(cluster, run_dir, printed.partition(":")[0].removeprefix("job "))

    return of


@pytest.fixture
def submit(start: Callable[..., Job], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submit a run in a folder of the test: (*settings); it is killed at the end of the test."""
    jobs = []

    def of(*settings: str) -> Job:
        jobs.append(start(tmp_path / f"job{len(jobs)}", *settings))
        return jobs[-1]

    yield of
    for job in jobs:
        _kill(job)


@pytest.fixture(scope="session")
def undisturbed(
    overrides: Callable[..., list[str]],
    run_ranks: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
    _one_thread: None,
) -> Path:
    """The directory of the same run on four ranks of this machine, without Slurm."""
    run_dir = tmp_path_factory.mktemp("local") / "whole"
    run_ranks(4, "launch/train.py", *overrides(run_dir))
    return run_dir


@pytest.fixture
def powered(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes up, before and after."""
    yield cluster
    for node in cluster.nodes:
        if cluster.down(node):
            cluster.boot(node)
    cluster.wait(cluster.idle, 60, "all nodes idle again")


@pytest.fixture(scope="session")
def limited(start: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A run that meets its time limit of three minutes twice, on nodes of its own.

    It takes minutes, so it begins with the first test and costs nothing while it waits: its ranks are stopped
    (SIGSTOP) after some steps of each attempt, until the signal of the time limit waits for them.
    """
    job = start(tmp_path_factory.mktemp("limited") / "job", "time=3m", "partition=apart")
    over = threading.Event()

    def hold_back() -> None:
        for attempt in (1, 2):
            while not over.is_set() and not job.gone_on(attempt - 1):
                time.sleep(0.2)
            stopped = [node for node in job.cluster.apart if job.cluster.signal("STOP", node)]
            try:
                while not over.is_set() and not all(job.cluster.signaled(node) for node in stopped):
                    time.sleep(0.5)
            finally:
                for node in stopped:
                    job.cluster.signal("CONT", node)

    held = ThreadPoolExecutor(1).submit(hold_back)
    yield job
    over.set()
    _kill(job)
    held.result()
