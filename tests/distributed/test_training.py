"""Real DeepSpeed on gloo ranks: stages and world sizes agree, a stopped run continues bit for bit."""

import json
import shutil
import signal
import time

import pytest
import torch
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import list_steps, load_checkpoint

STEPS = 20


def losses(metrics, run_dir):
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([line["loss"] for line in lines])


def damage(shards, copy, *names):
    """Copy shards and flip one bit in the middle of some of the tars; returns their paths."""
    shutil.copytree(shards, copy)
    for name in names:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    return [copy / name for name in names]


@pytest.mark.slow
def test_stages_and_worlds_follow_one_loss_curve(tiny, tmp_path, run_ranks, metrics):
    # The official lr: AdamW divides rounding by rounding where a gradient is nearly 0, and at the
    # sample's lr of 1e-3 that alone (1 thread against 2) moves the loss by more than 1e-4 in 20 steps.
    def run(name, *more):
        return tiny(name, "optim.lr=6e-5", "optim.head_lr_factor=10", "optim.warmup_steps=0", *more)

    two = [run(f"two-{stage}", f"engine.zero_stage={stage}") for stage in range(4)]
    # A rank that accumulates normalises each micro batch by itself, as two unsynchronised ranks do.
    accumulated = run("accumulated", "engine.zero_stage=0", "micro_batch=2", "engine.sync_batchnorm=false")
    unsynchronised = run("unsynchronised", "engine.zero_stage=1", "engine.sync_batchnorm=false")
    for ranks, runs in ((1, [run("one", "engine.zero_stage=0"), accumulated]), (2, [*two, unsynchronised])):
        plan = tmp_path / f"plan-{ranks}.json"
        plan.write_text(json.dumps(runs))
        run_ranks(ranks, "tests/distributed/train_many.py", str(plan))
    reference = losses(metrics, tmp_path / "one")
    assert reference[-5:].mean() < reference[:5].mean()
    pixels = sum(map(sum, metrics(tmp_path / "one", "final")[0]["confusion"]))
    for stage in range(4):
        curve = losses(metrics, tmp_path / f"two-{stage}")
        assert (curve - reference).abs().max() < 1e-4, f"ZeRO-{stage}"
        confusion = metrics(tmp_path / f"two-{stage}", "final")[0]["confusion"]
        assert sum(map(sum, confusion)) == pixels, "3 images on 2 ranks: each pixel once"
    curves = [losses(metrics, tmp_path / name) for name in ("accumulated", "unsynchronised")]
    assert (curves[0] - curves[1]).abs().max() < 1e-4
    assert (curves[0] - reference).abs().max() > 1e-4, "without it, batch norm does see other statistics"


def test_optimiser_state_survives_any_stage_and_odd_sizes(tmp_path, run_ranks):
    run_ranks(2, "tests/distributed/partition_ranks.py")


