"""python kill_saving.py steps|syscalls <folder>: end saves with SIGKILL, and load what is left.

steps: for k = 1, 2, ... a forked process is killed by itself just before its k-th step on the file system,
whichever thread takes it. syscalls: strace kills it at the k-th call of each system call that changes files,
also of those inside of safetensors. Ends with the number of kills, or with an assertion.
"""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from checkpoints import make_checkpointer, nobody, tensors

from segformer.checkpoint.atomic import clean
from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.checkpoint.reader import list_steps, load_checkpoint

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.scandir", "shutil.rmtree")
CALLS = ("write", "ftruncate", "rename", "renameat", "mkdir", "fsync", "unlinkat", "rmdir", "chmod")


def save(folder, step, seed):
    content = Checkpoint(*tensors(seed), TrainState(step=step, best_score=seed))
    make_checkpointer(folder, keep_last=1).save(content, last=True)


def seed_of(folder):
    """Of what is loaded, every tensor compared."""
    loaded = load_checkpoint(folder, warn=nobody)
    seed = loaded.state.best_score
    for found, expected in zip(loaded[:3], tensors(seed), strict=True):
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


def kill_until_it_ends(folder, new_step, start):
    """`start(at, save)` for at = 1, 2, ... until it ends unharmed; each kill left 11 (old) or 22 (new)."""
    outcomes = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, 11)
        status = start(len(outcomes) + 1, lambda: save(folder, new_step, 22))
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
        save(folder, 3, 33)
        assert list_steps(folder) == [3]
    assert outcomes == sorted(outcomes), "the old one up to a point, the new one from there on"
    assert seed_of(folder) == 22
    assert list_steps(folder) == [new_step]
    return outcomes


def kill_at_every_step(folder):
    kills = [kill_until_it_ends(folder, new_step, deadly) for new_step in (2, 1)]  # the next, the same again
    assert all(set(outcomes) == {11, 22} for outcomes in kills)
    print(sum(map(len, kills)))


def kill_at_every_system_call(folder):
    kills = {
        call: sum(len(kill_until_it_ends(folder, new_step, partial(traced, call))) for new_step in (2, 1))
        for call in CALLS
    }
    assert all(kills[call] > 2 for call in ("write", "fsync", "rename")), kills
    print(sum(kills.values()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "syscalls":
        kill_at_every_system_call(Path(sys.argv[2]))
    else:
        os.fsync = lambda _: None  # half of the time; the page cache outlives a killed process
        kill_at_every_step(Path(sys.argv[2]))
