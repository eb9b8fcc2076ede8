"""Training: one loop over a run (run.py), one function for an optimiser step.

    for every optimiser step: fetch, agree to go on, step, log, evaluate, save - in this order

Determinism: the weights after step t are a function of (configuration, shards, world size, device). The
sample order and augmentation don't depend on ranks or workers; the generator that drop-out draws from is
seeded anew at every step from (seed, step, rank), so a resume needs no random state.

Stopping: SIGTERM, SIGUSR2 and Ctrl-C set a flag on whichever rank receives them, and damaged data is kept as
an error of the rank that read it. Before the next step (or batch of an evaluation) all ranks agree to stop,
save one checkpoint together and end: with Preempted (exit code 75) or with the error of the rank that has it.
A second Ctrl-C stops at once. Steps that are not finite: recovery.py; ranks that hang: watchdog.py.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer.checkpoint.lease import Lease
from segformer.data.loading.samples import Batch, over_budget
from segformer.distributed.engine import take_step
from segformer.distributed.watchdog import Watchdog, enough_memory, lost_ranks, smaller_batch
from segformer.distributed.world import StopFlag, World, derive_seed, limit_threads
from segformer.distributed.zero_state import gather_model, gather_optimizer
from segformer.errors import CheckpointError, DataError, Preempted, RunTaken, SegformerError
from segformer.evaluation.metrics import AnyScores
from segformer.telemetry.logger import Telemetry
from segformer.telemetry.meter import memory
from segformer.telemetry.progress import duration
from segformer.training.config import RunConfig
from segformer.training.finite import Statistics, poisoned
from segformer.training.optim import set_learning_rate
from segformer.training.recovery import Outcome, note_outcome, roll_back
from segformer.training.run import Run, config_summary, set_up
from segformer.training.run_dir import prepare_run_dir
from segformer.training.task import training_crop


def train(cfg: RunConfig, world: World) -> AnyScores:
    """Train, or continue, the run of `cfg` and return the scores of its last step, equal on all ranks.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, where something does not fit.
        Preempted: a signal stopped the run; the same call continues it.
        DataError: in the middle of the run, on the rank that met it; the state before it has been saved.
        Diverged: loss or gradients were not finite for several steps, also after going back.
        RankLost: another rank has ended or hangs.
    """
    limit_threads(world)
    stacks = Watchdog(Path(cfg.run_dir) / "stacks", world, cfg.engine.timeout_s)
    described: dict[str, Any] = {"name": cfg.name, "steps": cfg.steps, "config": config_summary(cfg)}
    with (
        _leased(cfg, world) as lease,
        StopFlag() as stop,
        stacks as watchdog,
        Telemetry(cfg.telemetry, Path(cfg.run_dir), world, **described) as telemetry,
        lost_ranks(watchdog),
    ):
        run = set_up(cfg, world, telemetry, stop, watchdog, lease)
        try:
            return _loop(run)
        finally:
            run.batches.close()
            run.profiler.close()
            run.checkpoints.wait()  # before the lease is given back: the writer asks it before it commits


@contextlib.contextmanager
def _leased(cfg: RunConfig, world: World) -> Iterator[Lease | None]:
    """The run directory, made or taken by rank zero, which alone holds the lease; all ranks."""
    held: list[Lease] = []
    world.on_main(lambda: held.append(prepare_run_dir(cfg)))
    try:
        yield held[0] if held else None
    finally:
        for lease in held:
            lease.release()


def _loop(run: Run) -> AnyScores:
    cfg, telemetry, meter = run.cfg, run.telemetry, run.meter
    telemetry.start(run.state.step)
    losses = LossSum(run.engine.device)
    meter.reset()
    while run.state.step < cfg.steps:
        start = time.monotonic()
        batches, waited = _fetch(run)
        if _stopping(run):
            break
        with run.profiler.step(run.state.step + 1):
            outcome = train_step(run, batches, losses)
        run.state.step += 1
        if run.ledger is not None:
            run.ledger.add(run.state.step, [int(i) for batch in batches for i in batch.sample_ids])
        telemetry.advance()
        meter.add(cfg.global_batch, waited, time.monotonic() - start - run.agreeing)
        if run.profiler.covers(run.state.step):
            meter.reset()  # a profiled step is a slow one
        note_outcome(run, batches, outcome)
        if run.state.skipped_in_a_row >= cfg.max_skipped:
            roll_back(run)
            losses.clear()
            continue
        if run.state.step == cfg.steps or run.state.step % cfg.telemetry.log_every == 0:
            _log(run, losses, outcome.norm)
            _tell_replaced(run)
        if run.state.step < cfg.steps and not run.state.skipped_in_a_row:
            _evaluate_and_save(run)
    scores = _evaluate(run) if run.state.step == cfg.steps else None
    run.checkpoints.settle()
    if run.state.step and run.checkpoints.last_saved != run.state.step:
        _save(run, last=True)
    telemetry.stop_bar()
    if scores is None:
        raise _stopped(run)
    telemetry.line(scores.table(run.shards.classes))
    return scores


def _evaluate_and_save(run: Run) -> None:
    """What is due after a step, neither of which counts as training time; all ranks."""
    cfg, state = run.cfg, run.state
    due = state.step % cfg.checkpoint.save_every == 0
    if state.step % cfg.eval_every == 0:
        _evaluate(run)
        due = due or state.best_step == state.step  # the best is always on disk
        run.meter.reset()
    if due:
        _save(run)
        run.meter.reset()


def _fetch(run: Run) -> tuple[list[Batch], float]:
    """The micro batches of the next step and the seconds they took.

    An error in the data is kept until the ranks agree to stop: raised here, it would leave the others in a
    collective.
    """
    start = time.monotonic()
    batches: list[Batch] = []
    try:
        while len(batches) < run.batch.accumulation:
            batches.append(next(run.batches))
    except SegformerError as error:
        run.fail(error)
    run.replaced |= {found.sample_id: found.reason for batch in batches for found in batch.replaced}
    return batches, time.monotonic() - start


class LossSum:
    """Sums of the loss and its parts on the device, so that only a log line waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Start a new interval."""
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Count one micro batch."""
        for name, value in {"loss": loss, **parts}.items():
            value = value.detach().float()
            finite = value.isfinite()
            entry = torch.stack([torch.where(finite, value, 0.0), finite.float()])
            self._sums[name] = self._sums.get(name, torch.zeros(2, device=self._device)) + entry

    def means(self, world: World) -> dict[str, float | None]:
        """Mean of the finite values of the interval over all ranks, then a new interval; all ranks."""
        names = sorted(self._sums)
        total = world.sum(torch.stack([self._sums[name] for name in names])).tolist()
        self.clear()
        pairs = zip(names, total, strict=True)
        return {name: value / count if count else None for name, (value, count) in pairs}


