"""Real DeepSpeed on gloo ranks: a stopped run continues bit for bit, damaged data ends or is replaced."""

import shutil
import signal

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
    """Copy shards and flip one bit in the middle of some of the tars."""
    shutil.copytree(shards, copy)
    for name in names:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)


def test_optimizer_state_survives_any_stage_and_odd_sizes(tmp_path, run_ranks):
    run_ranks(2, "tests/distributed/partition_ranks.py")


@pytest.mark.slow
def test_without_sync_batchnorm_ranks_normalize_as_accumulated_micro_batches_do(
    tiny, tmp_path, train_many, metrics, calm
):
    def run(name, *more):
        return tiny(name, "engine.sync_batchnorm=false", "engine.zero_stage=0", *calm, *more)

    train_many(1, [run("whole"), run("accumulated", "micro_batch=2")])
    train_many(2, [run("two")])
    whole, accumulated, two = (losses(metrics, tmp_path / name) for name in ("whole", "accumulated", "two"))
    assert (accumulated - two).abs().max() < 1e-4
    assert (accumulated - whole).abs().max() > 1e-4, "other statistics"


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 2), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_a_stopped_run_continues_bit_for_bit(
    tiny, tmp_path, start_ranks, wait_for_steps, train_many, metrics, ranks, stage
):
    options = ["model.drop_path_rate=0.1", "model.dropout=0.1", "loader.workers=1"]
    options += [f"engine.zero_stage={stage}"]
    processes = start_ranks(ranks, "launch/train.py", *tiny("stopped", *options))
    wait_for_steps(tmp_path / "stopped", 10, processes[0])
    processes[0].send_signal(signal.SIGTERM)  # the first rank alone
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * ranks, "\n".join(outputs)
    assert "Preempted: stopped at step" in outputs[0]
    assert all("Preempted" not in output for output in outputs[1:])
    stopped_at = len(metrics(tmp_path / "stopped"))
    assert 10 <= stopped_at < STEPS
    train_many(ranks, [tiny("stopped", *options), tiny("whole", *options)])
    assert f"continuing from step {stopped_at}" in (tmp_path / "stopped" / "log.txt").read_text()
    assert torch.equal(losses(metrics, tmp_path / "stopped"), losses(metrics, tmp_path / "whole"))
    assert_identical(saved_state(tmp_path / "stopped"), saved_state(tmp_path / "whole"))


@pytest.fixture(scope="module")
def damaged(tiny_in, tiny_shards, tmp_path_factory, train_many):
    """(folder, outcomes by name) of runs on two ranks over shards with a flipped bit in some of the tars."""
    folder = tmp_path_factory.mktemp("damaged")
    tiny = tiny_in(folder)
    hurt = {"one": ["train-000002.tar"], "val": ["val-000000.tar"]}
    hurt["two"] = ["train-000000.tar", "train-000001.tar"]
    for name, tars in hurt.items():
        damage(tiny_shards, folder / name, *tars)
    runs = {
        "hit": tiny("hit", f"data.shards={folder / 'one'}", "engine.zero_stage=1"),
        "replaced": tiny("replaced", f"data.shards={folder / 'one'}", "loader.max_corrupt=0.1"),
        "eval": tiny("eval", f"data.shards={folder / 'val'}", "eval_every=5"),
        "many": tiny("many", f"data.shards={folder / 'two'}", "loader.max_corrupt=0.1", "loader.workers=2"),
    }
    outcomes = train_many(2, [*runs.values(), runs["many"]], failing=True)
    return folder, dict(zip([*runs, "repeated"], outcomes, strict=True))


def only_error(outcomes):
    """The error of the one rank that has one; the others end with it."""
    (error,) = [outcome for outcome in outcomes if outcome != "SystemExit: 2"]
    assert error.startswith("DataError: ")
    return error


@pytest.mark.faults
def test_a_damaged_sample_ends_a_run_and_the_steps_before_it_are_kept(damaged):
    folder, outcomes = damaged
    assert "train-000002.tar" in only_error(outcomes["hit"])
    steps = len((folder / "hit" / "metrics.jsonl").read_text().splitlines())
    assert list_steps(folder / "hit" / "checkpoints") == ([steps] if steps else [])
    assert steps < 16 / 4, "every sample is read in the first epoch"


@pytest.mark.faults
def test_a_corrupt_sample_within_the_budget_is_replaced_named_once_and_kept_in_the_state(damaged, metrics):
    """20 steps of 4 are five epochs of 16: both ranks meet the sample, several times, and count it once."""
    run = damaged[0] / "replaced"
    assert (run / "log.txt").read_text().count("replaced by its neighbor: shard ") == 1
    (line,) = metrics(run, "replaced")
    assert "train-000002.tar" in line["reason"]
    assert load_checkpoint(run / "checkpoints", step=STEPS).state.corrupt == [line["sample_id"]]
    assert len(metrics(run)) == STEPS


@pytest.mark.faults
def test_a_damaged_validation_image_costs_no_training(damaged):
    folder, outcomes = damaged
    assert "val-000000.tar" in only_error(outcomes["eval"])
    assert list_steps(folder / "eval" / "checkpoints") == [5]


@pytest.mark.faults
def test_a_run_with_too_many_corrupt_samples_does_not_go_on_when_it_is_repeated(damaged):
    for name in ("many", "repeated"):
        error = only_error(damaged[1][name])
        assert error.startswith("DataError: 2 corrupt samples, and loader.max_corrupt allows 1")
