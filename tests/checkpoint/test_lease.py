"""The lease of a run directory: one holder, taken over by the next attempt of the same job only."""

import json
import os
import subprocess
import sys
import threading

import pytest

from segformer.checkpoint import lease
from segformer.checkpoint.atomic import commit
from segformer.checkpoint.lease import Lease
from segformer.errors import CheckpointError, ConfigError, RunTaken

HOLD = "import sys; from pathlib import Path; from segformer.checkpoint.lease import Lease; "
HOLD += "held = Lease.take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.readline()"


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that holds the directory; (environment) -> process."""
    started = []

    def hold(**environment):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], env=os.environ | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that gives every node its own locks."""
    monkeypatch.setattr(lease, "lock", lambda _: True)


def attempt(monkeypatch, job, count):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))


def queue(monkeypatch, *jobs):
    """What squeue would say."""
    monkeypatch.setattr(lease, "_queued", lambda job: job in jobs)


def test_a_second_process_is_refused_and_a_dead_one_is_followed(tmp_path, elsewhere):
    process = elsewhere()
    with pytest.raises(ConfigError, match=f"in use by process {process.pid} on "):
        Lease.take(tmp_path)
    process.kill()
    process.wait()
    assert Lease.take(tmp_path).generation == 2


def test_a_second_take_in_one_process_is_refused_until_the_first_is_released(tmp_path):
    first = Lease.take(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        Lease.take(tmp_path)
    first.release()
    second = Lease.take(tmp_path)
    second.check()
    second.release()
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] is None


def test_the_next_attempt_of_a_job_takes_over_from_a_rank_that_still_runs_and_commits_nothing(
    tmp_path, monkeypatch
):
    attempt(monkeypatch, "17", 0)
    old = Lease.take(tmp_path)
    attempt(monkeypatch, "17", 1)
    new = Lease.take(tmp_path)
    new.check()
    with pytest.raises(RunTaken, match="taken over by Slurm job 17"):
        commit(tmp_path / "checkpoints", "step-00000001", {"a": lambda path: path.write_text("x")}, old.check)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    old.release()
    new.check()


def test_two_trainings_in_one_allocation_are_two(tmp_path, monkeypatch, elsewhere):
    elsewhere(SLURM_JOB_ID="17")
    attempt(monkeypatch, "17", 0)
    with pytest.raises(ConfigError, match="in use by Slurm job 17"):
        Lease.take(tmp_path)


def test_the_earlier_attempt_does_not_take_it_back(tmp_path, monkeypatch, no_locks):
    attempt(monkeypatch, "17", 1)
    Lease.take(tmp_path)
    attempt(monkeypatch, "17", 0)
    with pytest.raises(RunTaken, match="taken over by attempt 1"):
        Lease.take(tmp_path)


def test_without_locks_squeue_decides(tmp_path, monkeypatch, no_locks):
    attempt(monkeypatch, "17", 0)
    Lease.take(tmp_path)
    attempt(monkeypatch, "18", 0)
    queue(monkeypatch, "17")
    with pytest.raises(ConfigError, match="in use by Slurm job 17"):
        Lease.take(tmp_path)
    queue(monkeypatch)
    assert Lease.take(tmp_path).generation == 2


@pytest.mark.parametrize(
    ("says", "queued"), [("echo RUNNING", True), ("true", False), ("echo Invalid job id >&2; false", False)]
)
def test_squeue_is_asked_about_the_job(tmp_path, monkeypatch, says, queued):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "squeue").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert lease._queued("17") == queued


def test_a_file_that_can_t_be_read_for_a_moment_takes_nothing_away(tmp_path, monkeypatch):
    held = Lease.take(tmp_path)
    kept = (tmp_path / "lease.json").read_text()
    (tmp_path / "lease.json").write_text("")
    with pytest.raises(CheckpointError, match="can't be read"):
        held.check()
    (tmp_path / "lease.json").write_text(kept)
    held.check()
    (tmp_path / "lease.json").unlink()
    with pytest.raises(RunTaken, match=r"^.* has been removed, or its lease\.json; this process ends"):
        held.check()


def test_a_lock_that_outlives_its_job_is_waited_for(tmp_path, elsewhere, monkeypatch, capsys):
    """A file server may hold the lock of a node that it has lost for a minute or two."""
    process = elsewhere(SLURM_JOB_ID="17")
    attempt(monkeypatch, "18", 0)
    queue(monkeypatch)
    monkeypatch.setattr(lease, "RELEASE_S", 0)
    with pytest.raises(ConfigError, match="in use by Slurm job 17"):
        Lease.take(tmp_path)
    monkeypatch.setattr(lease, "RELEASE_S", 60)
    threading.Timer(0.5, process.kill).start()
    assert Lease.take(tmp_path).generation == 2
    assert "waiting for the lock of Slurm job 17" in capsys.readouterr().out
