"""Steps that were not taken because the loss or a gradient was not finite: counted, named, gone back from.

A skipped step uses up its samples and its place in the schedule; weights, moments and their average stay as
they were, so that it doesn't matter to anything else that it was there. cfg.max_skipped of them in a row lead
back to the newest good checkpoint, once: an accident of the hardware does not happen again. A cause in the
data or the settings does, and then the run ends and says which samples they were.
"""

from __future__ import annotations

from dataclasses import dataclass

from segformer.data.loading.samples import Batch
from segformer.errors import Diverged
from segformer.training.finite import name_samples
from segformer.training.run import Run, go_back


@dataclass(slots=True)
class Outcome:
    """What came of an optimiser step."""

    norm: float | None
    "Norm of the averaged gradients before clipping."
    taken: bool
    "Whether the weights moved; the same on all ranks."
    finite: bool
    "Whether this rank's losses were all finite; where the step was taken they were."


def note_outcome(run: Run, batches: list[Batch], outcome: Outcome) -> None:
    """Count, name and record a step that was not taken, and forget the row where one was; all ranks."""
    state = run.state
    if outcome.taken:
        state.skipped_in_a_row = 0
        run.skipped.clear()
        if state.step >= state.bad_step:
            state.bad_step = 0
        return
    split = run.shards.split(run.cfg.train_split)
    names = [split.describe(int(sample)) for batch in batches for sample in batch.sample_ids.tolist()]
    found = run.world.gather((outcome.finite, names))
    ranks = [rank for rank, (finite, _) in enumerate(found) if not finite]
    samples = sorted(name for finite, names in found for name in names if not (finite and ranks))
    run.skipped.append({"step": state.step, "ranks": ranks, "samples": samples})
    state.skipped += 1
    state.skipped_in_a_row += 1
    what = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
    run.telemetry.event("skipped", state.step, ranks=ranks, samples=samples)
    run.telemetry.line(f"step {state.step}: {what} is not finite; step skipped ({state.skipped} so far)")


def roll_back(run: Run) -> None:
    """To the newest good checkpoint from before the row; all ranks.

    Raises:
        Diverged: on rank zero, and the others end with it: there is no such checkpoint, or the run has gone
            back before and did not get past the same place.
    """
    count, step, been_there = run.state.skipped_in_a_row, run.state.step, run.state.bad_step
    steps = ", ".join(str(found["step"]) for found in run.skipped)
    trouble = (
        f"loss or gradients were not finite in steps {steps}; samples: {name_samples(run.skipped)} (all: "
        f'"skipped" in metrics.jsonl); lower optim.lr, or look at these samples; checkpoints: {run.folder}'
    )

    def end(why: str) -> None:
        raise Diverged(f"{why}: {trouble}")

    run.checkpoints.settle()
    if been_there:
        run.world.on_main(lambda: end("going back to a checkpoint did not help"))
    if not go_back(run):
        run.world.on_main(lambda: end("there is no checkpoint yet to go back to"))
    run.state.bad_step = step
    run.skipped.clear()
    run.telemetry.event("rollback", run.state.step, from_step=step)
    run.telemetry.line(f"{count} steps in a row were skipped: back to step {run.state.step}, once")
    run.telemetry.stop_bar()
    run.telemetry.start(run.state.step)
    run.meter.reset()
