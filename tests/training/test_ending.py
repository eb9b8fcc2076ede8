"""How a start of a run ends, and what the next one makes of it: in this process, with a tiny network."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nano
import pytest
from comparing import assert_identical, saved_state

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.distributed.world import init_world
from segformer.errors import CheckpointError, ConfigError, Preempted
from segformer.evaluation.metrics import Scores
from segformer.models.variants import VARIANTS
from segformer.training import loop
from segformer.training.config import RunConfig, compose
from segformer.training.directory import check_start
from segformer.training.early_stop import EarlyStopConfig, stops_early
from segformer.training.sizing import with_values
from segformer.training.task import Segmentation


@pytest.fixture(scope="module")
def base(tiny_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 6 steps."""
    small = ["augment.crop=[32,32]", "global_batch=2", "steps=6", "eval_every=2", "eval_batch=3"]
    small += ["optim.ema=0.9", "model.drop_path_rate=0.1", "optim.warmup_steps=2", "optim.lr=1e-3"]
    return compose(RunConfig, "config", tiny_in(tmp_path_factory.mktemp("base"))("base", *small))


@pytest.fixture
def run(base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scores]]:
    """(name, overrides ...) -> the scores of `base` with them in a folder of its own, begun or continued."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    world = init_world()

    def train(name: str, *more: str) -> Scores:
        given = dict(one.split("=") for one in more)
        values = {key: value if value.isalpha() else json.loads(value) for key, value in given.items()}
        values |= {"model.variant": "nano", "run_dir": str(tmp_path / name)}
        return loop.train(with_values(base, values), world)

    yield train
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


def plain_stop(scores: list[float], patience: int, gain: float) -> int | None:
    """The number of the evaluation that ends a run, by looking back from each of them."""
    best = [scores[0]]
    for score in scores[1:]:
        best.append(score if score > best[-1] and score >= best[-1] + gain else best[-1])
    for number in range(patience, len(scores)):
        if best[number] == best[number - patience]:
            return number
    return None


def test_the_run_ends_at_the_evaluation_where_a_plain_loop_ends_it():
    generator = random.Random(0)
    names = {"miou": "mIoU", "macc": "mAcc"}
    ends = set()
    for _ in range(300):
        scores = [generator.randrange(20) / 20 for _ in range(9)]
        patience, gain = generator.randrange(1, 5), generator.choice((0.0, 0.1))
        cfg = EarlyStopConfig(metric="macc", patience=patience, min_gain=gain)
        rows = [{"step": 10 * k, "miou": 0.0, "macc": score} for k, score in enumerate(scores, 1)]
        stopped = (k for k in range(len(rows)) if stops_early(cfg, names, rows[: k + 1]))
        end = next(stopped, None)
        assert end == plain_stop(scores, patience, gain), (scores, patience, gain)
        ends.add(end)
    assert len(ends) > 5
    rows = [{"step": 10, "miou": 0.5}, {"step": 20}, {"step": 30, "miou": 0.5009}]
    said = "no gain of 0.1% in mIoU for 2 evaluations, since 50.00% at step 10"
    assert stops_early(EarlyStopConfig(patience=2, min_gain=0.001), names, rows) == said
    assert stops_early(EarlyStopConfig(patience=0), names, rows) == ""


def test_an_early_stop_is_the_end_until_patience_grows_and_then_was_none(run, tmp_path, metrics):
    whole, folder = run("whole"), tmp_path / "early"
    stop = ["early_stop.metric=macc", "early_stop.min_gain=1"]  # the first is a gain, no other can be one
    first = run("early", *stop, "early_stop.patience=1")
    reason = "no gain of 100% in mAcc for 1 evaluation, since"
    assert last_line(folder).startswith(f"stopped early at step 4 of 6: {reason}")
    before = (folder / "checkpoints/step-00000004/model.safetensors").stat().st_mtime_ns
    assert run("early", *stop, "early_stop.patience=1") == first
    assert (folder / "checkpoints/step-00000004/model.safetensors").stat().st_mtime_ns == before
    assert steps_of(metrics, folder, "train") == [1, 2, 3, 4], "a finished run trains nothing"
    assert run("early", *stop, "early_stop.patience=2", "steps=6") == whole
    assert_identical(saved_state(folder, 6), saved_state(tmp_path / "whole", 6))
    left, right = (load_checkpoint(place / "checkpoints").state for place in (folder, tmp_path / "whole"))
    assert left == right
    assert (steps_of(metrics, folder, "eval"), steps_of(metrics, folder, "final")) == ([2], [4, 4, 6])


def test_a_pause_does_not_move_an_early_stop(run, tmp_path):
    stop = ["early_stop.patience=1", "early_stop.min_gain=1"]
    run("paused", *stop, "stop_at=1")
    run("paused", *stop, "stop_at=3")
    run("paused", *stop)
    assert last_line(tmp_path / "paused").startswith("stopped early at step 4 of 6")


def test_patience_that_comes_with_a_pause_is_judged_at_the_next_evaluation_that_counts(run, tmp_path):
    run("late", "stop_at=5")
    run("late", "early_stop.patience=1", "early_stop.min_gain=1", "stop_at=5")
    assert last_line(tmp_path / "late").startswith("paused at step 5 of 6")
    run("late", "early_stop.patience=1", "early_stop.min_gain=1", "steps=6")
    assert last_line(tmp_path / "late").startswith("finished")


def test_a_pause_between_two_evaluations_is_no_best(run, tmp_path, monkeypatch, metrics):
    """Scores rise up to step 3, the pause, and fall from there on."""
    evaluate = Segmentation.evaluate

    def scored(self: Segmentation, engine: Any, *given: Any, **more: Any) -> Any:
        scores = evaluate(self, engine, *given, **more)
        monkeypatch.setattr(type(scores), "score", next(values), raising=False)
        return scores

    monkeypatch.setattr(Segmentation, "evaluate", scored)
    values = iter([0.2, 0.9, 0.3, 0.1])
    run("paused", "stop_at=3")
    state = load_checkpoint(tmp_path / "paused/checkpoints").state
    assert (state.evaluated, state.best_step, state.best_score) == (3, 2, 0.2)
    run("paused")
    state = load_checkpoint(tmp_path / "paused/checkpoints").state
    assert (state.best_step, state.best_score) == (4, 0.3)


def test_the_last_evaluation_is_saved_and_an_extension_does_not_repeat_it(run, tmp_path, metrics):
    constant, folder = "optim.schedule=constant", tmp_path / "longer"
    run("longer", constant, "steps=2")
    state = load_checkpoint(folder / "checkpoints").state
    assert (state.evaluated, [row["step"] for row in state.evaluations]) == (2, [2])
    run("longer", constant, "steps=4")
    state = load_checkpoint(folder / "checkpoints").state
    assert [row["step"] for row in state.evaluations] == [2, 4]
    assert (steps_of(metrics, folder, "eval"), steps_of(metrics, folder, "final")) == ([], [2, 4])
    written = (folder / "checkpoints/step-00000004/model.safetensors").stat().st_mtime_ns
    run("longer", constant, "steps=4")
    assert (folder / "checkpoints/step-00000004/model.safetensors").stat().st_mtime_ns == written


def test_a_schedule_that_begins_at_the_end_is_refused_and_changes_nothing(run, tmp_path):
    run("ended", "steps=2")
    before = (tmp_path / "ended/config.yaml").read_bytes()
    for more in (["steps=2"], ["steps=1"]):
        with pytest.raises(ConfigError, match=r"optim.schedule_start=2 must be below steps=[12]; give more"):
            run("ended", *more, "optim.schedule_start=2")
    assert (tmp_path / "ended/config.yaml").read_bytes() == before


def test_a_score_that_the_task_has_not_is_refused(tiny):
    check_start(compose(RunConfig, "config", tiny("right", "early_stop.metric=aacc")))
    with pytest.raises(
        ConfigError, match=r"early_stop.metric=top1 is no score of segmentation; use one of miou"
    ):
        check_start(compose(RunConfig, "config", tiny("wrong", "early_stop.metric=top1")))


def test_a_constant_schedule_is_extended_by_more_steps(run, tmp_path):
    constant = "optim.schedule=constant"
    run("whole", constant)
    run("longer", constant, "steps=3")
    with pytest.raises(ConfigError, match="it has come to step 3 already"):
        run("longer", constant, "steps=2")
    run("longer", constant)
    assert_identical(saved_state(tmp_path / "longer", 6), saved_state(tmp_path / "whole", 6))


@pytest.mark.slow
def test_a_run_is_extended_by_a_new_schedule_and_goes_back_no_further(run, tmp_path, metrics):
    """Stopped on the way it ends with the same bits; the lr is the formula counted from the old end."""
    old = ["steps=4", "checkpoint.save_every=2", "checkpoint.keep_last=9"]
    more = ["steps=8", "optim.schedule_start=4", "optim.warmup_steps=1", "optim.lr=5e-4"]
    with pytest.raises(CheckpointError, match="; leave it out"):
        run("early", *old, *more)
    run("whole", *old)
    with pytest.raises(ConfigError) as refused:
        run("whole", *old, "steps=8")
    assert "(steps: 4 -> 8); give what it has, add optim.schedule_start=4 for a new" in str(refused.value)
    assert "begin a new run from its weights: run_dir=" in str(refused.value)
    folder = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", folder)
    run("whole", *old, *more)
    rates = [row["lr"] for row in metrics(tmp_path / "whole")]
    assert rates[4:] == pytest.approx([5e-4 * 1e-6, *(5e-4 * (1 - k / 4) for k in (1, 2, 3))], rel=1e-5)
    run("stopped", *old, *more, "stop_at=5")
    flip(folder / "checkpoints/step-00000005/model.safetensors")
    run("stopped", *old, *more, "stop_at=7")
    assert "damaged" in (folder / "log.txt").read_text()
    for step in (7, 6, 4):
        flip(folder / f"checkpoints/step-{step:08d}/model.safetensors")
    with pytest.raises(CheckpointError, match="is of step 2, before ") as early:
        run("stopped", *old, *more)
    own = str(early.value).partition("first bring it there again, with ")[2].split()
    assert own == ["steps=4", "optim.lr=0.001", "optim.schedule_start=0", "optim.warmup_steps=2"]
    run("stopped", *old, *own)
    run("stopped", *old, *more)
    assert_identical(saved_state(folder, 8), saved_state(tmp_path / "whole", 8))


def flip(path: Path) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def broken() -> None:
    raise TypeError("an error\nof this program")


def interrupted() -> None:
    raise KeyboardInterrupt


def without_memory() -> None:
    raise MemoryError


def signaled() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


@pytest.mark.parametrize(
    ("accident", "error", "said"),
    [
        (broken, TypeError, "ended by a bug: TypeError: an error of this program"),
        (interrupted, KeyboardInterrupt, "stopped at once by Ctrl-C; the same command continues from the ne"),
        (
            without_memory,
            ConfigError,
            "ConfigError: rank 0 is out of memory in step 2 (micro_batch=2, crop",
        ),
        (signaled, Preempted, "Preempted: stopped at step 2 by SIGUSR2 (the time limit of a job is near); "),
    ],
)
def test_the_last_line_of_the_log_says_what_ended_the_run(run, tmp_path, monkeypatch, accident, error, said):
    task_loss = Segmentation.loss
    steps = iter(range(99))

    def loss(*given: Any) -> Any:
        if next(steps) == 1:
            accident()
        return task_loss(*given)

    monkeypatch.setattr(Segmentation, "loss", loss)
    with pytest.raises(error):
        run("accident")
    assert last_line(tmp_path / "accident").startswith(said)
