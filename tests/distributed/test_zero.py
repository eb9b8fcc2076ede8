"""Every ZeRO stage on 1, 2 and 4 ranks ends at the weights of one plain PyTorch process; every optimizer
trains, saves and goes on at every stage."""

import json

import pytest
import torch
from comparing import assert_identical, saved_state
from plain_training import train_plainly

from segformer.checkpoint.reader import load_checkpoint
from segformer.training.optim import OPTIMIZERS

STEPS, HALF = 8, 4
STAGES = range(4)
# As `calm`, and calmer: eps 1e-4 left 2.8e-5 on 4 ranks at ZeRO-3, where rounding had grown.
CALM = ("optim.lr=2e-5", "optim.head_lr_factor=10", "optim.warmup_steps=0", "optim.eps=1e-3")
CALMER = (f"steps={STEPS}", *CALM)
FROZEN = (*CALMER, "optim.frozen_stages=2", "optim.ema=0.5", f"checkpoint.save_every={HALF}")
OPTIMIZER = {
    "adamw": (),
    "sgd": ("optim.lr=0.01", "optim.head_lr_factor=1", "optim.momentum=0.9"),
    "lion": ("optim.betas=[0.9,0.99]",),
}
CASES = [("adamw", 3), ("sgd", 0), ("sgd", 3), ("lion", 3)]
OTHERS = [("adamw", 0), ("lion", 0), ("sgd", 1), ("sgd", 2), ("lion", 1), ("lion", 2)]  # the slow ones


@pytest.fixture(scope="module")
def runs(small_in, tmp_path_factory, train_many):
    """The folder of runs of every stage on two ranks, of frozen ones, of every optimizer, and of those
    that went on from the middle: of a frozen one at another stage, of an optimizer's at its own."""
    folder = tmp_path_factory.mktemp("zero")
    small, plan = small_in(folder), []
    for stage in STAGES:
        plan += [{"run": small(f"stage-{stage}", f"engine.zero_stage={stage}", *CALMER), "watch": True}]
    plan += [small("frozen-3", "engine.zero_stage=3", *FROZEN)]
    plan += continued(folder, "frozen-3", small("again", "engine.zero_stage=0", *FROZEN))
    train_many(2, plan + of_optimizers(folder, small, CASES))
    return folder


def continued(folder, whole, run):
    """The entries of a plan for `run` from the middle of the run `whole` on."""
    (name,) = (item.removeprefix("name=") for item in run if item.startswith("name="))
    return [{"cut": str(folder / whole), "to": str(folder / name), "step": HALF}, run]


def of_optimizers(folder, small, cases):
    """A run of every case, and one that goes on from its middle."""
    plan = []
    for name, stage in cases:
        options = (f"optim.name={name}", f"engine.zero_stage={stage}", f"steps={STEPS}", *OPTIMIZER[name])
        options += ("optim.warmup_steps=0", f"checkpoint.save_every={HALF}", "optim.ema=0.9")
        whole = f"{name}-{stage}"
        plan += [small(whole, *options), *continued(folder, whole, small(f"{whole}-half", *options))]
    return plan


@pytest.fixture(scope="module")
def plain(small_in, tmp_path_factory):
    """Weights before and after, and losses of the run of one process."""
    return train_plainly(small_in(tmp_path_factory.mktemp("plain"))("plain", *CALMER))


def weights(run_dir):
    return load_checkpoint(run_dir / "checkpoints", step=STEPS).model


def differences(left, right):
    """(largest difference of a parameter, largest relative one of batch norm's statistics)."""
    assert left.keys() == right.keys()
    pairs = {name: (left[name].double(), right[name].double()) for name in left}
    statistics = {name: pairs.pop(name) for name in left if "running" in name or "num_batches" in name}
    parameters = max(float((one - other).abs().max()) for one, other in pairs.values())
    return parameters, max(float(((a - b).abs() / b.abs().max()).max()) for a, b in statistics.values())


def assert_near(found, reference, stage):
    """Parameters within 1e-5. The statistics are sums over 1024 products of them: 1e-3 of their size."""
    parameters, statistics = differences(found, reference)
    assert parameters <= 1e-5, f"ZeRO-{stage}"
    assert statistics < 1e-3, f"ZeRO-{stage}"


