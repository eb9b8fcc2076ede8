"""How a start of a run ends, and what the next one makes of it: in this process, with a tiny network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nano
import pytest
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.distributed.world import init_world
from segformer.evaluation.metrics import Scores
from segformer.models.variants import VARIANTS
from segformer.training import loop
from segformer.training.config import RunConfig, compose


@pytest.fixture
def run(tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scores]]:
    """(name, overrides ...) -> the scores of a run of 6 steps, which is begun or goes on."""
    from deepspeed.utils import groups

    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    groups._WORLD_GROUP = None  # DeepSpeed keeps that of a world which another test has closed
    small = ["model=nano", "augment.crop=[32,32]", "global_batch=2", "steps=6", "eval_every=2"]
    small += ["optim.ema=0.9", "model.drop_path_rate=0.1", "optim.warmup_steps=2", "optim.lr=1e-3"]
    world = init_world()
    yield lambda name, *more: loop.train(compose(RunConfig, "config", tiny(name, *small, *more)), world)
    world.close()


def last_line(run_dir: Path) -> str:
    """The last line of log.txt, without the time of day."""
    return (run_dir / "log.txt").read_text().splitlines()[-1].partition(" ")[2]


def steps_of(metrics: Callable[..., Any], run_dir: Path, kind: str) -> list[int]:
    return [row["step"] for row in metrics(run_dir, kind)]


def test_a_paused_run_goes_on_as_if_it_had_not_been(run, tmp_path, metrics):
    whole = run("whole")
    paused = run("paused", "stop_at=3")
    again = run("paused", "stop_at=2")
    folder = tmp_path / "paused"
    assert again == paused, "a step that the run has passed shows its scores"
    assert list_steps(folder / "checkpoints")[-1] == 3
    assert load_checkpoint(folder / "checkpoints").state.evaluated == 3
    goes_on = "the same command without stop_at, or with a larger one, goes on"
    assert last_line(folder) == f"paused at step 3 of 6 by stop_at=2; {goes_on}"
    run("paused", "stop_at=4")
    assert run("paused") == whole
    assert last_line(folder) == "finished: all 6 steps are done"
    assert_identical(saved_state(folder, 6), saved_state(tmp_path / "whole", 6))
    assert [row["loss"] for row in metrics(folder)] == [row["loss"] for row in metrics(tmp_path / "whole")]
    assert steps_of(metrics, tmp_path / "whole", "eval") == [2, 4]
    assert steps_of(metrics, folder, "eval") == [2, 3, 3, 4], "that of step 4 is not repeated"
    assert steps_of(metrics, folder, "final") == [6]
