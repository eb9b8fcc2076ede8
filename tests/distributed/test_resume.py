"""Runs that go on elsewhere: other worlds, other stages, other launchers, after many stops."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.loading.order import OrderSpec, SampleOrder
from segformer.distributed.world import free_port

STEPS = 40


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_at_stage_3_goes_on_anywhere(tiny, calm, tmp_path, train_many, metrics):
    """The same samples in every step, and the losses of 20 steps within 1e-5."""
    options = ("global_batch=6", f"steps={STEPS}", "checkpoint.save_every=20", "optim.ema=0.99", *calm)
    train_many(2, [tiny("start", "engine.zero_stage=3", *options)])
    whole = torch.tensor([line["loss"] for line in metrics(tmp_path / "start")])
    spec = load_checkpoint(tmp_path / "start" / "checkpoints", step=20).state.order_spec
    order = SampleOrder(OrderSpec.from_dict(spec))
    expected = [sorted(order.ids(6 * step, 6).tolist()) for step in range(20, STEPS)]
    for ranks in (1, 3):
        plan = []
        for stage in (1, 2):
            run = tmp_path / f"on-{ranks}-{stage}"
            plan += [{"cut": str(tmp_path / "start"), "to": str(run), "step": 20}]
            plan += [tiny(run.name, f"engine.zero_stage={stage}", "telemetry.ledger=true", *options)]
        train_many(ranks, plan)
        for stage in (1, 2):
            run = tmp_path / f"on-{ranks}-{stage}"
            ledgers = [path.read_text().splitlines() for path in (run / "ledger").iterdir()]
            parts = zip(*([json.loads(line)["ids"] for line in lines] for lines in ledgers), strict=True)
            assert [sorted(itertools.chain(*ids)) for ids in parts] == expected
            continued = torch.tensor([line["loss"] for line in metrics(run)])
            assert (continued - whole[20:]).abs().max() < 1e-5, run.name


@pytest.mark.slow
@pytest.mark.faults
def test_twenty_stops_in_sixty_steps_change_no_bit(
    tiny, tmp_path, start_ranks, run_ranks, wait_for_steps, metrics
):
    options = ("steps=60", "optim.ema=0.99", "model.drop_path_rate=0.1", "engine.zero_stage=2")
    options = (*options, "loader.workers=1")
    run_ranks(2, "launch/train.py", *tiny("whole", *options))
    rng, stops = random.Random(7), sorted(random.Random(5).sample(range(1, 60), 20))
    run_dir = tmp_path / "stopped"
    stopped = 0
    for stop in stops:
        processes = start_ranks(2, "launch/train.py", *tiny("stopped", *options))
        wait_for_steps(run_dir, stop, processes[0], restarts=stopped)
        processes[rng.randrange(2)].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        if [process.returncode for process in processes] == [0, 0]:  # the end was nearer than the signal
            break
        assert [process.returncode for process in processes] == [75, 75], "\n".join(outputs)
        stopped += 1
    assert stopped >= 15
    run_ranks(2, "launch/train.py", *tiny("stopped", *options))
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 61))
    assert_identical(saved_state(run_dir, 60), saved_state(tmp_path / "whole", 60))


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
def test_every_launcher_gives_the_same_weights(tiny, tmp_path, run_ranks, root):
    run_ranks(2, "launch/train.py", *tiny("by-hand", "steps=5"))
    reference = saved_state(tmp_path / "by-hand")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    clean |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for name, commands in (launchers(free_port()) | {"alone": [([sys.executable], {})]}).items():
        overrides = ["launch/train.py", *tiny(name, "steps=5")]
        processes = [
            subprocess.Popen([*command, *overrides], cwd=root, env=clean | more, **output)
            for command, more in commands
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), (name, outputs)
        if name != "alone":
            assert_identical(saved_state(tmp_path / name), reference)
    alone = saved_state(tmp_path / "alone")
    assert list_steps(tmp_path / "alone" / "checkpoints") == [5]
    worst = max(
        float((alone[name] - reference[name]).abs().max()) for name in alone if not name.startswith("exp_avg")
    )
    assert worst < 2e-2, "one rank normalizes the same batch, and rounds differently"