def stop_at(processes, run_dir, step):
    """SIGTERM to the first rank alone once `step` steps are logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            processes[0].send_signal(signal.SIGTERM)
            return
        time.sleep(0.01)
    pytest.fail("the run did not reach the step: " + processes[0].communicate()[0])


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_stopped_run_continues_bit_for_bit(tiny, tmp_path, start_ranks, run_ranks, metrics, ranks, stage):
    options = [
        "model.drop_path_rate=0.1",
        "model.dropout=0.1",
        f"engine.zero_stage={stage}",
        "loader.workers=1",
    ]
    run_ranks(ranks, "launch/train.py", *tiny("whole", *options))
    processes = start_ranks(ranks, "launch/train.py", *tiny("stopped", *options))
    stop_at(processes, tmp_path / "stopped", 10)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * ranks, "\n".join(outputs)
    assert "Preempted: stopped at step" in outputs[0]
    assert all("Preempted" not in output for output in outputs[1:])
    stopped_at = len(metrics(tmp_path / "stopped"))
    assert 10 <= stopped_at < STEPS
    outputs = run_ranks(ranks, "launch/train.py", *tiny("stopped", *options))
    assert f"continuing from step {stopped_at}" in outputs[0]
    assert torch.equal(losses(metrics, tmp_path / "stopped"), losses(metrics, tmp_path / "whole"))
    assert_identical(saved_state(tmp_path / "stopped"), saved_state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_checkpoint_resumes_on_other_worlds_and_stages(tiny, tmp_path, run_ranks, metrics):
    """10 steps on 2 ranks at ZeRO-3; then each of the others continues and follows the uninterrupted run."""
    plan = tmp_path / "plan.json"
    # `steps` is frozen, so the first half is a run that is cut off by removing its last checkpoint.
    start = tiny("start", "engine.zero_stage=3", "checkpoint.save_every=10")
    plan.write_text(json.dumps([start]))
    run_ranks(2, "tests/distributed/train_many.py", str(plan))
    whole = losses(metrics, tmp_path / "start")
    for ranks, stage in ((1, 1), (1, 2), (2, 0)):
        name = f"on-{ranks}-{stage}"
        shutil.copytree(tmp_path / "start", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}")
        (tmp_path / name / "metrics.jsonl").unlink()
        plan.write_text(json.dumps([tiny(name, f"engine.zero_stage={stage}")]))
        run_ranks(ranks, "tests/distributed/train_many.py", str(plan))
        continued = torch.tensor([line["loss"] for line in metrics(tmp_path / name)])
        assert len(continued) == STEPS - 10
        assert (continued - whole[10:]).abs().max() < 1e-4, f"{ranks} ranks, ZeRO-{stage}"


@pytest.mark.faults
def test_a_damaged_sample_is_one_line_of_one_rank_and_the_steps_before_it_are_kept(
    tiny, tiny_shards, tmp_path, run_ranks
):
    (tar,) = damage(tiny_shards, tmp_path / "damaged", "train-000002.tar")
    overrides = tiny("hit", f"data.shards={tmp_path / 'damaged'}", "engine.zero_stage=1")
    printed = "".join(run_ranks(2, "launch/train.py", *overrides, code=2))
    assert printed.count("DataError: ") == 1
    assert tar.name in printed
    assert "Traceback" not in printed
    steps = len((tmp_path / "hit" / "metrics.jsonl").read_text().splitlines())
    assert list_steps(tmp_path / "hit" / "checkpoints") == ([steps] if steps else [])
    assert steps < 16 / 4, "every sample is read in the first epoch"


@pytest.mark.faults
def test_a_corrupt_sample_within_the_budget_is_replaced_named_once_and_kept_in_the_state(
    tiny, tiny_shards, tmp_path, run_ranks, metrics
):
    """20 steps of 4 are five epochs of 16: both ranks meet the sample, several times, and count it once."""
    (tar,) = damage(tiny_shards, tmp_path / "damaged", "train-000002.tar")
    options = (f"data.shards={tmp_path / 'damaged'}", "loader.max_corrupt=0.1")
    outputs = run_ranks(2, "launch/train.py", *tiny("replaced", *options))
    assert outputs[0].count("replaced by its neighbour: shard ") == 1
    (line,) = metrics(tmp_path / "replaced", "replaced")
    assert tar.name in line["reason"]
    found = load_checkpoint(tmp_path / "replaced" / "checkpoints", step=STEPS).state
    assert found.corrupt == [line["sample_id"]]
    assert len(metrics(tmp_path / "replaced")) == STEPS


@pytest.mark.faults
def test_a_damaged_validation_image_costs_no_training_and_is_one_line(tiny, tiny_shards, tmp_path, run_ranks):
    (tar,) = damage(tiny_shards, tmp_path / "damaged", "val-000000.tar")
    overrides = tiny("hit", f"data.shards={tmp_path / 'damaged'}", "eval_every=5")
    printed = "".join(run_ranks(2, "launch/train.py", *overrides, code=2))
    assert printed.count("DataError: ") == 1
    assert tar.name in printed
    assert "Traceback" not in printed
    assert list_steps(tmp_path / "hit" / "checkpoints") == [5]


@pytest.mark.faults
def test_a_run_with_too_many_corrupt_samples_does_not_go_on_when_it_is_repeated(
    tiny, tiny_shards, tmp_path, run_ranks
):
    damage(tiny_shards, tmp_path / "damaged", "train-000000.tar", "train-000001.tar")
    overrides = tiny(
        "many", f"data.shards={tmp_path / 'damaged'}", "loader.max_corrupt=0.1", "loader.workers=2"
    )
    for _ in range(2):
        printed = "".join(run_ranks(2, "launch/train.py", *overrides, code=2))
        assert printed.count("DataError: 2 corrupt samples, and loader.max_corrupt allows 1") == 1
        assert "Traceback" not in printed
