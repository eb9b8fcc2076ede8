"""python kill_training.py <folder> <overrides as JSON>: end training with SIGKILL, and let it go on.

A run is finished, extended by a new schedule, paused, and ended by early stopping. Forked processes work
through these commands; each is killed by itself before a random one of its steps on the file system, and the
next one repeats the command that was killed. It ends with the number of kills, or an assertion: bits and
state are those of a run that nobody killed.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "checkpoint")]
import nano
import torch
from comparing import assert_identical, saved_state
from kill_saving import EVENTS, deadly, forked

import segformer.training.loop as loop
from segformer.checkpoint.reader import load_checkpoint
from segformer.distributed.engine import _import_deepspeed
from segformer.distributed.world import init_world
from segformer.models.variants import VARIANTS
from segformer.telemetry.jsonl import read_metrics
from segformer.training.config import RunConfig, compose

VARIANTS.update([nano.SIZE])
KILLS = 10
EXTENDED = ["steps=10", "optim.schedule_start=4", "optim.warmup_steps=1"]
COMMANDS = [[], [*EXTENDED, "stop_at=7"], EXTENDED]  # the last one stops early, at step 8


def train(folder, overrides):
    """The commands from the first one on that has not come to its end."""
    done = folder / "done.txt"
    world = init_world()
    for number, more in enumerate(COMMANDS):
        if number >= len(done.read_text()):
            place = [f"run_dir={folder / 'run'}", "steps=4", "eval_every=2", "checkpoint.save_every=3"]
            place += ["early_stop.patience=3", "early_stop.min_gain=1", "checkpoint.keep_last=2"]
            loop.train(compose(RunConfig, "config", [*overrides, *place, *more]), world)
            done.write_text("x" * (number + 1))
    world.close()


def main(folder, overrides):
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "done.txt").touch()
    steps = folder / "steps.txt"

    def counted():
        count = 0

        def step(event, _):
            nonlocal count
            count += event in EVENTS

        sys.addaudithook(step)
        train(folder / "whole", overrides)
        steps.write_text(str(count))

    assert forked(counted) == 0
    rng, most, kills = random.Random(3), int(steps.read_text()), 0
    while kills < KILLS and len((folder / "killed/done.txt").read_text()) < len(COMMANDS):
        status = deadly(rng.randrange(most // 20, most // 2), lambda: train(folder / "killed", overrides))
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        kills += status != 0
    assert forked(lambda: train(folder / "killed", overrides)) == 0
    whole, killed = folder / "whole/run", folder / "killed/run"
    assert_identical(saved_state(killed, 8), saved_state(whole, 8))
    left, right = (load_checkpoint(run / "checkpoints").state for run in (killed, whole))
    assert left == right
    assert [row["step"] for row in left.evaluations] == [2, 4, 6, 8]
    losses = [{row["step"]: row["loss"] for row in read_metrics(run, "train")} for run in (whole, killed)]
    assert losses[0] == losses[1]
    assert "stopped early at step 8 of 10" in (killed / "log.txt").read_text().splitlines()[-1]
    print(kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _import_deepspeed()
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
