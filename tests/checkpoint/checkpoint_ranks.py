"""Scenarios of a Checkpointer on two ranks, each in its own folder: `checkpoint_ranks.py <folder>`.

Prints a line for each that ends with an error.
"""

import os
import resource
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from segformer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.distributed.world import init_world
from segformer.errors import CheckpointError


def content(world, step, size=64):
    tensors = [{"w": torch.full((size, size), step + 0.5)} for _ in range(3)] if world.is_main else [{}] * 3
    return Checkpoint(*tensors, TrainState(step=step))


def make(world, folder, **callbacks):
    callbacks = {"warn": print, "failed": lambda *_: None} | callbacks
    return Checkpointer(CheckpointConfig(max_failures=3), folder, world.on_main, **callbacks)


def allow(world, bytes_):
    """How long a file of rank zero may become: what a full disk is to it. -1: as long as it likes."""
    if world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def full_disk(world, folder):
    """Saves fail, the run goes on, a save with room succeeds, and the third failure in a row ends all."""
    warnings, failures = [], []
    checkpointer = make(world, folder, warn=warnings.append, failed=lambda *what: failures.append(what))
    for step, room in ((1, True), (2, False), (3, False), (4, True), (5, False), (6, False)):
        allow(world, -1 if room else 8192)
        checkpointer.save(content(world, step))
        checkpointer.settle()
        assert world.gather(checkpointer.last_saved) == [4 if step >= 4 else 1] * world.size
    assert list_steps(folder) == [1, 4]
    assert load_checkpoint(folder).state.step == 4
    assert not list(folder.glob(".*"))
    assert [step for step, _ in failures] == ([2, 3, 5, 6] if world.is_main else [])
    assert all("File too large" in reason for _, reason in failures)
    assert len(warnings) == len(failures)
    checkpointer.save(content(world, 7))  # fails in the thread
    checkpointer.save(content(world, 8))


def last(world, folder):
    """The last save of a run has to succeed."""
    checkpointer = make(world, folder)
    checkpointer.save(content(world, 1), last=True)
    assert list_steps(folder) == [1]
    allow(world, 8192)
    checkpointer.save(content(world, 2), last=True)


def not_finite(world, folder):
    """No rank goes on with weights that are not numbers, and nothing is written."""
    checkpointer = make(world, folder)
    wrong = content(world, 1)
    if world.is_main:
        wrong.ema["w"][3, 4] = float("inf")
    checkpointer.save(wrong)


def slow_disk(world, folder):
    """Ranks step and talk while rank zero's disk stands still; a long write is waited for in rounds."""
    main_thread = threading.main_thread()

    def watched(real):
        def call(*args, **kwargs):
            assert threading.current_thread() is main_thread, f"{real.__name__} off the main thread"
            return real(*args, **kwargs)

        return call

    for name in ("broadcast_object_list", "all_gather_object", "all_reduce", "barrier"):
        setattr(dist, name, watched(getattr(dist, name)))
    gate, real = threading.Event(), os.fsync
    os.fsync = lambda descriptor: (gate.wait(60), real(descriptor))
    rounds = []
    checkpointer = make(world, folder, progress=lambda: rounds.append(1), round_s=0.02)
    checkpointer.save(content(world, 1))
    for _ in range(5):
        assert world.any(world.rank == world.size - 1)
    assert not gate.is_set()
    assert list_steps(folder) == []
    world.gather(None)
    threading.Timer(0.5, gate.set).start()  # 25 rounds
    checkpointer.settle(final=True)
    assert checkpointer.last_saved == 1
    world.gather(None)
    assert list_steps(folder) == [1]


def memory(world, folder):
    """Saving and loading take next to no memory beside the tensors: 3 x 64 MiB of them."""
    checkpointer = make(world, folder)
    large = content(world, 1, size=4096)
    for what, function in (
        ("save", lambda: checkpointer.save(large, last=True)),
        ("load", lambda: load_checkpoint(folder)),
    ):
        function()  # once, for what is allocated only once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak_mib()
        kept = function()
        assert peak_mib() - before < 16, what
    assert not world.is_main or torch.equal(kept.ema["w"], large.ema["w"])


def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    torch.set_num_threads(1)
    world = init_world(timeout_s=60)
    for scenario in (memory, full_disk, last, not_finite, slow_disk):
        try:
            scenario(world, Path(sys.argv[1]) / scenario.__name__)
        except (CheckpointError, SystemExit) as error:
            print(f"{scenario.__name__}: {type(error).__name__}: {error}", flush=True)
        finally:
            allow(world, -1)
    world.close()


main()
