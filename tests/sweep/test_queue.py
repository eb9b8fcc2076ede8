"""The queue of a sweep: what it trains, how far, and that a stop or a kill costs nothing."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from sweep.fake_training import STEPS, score

from segformer.errors import ConfigError, Preempted, SegformerError
from segformer.sweep import queue, runs
from segformer.sweep.plan import SearchConfig, SweepConfig
from segformer.sweep.queue import sweep
from segformer.sweep.runs import Job, plan_of
from segformer.training.config import RunConfig, compose
from segformer.training.directory import check_start

RATES = ("0.001", "0.01", "0.03", "0.1")
FIXED = ("experiment=sample", "data.shards=nowhere", f"steps={STEPS}")
GRID = (*FIXED, f"optim.lr={','.join(RATES)}", "seed=0,1")
TRAIN = [sys.executable, "-S", str(Path(__file__).with_name("fake_training.py"))]


@functools.cache
def cached(overrides):
    return compose(RunConfig, "config", list(overrides))


def composed(schema, name, overrides):
    """`compose`, once for the same overrides."""
    return cached(tuple(overrides))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory; what would be compared is kept in the list that is returned beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "POLL_S", 0.01)
    monkeypatch.setattr(runs, "compose", composed)
    compared: list[list[str]] = []
    monkeypatch.setattr(queue, "compare", lambda cfg, logged: compared.append(cfg.runs))
    return tmp_path / "runs/s", compared


def go_on(folder):
    """Let the runs that wait go on."""
    (folder / "hold").unlink()


def halving(overrides=GRID, jobs=4, **settings):
    return sweep(SweepConfig(name="s", sweep=SearchConfig(halving=2, jobs=jobs)), list(overrides), TRAIN)


def by_a_loop():
    """What halving by two leaves: (settings, steps) of each rung, and the steps that each run makes."""
    alive, made = [float(rate) for rate in RATES], Counter()
    for last, keep in ((2, 2), (4, 1), (8, 1)):
        for lr in alive:
            for seed in (0, 1):
                made[f"lr{RATES[[float(r) for r in RATES].index(lr)]}_seed{seed}"] = last
        means = {lr: (score(lr, 0, last) + score(lr, 1, last)) / 2 for lr in alive}
        alive = sorted(alive, key=lambda lr: -means[lr])[:keep]
    return alive, made


def once(made):
    """Every step of these runs, made once."""
    return {f"{run} {step}": 1 for run, last in made.items() for step in range(1, last + 1)}


def steps_made(folder):
    """How often each run made each step."""
    return Counter((folder / "steps.txt").read_text().splitlines())


def test_halving_trains_what_a_plain_loop_does_and_compares_the_best_first(place, capsys):
    folder, compared = place
    finalists = halving()
    (winner,), made = by_a_loop()
    assert {job.trial.setting for job in finalists} == {f"optim.lr={winner:g}"}
    assert steps_made(folder) == once(made)
    assert compared[0][:2] == [f"runs/s/lr{winner:g}_seed{seed}" for seed in (0, 1)]
    assert len(compared[0]) == 8
    printed = capsys.readouterr().out
    assert "8 runs of 4 settings: 4 to 25% of the steps, 2 to 50% of the steps, 1 to the end" in printed
    halving()
    assert steps_made(folder) == once(made), "a sweep that is done trains nothing"
    assert compared[1] == compared[0]


def test_a_stop_is_passed_on_and_the_same_command_ends_with_the_same_result(place):
    folder, compared = place
    (folder / "hold").parent.mkdir(parents=True)
    for moment in (1, 5, 11):  # steps that are made by then
        (folder / "hold").touch()

        def stop(moment=moment):
            while not (folder / "lr0.001_seed0.out").exists():
                time.sleep(0.01)
            (folder / "hold").unlink()
            while sum(steps_made(folder).values() if (folder / "steps.txt").exists() else [0]) < moment:
                time.sleep(0.002)
            (folder / "hold").touch()
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(Preempted, match=r"stopped by SIGTERM; .* the same command goes on with runs/s"):
            halving(jobs=2)
        thread.join()
    (folder / "hold").unlink()
    halving(jobs=2)
    (winner,), made = by_a_loop()
    assert steps_made(folder) == once(made)
    assert compared[0][0] == f"runs/s/lr{winner:g}_seed0"


def test_a_run_that_fails_is_named_and_the_others_go_on(place, capsys):
    _, compared = place
    with pytest.raises(SegformerError, match=r"1 of 3 runs failed: lr0.5; the same command tries"):
        sweep(SweepConfig(name="s"), [*FIXED, "optim.lr=0.5,0.01,0.1", "seed=0"], TRAIN)
    assert compared == [["runs/s/lr0.01", "runs/s/lr0.1"]]
    assert "lr0.5 failed with exit code 1" in capsys.readouterr().out


def test_runs_that_a_killed_sweep_left_at_work_are_waited_for(place, monkeypatch):
    folder, _ = place
    folder.mkdir(parents=True)
    (folder / "hold").touch()
    job = Job(plan_of(SweepConfig(name="s"), list(GRID))[0][0].trial, folder / "lr0.001_seed0", None)
    with (folder / ".running").open("w") as running:
        assert queue.lock(running.fileno())
        left = subprocess.Popen([*TRAIN, *job.overrides], pass_fds=[running.fileno()])
    said: list[str] = []
    monkeypatch.setattr(queue, "say", lambda text: said.append(text) or ("wait" in text and go_on(folder)))
    sweep(SweepConfig(name="s", sweep=SearchConfig(jobs=4)), list(GRID), TRAIN)
    assert left.wait() == 0
    assert set(steps_made(folder).values()) == {1}
    assert any("waiting for runs" in line for line in said)


def test_a_wrong_run_is_refused_before_anything_is_written(place, monkeypatch):
    folder, _ = place
    for overrides, words in (
        ((*FIXED, "optim.lr=1,x", "seed=0"), r"optim.lr=x must be a number"),
        ((*GRID, "run_dir=x"), r"run_dir=x is refused"),
        ((*GRID, "stop_at=3"), r"stop_at=3 is refused"),
    ):
        with pytest.raises(ConfigError, match=words):
            halving(overrides)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep is one process"):
        halving()
    assert not folder.exists()


def test_a_run_is_no_folder_of_a_sweep_nor_the_reverse(place):
    folder, _ = place
    folder.mkdir(parents=True)
    (folder / "sweep.json").touch()
    with pytest.raises(ConfigError, match=r"runs/s is the folder of a sweep, .*; give name=s_2"):
        check_start(cached((*FIXED, "name=s")))
    (folder / "sweep.json").rename(folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"runs/s is a run, and a sweep is a folder of runs"):
        halving()


def test_a_run_has_ended_where_log_export_and_report_are_of_one_step_whatever_their_times(place):
    folder, _ = place
    run, export = folder / "x", folder / "x/export"
    export.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "final", "step": 8, "miou": 0.5}\n')
    for exported, told, ended in ((8, 8, True), (8, 4, False), (4, 8, False), (8, 80, False)):
        (run / "report.html").write_text(f"<td>mIoU, step {told}</td>")
        (export / "config.json").write_text(json.dumps({"segformer": {"step": exported}}))  # later
        assert runs._ended(run) == ended


def test_rungs_keep_the_steps_of_the_first_start(place, monkeypatch, tiny_shards):
    opened, open_shards = [], runs.open_shards
    monkeypatch.setattr(runs, "open_shards", lambda cfg: opened.append(1) or open_shards(cfg))
    lines = ["experiment=scratch", f"data.shards={tiny_shards}", "epochs=3", "optim.lr=0.01,0.1"]
    cfg = SweepConfig(name="s", sweep=SearchConfig(halving=2))
    jobs, _ = plan_of(cfg, lines)
    assert opened == [1], "once for all runs"
    assert {job.steps for job in jobs} == {jobs[0].config.steps}
    elsewhere = jobs[0].of(40)
    assert "steps=40" in elsewhere.overrides
    assert "epochs=3" not in elsewhere.overrides
    assert compose(RunConfig, "config", elsewhere.overrides).steps == 40
    assert runs.to_rung(runs.Rung(0.25, 2), elsewhere).stop_at == 10


def test_a_sweep_without_any_score_says_so(place, monkeypatch):
    monkeypatch.setattr(Job, "score", lambda self: None)
    with pytest.raises(SegformerError, match=r"none of the 2 runs has a score that is a number"):
        sweep(SweepConfig(name="s"), [*FIXED, "optim.lr=0.01,0.1", "seed=0"], TRAIN)
