"""Training: one loop over a run (run.py), one function for an optimiser step.

    for every optimiser step: fetch, agree to go on, step, log, evaluate, save - in this order

Determinism: the weights after step t are a function of (configuration, shards, world size, device). The
sample order and augmentation don't depend on ranks or workers; the generator that drop-out draws from is
seeded anew at every step from (seed, step, rank), so a resume needs no random state.

Stopping: SIGTERM, SIGUSR2 and Ctrl-C set a flag on whichever rank receives them, and damaged data is kept as
an error of the rank that read it. Before the next step (or batch of an evaluation) all ranks agree to stop,
save one checkpoint together and end: with Preempted (exit code 75) or with the error of the rank that has it.
A second Ctrl-C stops at once.
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from segformer.checkpoint import save_checkpoint
from segformer.config import RunConfig
from segformer.data.loader import Batch
from segformer.data.prepare import over_budget
from segformer.dist import StopFlag, World, derive_seed, limit_threads
from segformer.engine import resolve_precision, total_norm
from segformer.errors import ConfigError, DataError, Preempted, SegformerError
from segformer.evaluate import evaluate
from segformer.metrics import Scores
from segformer.optim import set_learning_rate
from segformer.run import Run, config_summary, prepare_run_dir, set_up
from segformer.telemetry import Meter, Telemetry, duration, memory_gib


def train(cfg: RunConfig, world: World) -> Scores:
    """Train, or continue, the run of `cfg` and return the scores of its last step, equal on all ranks.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, where something does not fit.
        Preempted: a signal stopped the run; the same call continues it.
        DataError: in the middle of the run, on the rank that met it; the state before it has been saved.
    """
    limit_threads(world)
    world.on_main(lambda: prepare_run_dir(cfg))
    summary = config_summary(cfg)
    with (
        StopFlag() as stop,
        Telemetry(
            cfg.telemetry, Path(cfg.run_dir), world, name=cfg.name, steps=cfg.steps, config=summary
        ) as telemetry,
    ):
        return _loop(set_up(cfg, world, telemetry, stop))


def _loop(run: Run) -> Scores:
    cfg, state, telemetry = run.cfg, run.state, run.telemetry
    telemetry.start(state.step)
    meter, losses, saved = Meter(), LossSum(run.engine.device), state.step
    while state.step < cfg.steps:
        batches, waited = _fetch(run)
        if _stopping(run):
            break
        norm = train_step(run, batches, losses)
        state.step += 1
        telemetry.advance()
        meter.add(cfg.global_batch, waited)
        last = state.step == cfg.steps
        if last or state.step % cfg.telemetry.log_every == 0:
            _log(run, losses, norm, meter)
            _tell_replaced(run)
        due = state.step % cfg.checkpoint.save_every == 0
        if not last and state.step % cfg.eval_every == 0:
            _evaluate(run)
            due = due or state.best_step == state.step  # the best is always on disk
            meter.reset()  # evaluation and saving don't count as training time
        if not last and due:
            saved = _save(run)
            meter.reset()
    scores = _evaluate(run) if state.step == cfg.steps else None
    if saved < state.step:
        _save(run)
    telemetry.stop_bar()
    if scores is None:
        raise _stopped(run)
    telemetry.line(scores.table(run.shards.classes))
    return scores


def _fetch(run: Run) -> tuple[list[Batch], float]:
    """The micro batches of the next step and the seconds they took.

    An error in the data is kept until the ranks agree to stop: raised here, it would leave the others in a
    collective.
    """
    start = time.monotonic()
    batches: list[Batch] = []
    try:
        while len(batches) * run.micro_batch * run.world.size < run.cfg.global_batch:
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
        self._count = 0

    def add(self, loss: Tensor, parts: dict[str, Tensor]) -> None:
        """Count one micro batch."""
        for name, value in {"loss": loss, **parts}.items():
            self._sums[name] = (
                self._sums.get(name, torch.zeros((), device=self._device)) + value.detach().float()
            )
        self._count += 1

    def means(self, world: World) -> dict[str, float]:
        """Mean over the interval and all ranks, then a new interval; all ranks."""
        names = sorted(self._sums)
        total = world.sum(torch.stack([self._sums[name] for name in names])) / (self._count * world.size)
        self.clear()
        return dict(zip(names, total.tolist(), strict=True))


def train_step(run: Run, batches: list[Batch], losses: LossSum) -> Tensor | float | None:
    """One optimiser step over the rank's micro batches; all ranks. Returns the unclipped gradient norm."""
    cfg, engine = run.cfg, run.engine
    set_learning_rate(engine.optimizer.param_groups, cfg.optim, run.state.step, cfg.steps)
    engine.train()
    norm: Tensor | None = None
    for index, batch in enumerate(batches):
        torch.manual_seed(derive_seed(cfg.seed, "step", run.state.step, index, run.world.rank))
        batch = batch.to(run.world.device, non_blocking=True)
        logits = engine(run.normalize(batch.images, batch.photometric))
        loss, parts = run.criterion(logits, batch.targets)
        engine.backward(loss)
        if index == len(batches) - 1:
            norm = total_norm(engine)
        engine.step()
        losses.add(loss, parts)
    return norm if norm is not None else engine.get_global_grad_norm()


