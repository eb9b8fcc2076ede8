"""The log of a run: bar, lines, files; rank zero alone writes them."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import resource
import struct
import subprocess
import sys
import termios

import pytest
import torch

from segformer.distributed.world import World
from segformer.errors import ConfigError, Preempted
from segformer.telemetry.jsonl import newest_row
from segformer.telemetry.logger import Telemetry, TelemetryConfig
from segformer.telemetry.progress import duration, train_figures

MAIN = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
VALUES = {
    "loss": 0.5,
    "lr": 1e-3,
    "grad_norm": 2.5,
    "images_per_s": 17.25,
    "step_s": 0.5,
    "data_wait": 0.25,
    "memory_gib": None,
}


def telemetry(tmp_path, world=MAIN, **settings):
    return Telemetry(TelemetryConfig(**settings), tmp_path, world, name="run", steps=100, config={})


def test_a_line_has_loss_lr_speed_wait_and_the_time_that_is_left(tmp_path, capsys):
    with telemetry(tmp_path, progress=False) as log:
        log.start(0)
        log.train(40, VALUES)
    line = "step 40/100  loss 0.5000  lr 1.0e-03  grad 2.50  17.2 img/s  data wait 25%  eta 30s"
    assert capsys.readouterr().err == line + "\n"
    assert (tmp_path / "log.txt").read_text().split(" ", 1)[1] == line + "\n"


def test_a_line_stays_one_line_whatever_is_in_it(tmp_path, capsys):
    with telemetry(tmp_path, progress=False) as log:
        log.replaced(3, 7, "key 'a\x1b[2J\n09:00:00 step 4/4\r\u202e\udcff'")
    line = "replaced by its neighbor: key 'a\\x1b[2J\\n09:00:00 step 4/4\\r\\u202e\\udcff'"
    assert capsys.readouterr().err == line + "\n"
    assert (tmp_path / "log.txt").read_text().split(" ", 1)[1] == line + "\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["reason"].startswith("key 'a\x1b[2J\n09")


@pytest.mark.parametrize(
    ("rows", "columns", "figures"),
    [(24, 140, "data wait 25%]"), (24, 60, "loss 0.5000, lr"), (0, 0, "step 40/100  loss 0.5000")],
)
def test_a_terminal_gets_a_bar_cut_at_its_edge_and_one_without_a_size_gets_lines(
    rows, columns, figures, tmp_path, monkeypatch
):
    main, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(other, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with telemetry(tmp_path) as log:
            log.start(39)
            log.advance()
            log.train(40, VALUES)
            log.line("validation")
    data = b""
    with contextlib.suppress(OSError):  # raised where all of it has been read
        while part := os.read(main, 4096):
            data += part
    os.close(main)
    shown = data.decode()
    assert "40/100" in shown
    assert figures in shown
    assert "validation\r\n" in shown
    assert not rows or max(map(len, re.split("[\r\n]", shown))) <= columns


def test_metrics_are_one_json_object_a_line_and_a_restart_appends(tmp_path):
    for step, loss in ((10, 0.1234567891), (20, float("nan"))):
        with telemetry(tmp_path, progress=False) as log:
            log.train(step, VALUES | {"loss": loss})
            log.scores("eval", step, {"miou": 0.5, "iou": [0.25, None]})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [("train", 10), ("eval", 10), ("train", 20), ("eval", 20)]
    assert [(line["kind"], line["step"]) for line in lines] == expected
    assert lines[0]["loss"] == 0.123457
    assert lines[2]["loss"] == "nan"
    assert lines[1]["iou"] == [0.25, None]
    assert lines[0]["memory_gib"] is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    other = dataclasses.replace(MAIN, rank=1)  # of a world of one, as there is no process group here
    with telemetry(tmp_path / "run", other, progress=True) as log:
        log.start(0)
        log.line("text")
        log.train(10, VALUES)
        log.advance()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_durations_read_well():
    found = [duration(seconds) for seconds in (0.4, 59, 60, 200, 7500)]
    assert found == ["0s", "59s", "1m00s", "3m20s", "2h05m"]


def test_online_without_an_account_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="wandb login"):
        TelemetryConfig(wandb="online").check_trackers()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    TelemetryConfig(wandb="online").check_trackers()


@pytest.mark.parametrize(
    "bad",
    [{"wandb": "yes"}, {"log_every": 0}, {"wandb_timeout_s": 0}, {"wandb_timeout_s": 3600}, {"images": -1}],
)
def test_nonsense_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=rf"telemetry\.{next(iter(bad))}"):
        TelemetryConfig(**bad)


def test_a_line_speaks_of_mfu_stragglers_spikes_and_skipped_steps_only_where_there_are_some():
    quiet = VALUES | {"mfu": None, "straggler": 1.19, "straggler_rank": 0, "loss_spike": 1.9, "skipped": 0}
    assert train_figures(quiet) == train_figures(VALUES)
    loud = VALUES | {"mfu": 0.314, "straggler": 1.2, "straggler_rank": 3, "loss_spike": 2.0, "skipped": 2}
    assert train_figures(loud)[5:] == ["mfu 31.4%", "rank 3 1.2x slow", "loss spike 2.0x", "skipped 2"]
    assert train_figures({"loss": None}) == ["no finite loss"]
    assert train_figures({"lr/backbone.00": 1e-5, "lr/head": 6e-4}) == ["no finite loss", "lr 6.0e-04"]
    assert "loss spike nanx" in train_figures(VALUES | {"loss_spike": float("nan")})


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Preempted("stopped at step 41 by SIGTERM"), "Preempted: stopped at step 41 by SIGTERM"),
        (ZeroDivisionError("division by zero"), "ended by a bug: ZeroDivisionError: division by zero"),
        (None, "finished: all steps are done"),
    ],
)
def test_what_ended_a_start_is_in_the_log_and_in_metrics(error, text, tmp_path):
    with contextlib.suppress(Preempted, ZeroDivisionError), telemetry(tmp_path, progress=False) as log:
        log.start(40)
        log.advance()
        if error:
            raise error
        log.end(text)
    row = newest_row(tmp_path, "end")
    assert (row["step"], row["reason"]) == (41, text)
    assert row["time"].endswith("+00:00")
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].endswith(f" {text}")


def test_an_event_is_an_object_of_its_own(tmp_path):
    with telemetry(tmp_path, progress=False) as log:
        log.event("rollback", 12, to=10, samples=(3, 4), norm=float("inf"), why={"loss": float("nan")})
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    expected = {"to": 10, "samples": [3, 4], "norm": "inf", "why": {"loss": "nan"}}
    assert line == {"kind": "rollback", "step": 12} | expected


@pytest.mark.faults
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with telemetry(tmp_path, progress=False) as log:
        log.train(10, VALUES)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # Python ignores SIGXFSZ
        try:
            log.train(20, VALUES)
            log.train(30, VALUES)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.train(40, VALUES)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    whole = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    assert whole == [10, 40], "the line after a torn one begins anew"
    assert "metrics.jsonl: 2 lines could not be written" in capsys.readouterr().err


def test_names_that_are_no_unicode_can_be_logged(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.jpg")
    with telemetry(tmp_path, progress=False) as log:
        log.replaced(3, 7, f"{name} is damaged")
    assert "caf" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["sample_id"] == 7


def test_pictures_are_wanted_only_where_somebody_sees_them():
    assert TelemetryConfig().pictures == 0
    assert TelemetryConfig(wandb="offline").pictures == 4
    assert TelemetryConfig(tensorboard=True, images=2).pictures == 2


TERMINAL = """
import sys
from pathlib import Path
import torch
from segformer.distributed.world import World
from segformer.telemetry.logger import Telemetry, TelemetryConfig
world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
with Telemetry(TelemetryConfig(), Path(sys.argv[1]), world, name="run", steps=4, config={}) as log:
    log.start(0)
    for step in (1, 2, 3, 4):
        log.advance()
        log.train(step, {"loss": 0.5, "step_s": 1.0})
        if step == 2:
            print("half", flush=True)
            sys.stdin.readline()
    log.line("done")
print("ended", flush=True)
"""


def test_a_terminal_that_goes_away_does_not_take_the_run_with_it(tmp_path):
    main, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": other}
    with subprocess.Popen([sys.executable, "-c", TERMINAL, str(tmp_path)], text=True, **pipes) as run:
        os.close(other)
        assert run.stdout.readline() == "half\n"
        assert re.search(rb"[12]/4 \[", os.read(main, 4096))  # the bar leaves out what comes within 0.1 s
        os.close(main)  # as when the connection to the machine is lost
        out, _ = run.communicate("\n", timeout=60)
    assert out == "ended\n"
    assert "done" in (tmp_path / "log.txt").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
