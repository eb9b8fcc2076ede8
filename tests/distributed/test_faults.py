"""Steps that are not finite, ranks that hang or die, memory that is not there: in real runs on gloo ranks."""

import json
import resource
import shutil
import signal
import time

import pytest
import torch
from comparing import assert_identical, saved_state
from plain_training import train_plainly

from segformer.checkpoint.reader import list_steps, load_checkpoint

STEPS = 20


def write_plan(tmp_path, **plan):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"kind": "loss", "rank": 1, **plan}))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "kind", "clip"),
    [
        (0, "loss", 1),
        pytest.param(1, "gradient", 0, marks=pytest.mark.slow),
        pytest.param(2, "loss", 1, marks=pytest.mark.slow),
        (3, "gradient", 0),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(
    tiny, calm, tmp_path, run_ranks, metrics, stage, kind, clip
):
    plan = write_plan(tmp_path, steps=[5, 9], kind=kind)
    overrides = tiny("faulty", f"engine.zero_stage={stage}", f"engine.grad_clip={clip}", *calm)
    output = run_ranks(2, "tests/distributed/faulty_training.py", plan, *overrides)[0]
    what = "the loss of rank 1" if kind == "loss" else "the gradient"
    assert f"step 5: {what} is not finite; step skipped (1 so far)" in output
    loaded = load_checkpoint(tmp_path / "faulty" / "checkpoints")
    assert (loaded.state.skipped, loaded.state.skipped_in_a_row, loaded.state.bad_step) == (2, 0, 0)
    lines = metrics(tmp_path / "faulty", "skipped")
    assert [line["step"] for line in lines] == [5, 9]
    assert all(len(line["samples"]) == (2 if kind == "loss" else 4) for line in lines)
    _, reference, _ = train_plainly(overrides, skip={4, 8})
    for name, value in reference.items():
        if "running" in name or "num_batches" in name:
            assert torch.allclose(loaded.model[name].float(), value.float(), rtol=0, atol=1e-2), name
        else:
            assert (loaded.model[name] - value).abs().max() < 1e-5, name


def test_a_run_that_was_stopped_after_a_skipped_step_continues_bit_for_bit(
    tiny, tmp_path, run_ranks, metrics
):
    def run(name, *more):
        plan = write_plan(tmp_path, steps=[3], rank=0, once=False)
        run_ranks(1, "tests/distributed/faulty_training.py", plan, *tiny(name, "optim.ema=0.9", *more))

    run("whole", "checkpoint.save_every=10")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / f"step-{STEPS:08d}")
    run("half", "checkpoint.save_every=10")
    assert_identical(saved_state(tmp_path / "half"), saved_state(tmp_path / "whole"))
    averages = [load_checkpoint(tmp_path / name / "checkpoints").ema for name in ("half", "whole")]
    assert_identical(*averages)


@pytest.mark.slow
def test_the_first_step_may_be_skipped_and_accumulated_ones_too(tiny, tmp_path, run_ranks, metrics):
    """Moments that do not exist yet are saved as zeros; a bad micro batch takes its whole step with it."""
    plan = write_plan(tmp_path, steps=[1, 4], accumulation=2)
    options = ("micro_batch=1", "checkpoint.save_every=2", "steps=6", "checkpoint.keep_last=9")
    for stage in (0, 1, 2, 3):
        overrides = tiny(f"stage-{stage}", f"engine.zero_stage={stage}", "engine.grad_clip=1", *options)
        run_ranks(2, "tests/distributed/faulty_training.py", plan, *overrides)
        assert [line["step"] for line in metrics(tmp_path / f"stage-{stage}", "skipped")] == [1, 4]
        folder = tmp_path / f"stage-{stage}" / "checkpoints"
        assert list_steps(folder) == [2, 6], "none in a row of skipped steps"
        losses = torch.tensor([line["loss"] for line in metrics(tmp_path / f"stage-{stage}")])
        reference = torch.tensor([line["loss"] for line in metrics(tmp_path / "stage-0")])
        assert (losses - reference).abs().max() < 1e-4, f"ZeRO-{stage}"


