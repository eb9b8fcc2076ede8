"""Accidents that a run survives: steps that are not finite, and corrupt samples.

A skipped step (step.py) uses up its samples and its place in the schedule. cfg.max_skipped of them in a row
lead back to the newest good checkpoint, once: an accident of the hardware does not happen again. A cause in
the data or the settings does, and then the run ends and says which samples they were. Corrupt samples are
replaced by the loader, and the run ends where there are more than loader.max_corrupt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from segformer.checkpoint.format import TrainState
from segformer.data.loading.loader import spent_budget
from segformer.data.loading.samples import Batch, over_budget
from segformer.distributed.world import World
from segformer.distributed.zero_state import write_model
from segformer.errors import DataError, Diverged, listed
from segformer.training.config import RunConfig
from segformer.training.run import Services, newest_checkpoint
from segformer.training.step import ModelState, Outcome


def count_skipped(
    world: World, state: TrainState, run: Services, batches: list[Batch], outcome: Outcome
) -> None:
    """Count, log and record a step that was not taken, and forget the row where one was; all ranks."""
    if outcome.taken:
        state.skipped_in_a_row = 0
        run.skipped.clear()
        if state.step >= state.bad_step:
            state.bad_step = 0
        return
    names = [run.split.describe(int(sample)) for batch in batches for sample in batch.sample_ids.tolist()]
    found = world.gather((outcome.finite, names))
    ranks = [rank for rank, (finite, _) in enumerate(found) if not finite]
    samples = sorted(name for finite, names in found for name in names if not (finite and ranks))
    run.skipped.append({"step": state.step, "samples": samples})
    state.skipped += 1
    state.skipped_in_a_row += 1
    what = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
    run.telemetry.event("skipped", state.step, ranks=ranks, samples=samples)
    run.telemetry.line(f"step {state.step}: {what} is not finite; step skipped ({state.skipped} so far)")


def _diverged(why: str, row: Sequence[dict[str, Any]], checkpoints: str) -> NoReturn:
    steps = ", ".join(str(found["step"]) for found in row)
    samples = listed(dict.fromkeys(name for found in row for name in found["samples"]), 8)
    raise Diverged(
        f"{why}: loss or gradients were not finite in steps {steps}; samples: {samples} (all: "
        f'"skipped" in metrics.jsonl); lower optim.lr, or look at these samples; checkpoints: {checkpoints}'
    )


def roll_back(cfg: RunConfig, world: World, model: ModelState, run: Services) -> None:
    """Go on from the newest good checkpoint from before the row of skipped steps, in this process; all ranks.

    Raises:
        Diverged: on rank zero, and the others end with it: there is no such checkpoint, or the run has gone
            back before and did not get past the same place.
    """
    count, step, folder = model.state.skipped_in_a_row, model.state.step, f"{cfg.run_dir}/checkpoints"
    run.checkpoints.settle()
    if model.state.bad_step:
        world.on_main(lambda: _diverged("going back to a checkpoint did not help", run.skipped, folder))
    saved = newest_checkpoint(cfg, world, run.telemetry.line, calm=True)
    if saved is None:
        world.on_main(lambda: _diverged("there is no checkpoint yet to go back to", run.skipped, folder))
    assert saved is not None
    write_model(model.engine, saved.model)
    model.restore(saved)
    run.saved = replace(model.state)
    model.state.bad_step = step
    run.skipped.clear()
    run.checkpoints.last_saved = model.state.step
    run.batches.close()
    run.batches = iter(run.stream(start_step=model.state.step))
    run.telemetry.event("rollback", model.state.step, from_step=step)
    run.telemetry.line(f"{count} steps in a row were skipped: back to step {model.state.step}, once")
    run.telemetry.stop_bar()
    run.telemetry.start(model.state.step)
    run.meter.reset()


def report_replaced(cfg: RunConfig, world: World, state: TrainState, run: Services) -> None:
    """Log which corrupt samples the ranks replaced, and stop where they are too many; all ranks.

    A sample counts once, whichever ranks and epochs meet it.
    """
    if not world.any(bool(run.replaced)):
        return
    met = {sample: reason for part in world.gather(run.replaced) for sample, reason in part.items()}
    run.replaced = {}
    for sample_id in sorted(met.keys() - set(state.corrupt)):
        state.corrupt = sorted([*state.corrupt, sample_id])
        run.telemetry.replaced(state.step, sample_id, met[sample_id])
    if world.is_main and (spent := spent_budget(cfg.loader, run.split, state.corrupt)):
        run.stopping.fail(DataError(over_budget(*spent, met[max(met)])))
