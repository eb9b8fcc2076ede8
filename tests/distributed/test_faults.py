"""Steps that are not finite, ranks that hang or die, memory that is not there: in real runs on gloo ranks."""

import signal

import pytest
import torch
from comparing import assert_identical, saved_state
from plain_training import train_plainly

from segformer.checkpoint.reader import list_steps, load_checkpoint

STEPS = 10
SKIPPING = {
    "loss": ("engine.zero_stage=0", "engine.grad_clip=1", f"steps={STEPS}"),
    "gradient": ("engine.zero_stage=3", "engine.grad_clip=0", f"steps={STEPS}"),
}


@pytest.fixture(scope="module")
def faulty(small_in, calm, tmp_path_factory, train_many):
    """(folder, outcome by name) of runs on two ranks whose losses go wrong, and of one without memory."""
    folder = tmp_path_factory.mktemp("faulty")
    small, once = small_in(folder), {"steps": [3], "rank": 0, "once": False}
    options = ("optim.ema=0.9", "checkpoint.save_every=5", f"steps={STEPS}")
    plan = [
        {"run": small(kind, *chosen, *calm), "wrong": {"steps": [3, 6], "kind": kind}}
        for kind, chosen in SKIPPING.items()
    ]
    due, calmly = (
        small(name, "eval_every=3", "checkpoint.save_every=3", "steps=7") for name in ("due", "calmly")
    )
    plan += [{"run": due, "stop": [3, 1]}, {"run": due, "stop": [7, 0]}, {"run": due}, {"run": calmly}]
    large = small("large", "augment.crop=[1024,1024]", "global_batch=32", "steps=1")
    plan += [
        {"run": small("whole", *options), "wrong": once},
        {"cut": str(folder / "whole"), "to": str(folder / "half"), "step": 5},
        {"run": small("half", *options), "wrong": once},
        {"run": small("stays", *options), "wrong": {"steps": [7, 8, 9], "once": False}},
        {"run": large, "memory": 200},
    ]
    names = [*SKIPPING, "due", "due again", "due at last", "calmly", "whole", "half", "stays", "large"]
    return folder, dict(zip(names, train_many(2, plan, failing=True), strict=True))


@pytest.mark.parametrize("kind", SKIPPING)
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(faulty, small, calm, metrics, kind):
    run = faulty[0] / kind
    what = "the loss of rank 1" if kind == "loss" else "the gradient"
    assert f"step 3: {what} is not finite; step skipped (1 so far)" in (run / "log.txt").read_text()
    loaded = load_checkpoint(run / "checkpoints")
    assert (loaded.state.skipped, loaded.state.skipped_in_a_row, loaded.state.bad_step) == (2, 0, 0)
    lines = metrics(run, "skipped")
    assert [line["step"] for line in lines] == [3, 6]
    assert all(len(line["samples"]) == (2 if kind == "loss" else 4) for line in lines)
    _, reference, _ = train_plainly(small("plain", *SKIPPING[kind], *calm), skip={2, 5})
    for name, value in reference.items():
        if "running" in name or "num_batches" in name:
            assert torch.allclose(loaded.model[name].float(), value.float(), rtol=0, atol=1e-2), name
        else:
            assert (loaded.model[name] - value).abs().max() < 1e-5, name


def test_a_run_that_goes_on_after_a_skipped_step_continues_bit_for_bit(faulty):
    folder, outcomes = faulty
    assert not any(outcomes["whole"] + outcomes["half"])
    assert_identical(saved_state(folder / "half"), saved_state(folder / "whole"))


def test_a_cause_that_stays_ends_the_run_with_the_samples(faulty):
    folder, outcomes = faulty
    message, other = outcomes["stays"]
    assert message.startswith("Diverged: going back to a checkpoint did not help: ")
    assert "in steps 7, 8, 9; samples: " in message
    assert "train-00000" in message
    assert other == "SystemExit: 2"
    assert list_steps(folder / "stays" / "checkpoints") == [5]


def test_an_evaluation_that_a_stop_has_left_out_is_made_when_the_run_goes_on(faulty, metrics):
    """Stopped in the evaluation of step 3, and in the last one."""
    folder, outcomes = faulty
    assert outcomes["due"][0].startswith("Preempted: stopped at step 3 by SIGTERM")
    assert outcomes["due again"][0].startswith("Preempted: stopped at step 7 by SIGTERM")
    assert not any(outcomes["due at last"] + outcomes["calmly"])
    for kind in ("eval", "final"):
        assert metrics(folder / "due", kind) == metrics(folder / "calmly", kind), kind
    assert [line["step"] for line in metrics(folder / "due", "eval")] == [3, 6]
    left, right = (load_checkpoint(folder / name / "checkpoints") for name in ("due", "calmly"))
    assert left.state == right.state
    assert list_steps(folder / "calmly" / "checkpoints") == [3, 6, 7]


