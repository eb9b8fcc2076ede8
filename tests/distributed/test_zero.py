"""Every ZeRO stage on 1, 2 and 4 ranks ends at the weights of one plain PyTorch process."""

import shutil

import pytest
import torch
from plain_training import train_plainly

from segformer.checkpoint.reader import load_checkpoint

STEPS = 20
STAGES = range(4)
# As `calm`, and calmer: eps 1e-4 left 2.8e-5 on 4 ranks at ZeRO-3, where rounding had grown.
CALMER = ["optim.lr=2e-5", "optim.head_lr_factor=10", "optim.warmup_steps=0", "optim.eps=1e-3"]


def weights(run_dir):
    return load_checkpoint(run_dir / "checkpoints", step=STEPS).model


def differences(left, right):
    """(largest difference of a parameter, largest relative one of batch norm's statistics)."""
    assert left.keys() == right.keys()
    pairs = {name: (left[name].double(), right[name].double()) for name in left}
    statistics = {name: pairs.pop(name) for name in left if "running" in name or "num_batches" in name}
    parameters = max(float((one - other).abs().max()) for one, other in pairs.values())
    return parameters, max(float(((a - b).abs() / b.abs().max()).max()) for a, b in statistics.values())


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_stage_and_world_ends_at_the_weights_of_plain_pytorch(tiny, tmp_path, train_many, ranks):
    """Parameters within 1e-5. The statistics are sums over 1024 products of them: 1e-3 of their size."""
    before, reference, _ = train_plainly(tiny("plain", *CALMER))
    assert differences(before, reference)[0] > 1e-3, "otherwise the bound below means nothing"
    train_many(
        ranks,
        [tiny(f"stage-{stage}", f"engine.zero_stage={stage}", *CALMER) for stage in STAGES],
    )
    for stage in STAGES:
        parameters, statistics = differences(weights(tmp_path / f"stage-{stage}"), reference)
        assert parameters < 1e-5, f"ZeRO-{stage}"
        assert statistics < 1e-3, f"ZeRO-{stage}"


@pytest.mark.slow
def test_offloading_changes_nothing(tiny, calm, tmp_path, train_many):
    _, reference, _ = train_plainly(tiny("plain", *calm))
    moved = {
        "one": ("engine.zero_stage=1", "engine.offload_optimizer=true"),
        "two": ("engine.zero_stage=2", "engine.offload_optimizer=true"),
        "three": ("engine.zero_stage=3", "engine.offload_optimizer=true", "engine.offload_parameters=true"),
    }
    train_many(2, [tiny(name, *options, *calm) for name, options in moved.items()])
    for name in moved:
        assert differences(weights(tmp_path / name), reference)[0] < 1e-5, name


@pytest.mark.slow
def test_bf16_stays_near_plain_bf16(tiny, calm, tmp_path, train_many, metrics):
    """Losses within 2e-2; the way that the parameters went points in the direction of plain bf16's."""
    before, reference, losses = train_plainly(tiny("plain", *calm), bf16=True)
    options = ("engine.precision=bf16", *calm)
    runs = [tiny(f"stage-{stage}", f"engine.zero_stage={stage}", *options) for stage in STAGES]
    train_many(2, runs)
    for stage in STAGES:
        found = weights(tmp_path / f"stage-{stage}")
        curve = torch.tensor([line["loss"] for line in metrics(tmp_path / f"stage-{stage}")])
        assert (curve - torch.tensor(losses)).abs().max() < 2e-2
        names = [name for name in found if "running" not in name and "num_batches" not in name]
        went = torch.cat([(found[name] - before[name]).flatten() for name in names])
        wanted = torch.cat([(reference[name] - before[name]).flatten() for name in names])
        assert torch.cosine_similarity(went, wanted, dim=0) > 0.95


def test_frozen_stages_keep_their_weights_at_every_zero_stage_and_through_a_restart(
    tiny, tmp_path, train_many, run_ranks
):
    options = [*CALMER, "optim.frozen_stages=2", "optim.ema=0.5", "checkpoint.save_every=10"]
    before, reference, _ = train_plainly(tiny("plain", *options))
    train_many(2, [tiny(f"stage-{stage}", f"engine.zero_stage={stage}", *options) for stage in STAGES])
    frozen = {name for name in before if name[9:].startswith(("patch_embed1", "block2", "norm2"))}
    assert len(frozen) > 10
    for stage in STAGES:
        folder = tmp_path / f"stage-{stage}" / "checkpoints"
        loaded = load_checkpoint(folder, step=STEPS)
        assert all(torch.equal(loaded.model[name], before[name]) for name in frozen), stage
        assert frozen.isdisjoint(loaded.ema), stage
        assert differences(loaded.model, reference)[0] <= 1e-5, stage
        shutil.rmtree(folder / f"step-{STEPS:08d}")  # go on from step 10, at another stage, on one rank
    again = tiny("stage-3", "engine.zero_stage=0", *options)
    assert "continuing from step 10" in run_ranks(1, "launch/train.py", *again)[0]
    assert differences(weights(tmp_path / "stage-3"), reference)[0] <= 1e-5
