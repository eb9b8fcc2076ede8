"""Training: one loop over the parts of a run (run.py); the optimizer step is step.py.

    for every optimizer step: fetch, agree to go on, step, log, evaluate, save - in this order

Determinism: the weights after step t are a function of (configuration, shards, world size, device). The
sample order and augmentation don't depend on ranks or workers; the generator that drop-out draws from is
seeded anew at every step from (seed, step, rank), so a resume needs no random state.

Before every step (or batch of an evaluation) all ranks agree to stop (stopping.py); they then save one
checkpoint together and end: with Preempted (exit code 75) or with the error of the rank that has it. A second
Ctrl-C stops at once. Steps that are not finite: recovery.py; ranks that hang: watchdog.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

from segformer.data.loading.samples import Batch
from segformer.distributed.watchdog import Watchdog, lost_ranks
from segformer.distributed.world import StopFlag, World, limit_threads
from segformer.errors import CheckpointError, RunTaken, reported
from segformer.evaluation.metrics import Scores
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.meter import memory
from segformer.telemetry.progress import duration
from segformer.training.config import RunConfig
from segformer.training.recovery import count_skipped, report_replaced, roll_back
from segformer.training.run import Services, config_summary, leased, set_up
from segformer.training.step import LossSum, ModelState, enough_memory, train_step
from segformer.training.stopping import Stopping
from segformer.training.task import Task


def train(cfg: RunConfig, world: World) -> Scores:
    """Train, or continue, the run of `cfg` and return the scores of its last step, equal on all ranks.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, where something does not fit.
        Preempted: a signal stopped the run; the same call continues it.
        DataError: in the middle of the run, on the rank that met it; the state before it has been saved.
        Diverged: loss or gradients were not finite for several steps, also after going back.
        RankLost: another rank has ended or hangs.
    """
    limit_threads(world)
    run_dir, summary = Path(cfg.run_dir), config_summary(cfg)
    with (
        leased(cfg, world) as lease,
        StopFlag() as flag,
        Watchdog(run_dir / "stacks", world, cfg.engine.timeout_s) as watchdog,
        Telemetry(cfg.telemetry, run_dir, world, name=cfg.name, steps=cfg.steps, config=summary) as telemetry,
        lost_ranks(watchdog),
    ):
        task, model, run = set_up(cfg, world, telemetry, Stopping(world, flag, watchdog), lease)
        with contextlib.closing(run):
            return _loop(cfg, world, task, model, run)


def _loop(cfg: RunConfig, world: World, task: Task, model: ModelState, run: Services) -> Scores:
    telemetry, meter, stopping, losses = run.telemetry, run.meter, run.stopping, LossSum(world.device)
    accumulation = cfg.batch_shape(world.size).accumulation
    telemetry.start(model.state.step)
    meter.reset()
    while model.state.step < cfg.steps:
        start = time.monotonic()
        batches, waited = _fetch(run, accumulation)
        if stopping.agreed():
            break
        with run.profiler.step(model.state.step + 1):
            outcome = train_step(cfg, world, task, model, batches, losses)
        step, state = model.state.step, model.state
        meter.add(cfg.global_batch, waited, time.monotonic() - start - stopping.waited)
        if run.profiler.covers(step):
            meter.reset()  # a profiled step is a slow one
        telemetry.advance()
        if run.ledger is not None:
            run.ledger.add(step, [int(i) for batch in batches for i in batch.sample_ids])
        count_skipped(world, state, run, batches, outcome)
        if state.skipped_in_a_row >= cfg.max_skipped:
            roll_back(cfg, world, model, run)
            losses.clear()
            continue
        if step == cfg.steps or step % cfg.telemetry.log_every == 0:
            _log(world, model, run, losses, outcome.norm)
            report_replaced(cfg, world, state, run)
        if step == cfg.steps or state.skipped_in_a_row:
            continue
        if step % cfg.eval_every == 0:
            _evaluate(cfg, world, task, model, run)
        if step % cfg.checkpoint.save_every == 0 or state.best_step == step:  # the best is always on disk
            report_replaced(cfg, world, state, run)
            _save(world, model, run)
    scores = _evaluate(cfg, world, task, model, run) if model.state.step == cfg.steps else None
    run.checkpoints.settle()
    if model.state.step and run.checkpoints.last_saved != model.state.step:
        report_replaced(cfg, world, model.state, run)
        _save(world, model, run, last=True)
    telemetry.stop_bar()
    if scores is None:
        raise stopping.reason(model.state.step, Path(cfg.run_dir) / "checkpoints")
    for row in scores.table(task.shards.classes).splitlines():
        telemetry.line(row)
    return scores


def _fetch(run: Services, count: int) -> tuple[list[Batch], float]:
    """The micro batches of the next step, fewer where the data is damaged, and the seconds they took."""
    start = time.monotonic()
    batches: list[Batch] = []
    with reported(run.stopping.fail):
        while len(batches) < count:
            batches.append(next(run.batches))
    run.replaced |= {found.sample_id: found.reason for batch in batches for found in batch.replaced}
    return batches, time.monotonic() - start


def _log(world: World, model: ModelState, run: Services, losses: LossSum, norm: float | None) -> None:
    """Log the interval since the last line; all ranks."""
    means = losses.means(world)
    groups = {str(group["name"]): float(group["lr"]) for group in model.engine.optimizer.param_groups}
    body = [rate for name, rate in groups.items() if not name.startswith("head")] or list(groups.values())
    layers = [name for name in groups if "." in name]  # with layer decay: the first and the last of them
    values: dict[str, float | None] = {**means, "lr": max(body)}
    values |= {f"lr/{name}": rate for name, rate in groups.items() if name not in layers[1:-1]}
    values |= {"grad_norm": norm, "skipped": float(model.state.skipped)}
    values |= run.meter.rates() | memory(world.device)
    values["loss_spike"] = None if means["loss"] is None else run.spike.ratio(means["loss"])
    if run.lease is not None:
        try:  # where the file system is slow, the next commit asks again
            with reported(lambda error: run.telemetry.line(str(error)), on=CheckpointError):
                run.lease.check()
        except RunTaken as error:
            return run.stopping.fail(error)
    run.telemetry.train(model.state.step, values)
    run.meter.reset()


def _evaluate(cfg: RunConfig, world: World, task: Task, model: ModelState, run: Services) -> Scores | None:
    """Scores on the evaluation split, None where the ranks stop; remembers the best step; all ranks."""
    start, state, telemetry = time.monotonic(), model.state, run.telemetry
    swapped = contextlib.nullcontext() if model.ema is None else model.ema.swapped_in(world)
    where = f"in evaluation (eval_batch={cfg.eval_batch}); lower eval_batch"
    with swapped, enough_memory(world.rank, lambda: where):
        scores = task.evaluate(
            model.engine,
            world,
            should_stop=run.stopping.agreed,
            on_error=run.stopping.fail,
            pictures=cfg.telemetry.pictures,
        )
    run.meter.reset()  # it does not count as training time
    if scores is None:
        return None
    kind = "final" if state.step == cfg.steps else "eval"
    telemetry.scores(kind, state.step, scores.to_dict(), task.shards.classes)
    telemetry.pictures(state.step, scores.pictures)
    count = task.shards.split(cfg.eval_split).num_samples
    of = "" if model.ema is None else " of the EMA"
    took = duration(time.monotonic() - start)
    telemetry.line(f"step {state.step}: validation {scores.summary()}{of} ({count} images in {took})")
    if math.isfinite(scores.score) and (state.best_score is None or scores.score > state.best_score):
        state.best_score, state.best_step = scores.score, state.step
    return scores


def _save(world: World, model: ModelState, run: Services, *, last: bool = False) -> None:
    """Hand the state over to be written, or write it (last); all ranks."""
    run.checkpoints.settle()  # never two copies of the state in the host's memory
    run.checkpoints.save(model.gather(world), last=last)
    run.meter.reset()
