"""The log of a run: bar, lines, files; rank zero alone writes them."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from segformer.dist import World
from segformer.errors import ConfigError
from segformer.telemetry import Meter, Telemetry, TelemetryConfig, duration, memory_gib

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
    line = "step 40/100  loss 0.5000  lr 1.00e-03  grad 2.50  17.2 img/s  data wait 25%  eta 30s"
    assert capsys.readouterr().err == line + "\n"
    assert (tmp_path / "log.txt").read_text().split(" ", 1)[1] == line + "\n"


def test_the_bar_shows_the_same_and_lines_go_above_it(tmp_path, capsys):
    with telemetry(tmp_path, progress=True) as log:
        log.start(39)
        log.advance()
        log.train(40, VALUES)
        log.line("validation")
    shown = capsys.readouterr().err
    assert "40/100" in shown
    assert "loss 0.5000, lr 1.00e-03, grad 2.50, 17.2 img/s, data wait 25%" in shown
    assert "validation\n" in shown


def test_metrics_are_one_json_object_a_line_and_a_restart_appends(tmp_path):
    for step, loss in ((10, 0.1234567891), (20, float("nan"))):
        with telemetry(tmp_path, progress=False) as log:
            log.train(step, VALUES | {"loss": loss})
            log.scores("eval", step, {"miou": 0.5, "iou": [0.25, None]})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", 10), ("eval", 10)),
        *(("train", 20), ("eval", 20)),
    ]
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


def test_rates_are_means_since_the_last_reset(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = Meter()
    for _ in range(4):
        now += 0.5
        meter.add(images=16, waited=0.125)
    assert meter.rates() == {"images_per_s": 32.0, "step_s": 0.5, "data_wait": 0.25}
    meter.reset()
    now += 1.0
    meter.add(images=16, waited=0.0)
    assert meter.rates() == {"images_per_s": 16.0, "step_s": 1.0, "data_wait": 0.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (60, "1m00s"), (200, "3m20s"), (7500, "2h05m")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_the_memory_of_a_cpu_is_the_resident_set():
    (line,) = [
        text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmRSS")
    ]
    assert memory_gib(MAIN.device) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.02)


def test_online_without_an_account_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="wandb login"):
        TelemetryConfig(wandb="online").check_account()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    TelemetryConfig(wandb="online").check_account()


@pytest.mark.parametrize("bad", [{"wandb": "yes"}, {"log_every": 0}])
def test_nonsense_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=rf"telemetry\.{next(iter(bad))}"):
        TelemetryConfig(**bad)