def _log(run: Run, losses: LossSum, norm: Tensor | float | None, meter: Meter) -> None:
    means = losses.means(run.world)
    groups = {str(group["name"]): group["lr"] for group in run.engine.optimizer.param_groups}
    values: dict[str, float | None] = {**means, "lr": groups["backbone"], "lr_head": groups["head"]}
    values["grad_norm"] = None if norm is None else float(norm)
    values |= meter.rates() | {"memory_gib": memory_gib(run.world.device)}
    run.telemetry.train(run.state.step, values)
    meter.reset()
    if not math.isfinite(means["loss"]):
        run.world.on_main(lambda: _diverged(run, means["loss"]))


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


def _diverged(run: Run, loss: float) -> NoReturn:
    raise ConfigError(
        f"the loss is {loss} at step {run.state.step}; lower optim.lr, or look at the data; "
        f"checkpoints in {run.folder} are from before"
    )


def _evaluate(run: Run) -> Scores | None:
    """Scores on the evaluation split, or None when a signal came; remembers the best step; all ranks."""
    cfg, world, state = run.cfg, run.world, run.state
    split = run.shards.split(cfg.eval_split)
    start = time.monotonic()
    scores = evaluate(
        run.engine,
        run.normalize,
        split,
        cfg.loader,
        world,
        num_classes=len(run.shards.classes),
        batch_size=cfg.eval_batch,
        bf16=resolve_precision(cfg.engine, world.device) == "bf16",
        interrupted=lambda: _stopping(run),
        failed=run.fail,
    )
    if scores is None:
        return None
    run.telemetry.scores("final" if state.step == cfg.steps else "eval", state.step, scores.to_dict())
    run.telemetry.line(
        f"step {state.step}: validation mIoU {scores.miou:.4f}, mAcc {scores.macc:.4f}, "
        f"aAcc {scores.aacc:.4f} ({split.num_samples} images in {duration(time.monotonic() - start)})"
    )
    if state.best_miou is None or scores.miou > state.best_miou:
        state.best_miou, state.best_step = scores.miou, state.step
    return scores


def _save(run: Run) -> int:
    """Write a checkpoint and return its step; all ranks."""
    _tell_replaced(run)
    save_checkpoint(run.engine, run.state, run.cfg.checkpoint, run.folder, run.world)
    return run.state.step


def _stopping(run: Run) -> bool:
    """Whether any rank has been told to stop, or can't go on; all ranks."""
    return run.world.any(run.stop.signal is not None or run.failure is not None)


def _stopped(run: Run) -> BaseException:
    """Why the run ends early: its error on the rank that has one, silence on others; or Preempted."""
    signals = [number for number in run.world.gather(run.stop.signal) if number is not None]
    if run.world.any(run.failure is not None):
        return run.failure or SystemExit(SegformerError.exit_code)
    return Preempted(
        f"stopped at step {run.state.step} by {signal.Signals(signals[0]).name}; the state is in "
        f"{run.folder}; the same command continues"
    )