@pytest.mark.faults
def test_a_micro_batch_that_does_not_fit_says_what_to_lower(faulty):
    where = "rank 0 is out of memory in step 1 (micro_batch=16, crop 1024x1024)"
    assert faulty[1]["large"][0].startswith(f"ConfigError: {where}; use micro_batch=8")


@pytest.fixture(scope="module")
def more(small_in, tmp_path_factory, train_many):
    """(folder, outcomes) of further runs on two ranks whose losses go wrong."""
    folder = tmp_path_factory.mktemp("more")
    small, plan = small_in(folder), []
    options = ("micro_batch=1", "checkpoint.save_every=2", "steps=6", "checkpoint.keep_last=9")
    for stage in range(4):
        run = small(f"stage-{stage}", f"engine.zero_stage={stage}", "engine.grad_clip=1", *options)
        plan += [{"run": run, "wrong": {"steps": [1, 4], "accumulation": 2}}]
    stopped = small("stopped", "engine.zero_stage=1", "steps=4")
    plan += [{"run": stopped, "wrong": {"steps": [1, 2], "rank": 0}, "stop": [1, 0]}, {"run": stopped}]
    options = ("engine.zero_stage=2", "checkpoint.save_every=5", "loader.workers=1", "optim.ema=0.9")
    whole, back = (small(name, f"steps={STEPS}", *options) for name in ("whole", "back"))
    plan += [{"run": whole}, {"run": back, "wrong": {"steps": [7, 8, 9]}}]
    return folder, train_many(2, plan, failing=True)


@pytest.mark.slow
def test_the_first_step_may_be_skipped_and_accumulated_ones_too(more, metrics):
    """Moments that do not exist yet are saved as zeros; a bad micro batch takes its whole step with it."""
    reference = torch.tensor([line["loss"] for line in metrics(more[0] / "stage-0")])
    for stage in range(4):
        run = more[0] / f"stage-{stage}"
        assert [line["step"] for line in metrics(run, "skipped")] == [1, 4]
        assert list_steps(run / "checkpoints") == [2, 6], "none in a row of skipped steps"
        losses = torch.tensor([line["loss"] for line in metrics(run)])
        assert (losses - reference).abs().max() < 1e-4, f"ZeRO-{stage}"


@pytest.mark.slow
def test_a_stop_before_any_step_was_taken_saves_a_state_that_continues(more):
    folder, outcomes = more[0] / "stopped/checkpoints", more[1][4:6]
    assert outcomes[0][0].startswith("Preempted: stopped at step 2")
    assert not any(outcomes[1])
    loaded = load_checkpoint(folder, step=2)
    assert (loaded.state.skipped, loaded.state.skipped_in_a_row) == (2, 2)
    assert not any(value.any() for value in loaded.optimizer.values())
    assert load_checkpoint(folder, step=4).state.skipped_in_a_row == 0


@pytest.mark.slow
def test_three_in_a_row_go_back_once_and_end_as_if_nothing_had_been(more, metrics):
    back = more[0] / "back"
    assert "3 steps in a row were skipped: back to step 5, once" in (back / "log.txt").read_text()
    assert [line["step"] for line in metrics(back, "rollback")] == [5]
    assert load_checkpoint(back / "checkpoints").state.skipped == 0, "none in what was kept"
    assert_identical(saved_state(back), saved_state(more[0] / "whole"))


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_or_dies_ends_the_others_in_one_line(
    small, tmp_path, start_ranks, wait_for_steps, sent
):
    overrides = small("lost", "engine.timeout_s=5", "steps=4000", "checkpoint.save_every=5")
    processes = start_ranks(2, "tests/nano.py", "launch/train.py", *overrides)
    try:
        wait_for_steps(tmp_path / "lost", 6, processes[0])
        processes[1].send_signal(sent)
        output = processes[0].communicate(timeout=60)[0]
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode == 76, output
    assert output.count("RankLost: another rank has ended or hangs (") == 1
    assert "Traceback" not in output
    assert "RankLost: another rank" in (tmp_path / "lost/log.txt").read_text().splitlines()[-1]
    stacks = tmp_path / "lost" / "stacks" / "rank-00000.txt"
    if sent == signal.SIGSTOP:
        assert str(stacks) in output
        assert "loop.py" in stacks.read_text()
    assert list_steps(tmp_path / "lost" / "checkpoints")[-1] % 5 == 0, "what was committed is there"
