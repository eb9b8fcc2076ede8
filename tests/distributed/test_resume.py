"""Runs that go on elsewhere: other worlds, other stages, other launchers, after many stops."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import load_checkpoint
from segformer.data.loading.order import MixedOrder, OrderSpec, SampleOrder
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.tiling import Tiling
from segformer.distributed.rendezvous import free_port
from segformer.training.config import RunConfig, compose

STEPS, HALF = 16, 8


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_at_stage_3_goes_on_anywhere(small, calm, tmp_path, train_many, metrics):
    """The same samples in every step, and their losses within 1e-5."""
    options = ("global_batch=6", f"steps={STEPS}", f"checkpoint.save_every={HALF}", "optim.ema=0.99", *calm)
    train_many(2, [small("start", "engine.zero_stage=3", *options)])
    whole = torch.tensor([line["loss"] for line in metrics(tmp_path / "start")])
    spec = load_checkpoint(tmp_path / "start" / "checkpoints", step=HALF).state.order_spec
    order = SampleOrder(OrderSpec.from_dict(spec))
    expected = [sorted(order.ids(6 * step, 6).tolist()) for step in range(HALF, STEPS)]
    for ranks, stages in ((1, (1,)), (3, (1, 2))):
        runs = {stage: tmp_path / f"on-{ranks}-{stage}" for stage in stages}
        plan = []
        for stage, run in runs.items():
            plan += [{"cut": str(tmp_path / "start"), "to": str(run), "step": HALF}]
            plan += [small(run.name, f"engine.zero_stage={stage}", "telemetry.ledger=true", *options)]
        train_many(ranks, plan)
        for run in runs.values():
            ledgers = [path.read_text().splitlines() for path in (run / "ledger").iterdir()]
            parts = zip(*([json.loads(line)["ids"] for line in lines] for lines in ledgers), strict=True)
            assert [sorted(itertools.chain(*ids)) for ids in parts] == expected
            continued = torch.tensor([line["loss"] for line in metrics(run)])
            assert (continued - whole[HALF:]).abs().max() < 1e-5, run.name


@pytest.mark.slow
@pytest.mark.faults
def test_twenty_stops_at_random_steps_change_no_bit(small, tmp_path, train_many, metrics):
    """The signal comes to either rank; one that comes to a process of its own: test_training.py."""
    options = ("steps=62", "optim.ema=0.99", "model.drop_path_rate=0.1", "engine.zero_stage=2")
    whole, stopped = (small(name, *options) for name in ("whole", "stopped"))
    rng = random.Random(7)
    stops = [[step, rng.randrange(2)] for step in sorted(rng.sample(range(1, 61, 2), 20))]
    plan = [whole, *({"run": stopped, "stop": stop} for stop in stops), stopped]
    outcomes = train_many(2, plan, failing=True)
    for (step, _), ended in zip(stops, outcomes[1:-1], strict=True):
        told = f"Preempted: stopped at step {step + 1} by SIGTERM"  # asked ahead of the step
        assert all(text.startswith(told) for text in ended)
    assert not any(outcomes[0] + outcomes[-1])
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == list(range(1, 63))
    assert_identical(saved_state(tmp_path / "stopped", 62), saved_state(tmp_path / "whole", 62))


@pytest.mark.slow
@pytest.mark.faults
def test_extension_pause_and_early_stop_killed_at_any_moment_end_in_the_same_bits(small, tmp_path, run_ranks):
    options = ("optim.ema=0.9", "model.drop_path_rate=0.1", "augment.crop=[32,32]", "global_batch=2")
    given = (str(tmp_path), json.dumps(small("run", *options)))
    output = run_ranks(1, "tests/distributed/kill_training.py", *given)
    assert int(output[0].splitlines()[-1]) > 5


def launchers(port):
    """Commands that start two ranks, by the name of the launcher, and what they add to the environment."""
    python = [sys.executable]
    step = {"SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]
    ranks = [(python, step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in range(2)]
    return {"torchrun": [(python + torchrun, {})], "deepspeed": [(python + deepspeed, {})], "srun": ranks}


@pytest.mark.slow
def test_every_launcher_gives_the_same_weights(tiny, tmp_path, root):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    clean = {name: value for name, value in clean.items() if "RANK" not in name and "WORLD" not in name}
    clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for name, commands in launchers(free_port()).items():
        overrides = ["launch/train.py", *tiny(name, "steps=3")]
        processes = [
            subprocess.Popen([*command, *overrides], cwd=root, env=clean | more, **output)
            for command, more in commands
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), (name, outputs)
        assert "2 x cpu" in (tmp_path / name / "log.txt").read_text()
        assert_identical(saved_state(tmp_path / name), saved_state(tmp_path / "torchrun"))


@pytest.mark.slow
def test_a_run_on_two_sets_sees_its_samples_in_order_on_other_ranks_and_stages(
    small, calm, tmp_path, tiny_root, tiny_shards, train_many, metrics
):
    """Stopped three times and continued each time elsewhere: each set's own epochs, losses and scores of one.

    The second set is cut into tiles, of which two ranks evaluate unequal numbers.
    """
    tiles = tmp_path / "tiles"
    data = compose(RunConfig, "config", ["data=sample"]).data
    tiling = Tiling.of([128, 128], 0, 0.0)
    write_shards(data, tiny_root, tiles, seed=0, samples_per_shard=64, workers=1, tiling=tiling)
    held = ShardSet.open(tiles).split("val")
    assert len(set(np.bincount(held.tiled.owners(2)).tolist())) == 2
    options = ["data=folder", "data.shards=", "mixture.sets.one.classes.background=[paper, glass]", *calm]
    options += [f"mixture.sets.one.shards={tiny_shards}", f"mixture.sets.two.shards={tiles}"]
    options += ["mixture.sets.one.weight=2", "mixture.sets.two.classes.background=[glass]"]
    options += ["global_batch=6", f"steps={HALF}", "telemetry.ledger=true"]
    train_many(1, [small("whole", *options, "eval_every=1")])
    places = ((2, 3, 2), (3, 1, 5), (1, 0, 7), (2, 2, None))  # ranks, ZeRO stage, where it stops
    for ranks, stage, stop in places:
        extra = [f"engine.zero_stage={stage}"] + ([f"stop_at={stop}"] if stop else [])
        train_many(ranks, [small("moved", *options, *extra)])
    state = load_checkpoint(tmp_path / "moved" / "checkpoints").state
    order = MixedOrder.from_dict(state.order_spec["sets"], 6 * HALF)
    assert {name: entry["position"] for name, entry in state.order_spec["sets"].items()} == {
        "one": 32,
        "two": 16,
    }
    for run in ("whole", "moved"):
        seen = {}
        for path in (tmp_path / run / "ledger").iterdir():
            for line in map(json.loads, path.read_text().splitlines()):
                seen.setdefault(line["step"], []).extend(line["ids"])
        assert [sorted(seen[step]) for step in range(1, HALF + 1)] == [
            sorted(order.ids(6 * step, 6).tolist()) for step in range(HALF)
        ]
        of_one = [sample for step in sorted(seen) for sample in seen[step] if sample < 16]
        assert Counter(of_one) == dict.fromkeys(range(16), 2), "two epochs"
    scores = [
        {line["step"]: line["iou"] for kind in ("eval", "final") for line in metrics(tmp_path / run, kind)}
        for run in ("whole", "moved")
    ]
    assert scores[1].keys() == {2, 5, 7, 8}
    for step, found in scores[1].items():
        assert found == pytest.approx(scores[0][step], abs=1e-3)
    losses = [torch.tensor([line["loss"] for line in metrics(tmp_path / run)]) for run in ("whole", "moved")]
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    again = small("moved", *options, "mixture.sets.two.weight=2")
    assert "mixture.sets.two.weight: None -> 2.0" in train_many(1, [again], failing=True)[0][0]