def test_every_stage_ends_at_the_weights_of_plain_pytorch(runs, plain):
    before, reference, _ = plain
    assert differences(before, reference)[0] > 5e-4, "otherwise the bound means nothing"
    for stage in STAGES:
        assert_near(weights(runs / f"stage-{stage}"), reference, stage)


def test_frozen_stages_keep_their_weights_through_a_restart_at_another_stage(runs, small):
    before, reference, _ = train_plainly(small("plain", *FROZEN))
    frozen = {name for name in before if name[9:].startswith(("patch_embed1", "block2", "norm2"))}
    assert len(frozen) > 10
    assert f"continuing from step {HALF}" in (runs / "again" / "log.txt").read_text()
    for name in ("frozen-3", "again"):
        assert_frozen(runs / name, frozen, before, reference)


def assert_frozen(run_dir, frozen, before, reference):
    loaded = load_checkpoint(run_dir / "checkpoints", step=STEPS)
    assert all(torch.equal(loaded.model[key], before[key]) for key in frozen), run_dir
    assert frozen.isdisjoint(loaded.ema), run_dir
    assert differences(loaded.model, reference)[0] <= 1e-5, run_dir


@pytest.mark.slow
def test_frozen_stages_keep_their_weights_at_every_stage(more, small):
    before, reference, _ = train_plainly(small("plain", *FROZEN))
    frozen = {name for name in before if torch.equal(before[name], reference[name])}
    assert any(name[9:].startswith("block2") for name in frozen)
    for stage in range(3):
        assert_frozen(more / f"frozen-{stage}", frozen, before, reference)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_run_of_every_optimizer_continues_equal_to_an_undisturbed_one(runs, metrics, name, stage):
    assert_continues(runs, metrics, name, stage)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), OTHERS)
def test_it_does_at_the_other_stages(more, metrics, name, stage):
    assert_continues(more, metrics, name, stage)


def assert_continues(runs, metrics, name, stage):
    """The second half of a run, from its checkpoint, is that of the undisturbed one; and it learns."""
    whole, half = runs / f"{name}-{stage}", runs / f"{name}-{stage}-half"
    assert [line["step"] for line in metrics(half)] == list(range(HALF + 1, STEPS + 1))
    assert_identical(saved_state(half), saved_state(whole))
    loaded = load_checkpoint(whole / "checkpoints")
    assert {key.split(".", 1)[0] for key in loaded.optimizer} == set(OPTIMIZERS[name].states)
    assert all(bool(value.any()) for key, value in loaded.optimizer.items() if key.endswith("weight"))
    losses = [line["loss"] for line in metrics(whole)]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_sgd_ends_at_the_same_weights_at_another_stage(runs):
    """Its step is linear in the gradients: rounding stays rounding, unlike under Lion's sign."""
    found, reference = (weights(runs / f"sgd-{stage}") for stage in (3, 0))
    assert differences(found, reference)[0] < 1e-4
    half = load_checkpoint(runs / "sgd-0/checkpoints", step=HALF).model
    assert differences(half, reference)[0] > 1e-3, "otherwise the bound means nothing"


@pytest.fixture(scope="module")
def alone(small_in, calm, tmp_path_factory, train_many):
    """The folder of runs on one rank, at every stage, and without sync_batchnorm."""
    folder = tmp_path_factory.mktemp("alone")
    small = small_in(folder)
    unsynced = (*calm, f"steps={STEPS}", "engine.sync_batchnorm=false", "engine.zero_stage=0")
    plan = [small("whole", *unsynced), small("accumulated", "micro_batch=2", *unsynced)]
    train_many(1, plan + [small(f"stage-{stage}", f"engine.zero_stage={stage}", *CALMER) for stage in STAGES])
    return folder


@pytest.fixture(scope="module")
def more(small_in, calm, tmp_path_factory, train_many):
    """The folder of further runs on two ranks: offloaded, in bf16, with gradients averaged in it, without
    sync_batchnorm; of optimizers."""
    folder = tmp_path_factory.mktemp("more")
    small, common = small_in(folder), (*calm, f"steps={STEPS}")
    plan = [small("two", "engine.sync_batchnorm=false", "engine.zero_stage=0", *common)]
    plan += [small("ordered", "engine.zero_stage=2", "engine.deterministic=true", *common)]
    for stage in STAGES:
        options = (f"engine.zero_stage={stage}", *common)
        plan += [small(f"frozen-{stage}", f"engine.zero_stage={stage}", *FROZEN)]
        plan += [{"run": small(f"bf16-{stage}", "engine.precision=bf16", *options), "watch": True}]
        rounded = ("engine.precision=bf16", "engine.grad_dtype=bf16", *options)
        plan += [{"run": small(f"rounded-{stage}", *rounded), "watch": True}]
        if stage:
            moved = ("engine.offload_optimizer=true", f"engine.offload_parameters={str(stage == 3).lower()}")
            plan += [small(f"offloaded-{stage}", *moved, *options)]
    train_many(2, plan + of_optimizers(folder, small, OTHERS))
    return folder


