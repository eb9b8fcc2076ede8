"""Saving while training goes on: slow disks, full disks, kills, errors, several ranks."""

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpointer, nobody, tensors

from segformer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.checkpoint.reader import list_steps, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TESTS = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}


def content(step):
    return Checkpoint(*tensors(step), TrainState(step=step))


@pytest.fixture
def checkpointer(tmp_path):
    return make_checkpointer(tmp_path)


# -- crashes and full disks


@pytest.mark.faults
def test_a_kill_at_every_step_leaves_the_old_or_the_new_checkpoint(tmp_path, run_ranks):
    (printed,) = run_ranks(1, "tests/checkpoint/kill_saving.py", "steps", str(tmp_path / "run"), env=TESTS)
    assert int(printed) > 2 * 25


def may_trace():
    """Whether strace is here and may attach to another process."""
    program = "import os, sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        try:
            command = ["strace", "-p", str(process.pid), "-o", os.devnull]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
                attached = "attached" in strace.stderr.readline()
                process.stdin.close()
            return attached
        except OSError:
            return False
        finally:
            process.kill()


@pytest.mark.faults
def test_a_kill_at_every_system_call_leaves_the_old_or_the_new_checkpoint(tmp_path, run_ranks):
    """Also at those inside of safetensors, which Python does not see."""
    if not may_trace():
        pytest.skip("needs strace, and the right to attach it")
    (printed,) = run_ranks(1, "tests/checkpoint/kill_saving.py", "syscalls", str(tmp_path / "run"), env=TESTS)
    assert int(printed) > 50


@pytest.mark.faults
def test_ranks_agree_on_full_disks_last_saves_bad_values_and_talk_during_slow_writes(tmp_path, run_ranks):
    """The scenarios of checkpoint_ranks.py, with their own assertions."""
    zero, one = run_ranks(2, "tests/checkpoint/checkpoint_ranks.py", str(tmp_path))
    full, last, not_finite = zero.splitlines()
    assert "step-00000007 can't be written: " in full
    assert "File too large" in full
    assert "3 of 3 failures in a row, the newest checkpoint is step 4" in full
    assert list_steps(tmp_path / "full_disk") == [1, 4]
    assert last.startswith("last: CheckpointError: ")
    assert list_steps(tmp_path / "last") == [1]
    assert not_finite.endswith("CheckpointError: not saving step 1: w is not finite; lower optim.lr")
    assert not (tmp_path / "not_finite").exists()
    assert one.splitlines() == [f"{name}: SystemExit: 2" for name in ("full_disk", "last", "not_finite")]


# -- while training goes on


class Gate:
    """os.fsync that stands still until it is opened, and notes which thread came."""

    def __init__(self, monkeypatch):
        self.open, self.threads, real = threading.Event(), [], os.fsync

        def fsync(descriptor):
            self.threads.append(threading.current_thread().name)
            assert self.open.wait(60)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_steps_go_on_while_a_slow_disk_takes_the_checkpoint_of_the_moment_of_the_save(
    tmp_path, monkeypatch, checkpointer
):
    gate = Gate(monkeypatch)
    state = TrainState(step=1, corrupt=[4])
    checkpointer.save(Checkpoint(*tensors(), state))
    state.step, state.best_score = 2, 0.5  # the steps that follow
    state.corrupt.append(5)
    assert not gate.open.is_set()
    assert list_steps(tmp_path) == []
    assert checkpointer.last_saved is None
    gate.open.set()
    checkpointer.settle(final=True)
    assert checkpointer.last_saved == 1
    assert load_checkpoint(tmp_path).state == TrainState(step=1, corrupt=[4])
    assert threading.current_thread().name not in gate.threads


def test_one_save_is_in_flight_and_the_next_one_waits_for_it(tmp_path, monkeypatch, checkpointer):
    gate = Gate(monkeypatch)
    checkpointer.save(content(1))
    threading.Timer(0.2, gate.open.set).start()
    checkpointer.save(content(2))
    assert gate.open.is_set(), "the second save came back before the first one could end"
    assert checkpointer.last_saved == 1
    checkpointer.settle(final=True)
    assert list_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(("background", "last"), [(False, False), (True, True)])
