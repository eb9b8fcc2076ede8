"""Shared by all tests: the shipped sample as shards, small run configurations, and real gloo ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary data-set folder: 16 training images of data_prep/sample and 3 validation images."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 16), ("val", 3)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
            paths = sorted((ROOT / "data_prep/sample" / kind / split).iterdir())
            for path in paths[:: len(paths) // count][:count]:
                shutil.copy(path, folder / kind / split)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_root` as shards."""
    from segformer.data.shards.sharding import write_shards
    from segformer.training.config import RunConfig, compose

    out = tmp_path_factory.mktemp("shards") / "tiny"
    data = compose(RunConfig, "config", ["data=sample"]).data
    write_shards(data, tiny_root, out, seed=0, samples_per_shard=6, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_in(tiny_shards: Path) -> Callable[[Path], Callable[..., list[str]]]:
    """(folder) -> (name, overrides ...) -> overrides of a run in that folder; see `tiny`."""

    def within(folder: Path) -> Callable[..., list[str]]:
        def overrides(name: str, *more: str) -> list[str]:
            return [
                "experiment=sample",
                f"name={name}",
                f"run_dir={folder / name}",
                f"data.shards={tiny_shards}",
                "steps=20",
                "global_batch=4",
                "eval_every=1000",
                "overlays=0",
                "augment.crop=[64,64]",
                "model.drop_path_rate=0",
                "model.dropout=0",
                "loader.workers=0",
                "telemetry.log_every=1",
                "checkpoint.save_every=1000",
                *more,
            ]

        return overrides

    return within


@pytest.fixture
def tiny(tiny_in: Callable[[Path], Callable[..., list[str]]], tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a run of 20 steps of MiT-B0 on crops of 64 pixels; only the data is random."""
    return tiny_in(tmp_path)


@pytest.fixture(scope="session")
def calm() -> list[str]:
    """Settings under which rounding stays rounding, for comparisons of weights.

    AdamW divides a gradient by the root of its second moment: where a gradient is zero but for rounding (the
    biases of attention's keys, which softmax ignores), an eps of 1e-8 turns rounding into whole steps.
    """
    return ["optim.lr=2e-5", "optim.head_lr_factor=10", "optim.warmup_steps=0", "optim.eps=1e-4"]


@pytest.fixture(scope="session")
def metrics() -> Callable[..., list[dict]]:
    """The lines of one kind in a run's metrics.jsonl."""

    def read(run_dir: Path, kind: str = "train") -> list[dict]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., list[subprocess.Popen]]:
    """Start `ranks` CPU processes of a script as torchrun would, one thread each; their output is piped."""
    from segformer.distributed.rendezvous import free_port

    def start(ranks: int, *argv: str, env: dict[str, str] | None = None) -> list[subprocess.Popen]:
        shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        return [
            subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (env or {}),
                **pipes,
            )
            for rank in range(ranks)
        ]

    return start


@pytest.fixture(scope="session")
def wait_for_steps() -> Callable[..., None]:
    """Wait until a run has logged so many steps (log_every=1) and goes on for the `restarts`-th time.

    Its handlers of signals are there by then. Fails where its process ends before.
    """

    def reached(path: Path, steps: int, restarts: int) -> bool:
        text = path.read_text() if path.exists() else ""
        return text.count('"kind": "train"') >= steps and text.count('"kind": "continued"') >= restarts

    def wait(run_dir: Path, steps: int, process: subprocess.Popen, restarts: int = 0) -> None:
        path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not reached(path, steps, restarts):
            if time.monotonic() > deadline or process.poll() is not None:
                pytest.fail("the run did not reach the step: " + process.communicate()[0])
            time.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., list[subprocess.Popen]]) -> Callable[..., list[str]]:
    """`start_ranks`, wait, assert that every rank exits with `code`, return their outputs."""

    def run(
        ranks: int, *argv: str, code: int = 0, timeout: float = 300, **options: dict[str, str]
    ) -> list[str]:
        processes = start_ranks(ranks, *argv, **options)
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        codes = [process.returncode for process in processes]
        assert codes == [code] * ranks, "\n".join(outputs)
        return outputs

    return run


@pytest.fixture(scope="session")
def train_many(
    tmp_path_factory: pytest.TempPathFactory, start_ranks: Callable[..., list[subprocess.Popen]]
) -> Iterator[Callable[..., list[tuple[str, ...]]]]:
    """Several runs, one after the other; a run is a list of overrides, or an entry of a plan
    (distributed/train_many.py). One group of ranks of each size takes the plans of the whole session.

    Returns the outcome of each run on each rank; one that is not "" has to be expected: `failing`.
    """
    groups: dict[int, list[subprocess.Popen]] = {}

    def ended(process: subprocess.Popen) -> list[str]:
        """The outcomes of the plan that it has been given."""
        printed = []
        for line in iter(process.stdout.readline, ""):
            if line.startswith("["):
                with contextlib.suppress(ValueError):
                    return json.loads(line)
            printed.append(line)
        pytest.fail("a rank has ended: " + "".join(printed))

    def train(ranks: int, runs: list, *, failing: bool = False) -> list[tuple[str, ...]]:
        plan = tmp_path_factory.mktemp("plans") / "plan.json"
        plan.write_text(json.dumps([{"run": run} if isinstance(run, list) else run for run in runs]))
        if ranks not in groups or any(process.poll() is not None for process in groups[ranks]):
            groups[ranks] = start_ranks(ranks, "tests/distributed/train_many.py")
        for process in groups[ranks]:
            process.stdin.write(f"{plan}\n")
            process.stdin.flush()
        alarm = threading.Timer(900, lambda: [process.kill() for process in groups[ranks]])
        alarm.start()
        try:
            outcomes = list(zip(*map(ended, groups[ranks]), strict=True))
        finally:
            alarm.cancel()
        assert failing or not any(map(any, outcomes)), outcomes
        return outcomes

    yield train
    for process in itertools.chain(*groups.values()):
        process.kill()
        process.communicate()
