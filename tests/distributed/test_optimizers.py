"""Every optimizer of the table, at every ZeRO stage: it trains, saves and goes on as if nothing had been."""

import pytest
import torch
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import load_checkpoint
from segformer.training.optim import OPTIMIZERS

STEPS, HALF = 8, 4
OPTIONS = {
    "adamw": (),
    "sgd": ("optim.lr=0.01", "optim.head_lr_factor=1", "optim.momentum=0.9"),
    "lion": ("optim.lr=1e-4", "optim.head_lr_factor=1", "optim.betas=[0.9,0.99]"),
}
CASES = [(name, stage) for name in ("sgd", "lion") for stage in range(4)] + [("adamw", 3)]


@pytest.fixture(scope="module")
def runs(tiny_in, tmp_path_factory, train_many):
    """The folder of whole runs and of runs that went on from their middle, each on two ranks."""
    folder = tmp_path_factory.mktemp("optimizers")
    tiny, plan = tiny_in(folder), []
    for name, stage in CASES:
        case = f"{name}-{stage}"
        options = [
            *(f"optim.name={name}", f"engine.zero_stage={stage}", f"steps={STEPS}", "optim.warmup_steps=0"),
            *(f"checkpoint.save_every={HALF}", "optim.ema=0.9", *OPTIONS[name]),
        ]
        plan += [
            {"run": tiny(case, *options)},
            {"cut": str(folder / case), "to": str(folder / f"{case}-half"), "step": HALF},
            {"run": tiny(f"{case}-half", *options)},
        ]
    train_many(2, plan)
    return folder


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_run_continues_equal_to_an_undisturbed_one(runs, metrics, name, stage):
    whole, half = runs / f"{name}-{stage}", runs / f"{name}-{stage}-half"
    assert [line["step"] for line in metrics(half)] == list(range(HALF + 1, STEPS + 1))
    assert_identical(saved_state(half), saved_state(whole))
    loaded = load_checkpoint(whole / "checkpoints")
    assert {key.split(".", 1)[0] for key in loaded.optimizer} == set(OPTIMIZERS[name].states)
    assert all(bool(value.any()) for key, value in loaded.optimizer.items() if key.endswith("weight"))
    losses = [line["loss"] for line in metrics(whole)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sgd_ends_at_the_same_weights_at_every_stage(runs, stage):
    """Its step is linear in the gradients: rounding stays rounding, unlike under Lion's sign."""
    plain, cut = (load_checkpoint(runs / f"sgd-{stage}" / "checkpoints").model for stage in (0, stage))
    parameters = [name for name in plain if "running" not in name and "num_batches" not in name]
    assert max(float((plain[name] - cut[name]).abs().max()) for name in parameters) < 1e-4
    assert not torch.equal(
        load_checkpoint(runs / "sgd-0" / "checkpoints", step=HALF).model[parameters[0]], plain[parameters[0]]
    )
