"""wandb and TensorBoard beside a run: what they are given arrives, and nothing they do holds it up.

wandb is the real client in processes of their own, against real sockets: a server that takes what it is
sent, one that stops to answer, one that never answers.
"""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.telemetry import logger
from segformer.telemetry.logger import Telemetry, TelemetryConfig
from segformer.telemetry.trackers import without_secrets

MAIN = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
CANARY = "c0ffee" * 6 + "cafe"  # as long as a key of wandb
TIMEOUT_S = 4
SCRIPT = f"""
import json, sys, time
from pathlib import Path
import torch, wandb
from segformer.distributed.world import World
from segformer.telemetry.logger import Telemetry, TelemetryConfig
run_dir, mode, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
config = {{"lr": 0.5, "api_key": "{CANARY}", "note": "it is {CANARY}"}}
cfg = TelemetryConfig(wandb=mode, wandb_timeout_s={TIMEOUT_S}, progress=False)
scores = {{"miou": 0.5, "iou": [0.25, None], "confusion": [[3, 1], [0, 0]]}}

def run():
    times = [time.monotonic()]
    log = Telemetry(cfg, run_dir, world, name="run", steps=40, config=config)
    times.append(time.monotonic())
    log.start(0)
    slowest = 0.0
    for step in range(1, 41):
        began = time.monotonic()
        log.train(step, {{"loss": 1 / step, "lr": 1e-4}})
        if step == 20:
            log.scores("eval", step, scores, ["a", "b"])
        slowest = max(slowest, time.monotonic() - began)
        if step == 20 and pause:
            print("half", flush=True)
            sys.stdin.readline()
    times.append(time.monotonic())
    log.close()
    times.append(time.monotonic())
    found = {{"open": times[1] - times[0], "slowest": slowest, "close": times[3] - times[2]}}
    print(json.dumps(found), flush=True)

for _ in range(2 if mode == "offline" else 1):
    run()
"""


