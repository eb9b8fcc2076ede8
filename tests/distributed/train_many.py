"""Runs one after the other in one group of ranks; each line of the standard input is the path of a plan.

A plan is a list of
    {"run": overrides, "wrong": {"rank": 1, "steps": [5], "kind": "loss" | "gradient", "once": true,
                                 "accumulation": 1}, "stop": [3, 1], "memory": 200}
        a run; its losses go wrong where `wrong` says so (steps count from 1; of accumulated micro batches the
        first one), `stop` is a step, in which a rank gets SIGTERM, and `memory` are the MiB that a step may
        allocate; all three may be left out. With "watch": true the run directory gets a watched.json:
        "numbers" that the ranks added up, by type, and how often the host "waited" for the device
    {"cut": source, "to": target, "step": 10}
        a copy of a run as it was when it had saved that step
After each plan a rank prints a line of JSON, the outcome of each run: "" or "Error: message".
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.append(str(Path(__file__).parents[1]))
import nano

import segformer.training.loop as loop
from segformer.distributed.world import init_world
from segformer.errors import SegformerError
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, compose
from segformer.training.task import Segmentation

VARIANTS.update([nano.SIZE])
NUMBERS = Counter()  # that the ranks have added up, by type
HONEST, STEP, LINEAR = Segmentation.loss, loop.train_step, torch.nn.functional.linear


def wrong_loss(plan):
    """Segmentation.loss that goes wrong as planned."""
    left = [*plan["steps"]]

    def loss(self, model, batch, position):
        value, parts = HONEST(self, model, batch, position)
        micro_step, rank = divmod(position, torch.distributed.get_world_size())
        step, index = divmod(micro_step, plan.get("accumulation", 1))
        if index or rank != plan.get("rank", 1) or step + 1 not in left:
            return value, parts
        if plan.get("once", True):
            left.remove(step + 1)
        if plan.get("kind") == "gradient":
            return value + (value * 0).sqrt(), parts  # the value is right, its derivative 0 x infinity
        return value * torch.nan, parts

    return loss


def stopped_step(stop):
    """train_step in which a rank gets a signal."""

    def step(cfg, world, task, model, *arguments):
        if [model.state.step + 1, world.rank] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return STEP(cfg, world, task, model, *arguments)

    return step


def limited_step(mebibytes):
    """train_step that can't get more memory than that."""

    def step(*arguments):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, before[1]))
        try:
            return STEP(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return step


def counted(function):
    """A collective that adds up, with its numbers counted."""

    def call(*given, **named):
        tensor = next(item for item in (*named.values(), *given) if isinstance(item, torch.Tensor))
        NUMBERS[str(tensor.dtype)] += tensor.numel()
        return function(*given, **named)

    return call


@contextlib.contextmanager
def watched(run):
    """Write watched.json."""
    from deepspeed.accelerator import get_accelerator

    NUMBERS.clear()
    waits = []
    with patch.object(type(get_accelerator()), "synchronize", lambda *_: waits.append(1)):
        yield
    (folder,) = (item.removeprefix("run_dir=") for item in run if item.startswith("run_dir="))
    Path(folder, "watched.json").write_text(json.dumps({"numbers": NUMBERS, "waited": len(waits)}))


def cut(source, target, step):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("metrics.jsonl", "wandb*", "stacks"))
    for path in Path(target, "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def outcome(world, entry):
    torch.nn.functional.linear = LINEAR  # stage 3 of DeepSpeed replaces it for good, and rounds differently
    Segmentation.loss = wrong_loss(entry["wrong"]) if "wrong" in entry else HONEST
    loop.train_step = stopped_step(entry["stop"]) if "stop" in entry else STEP
    if "memory" in entry:
        loop.train_step = limited_step(entry["memory"])
    watching = watched(entry["run"]) if "watch" in entry else contextlib.nullcontext()
    try:
        with watching:
            loop.train(compose(RunConfig, "config", entry["run"]), world)
    except (SegformerError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main():
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):  # before DeepSpeed takes them
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
    world = init_world(timeout_s=120)
    for plan in iter(sys.stdin.readline, ""):
        outcomes = []
        for entry in json.loads(Path(plan.rstrip()).read_text()):
            if "cut" in entry:
                world.on_main(lambda entry=entry: cut(entry["cut"], entry["to"], entry["step"]))
            else:
                outcomes.append(outcome(world, entry))
        print("\n" + json.dumps(outcomes), flush=True)
    world.close()


if __name__ == "__main__":  # a loader's process imports this file, too
    main()
