"""What submitting refuses before it writes anything, and what resubmitting keeps; no Slurm is needed."""

import json
from dataclasses import asdict

import pytest

from launch.slurm import look_after
from segformer.errors import ConfigError
from segformer.slurm import submission
from segformer.slurm.queue import JobState, would_start
from segformer.slurm.settings import SlurmConfig
from segformer.training.config import RunConfig


def test_a_run_directory_that_others_may_exchange_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    assert submission.make_folder(run_dir).path == run_dir / "slurm/0001"
    assert submission.make_folder(run_dir).path == run_dir / "slurm/0002"
    run_dir.chmod(0o770)
    with pytest.raises(ConfigError, match="chmod go-w"):
        submission.make_folder(run_dir)
    run_dir.chmod(0o750)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="everybody may exchange"):
        submission.make_folder(run_dir)
    tmp_path.chmod(0o1777)
    submission.make_folder(run_dir)


def test_a_folder_that_others_may_open_is_refused(tmp_path):
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm").chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        submission.make_folder(tmp_path / "run")
    (tmp_path / "run/slurm").rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "run/slurm").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="is a link"):
        submission.make_folder(tmp_path / "run")


def resubmitted(monkeypatch, tmp_path, saved, *overrides):
    """The settings with which a job of these settings is submitted again."""
    folder = submission.make_folder(tmp_path / "run")
    settings = {**dict.fromkeys(["partition", "account", "qos", "constraint", "mem"], ""), **saved}
    folder.record.write_text(json.dumps({"job": "17", "settings": settings, "directory": "/"}))
    found = []
    monkeypatch.setattr(submission, "resubmit", lambda run_dir, cfg: found.append(cfg))
    look_after("resubmit", [str(tmp_path / "run"), *overrides])
    return found[0]


def test_resubmitting_keeps_the_settings_of_before_and_judges_the_new_ones_by_them(monkeypatch, tmp_path):
    saved = {
        "nodes": "2-4", "gpus_per_node": 0, "tasks_per_node": None, "cpus_per_task": 3, "time": "24h",
        "constraint": "a|b", "signal_delay_s": 60, "setup": ["module load x; y"],
        "sbatch": {"exclusive": True}, "requeue": False, "dry_run": False, "watch": True,
    }  # fmt: skip
    cfg = asdict(resubmitted(monkeypatch, tmp_path, saved, "tasks_per_node=2", "time=2m"))
    wanted = saved | {"gpus_per_node": "0", "tasks_per_node": 2, "time": "2m", "watch": False}
    assert {key: cfg[key] for key in wanted} == wanted


@pytest.mark.parametrize("override", ["steps=5", "++nodes=2", "setup=[ls]", "cluster=gpu8"])
def test_resubmitting_changes_the_job_and_nothing_else(tmp_path, monkeypatch, override):
    with pytest.raises(ConfigError, match=r"refused|can't be changed"):
        resubmitted(monkeypatch, tmp_path, {"nodes": "1"}, override)


def test_a_job_that_is_still_ending_asks_for_patience(tmp_path, monkeypatch):
    folder = submission.make_folder(tmp_path / "run")
    folder.record.write_text(json.dumps({"job": "17"}))
    monkeypatch.setattr(submission, "job_state", lambda job: JobState("COMPLETING"))
    with pytest.raises(ConfigError, match="job 17 is still ending; try again in a moment"):
        submission.submit(SlurmConfig(), RunConfig(run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("error: invalid partition specified: x", "sbatch refused: invalid partition specified: x"),
        ("fatal: Could not establish a configuration source", None),
    ],
)
def test_a_dry_run_repeats_what_slurm_refuses_and_says_where_none_answers(
    monkeypatch, tmp_path, text, answer
):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\necho 'sbatch: {text}' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if answer is None:
        assert would_start("#!/bin/sh") == "not asked: no Slurm controller reachable from here"
    else:
        with pytest.raises(ConfigError, match=answer):
            would_start("#!/bin/sh")