@pytest.mark.slow
def test_a_stop_before_any_step_was_taken_saves_a_state_that_continues(tiny, tmp_path, run_ranks):
    plan = write_plan(tmp_path, steps=[1, 2], rank=0)
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal, segformer.training.loop as train\n"
        "step = train.train_step\n"
        "def stop_after(run, *arguments):\n"
        "    if run.state.step == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(run, *arguments)\n"
        "train.train_step = stop_after\n"
        "import runpy, sys\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path('tests/distributed/faulty_training.py', run_name='__main__')\n"
    )
    overrides = tiny("stopped", "engine.zero_stage=1")
    arguments = ["tests/distributed/faulty_training.py", plan, *overrides]
    run_ranks(1, str(script), *arguments, code=75)
    loaded = load_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert (loaded.state.step, loaded.state.skipped, loaded.state.skipped_in_a_row) == (2, 2, 2)
    assert not any(value.any() for value in loaded.optimizer.values())
    run_ranks(1, "launch/train.py", *overrides)
    assert load_checkpoint(tmp_path / "stopped" / "checkpoints").state.skipped_in_a_row == 0


@pytest.mark.slow
def test_three_in_a_row_go_back_once_and_end_as_if_nothing_had_been(tiny, tmp_path, run_ranks, metrics):
    options = ("engine.zero_stage=2", "checkpoint.save_every=5", "loader.workers=1", "optim.ema=0.9")
    run_ranks(2, "launch/train.py", *tiny("whole", *options))
    plan = write_plan(tmp_path, steps=[7, 8, 9])
    output = run_ranks(2, "tests/distributed/faulty_training.py", plan, *tiny("faulty", *options))[0]
    assert "3 steps in a row were skipped: back to step 5, once" in output
    assert [line["step"] for line in metrics(tmp_path / "faulty", "rollback")] == [5]
    assert load_checkpoint(tmp_path / "faulty" / "checkpoints").state.skipped == 0, "none in what was kept"
    assert_identical(saved_state(tmp_path / "faulty"), saved_state(tmp_path / "whole"))


def test_a_cause_that_stays_ends_the_run_with_the_samples(tiny, tmp_path, run_ranks):
    plan = write_plan(tmp_path, steps=[7, 8, 9], once=False)
    overrides = tiny("faulty", "checkpoint.save_every=5")
    outputs = run_ranks(2, "tests/distributed/faulty_training.py", plan, *overrides, code=2)
    assert outputs[0].count("Diverged: going back to a checkpoint did not help: ") == 1
    assert "in steps 7, 8, 9; samples: " in outputs[0]
    assert "train-00000" in outputs[0].split("Diverged: ")[1]
    assert "Traceback" not in "".join(outputs)
    assert "Diverged" not in outputs[1]
    assert list_steps(tmp_path / "faulty" / "checkpoints") == [5]
    early = write_plan(tmp_path, steps=[1, 2, 3], once=False)
    outputs = run_ranks(2, "tests/distributed/faulty_training.py", early, *tiny("early"), code=2)
    assert "Diverged: there is no checkpoint yet to go back to: " in outputs[0]


def wait_for_steps(run_dir, count, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    pytest.fail("the run did not reach the step: " + process.communicate()[0])


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_others_in_one_line(tiny, tmp_path, start_ranks, run_ranks, sent):
    overrides = tiny("lost", "engine.timeout_s=6", "steps=400", "checkpoint.save_every=5")
    processes = start_ranks(2, "launch/train.py", *overrides)
    try:
        wait_for_steps(tmp_path / "lost", 12, processes[0])
        processes[1].send_signal(sent)
        output = processes[0].communicate(timeout=60)[0]
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 76, output
    assert output.count("RankLost: another rank has ended or hangs (") == 1
    assert "Traceback" not in output
    stacks = tmp_path / "lost" / "stacks" / "rank-00000.txt"
    if sent == signal.SIGSTOP:
        assert str(stacks) in output
        assert "train.py" in stacks.read_text()
    assert list_steps(tmp_path / "lost" / "checkpoints")[-1] % 5 == 0, "what was committed is there"


@pytest.mark.faults
def test_a_micro_batch_that_does_not_fit_is_one_line_that_says_what_to_lower(tiny, tmp_path, run_ranks):
    plan = tmp_path / "limited.py"
    plan.write_text(
        "import resource, runpy, sys, torch, segformer.training.loop as train\n"
        "step = train.train_step\n"
        "def limited(*arguments):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)\n"
        "    return step(*arguments)\n"
        "train.train_step = limited\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path('launch/train.py', run_name='__main__')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    overrides = tiny("large", "augment.crop=[1024,1024]", "global_batch=16")
    output = run_ranks(1, str(plan), "launch/train.py", *overrides, code=2)[0]
    assert "ConfigError: rank 0 is out of memory in step 1 (micro_batch=16, crop 1024x1024); use" in output
    assert "micro_batch=8" in output
    assert "Traceback" not in output