def train_step(run: Run, batches: list[Batch], losses: LossSum) -> Outcome:
    """One optimiser step over the rank's micro batches; all ranks."""
    cfg, engine, world, step = run.cfg, run.engine, run.world, run.state.step
    set_learning_rate(engine.optimizer.param_groups, cfg.optim, step, cfg.steps)
    engine.train()
    statistics = Statistics(engine.module)
    seen: list[Tensor] = []
    crop = "x".join(map(str, training_crop(cfg)))
    what = f"in step {step + 1} (micro_batch={run.batch.micro_batch}, crop {crop})"
    with enough_memory(world.rank, what, smaller_batch(run.batch.micro_batch)):
        for index, batch in enumerate(batches):
            torch.manual_seed(derive_seed(cfg.seed, "step", step, index, world.rank))
            batch = batch.to(world.device, non_blocking=True)
            position = (step * len(batches) + index) * world.size + world.rank
            loss, parts = run.task.loss(engine, batch, position)
            engine.backward(poisoned(loss))
            losses.add(loss, parts)
            seen.append(loss.detach())
            if index < len(batches) - 1:
                engine.step()
        norm, taken = take_step(engine, cfg.engine.grad_clip)
    if not taken:
        statistics.put_back()
        return Outcome(norm, taken, bool(torch.stack(seen).isfinite().all()))
    if run.average is not None:
        run.average.update(step - run.state.skipped)
    return Outcome(norm, taken, True)


