"""Steps that are not finite, ranks that hang or die, memory that is not there: in real runs on gloo ranks."""

import resource
import signal

import pytest
import torch
from comparing import assert_identical, saved_state
from plain_training import train_plainly

from segformer.checkpoint.reader import list_steps, load_checkpoint

SKIPPING = {
    "loss": ("engine.zero_stage=0", "engine.grad_clip=1"),
    "gradient": ("engine.zero_stage=3", "engine.grad_clip=0"),
}


@pytest.fixture(scope="module")
def faulty(tiny_in, calm, tmp_path_factory, train_many):
    """(folder, outcome by name) of runs on two ranks whose losses go wrong."""
    folder = tmp_path_factory.mktemp("faulty")
    tiny, once = tiny_in(folder), {"steps": [3], "rank": 0, "once": False}
    options = ("optim.ema=0.9", "checkpoint.save_every=10")
    plan = [
        {"run": tiny(kind, *chosen, *calm), "wrong": {"steps": [5, 9], "kind": kind}}
        for kind, chosen in SKIPPING.items()
    ]
    plan += [
        {"run": tiny("whole", *options), "wrong": once},
        {"cut": str(folder / "whole"), "to": str(folder / "half"), "step": 10},
        {"run": tiny("half", *options), "wrong": once},
        {"run": tiny("stays", "checkpoint.save_every=5"), "wrong": {"steps": [7, 8, 9], "once": False}},
    ]
    names = [*SKIPPING, "whole", "half", "stays"]
    return folder, dict(zip(names, train_many(2, plan, failing=True), strict=True))


@pytest.mark.parametrize("kind", SKIPPING)
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(faulty, tiny, calm, metrics, kind):
    run = faulty[0] / kind
    what = "the loss of rank 1" if kind == "loss" else "the gradient"
    assert f"step 5: {what} is not finite; step skipped (1 so far)" in (run / "log.txt").read_text()
    loaded = load_checkpoint(run / "checkpoints")
    assert (loaded.state.skipped, loaded.state.skipped_in_a_row, loaded.state.bad_step) == (2, 0, 0)
    lines = metrics(run, "skipped")
    assert [line["step"] for line in lines] == [5, 9]
    assert all(len(line["samples"]) == (2 if kind == "loss" else 4) for line in lines)
    _, reference, _ = train_plainly(tiny("plain", *SKIPPING[kind], *calm), skip={4, 8})
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


@pytest.mark.slow
def test_the_first_step_may_be_skipped_and_accumulated_ones_too(tiny, tmp_path, train_many, metrics):
    """Moments that do not exist yet are saved as zeros; a bad micro batch takes its whole step with it."""
    wrong = {"steps": [1, 4], "accumulation": 2}
    options = ("micro_batch=1", "checkpoint.save_every=2", "steps=6", "checkpoint.keep_last=9")
    runs = [tiny(f"stage-{n}", f"engine.zero_stage={n}", "engine.grad_clip=1", *options) for n in range(4)]
    train_many(2, [{"run": run, "wrong": wrong} for run in runs])
    for stage in range(4):
        run = tmp_path / f"stage-{stage}"
        assert [line["step"] for line in metrics(run, "skipped")] == [1, 4]
        assert list_steps(run / "checkpoints") == [2, 6], "none in a row of skipped steps"
        losses = torch.tensor([line["loss"] for line in metrics(run)])
        reference = torch.tensor([line["loss"] for line in metrics(tmp_path / "stage-0")])
        assert (losses - reference).abs().max() < 1e-4, f"ZeRO-{stage}"


@pytest.mark.slow
def test_a_stop_before_any_step_was_taken_saves_a_state_that_continues(tiny, tmp_path, train_many):
    run, folder = tiny("stopped", "engine.zero_stage=1"), tmp_path / "stopped" / "checkpoints"
    (stopped,) = train_many(1, [{"run": run, "wrong": {"steps": [1, 2], "rank": 0}, "stop": 2}], failing=True)
    assert stopped[0].startswith("Preempted: stopped at step 2")
    loaded = load_checkpoint(folder)
    assert (loaded.state.step, loaded.state.skipped, loaded.state.skipped_in_a_row) == (2, 2, 2)
    assert not any(value.any() for value in loaded.optimizer.values())
    train_many(1, [run])
    assert load_checkpoint(folder).state.skipped_in_a_row == 0


@pytest.mark.slow
def test_three_in_a_row_go_back_once_and_end_as_if_nothing_had_been(tiny, tmp_path, train_many, metrics):
    options = ("engine.zero_stage=2", "checkpoint.save_every=5", "loader.workers=1", "optim.ema=0.9")
    wrong = {"steps": [7, 8, 9]}
    train_many(2, [tiny("whole", *options), {"run": tiny("faulty", *options), "wrong": wrong}])
    assert "3 steps in a row were skipped: back to step 5, once" in (tmp_path / "faulty/log.txt").read_text()
    assert [line["step"] for line in metrics(tmp_path / "faulty", "rollback")] == [5]
    assert load_checkpoint(tmp_path / "faulty" / "checkpoints").state.skipped == 0, "none in what was kept"
    assert_identical(saved_state(tmp_path / "faulty"), saved_state(tmp_path / "whole"))


@pytest.mark.faults
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_others_in_one_line(
    tiny, tmp_path, start_ranks, wait_for_steps, sent
):
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
        assert "loop.py" in stacks.read_text()
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