PLACE = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of wandb's server as its client needs; hangs where `server.hangs` is set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(404, b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append(body)
        answer = {"data": None}
        asked = json.loads(body) if self.path == "/graphql" else {}
        if (name := asked.get("operationName")) == "RunResumeStatus" and self.server.history():
            answer = {"data": {"model": {**PLACE, "bucket": self.server.resumed()}}}
        elif name == "UpsertBucket":
            bucket = {"id": "b", "name": asked["variables"]["name"], "project": PLACE}
            bucket |= {"historyLineCount": len(self.server.history())}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        elif name == "CreateRunFiles":
            names = asked["variables"]["files"]
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in names]
            answer = {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        self._answer(200, json.dumps(answer).encode())

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.uploads[self.path.removeprefix("/upload/")] = body
        self._answer(200, b"")

    def _answer(self, code, body):
        if self.server.hangs:
            self.server.over.wait()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.uploads, self.hangs, self.over = [], {}, False, threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def history(self):
        """The lines of the run's history, by the place that each was sent to."""
        lines = {}
        for body in self.bodies:
            sent = json.loads(body)["files"] if body.startswith(b'{"files"') else {}
            if part := sent.get("wandb-history.jsonl"):
                lines |= dict(enumerate(part["content"], part["offset"]))
        return [lines[place] for place in sorted(lines)]

    def resumed(self):
        """What is said of a run that goes on."""
        lines = self.history()
        told = {"id": "b", "name": "r", "summaryMetrics": "{}", "displayName": "run", "config": "{}"}
        told |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "wandbConfig": "{}"}
        return told | {"historyLineCount": len(lines), "historyTail": json.dumps([lines[-1]])}

    def handle_error(self, *_):
        """A client that gave up is no error of the server."""

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Started:
    """A process that logs a run of 40 steps (offline: and starts it again), and what came of it."""

    def __init__(self, folder, mode, url, pause=False):
        self.run_dir, self.url = folder / "run", url
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        env = clean | {"WANDB_BASE_URL": url, "WANDB_API_KEY": CANARY, "HOME": str(home), "no_proxy": "*"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.run_dir), mode, str(int(pause))],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self):
        out, self.err = self.process.communicate("\n", timeout=120)
        assert self.process.returncode == 0, self.err
        self.times = json.loads(out.splitlines()[-1])
        self.lines = [line for line in self.err.splitlines() if not line.startswith("step ")]
        self.seconds = time.monotonic() - self.began
        return self


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The processes of all cases, side by side."""
    folder = tmp_path_factory.mktemp("wandb")
    servers = {"online": Server(), "stops": Server()}
    cases = {"stops": Started(folder / "stops", "online", servers["stops"].url, pause=True)}
    assert cases["stops"].process.stdout.readline() == "half\n"
    time.sleep(1)  # some of it is on its way
    servers["stops"].hangs = True
    with socket.create_server(("127.0.0.1", 0)) as hole:  # connects, and never says a word
        silent = f"http://127.0.0.1:{hole.getsockname()[1]}"
        cases["silent"] = Started(folder / "silent", "online", silent)
        cases["stops"].wait()  # two at a time
        cases["online"] = Started(folder / "online", "online", servers["online"].url)
        cases["silent"].wait()
        cases["offline"] = Started(folder / "offline", "offline", silent)
        cases["online"].wait()
        cases["offline"].wait()
    for name, server in servers.items():
        cases[name].server = server
        server.stop()
    return cases


@pytest.mark.slow
def test_a_server_gets_values_pictures_and_the_step_they_belong_to(ran):
    case = ran["online"]
    streams = [json.loads(body)["files"] for body in case.server.bodies if body.startswith(b'{"files"')]
    lines = [line for files in streams for line in files.get("wandb-history.jsonl", {}).get("content", [])]
    rows = {}
    for row in map(json.loads, lines):
        rows.setdefault(row["step"], {}).update(row)
    assert sorted(rows) == list(range(1, 41))
    assert rows[8]["train/loss"] == 0.125
    assert rows[20]["eval/miou"] == 0.5
    assert rows[20]["eval/iou/a"] == 0.25
    assert "eval/iou/b" not in rows[20], "a class without a score has no point"
    assert any(name.startswith("media/images/eval/confusion") for name in case.server.uploads)
    assert not case.lines, "silent where all is well"


@pytest.mark.slow
def test_offline_keeps_one_run_id_over_restarts(ran):
    identifier = (ran["offline"].run_dir / "wandb_id.txt").read_text().split()[0]
    # The folders' names end otherwise when both runs began within one second.
    recorded = list(ran["offline"].run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert [path.name for path in recorded] == [f"run-{identifier}.wandb"] * 2


@pytest.mark.slow
def test_the_documented_command_sends_all_parts_of_an_offline_run_and_overwrites_nothing(ran, tmp_path):
    """Both parts logged the steps 1 to 40, as after a restart from the beginning."""
    server, case = Server(), ran["offline"]
    parts = sorted(map(str, case.run_dir.glob("wandb/offline-run-*")))
    wandb = [sys.executable, "-m", "wandb", "sync", *parts]
    env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": CANARY, "HOME": str(tmp_path)}
    done = subprocess.run(wandb, env=env, capture_output=True, text=True, timeout=60)
    server.stop()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in server.history()]
    own = [row["_step"] for row in rows]
    assert own == sorted(set(own)), "wandb's own step grows over the restart"
    trained = [row["step"] for row in rows if "train/loss" in row]
    assert trained == [*range(1, 41), *range(1, 41)]


@pytest.mark.slow
def test_a_server_that_can_t_be_used_means_offline_and_one_line(ran):
    case = ran["silent"]
    assert len(case.lines) == 1, case.err
    assert case.lines[0].startswith(f"wandb: no run at {case.url} (")
    assert "wandb sync" in case.lines[0]
    recorded = next(case.run_dir.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    assert b"eval/miou" in recorded


@pytest.mark.slow
def test_neither_the_start_nor_a_step_waits_longer_than_documented(ran):
    assert all(case.times["open"] < TIMEOUT_S + 5 for case in ran.values())
    assert {name: case.times["slowest"] for name, case in ran.items() if case.times["slowest"] > 2} == {}


@pytest.mark.slow
def test_a_server_that_stops_to_answer_costs_the_end_of_the_run_a_bounded_time(ran):
    case = ran["stops"]
    assert case.times["close"] < TIMEOUT_S + 6
    assert case.seconds < 60, "and the interpreter exits"
    line = case.lines[0]
    assert line.startswith("wandb: not everything was sent; ")
    assert f"`wandb sync {case.run_dir}" in line
    assert b"train/loss" in next(case.run_dir.glob("wandb/run-*/run-*.wandb")).read_bytes()


@pytest.mark.slow
def test_the_key_is_in_no_file_and_in_nothing_that_is_sent(ran):
    for case in ran.values():
        files = [path for path in case.run_dir.parent.rglob("*") if path.is_file()]
        assert len(files) > 3
        assert not [path for path in files if CANARY.encode() in path.read_bytes()]
        assert CANARY not in case.err
    server = ran["online"].server
    assert not [body for body in [*server.bodies, *server.uploads.values()] if CANARY.encode() in body]
    assert any(b"0.5" in body for body in server.bodies), "the rest of the configuration is sent"


@pytest.mark.slow
def test_no_machine_is_described(ran):
    sent = b"".join([*ran["online"].server.bodies, *ran["online"].server.uploads.values()])
    for private in (sys.executable, os.getcwd(), socket.gethostname()):
        assert private.encode() not in sent
    assert not list(ran["online"].run_dir.rglob("requirements.txt"))


def test_a_tracker_that_fails_is_logged_once_and_the_next_entries_still_go_through(
    tmp_path, monkeypatch, capsys
):
    weak = Mock(**{"scalars.side_effect": RuntimeError("no\nspace"), "close.side_effect": RuntimeError("x")})
    monkeypatch.setattr(logger, "Wandb", lambda *_, **__: weak)
    with telemetry(tmp_path, wandb="offline") as log:
        log.train(1, {"loss": 0.5})
        log.pictures(2, {"photo": np.zeros((4, 6, 3), np.uint8)})
    assert weak.pictures.called
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "wandb: no space"
    assert lines[2:] == ["wandb missed 2 entries; metrics.jsonl has them all"]


def test_a_tracker_that_can_t_be_opened_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logger, "Tensorboard", lambda *_: 1 / 0)
    with telemetry(tmp_path, tensorboard=True) as log:
        log.train(1, {"loss": 0.5})
    assert capsys.readouterr().err.startswith("TensorBoard: division by zero\nstep 1/9")


def test_secrets_are_left_out_by_name_and_by_value(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "verysecretvalue")
    config = {"lr": 1.0, "hf_token": "x", "data": {"root": "a/verysecretvalue/b", "name": "sample"}}
    assert without_secrets(config) == {"lr": 1.0, "data": {"name": "sample"}}


def telemetry(folder, **options):
    config = {"lr": 0.5, "token": CANARY}
    cfg = TelemetryConfig(progress=False, **options)
    return Telemetry(cfg, folder, MAIN, name="run", steps=9, config=config)


def test_tensorboard_s_own_reader_finds_values_pictures_and_no_point_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log_steps(log, start, *steps):
        time.sleep(1.1 if start else 0)  # event files are ordered by the second in their names
        log.start(start)
        for step in steps:
            log.train(step, {"loss": float(10 * start + step), "lr": 0.1})

    with telemetry(tmp_path, tensorboard=True) as log:
        log_steps(log, 0, 1, 2, 3)
        log_steps(log, 1, 2, 3, 4)  # a rollback to step 1
    with telemetry(tmp_path, tensorboard=True) as log:
        log_steps(log, 3, 4, 5)  # a restart from step 3
        scores = {"miou": 0.25, "iou": [0.5, None], "confusion": [[3, 1], [0, 0]]}
        log.scores("eval", 5, scores, ["road", "sky"])
        log.pictures(5, {"photo": np.full((4, 6, 3), 200, np.uint8)})
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    losses = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 12.0), (3, 13.0), (4, 34.0), (5, 35.0)]
    assert [(e.step, e.value) for e in reader.Scalars("eval/iou/road")] == [(5, 0.5)]
    assert "eval/iou/sky" not in reader.Tags()["scalars"]
    (picture,) = reader.Images("pictures/photo")
    assert (picture.width, picture.height) == (6, 4)
    assert reader.Images("eval/confusion")[0].width == 320
    for path in (tmp_path / "tensorboard").iterdir():
        assert b"| lr | 0.5 |" in path.read_bytes()
        assert CANARY.encode() not in path.read_bytes()


def test_tensorboard_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"telemetry\.tensorboard=true needs the package tensorboard"):
        TelemetryConfig(tensorboard=True).check_trackers()