def test_a_save_that_is_told_to_is_on_the_disk_when_it_returns(tmp_path, background, last):
    checkpointer = make_checkpointer(tmp_path, background=background)
    checkpointer.save(content(1), last=last)
    assert checkpointer.last_saved == 1
    assert list_steps(tmp_path) == [1]


def test_a_bug_in_the_writer_is_raised_as_it_is(tmp_path, checkpointer):
    checkpointer.save(Checkpoint({"w": torch.ones(3, 4).t()}, {}, {}, TrainState(step=1)))
    with pytest.raises(ValueError, match="non contiguous"):
        checkpointer.settle(final=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [True, False])
def test_the_writer_lets_the_tensors_go(tmp_path, room):
    folder = tmp_path / "checkpoints"
    if not room:
        folder.touch()  # where the folder should be
    checkpointer = make_checkpointer(folder, warn=lambda _: None, failed=lambda *_: None)
    weight = torch.ones(3)
    alive = weakref.ref(weight)
    checkpointer.save(Checkpoint({"w": weight}, {}, {}, TrainState(step=1)))
    del weight
    checkpointer.wait()
    assert alive() is None, "before the next save has settled this one"
    checkpointer.settle()
    assert checkpointer.last_saved == (1 if room else None)


def test_a_save_that_was_handed_over_survives_an_error_of_the_main_thread(tmp_path):
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from checkpoints import Checkpoint, TrainState, make_checkpointer\n"
        "large = Checkpoint({'w': torch.ones(2000, 2000)}, {}, {}, TrainState(step=1))\n"
        "make_checkpointer(Path(sys.argv[1])).save(large)\n"
        "raise SystemExit(9)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | TESTS, check=False, timeout=120)
    assert ended.returncode == 9
    assert load_checkpoint(tmp_path, warn=nobody).state.step == 1


def test_a_checkpoint_that_can_not_be_deleted_is_a_warning_and_no_failure(tmp_path, monkeypatch):
    warnings = []
    checkpointer = make_checkpointer(tmp_path, warn=warnings.append, keep_last=1)
    checkpointer.save(content(1), last=True)
    monkeypatch.setattr("segformer.checkpoint.checkpointer.delete", lambda path: False)
    checkpointer.save(content(2), last=True)
    assert list_steps(tmp_path) == [1, 2]
    assert len(warnings) == 1
    assert "step-00000001 can't be deleted" in warnings[0]


def test_a_lower_keep_last_makes_room_at_the_start(tmp_path):
    checkpointer = make_checkpointer(tmp_path, keep_last=9)
    for step in range(1, 6):
        checkpointer.save(content(step), last=True)
    cfg, options = CheckpointConfig(keep_last=2), {"warn": print, "failed": print}
    Checkpointer(cfg, tmp_path, lambda function: function(), **options, last_saved=5, best_step=1)
    assert list_steps(tmp_path) == [1, 4, 5]


def test_waiting_lets_the_writer_finish_before_its_fence_closes(tmp_path, monkeypatch):
    """A run that ends with an error gives the directory back afterwards."""
    released, go = threading.Event(), threading.Event()

    def fence():
        assert not released.is_set(), "the directory was given back in the middle of a save"

    checkpointer = make_checkpointer(tmp_path, fence=fence)
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (go.wait(30), sync(descriptor)))
    checkpointer.save(content(3))
    threading.Timer(0.2, go.set).start()
    checkpointer.wait()
    released.set()
    assert list_steps(tmp_path) == [3]


@pytest.mark.parametrize(("notice_s", "warned"), [(0.0, False), (1e-3, True), (3600.0, False)])
def test_a_save_that_takes_half_of_the_notice_is_warned_of_once(tmp_path, notice_s, warned):
    lines = []
    checkpointer = make_checkpointer(tmp_path, warn=lines.append, notice_s=notice_s)
    for step in (1, 2):
        checkpointer.save(content(step))
        checkpointer.settle()
    assert len(lines) == warned
    assert not warned or "resubmit with signal_delay_s=" in lines[0]
