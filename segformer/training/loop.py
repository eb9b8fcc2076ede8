"""Training: one loop over the parts of a run (run.py); the optimizer step is step.py.

    for every optimizer step: evaluate, agree to go on, fetch ahead, step, log, save - in this order

An evaluation belongs to the step before it, and what it could lose is saved by then. TrainState.evaluated
says whether it was made; who continues from a state without it makes it first.

Determinism: the weights after step t are a function of (configuration, shards, world size, device). The
sample order and augmentation don't depend on ranks or workers; the generator that drop-out draws from is
seeded anew at every step from (seed, step, rank), so a resume needs no random state.

Before every step (or batch of an evaluation) all ranks agree to stop (stopping.py); they then save one
checkpoint together and end: with Preempted (exit code 75) or with the error of the rank that has it. A second
Ctrl-C stops at once. The question is asked a step ahead, together with the batches, so that nobody waits for
the answer. Steps that are not finite: recovery.py; ranks that hang: watchdog.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from pathlib import Path

from segformer.checkpoint.format import TrainState
from segformer.data.loading.order import MixedOrder
from segformer.data.loading.samples import Batch
from segformer.distributed.engine import determinism
from segformer.distributed.watchdog import Watchdog, lost_ranks
from segformer.distributed.world import StopFlag, World, limit_threads
from segformer.errors import CheckpointError, RunTaken, reported
from segformer.evaluation.metrics import SCORES, Scores
from segformer.evaluation.tables import percent
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.meter import memory
from segformer.telemetry.progress import Evaluated, duration
from segformer.training.config import RunConfig
from segformer.training.directory import leased
from segformer.training.early_stop import stops_early
from segformer.training.header import draw_first_batch
from segformer.training.recovery import count_skipped, report_replaced, roll_back
from segformer.training.run import Services, config_summary, set_up
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
    run_dir = Path(cfg.run_dir)
    with (
        determinism(cfg.engine),
        leased(cfg, world) as (cfg, sizes, lease),
        StopFlag() as flag,
        Watchdog(run_dir / "stacks", world, cfg.engine.timeout_s) as watchdog,
        Telemetry(
            cfg.telemetry, run_dir, world, name=cfg.name, steps=cfg.steps, config=config_summary(cfg)
        ) as telemetry,
        lost_ranks(watchdog),
    ):
        watchdog.record = telemetry.keep
        for line in sizes:
            telemetry.line(line)
        task, model, run = set_up(cfg, world, telemetry, Stopping(world, flag, watchdog), lease)
        with contextlib.closing(run):
            return _loop(cfg, world, task, model, run)


def _loop(cfg: RunConfig, world: World, task: Task, model: ModelState, run: Services) -> Scores:
    telemetry, meter, stopping, losses = run.telemetry, run.meter, run.stopping, LossSum(world.device)
    accumulation = cfg.batch_shape(world.size).accumulation
    ahead: list[Batch] | None = None  # the micro batches of the next step, once they are fetched
    last = min(cfg.steps, cfg.stop_at or cfg.steps)  # of this start; the schedule is that of the whole run
    scores: Scores | None = None  # of the state as it is
    telemetry.start(model.state.step)
    meter.reset()
    while not _ending(cfg, model.state):
        if _evaluation_due(cfg, model.state):
            scores = _evaluate(cfg, world, task, model, run)
            if scores is None:
                break  # it is made when the run goes on
            if model.state.best_step == model.state.step != run.saved.step:  # the best is always on disk
                _save(cfg, world, model, run)
            continue  # unless it was the last
        start, waited = time.monotonic(), 0.0
        if ahead is None:
            ahead, waited = _fetch(run, accumulation)
            stopping.ask()
            draw_first_batch(cfg, world, task, telemetry, ahead, model.state.step)
        if stopping.agreed():
            break
        batches, ahead = ahead, None
        run.replaced |= {found.sample_id: found.reason for batch in batches for found in batch.replaced}
        if model.state.step + 1 < last:
            ahead, more = _fetch(run, accumulation)
            stopping.ask()
            waited += more
        with run.profiler.step(model.state.step + 1):
            outcome, scores = train_step(cfg, world, task, model, batches, losses), None
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
            ahead = None
            continue
        if step == last or step % cfg.telemetry.log_every == 0:
            _log(world, model, run, losses, outcome.norm)
            report_replaced(cfg, world, state, run)
        if (step == last or step % cfg.checkpoint.save_every == 0) and not state.skipped_in_a_row:
            _save(cfg, world, model, run)
    return _end(cfg, world, task, model, run, scores)


def _end(
    cfg: RunConfig, world: World, task: Task, model: ModelState, run: Services, scores: Scores | None
) -> Scores:
    """Evaluate, save and say how the start ends; all ranks. Raises the reason where the ranks stop."""
    state, telemetry = model.state, run.telemetry
    if not _ending(cfg, state):
        scores = None
    elif scores is None:
        scores = _evaluate(cfg, world, task, model, run)
    run.checkpoints.settle()
    # Of a run with all its steps a new best or evaluation is news: one that is shown again stays as it is,
    # also where an older version did not note its evaluation (0).
    news, before = run.saved != state, run.saved.evaluated
    if scores is not None and state.step == cfg.steps:
        news = run.saved.best_step != state.best_step or before not in (0, state.evaluated)
    if state.step and (run.checkpoints.last_saved != state.step or news):
        _save(cfg, world, model, run, last=True)
    telemetry.stop_bar()
    if scores is None:
        raise run.stopping.reason(state.step, Path(cfg.run_dir) / "checkpoints")
    for row in scores.table(task.scored_classes).splitlines():
        telemetry.line(row)
    if state.best_score is not None:
        name = next(iter(scores.NAMES.values()))
        best = f"best {name} {percent(state.best_score)} at step {state.best_step}"
        telemetry.line(f"{best}, last {percent(scores.score)} at step {state.step}")
    telemetry.end(_ending(cfg, state))
    return scores


def _ending(cfg: RunConfig, state: TrainState) -> str:
    """Why training ends at this step, the last line of a start; "" where it goes on."""
    if whole := _finished(cfg, state):
        return whole
    if not cfg.stop_at or state.step < cfg.stop_at:
        return ""
    goes_on = "the same command without stop_at, or with a larger one, goes on"
    return f"paused at step {state.step} of {cfg.steps} by stop_at={cfg.stop_at}; {goes_on}"


def _finished(cfg: RunConfig, state: TrainState) -> str:
    """Why the whole run ends at this step; "" where it does not."""
    if state.step >= cfg.steps:
        return f"finished: all {cfg.steps} steps are done"
    names = SCORES[cfg.data.task].NAMES
    here = bool(state.evaluations) and state.evaluations[-1]["step"] == state.step
    why = stops_early(cfg.early_stop, names, state.evaluations) if here else ""
    goes_on = "early_stop.patience=0, or a larger one, goes on"
    return why and f"stopped early at step {state.step} of {cfg.steps}: {why}; {goes_on}"


def _fetch(run: Services, count: int) -> tuple[list[Batch], float]:
    """The micro batches of a step, fewer where the data is damaged, and the seconds they took."""
    start = time.monotonic()
    batches: list[Batch] = []
    with reported(run.stopping.fail):
        while len(batches) < count:
            batches.append(next(run.batches))
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


def _evaluation_due(cfg: RunConfig, state: TrainState) -> bool:
    """The evaluation of the last step is to be made; never amid skipped steps."""
    wanted = state.step > 0 and state.step % cfg.eval_every == 0
    return wanted and state.evaluated != state.step and not state.skipped_in_a_row


def _evaluate(cfg: RunConfig, world: World, task: Task, model: ModelState, run: Services) -> Scores | None:
    """Scores on the evaluation split, None where the ranks stop; remembers the best step; all ranks."""
    start, state, telemetry = time.monotonic(), model.state, run.telemetry
    counts = _evaluation_due(cfg, state)
    swapped = contextlib.nullcontext() if model.ema is None else model.ema.swapped_in(world)
    split = task.shards.split(cfg.eval_split)
    where = f"in evaluation (eval_batch={cfg.eval_batch}); lower eval_batch"
    with swapped, enough_memory(world.rank, lambda: where):
        scores = task.evaluate(
            model.engine,
            world,
            should_stop=run.stopping.agreed,
            on_error=run.stopping.fail,
            warn=telemetry.of_rank,
            pictures=cfg.telemetry.pictures,
            advance=Evaluated(split.num_samples, telemetry.line).add,
        )
    run.meter.reset()  # it does not count as training time
    if scores is None:
        return None
    state.evaluated = state.step
    if counts:
        found = {key: getattr(scores, key) for key in scores.NAMES}
        known = {key: value for key, value in found.items() if math.isfinite(value)}
        state.evaluations = [*state.evaluations, {"step": state.step, **known}]
    kind = "final" if _finished(cfg, state) else "eval"
    better = math.isfinite(scores.score) and (state.best_score is None or scores.score > state.best_score)
    if better and (counts or kind == "final"):  # a pause elsewhere would make a best that the run has not
        state.best_score, state.best_step = scores.score, state.step
    values = scores.to_dict() | {"protocol": task.protocol}
    telemetry.scores(kind, state.step, values, task.scored_classes)
    telemetry.pictures(state.step, scores.pictures)
    of = "" if model.ema is None else " of the EMA"
    how = f"{split.extent}, {task.protocol}, in {duration(time.monotonic() - start)}"
    telemetry.line(f"step {state.step}: validation {scores.summary()}{of} ({how})")
    return scores


def _save(cfg: RunConfig, world: World, model: ModelState, run: Services, *, last: bool = False) -> None:
    """Hand the state over to be written, or write it (last); all ranks."""
    report_replaced(cfg, world, model.state, run)
    run.checkpoints.settle()  # never two copies of the state in the host's memory
    if isinstance(run.order, MixedOrder):
        model.state.order_spec = {"sets": run.order.to_dict(model.state.step * cfg.global_batch)}
    run.checkpoints.save(model.gather(world), last=last)
    run.saved = replace(model.state)
    run.meter.reset()
