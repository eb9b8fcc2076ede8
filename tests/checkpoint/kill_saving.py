"""python kill_saving.py steps|syscalls|moments <folder>: end saves with SIGKILL, and load what is left.

steps: for k = 1, 2, ... a forked process is killed by itself just before its k-th step on the file system,
whichever thread takes it. syscalls: strace kills it at the k-th call of each system call that changes files,
also of those inside of safetensors. moments <count>: a process that saves and saves is killed at random
moments. Ends with the number of kills, or with an assertion.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from segformer.checkpoint.atomic import clean
from segformer.checkpoint.checkpointer import CheckpointConfig, Checkpointer, write_checkpoint
from segformer.checkpoint.format import TrainState
from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.distributed.world import World

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.scandir", "shutil.rmtree")
CALLS = ("write", "ftruncate", "rename", "renameat", "mkdir", "fsync", "unlinkat", "rmdir", "chmod")
CFG = CheckpointConfig(save_every=1, keep_last=1)
WORLD = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


def contents(seed, size=40):
    """Tensors and state that can be told from those of every other seed."""
    generator = torch.Generator().manual_seed(seed)
    model, first, average = (torch.randn(size, size, generator=generator) for _ in range(3))
    return {"w": model}, {"exp_avg.w": first}, {"w": average}, seed


def save(folder, step, seed, background, size=40):
    model, optimizer, ema, score = contents(seed, size)
    state = TrainState(step=step, best_score=score)
    if not background:
        write_checkpoint(model, optimizer, state, CFG, folder, ema)
        return
    checkpointer = Checkpointer(CFG, folder, WORLD, warn=fail, failed=fail)
    checkpointer.save(model, optimizer, ema, state)
    checkpointer.finish()


def fail(*what):
    raise AssertionError(what)


def seed_of(folder, size=40):
    """Of what is loaded, every tensor compared."""
    loaded = load_checkpoint(folder, warn=fail)
    seed = loaded.state.best_score
    for found, expected in zip(loaded[:3], contents(seed, size)[:3], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    return seed


def forked(function):
    """The status of a process that ran `function`."""
    process = os.fork()
    if not process:
        try:
            function()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def deadly(at, function):
    """`function`, ended by SIGKILL before its `at`-th step on the file system."""
    count = 0

    def step(event, _=()):
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def armed():
        sys.addaudithook(step)
        os.fsync = lambda _: step("open")
        function()

    return forked(armed)


def traced(call, at, function):
    """`function` in a process that strace kills at the `at`-th `call` of one of its threads."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.close(write)
        os.read(read, 1)
        os._exit(0 if function() is None else 1)
    os.close(read)
    command = ["strace", "-f", "-p", str(process), "-o", os.devnull, "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:signal=SIGKILL:when={at}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert "attached" in strace.stderr.readline()
        os.close(write)  # go
        return os.waitpid(process, 0)[1]


def kill_until_it_ends(folder, new_step, background, start):
    """`start(at, save)` for at = 1, 2, ... until it ends unharmed; each kill left 11 (old) or 22 (new)."""
    outcomes = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, 11, False)
        status = start(len(outcomes) + 1, lambda: save(folder, new_step, 22, background))
        if status == 0:
            break
        assert os.WIFSIGNALED(status), outcomes
        assert os.WTERMSIG(status) == signal.SIGKILL
        if list_steps(folder):  # a reader, who cleans nothing
            assert seed_of(folder) in (11, 22)
        else:
            assert new_step == 1, "only a step that is replaced may be out of sight for a moment"
        clean(folder)
        outcomes.append(seed_of(folder))
        for step in list_steps(folder):
            load_checkpoint(folder, step=step)  # nothing half deleted
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        save(folder, 3, 33, background)
        assert list_steps(folder) == [3]
    assert outcomes == sorted(outcomes), "the old one up to a point, the new one from there on"
    assert seed_of(folder) == 22
    assert list_steps(folder) == [new_step]
    return outcomes


def kill_at_every_step(folder):
    kills = 0
    for background in (False, True):
        for new_step in (2, 1):  # the next checkpoint, and the same one once more
            outcomes = kill_until_it_ends(folder, new_step, background, deadly)
            assert set(outcomes) == {11, 22}
            kills += len(outcomes)
    print(kills)


def kill_at_every_system_call(folder):
    kills = dict.fromkeys(CALLS, 0)
    for call in CALLS:
        for new_step in (2, 1):
            start = partial(traced, call)
            kills[call] += len(kill_until_it_ends(folder, new_step, True, start))
    for call in ("write", "fsync", "rename"):
        assert kills[call] > 2, kills
    print(sum(kills.values()))


def kill_at_random_moments(folder, count, size=400):
    """One run, killed again and again: it never goes back, and no checkpoint is ever damaged."""
    generator = random.Random(0)
    step = kills = torn = 0
    save(folder, 0, 0, False, size)
    while kills < count:
        process = os.fork()
        if not process:
            while True:
                step += 1
                save(folder, step, step, background=bool(step % 2), size=size)
        time.sleep(generator.uniform(0, 0.04))
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL, "it ended by itself"
        kills += 1
        torn += any(folder.glob(".tmp-*"))
        clean(folder)
        found = seed_of(folder, size)
        assert found >= step
        step = int(found)
    assert step > 0
    assert torn > 0, "no kill met a save"
    print(kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "syscalls":
        kill_at_every_system_call(Path(sys.argv[2]))
        sys.exit()
    os.fsync = lambda _: None  # half of the time; the page cache outlives a killed process
    if sys.argv[1] == "steps":
        kill_at_every_step(Path(sys.argv[2]))
    else:
        kill_at_random_moments(Path(sys.argv[2]), int(sys.argv[3]))
