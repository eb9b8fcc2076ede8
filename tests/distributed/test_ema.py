"""The EMA of the weights follows its formula at every stage; accumulating equals a larger batch."""

import itertools

import pytest
import shapes
import torch

from segformer.checkpoint.reader import load_checkpoint
from segformer.data.loading.loader import LoaderConfig
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint

STEPS, STAGES = 4, (0, 3)


@pytest.fixture(scope="module")
def runs(small_in, calm, tmp_path_factory, train_many):
    """The folder of runs on two ranks: with the EMA and evaluations, without both, with accumulation."""
    folder = tmp_path_factory.mktemp("ema")
    small, plan = small_in(folder), []
    shards = shapes.write_set(folder, {"train": 24, "val": 3})
    classifier = ["data=folder", "data.task=classification", "model=nano", f"data.shards={shards}"]
    classifier += ["classification.size=48", "classification.eval_resize=56", "steps=5", "global_batch=8"]
    classifier += ["model.drop_path_rate=0", "model.dropout=0", "loader.workers=0", "eval_every=100", *calm]
    for name, micro_batch, stage in (("whole", 4, 0), ("parts", 2, 2)):
        own = [f"name={name}", f"run_dir={folder / name}", f"micro_batch={micro_batch}"]
        plan += [[*classifier, *own, f"engine.zero_stage={stage}"]]
    options = ("optim.ema=0.25", "eval_every=2", "checkpoint.save_every=1", "checkpoint.keep_last=20")
    for stage in STAGES:
        common = (f"engine.zero_stage={stage}", f"steps={STEPS}")
        plan += [small(f"stage-{stage}", *common, *options), small(f"never-{stage}", *common)]
    train_many(2, plan)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_the_ema_follows_its_formula(runs, stage):
    """a_(t+1) = d a_t + (1 - d) w_(t+1), d = min(0.25, (1 + t) / (10 + t)), from the saved weights."""
    saved = [load_checkpoint(runs / f"stage-{stage}/checkpoints", step=step) for step in range(1, STEPS + 1)]
    for before, now in itertools.pairwise(saved):
        t = before.state.step
        decay = min(0.25, (1 + t) / (10 + t))
        for name, ema in before.ema.items():
            wanted = decay * ema.double() + (1 - decay) * now.model[name].double()
            assert (now.ema[name] - wanted).abs().max() < 1e-6, f"step {t}: {name}"
    assert any(not torch.equal(now.ema[name], now.model[name]) for name in now.ema)


@pytest.mark.parametrize("stage", STAGES)
def test_keeping_and_evaluating_the_ema_leaves_the_weights_as_they_were(runs, stage):
    folders = (runs / f"{kind}-{stage}/checkpoints" for kind in ("stage", "never"))
    often, never = (load_checkpoint(folder).model for folder in folders)
    assert all(torch.equal(often[name], never[name]) for name in never)


def test_the_ema_is_what_is_scored_at_the_end_as_in_the_run_directory(runs, metrics):
    config = EvaluateConfig(checkpoint=str(runs / "stage-3"), loader=LoaderConfig(workers=0))
    scores = evaluate_checkpoint(config).to_dict()
    (final,) = metrics(runs / "stage-3", "final")
    assert [final[name] for name in ("miou", "macc")] == pytest.approx([scores["miou"], scores["macc"]])


def test_accumulating_is_the_same_as_a_larger_batch(runs):
    """2 ranks x 4 against 2 ranks x 2 x 2 within 1e-5; of a network without batch norm."""
    whole, parts = (load_checkpoint(runs / name / "checkpoints").model for name in ("whole", "parts"))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5
