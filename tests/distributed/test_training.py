"""Real DeepSpeed on gloo ranks: a stopped run continues bit for bit, damaged data ends or is replaced."""

import shutil
import signal
import time

import cv2
import numpy as np
import pytest
import torch
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.telemetry.jsonl import read_metrics

STEPS = 10


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


def test_a_stopped_run_continues_bit_for_bit(
    small, tmp_path, start_ranks, wait_for_steps, train_many, metrics
):
    options = ("model.drop_path_rate=0.1", "model.dropout=0.1", "engine.zero_stage=2", f"steps={STEPS}")
    given = small("stopped", *options, "loader.workers=1")
    processes = start_ranks(2, "tests/nano.py", "launch/train.py", *given)
    wait_for_steps(tmp_path / "stopped", 3, processes[0])
    processes[0].send_signal(signal.SIGHUP)  # a closed terminal; the first rank alone
    while processes[0].poll() is None:  # further signals don't change how they end
        for process in processes:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * 2, "\n".join(outputs)
    assert "Preempted: stopped at step" in outputs[0]
    assert "Preempted: stopped at step" in (tmp_path / "stopped/log.txt").read_text()
    assert "Preempted" not in outputs[1]
    stopped_at = len(metrics(tmp_path / "stopped"))
    assert 3 <= stopped_at < STEPS
    train_many(2, [small("stopped", *options), small("whole", *options)])
    assert f"continuing from step {stopped_at}" in (tmp_path / "stopped" / "log.txt").read_text()
    assert torch.equal(losses(metrics, tmp_path / "stopped"), losses(metrics, tmp_path / "whole"))
    assert_identical(saved_state(tmp_path / "stopped"), saved_state(tmp_path / "whole"))


@pytest.fixture(scope="module")
def damaged(small_in, tiny_shards, tmp_path_factory, train_many):
    """(folder, outcomes by name) of runs on two ranks over shards with a flipped bit in some of the tars."""
    folder = tmp_path_factory.mktemp("damaged")
    small = small_in(folder)
    hurt = {"one": ["train-000002.tar"], "val": ["val-000000.tar"]}
    hurt["two"] = ["train-000000.tar", "train-000001.tar"]
    for name, tars in hurt.items():
        damage(tiny_shards, folder / name, *tars)
    runs = {
        "hit": small("hit", f"data.shards={folder / 'one'}", "engine.zero_stage=1"),
        "replaced": small("replaced", f"data.shards={folder / 'one'}", "loader.max_corrupt=0.1", "steps=9"),
        "eval": small("eval", f"data.shards={folder / 'val'}", "eval_every=2"),
        "many": small("many", f"data.shards={folder / 'two'}", "loader.max_corrupt=0.1", "loader.workers=1"),
        "repeated": small("many", f"data.shards={folder / 'two'}", "loader.max_corrupt=0.1"),
    }
    same = [small("same", "global_batch=3", "steps=2"), small("same", "steps=2")]
    outcomes = train_many(2, [*runs.values(), *same], failing=True)
    return folder, dict(zip([*runs, "refused", "corrected"], outcomes, strict=True))


def only_error(outcomes):
    """The error of the one rank that has one; the others end with it."""
    (error,) = [outcome for outcome in outcomes if outcome != "SystemExit: 2"]
    assert error.startswith("DataError: ")
    return error


@pytest.mark.faults
def test_a_damaged_sample_ends_a_run_and_the_steps_before_it_are_kept(damaged):
    folder, outcomes = damaged
    assert (error := only_error(outcomes["hit"])).count("train-000002.tar")
    assert (folder / "hit/log.txt").read_text().splitlines()[-1].endswith(error), "whichever rank met it"
    steps = len(list(read_metrics(folder / "hit", "train")))
    assert list_steps(folder / "hit" / "checkpoints") == ([steps] if steps else [])
    assert steps < 16 / 4, "every sample is read in the first epoch"


@pytest.mark.faults
def test_a_corrupt_sample_within_the_budget_is_replaced_named_once_and_kept_in_the_state(damaged, metrics):
    """9 steps of 4 are two epochs of 16: the ranks meet the sample several times and count it once."""
    run = damaged[0] / "replaced"
    assert (run / "log.txt").read_text().count("replaced by its neighbor: shard ") == 1
    (line,) = metrics(run, "replaced")
    assert "train-000002.tar" in line["reason"]
    assert load_checkpoint(run / "checkpoints", step=9).state.corrupt == [line["sample_id"]]
    assert len(metrics(run)) == 9


@pytest.mark.faults
def test_a_damaged_validation_image_costs_no_training(damaged):
    folder, outcomes = damaged
    assert "val-000000.tar" in only_error(outcomes["eval"])
    assert list_steps(folder / "eval" / "checkpoints") == [2]


@pytest.mark.faults
def test_a_run_with_too_many_corrupt_samples_does_not_go_on_when_it_is_repeated(damaged):
    for name in ("many", "repeated"):
        error = only_error(damaged[1][name])
        assert error.startswith("DataError: 2 corrupt samples, and loader.max_corrupt allows 1")


def test_a_refused_start_can_be_corrected_under_the_same_name(damaged):
    folder, outcomes = damaged
    assert "use a world size of 1, 3 or global_batch=2 or 4" in outcomes["refused"][0]
    assert outcomes["refused"][1] == "SystemExit: 2"
    assert not any(outcomes["corrected"])
    assert list_steps(folder / "same" / "checkpoints") == [2]


def write_sizes(folder):
    """Shards of eight training images of one size and of three validation images of each of ten sizes."""
    generator = np.random.default_rng(0)
    sizes = [
        (64, 64),
        (64, 96),
        (96, 64),
        (128, 64),
        (40, 77),
        (20, 64),
        (97, 33),
        (160, 96),
        (32, 224),
        (65, 64),
    ]
    for split, shapes in (("train", [(64, 64)] * 8), ("val", [size for size in sizes for _ in range(3)])):
        for index, size in enumerate(shapes):
            for kind, most in (("images", 256), ("masks", 2)):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, most, size, np.uint8)
                cv2.imwrite(str(folder / kind / split / f"{index:02}.png"), pixels)
    cfg = DatasetConfig(name="sizes", image_suffix=".png", classes=["a", "b"])
    write_shards(cfg, folder, folder / "shards", seed=0, samples_per_shard=40, workers=1)
    return folder / "shards"


@pytest.mark.slow
def test_a_run_compiled_by_inductor_evaluates_batches_of_all_sizes(
    small, calm, tmp_path, train_many, metrics
):
    options = [
        f"data.shards={write_sizes(tmp_path)}",
        "data.name=sizes",
        "data.classes=[a,b]",
        "data.palette=[]",
    ]
    options += ["eval_batch=4", "eval_every=2", "steps=3", *calm]
    names = {
        name: small(name, f"engine.compile={name == 'compiled'}", *options) for name in ("compiled", "eager")
    }
    train_many(2, list(names.values()))
    losses, pixels = {}, {}
    for name in names:
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
        pixels[name] = [np.sum(line["confusion"]) for line in metrics(tmp_path / name, "eval")]
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=1e-4)
    assert len(losses["eager"]) == 3
    assert pixels["compiled"] == pixels["eager"] == [pixels["eager"][0]]
