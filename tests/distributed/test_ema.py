"""The EMA of the weights follows its formula at every stage; accumulating equals a larger batch."""

import itertools

import pytest
import shapes
import torch

from segformer.checkpoint.reader import load_checkpoint

STEPS = 8


def test_the_ema_follows_its_formula_and_is_what_is_scored(tiny, tmp_path, run_ranks, train_many, metrics):
    """a_(t+1) = d a_t + (1 - d) w_(t+1), d = min(0.7, (1 + t) / (10 + t)), from the saved weights."""
    options = (f"steps={STEPS}", "optim.ema=0.7", "checkpoint.save_every=1", "checkpoint.keep_last=20")
    stages = (0, 2, 3)
    train_many(2, [tiny(f"stage-{stage}", f"engine.zero_stage={stage}", *options) for stage in stages])
    for stage in stages:
        folder = tmp_path / f"stage-{stage}" / "checkpoints"
        saved = [load_checkpoint(folder, step=step) for step in range(1, STEPS + 1)]
        for before, now in itertools.pairwise(saved):
            t = before.state.step
            decay = min(0.7, (1 + t) / (10 + t))
            for name, ema in before.ema.items():
                wanted = decay * ema.double() + (1 - decay) * now.model[name].double()
                assert (now.ema[name] - wanted).abs().max() < 1e-6, f"ZeRO-{stage}, step {t}: {name}"
        assert any(not torch.equal(now.ema[name], now.model[name]) for name in now.ema)
    # The last evaluation was of the EMA, as that of the run directory is.
    place = f"checkpoint={tmp_path / 'stage-3'}"
    printed = run_ranks(2, "launch/evaluate.py", place, "loader.workers=0")[0]
    (final,) = metrics(tmp_path / "stage-3", "final")
    (mean,) = [line for line in printed.splitlines() if line.startswith("mean")]
    assert mean.split()[1:3] == [f"{100 * final[name]:.2f}" for name in ("miou", "macc")]


@pytest.mark.slow
def test_evaluating_the_ema_leaves_the_weights_as_they_were(tiny, tmp_path, train_many):
    options = (f"steps={STEPS}", "optim.ema=0.7")
    stages = range(4)
    runs = [
        tiny(f"{often}-{stage}", f"engine.zero_stage={stage}", f"eval_every={often}", *options)
        for stage in stages  # 3 last: DeepSpeed then replaces F.linear, which rounds differently
        for often in (2, 100)
    ]
    train_many(2, runs)
    for stage in stages:
        often, never = (
            load_checkpoint(tmp_path / f"{kind}-{stage}" / "checkpoints", step=STEPS) for kind in (2, 100)
        )
        assert all(torch.equal(often.model[name], never.model[name]) for name in never.model), f"ZeRO-{stage}"


@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 4), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_accumulating_is_the_same_as_a_larger_batch(tmp_path, train_many, calm, ranks, accumulated):
    """1 x 8 against 4 x 2, on one rank and on two, within 1e-5; of a network without batch norm."""
    shards = shapes.write_set(tmp_path, {"train": 24, "val": 3})

    def run(name, micro_batch, stage):
        return [
            *("data=folder", "data.task=classification", "data.name=shapes", f"data.shards={shards}"),
            *(f"name={name}", f"run_dir={tmp_path / name}", "steps=20", "global_batch=8", "eval_every=100"),
            *("classification.size=48", "classification.eval_resize=56", "model.drop_path_rate=0"),
            *("model.dropout=0", "loader.workers=0", f"micro_batch={micro_batch}", *calm),
            f"engine.zero_stage={stage}",
        ]

    train_many(ranks, [run("whole", 8 // ranks, 0), run("parts", 8 // ranks // accumulated, 2)])
    whole, parts = (
        load_checkpoint(tmp_path / name / "checkpoints", step=20).model for name in ("whole", "parts")
    )
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5
