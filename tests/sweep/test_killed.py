"""A sweep of real runs, killed and stopped on its way: it ends with the weights of undisturbed runs."""

import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from segformer.job import run_job
from segformer.telemetry.jsonl import read_metrics
from segformer.training.config import RunConfig, compose

STEPS = 4


def start(root, place, overrides):
    command = [sys.executable, str(root / "launch/sweep.py"), "name=s", "images=0", "sweep.halving=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *overrides], cwd=place, env=environment, **pipes)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_sweep_of_real_runs_ends_as_if_nothing_had_happened(root, tmp_path, tiny, monkeypatch):
    fixed = [one for one in tiny("x") if not one.startswith(("name=", "run_dir=", "steps="))]
    overrides = [*fixed, f"steps={STEPS}", "optim.lr=1e-4,1e-3"]
    first, second = (tmp_path / "runs/s" / name for name in ("lr1e-4", "lr1e-3"))
    for seen, number in ((first / "lease.json", signal.SIGKILL), (second / "lease.json", signal.SIGTERM)):
        process = start(root, tmp_path, overrides)
        wait_for(seen, process)
        process.send_signal(number)
        output = process.communicate()[0]
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 75}[number], output
    process = start(root, tmp_path, overrides)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert (tmp_path / "runs/s/comparison/index.html").is_file()
    for run in (first, second):
        steps = [row["step"] for row in read_metrics(run, "train")]
        assert steps == list(range(1, len(steps) + 1)), "no step was trained twice"
    assert sorted(len(list(read_metrics(run, "train"))) for run in (first, second)) == [STEPS // 2, STEPS]
    winner = first if len(list(read_metrics(first, "train"))) == STEPS else second
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rate = f"optim.lr={winner.name.removeprefix('lr')}"
    run_job(compose(RunConfig, "config", [*fixed, f"steps={STEPS}", rate, f"run_dir={tmp_path / 'alone'}"]))
    swept, alone = (load_file(run / "export/model.safetensors") for run in (winner, tmp_path / "alone"))
    assert all(swept[name].equal(alone[name]) for name in alone)