@pytest.mark.slow
def test_one_rank_ends_at_the_weights_of_plain_pytorch(alone, plain):
    for stage in STAGES:
        assert_near(weights(alone / f"stage-{stage}"), plain[1], stage)


@pytest.mark.slow
def test_four_ranks_end_at_the_weights_of_plain_pytorch(small, tmp_path, train_many, plain):
    train_many(4, [small(f"stage-{stage}", f"engine.zero_stage={stage}", *CALMER) for stage in STAGES])
    for stage in STAGES:
        assert_near(weights(tmp_path / f"stage-{stage}"), plain[1], stage)


@pytest.mark.slow
def test_without_sync_batchnorm_ranks_normalize_as_accumulated_micro_batches_do(alone, more, metrics):
    folders = (alone / "whole", alone / "accumulated", more / "two")
    whole, accumulated, two = (torch.tensor([line["loss"] for line in metrics(one)]) for one in folders)
    assert (accumulated - two).abs().max() < 1e-4
    assert (accumulated - whole).abs().max() > 1e-4, "other statistics"


@pytest.mark.slow
def test_offloading_changes_nothing(more, small, calm):
    _, reference, _ = train_plainly(small("plain", *calm, f"steps={STEPS}"))
    for stage in (1, 2, 3):
        assert differences(weights(more / f"offloaded-{stage}"), reference)[0] < 1e-5, f"ZeRO-{stage}"


def watched(run_dir):
    """What train_many.py wrote down of a run: numbers that the ranks added up, by type; waits."""
    found = json.loads((run_dir / "watched.json").read_text())
    return found["numbers"], found["waited"]


@pytest.mark.parametrize("stage", STAGES)
def test_steps_do_not_wait_for_the_device_to_time_it(runs, stage):
    """DeepSpeed's timer did from the third step on, twice a micro batch."""
    numbers, waits = watched(runs / f"stage-{stage}")
    assert "torch.bfloat16" not in numbers
    assert waits == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_averaged_in_the_type_that_is_asked_for(more, stage):
    """In bf16 where that is asked for, above stage 0 but those of norms; none otherwise."""
    assert "torch.bfloat16" not in watched(more / f"bf16-{stage}")[0]
    model = load_checkpoint(more / f"bf16-{stage}/checkpoints").model
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    size = sum(value.numel() for name, value in model.items() if not name.endswith(buffers))
    counted = watched(more / f"rounded-{stage}")[0]["torch.bfloat16"] / (STEPS * size)
    if stage == 0:
        assert counted == 1
    else:
        assert 0.9 < counted * (2 if stage == 3 else 1) < 1, "at 3 a rank counts what it keeps of a sum"


@pytest.mark.slow
def test_deterministic_operations_compute_the_same_but_for_rounding(more):
    assert differences(weights(more / "ordered"), weights(more / "offloaded-2"))[0] < 1e-5


@pytest.mark.slow
def test_bf16_stays_near_plain_bf16(more, small, calm, metrics):
    """Losses within 2e-2; the way that the parameters went points in the direction of plain bf16's."""
    before, reference, losses = train_plainly(small("plain", *calm, f"steps={STEPS}"), bf16=True)
    for stage in STAGES:
        found = weights(more / f"bf16-{stage}")
        curve = torch.tensor([line["loss"] for line in metrics(more / f"bf16-{stage}")])
        assert (curve - torch.tensor(losses)).abs().max() < 2e-2
        names = [name for name in found if "running" not in name and "num_batches" not in name]
        went = torch.cat([(found[name] - before[name]).flatten() for name in names])
        wanted = torch.cat([(reference[name] - before[name]).flatten() for name in names])
        assert torch.cosine_similarity(went, wanted, dim=0) > 0.95