def _log(run: Run, losses: LossSum, norm: float | None) -> None:
    means = losses.means(run.world)
    groups = {str(group["name"]): float(group["lr"]) for group in run.engine.optimizer.param_groups}
    body = [rate for name, rate in groups.items() if not name.startswith("head")] or list(groups.values())
    values: dict[str, float | None] = {**means, "lr": max(body)}
    values |= {f"lr/{name}": groups[name] for name in _told(list(groups))}
    values |= {"grad_norm": norm, "skipped": float(run.state.skipped)}
    values |= run.meter.rates() | memory(run.world.device)
    values["loss_spike"] = None if means["loss"] is None else run.spike.ratio(means["loss"])
    if run.lease is not None:
        try:
            run.lease.check()
        except RunTaken as error:
            return run.fail(error)
        except CheckpointError as error:
            run.telemetry.line(str(error))  # the file system is slow; the next commit asks again
    run.telemetry.train(run.state.step, values)
    run.meter.reset()


def _told(names: list[str]) -> list[str]:
    """The groups whose lr is logged: all, or with layer decay the first, the last and the head."""
    layers = [name for name in names if "." in name]
    return [name for name in names if name not in layers[1:-1]]


def _tell_replaced(run: Run) -> None:
    """Bring together which corrupt samples the ranks replaced, and fail where they are too many; all ranks.

    A sample counts once, whichever ranks and epochs meet it.
    """
    if not run.world.any(bool(run.replaced)):
        return
    met = {sample: reason for part in run.world.gather(run.replaced) for sample, reason in part.items()}
    run.replaced = {}
    state = run.state
    for sample_id in sorted(met.keys() - set(state.corrupt)):
        state.corrupt = sorted([*state.corrupt, sample_id])
        run.telemetry.replaced(state.step, sample_id, met[sample_id])
    if len(state.corrupt) > run.corrupt_budget and run.world.is_main:
        last = met[max(met)]
        run.failure = DataError(over_budget(len(state.corrupt), run.corrupt_budget, last))


def _evaluate(run: Run) -> AnyScores | None:
    """Scores on the evaluation split, or None when a signal came; remembers the best step; all ranks."""
    cfg, world, state = run.cfg, run.world, run.state
    start = time.monotonic()
    shown = run.average.shown(world) if run.average is not None else contextlib.nullcontext()
    with shown, enough_memory(world.rank, f"in evaluation (eval_batch={cfg.eval_batch})", "lower eval_batch"):
        scores = run.task.evaluate(
            run.engine,
            world,
            should_stop=lambda: _stopping(run),
            on_error=run.fail,
            pictures=cfg.telemetry.pictures,
        )
    if scores is None:
        return None
    kind = "final" if state.step == cfg.steps else "eval"
    run.telemetry.scores(kind, state.step, scores.to_dict(), run.shards.classes)
    run.telemetry.pictures(state.step, scores.pictures)
    count = run.shards.split(cfg.eval_split).num_samples
    average = " of the averaged weights" if run.average is not None else ""
    run.telemetry.line(
        f"step {state.step}: validation {scores.summary()}{average} "
        f"({count} images in {duration(time.monotonic() - start)})"
    )
    if math.isfinite(scores.score) and (state.best_score is None or scores.score > state.best_score):
        state.best_score, state.best_step = scores.score, state.step
    return scores


def _save(run: Run, *, last: bool = False) -> None:
    """Hand the state over to be written, or write it (last); all ranks."""
    _tell_replaced(run)
    run.checkpoints.settle()  # never two copies of the state in the host's memory
    average = {} if run.average is None else run.average.gather(run.world)
    model, optimizer = gather_model(run.engine), gather_optimizer(run.engine, run.world)
    run.checkpoints.save(model, optimizer, average, run.state, last=last)


def _stopping(run: Run) -> bool:
    """Whether any rank has been told to stop, or can't go on; all ranks."""
    run.watchdog.progress()
    start = time.monotonic()
    stop = run.world.any(run.stop.signal is not None or run.failure is not None)
    run.agreeing = time.monotonic() - start
    return stop


def _stopped(run: Run) -> BaseException:
    """Why the run ends early: its error on the rank that has one, silence on others; or Preempted."""
    signals = [number for number in run.world.gather(run.stop.signal) if number is not None]
    if run.world.any(run.failure is not None):
        return run.failure or SystemExit(SegformerError.exit_code)
    name = signal.Signals(signals[0]).name
    if not run.state.step:
        return Preempted(f"stopped before the first step by {name}; the same command begins again")
    where = f"the state is in {run.folder}; the same command continues"
    return Preempted(f"stopped at step {run.state.step} by {name}; {where}")
