"""Checkpoints: saved while training goes on, old ones deleted; reader.py finds the newest good one again.

    runs/x/checkpoints/
      step-00016000/             a committed folder (atomic.py) of the files of format.py
      step-00016500/

    checkpointer = Checkpointer(cfg.checkpoint, folder, world.on_main, warn=..., failed=...)   # all ranks
    checkpointer.settle()                      # so that memory never holds two copies
    checkpointer.save(content)                 # goes on at once
    checkpointer.save(content, last=True)      # is on the disk when it returns
    checkpointer.settle(final=True)            # before a run ends without a last save

Save: every rank takes part in gathering the tensors; rank zero checks that they are finite and hands them to
a thread, which writes. The thread never calls a collective: all ranks learn its outcome together, at the next
save or settle. A save that fails (a full disk) costs nothing but itself: older checkpoints stay and the run
goes on, until max_failures saves in a row have failed. The thread outlives an error of the main thread, so
that a save that was handed over is finished before the process ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from segformer.checkpoint.atomic import commit, delete
from segformer.checkpoint.format import Checkpoint, check_finite, step_name, writers_of
from segformer.checkpoint.reader import list_steps
from segformer.errors import CheckpointError, ConfigError, at_least, listed


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every: int = 1000
    "Optimizer steps between checkpoints; others are written for a new best, at a stop and at the end."
    keep_last: int = 3
    "Newest checkpoints to keep; the one with the best validation score stays beside them."
    keep_every: int = 0
    "Checkpoints of every multiple of so many steps stay forever; 0: none."
    background: bool = True
    "Write in a thread while training goes on; needs host memory for one copy of the saved tensors."
    notice_s: float = 0.0
    "Seconds from a stop signal to the end of the job; a save that takes half of them is warned of. 0: any."
    max_failures: int = 3
    "Saves in a row that may fail (a full disk) before the run ends; older checkpoints stay."

    def __post_init__(self) -> None:
        at_least(self, "checkpoint.", save_every=1, keep_last=1, keep_every=0, max_failures=1, notice_s=0)

    def check_kept(self) -> None:
        """ConfigError where a step that shall stay is not saved."""
        if self.keep_every % self.save_every:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of "
                f"checkpoint.save_every={self.save_every}: other steps are not saved"
            )


class _Outcome(NamedTuple):
    """How a save went."""

    step: int
    seconds: float = 0.0
    "From the beginning to the commit."
    left: Sequence[Path] = ()
    "Older checkpoints that could not be deleted."
    failure: str = ""
    "Why the disk did not take it. Not the error itself: the frames of its traceback keep the tensors."


class Checkpointer:
    """Saves a run while it goes on; one on every rank, every method called by all of them.

    `on_main` runs a function on rank zero and gives its result, or its error, to all ranks (World.on_main).
    The ranks wait for a long write in rounds of `round_s` seconds, each of which begins with `progress`: one
    long collective would meet the group's timeout.

    `fence` raises where this process must not write any more; it is called in the writer's thread, before a
    commit and before old ones are deleted. `warn` prints a line, `failed` records (step, reason) of a save
    that failed; rank zero, main thread.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        folder: Path,
        on_main: Callable[[Callable[[], Any]], Any],
        *,
        warn: Callable[[str], None],
        failed: Callable[[int, str], None],
        fence: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
        round_s: float = 5.0,
        last_saved: int | None = None,
        best_step: int | None = None,
    ) -> None:
        self.last_saved = last_saved
        "The newest committed step, as far as the ranks have learned."
        self._progress, self._round_s, self._fence = progress, round_s, fence
        self._cfg, self._folder, self._on_main = cfg, folder, on_main
        self._warn, self._failed = warn, failed
        # Rank zero only. The interpreter waits for the thread also where the main thread ends with an error.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[_Outcome] | None = None
        self._failures, self._failure, self._warned = 0, "", False
        if last_saved is not None:  # a lower keep_last makes room before the next save
            on_main(lambda: _prune(folder, cfg, last_saved, best_step))

    def save(self, content: Checkpoint, *, last: bool = False) -> None:
        """Save `content`, whose tensors are {} off rank zero; all ranks.

        The tensors belong to the writer from now on, the state is copied. Waits for the save before this
        one, and for this one only where `last` is set or checkpoint.background is not.

        Raises:
            CheckpointError: a tensor is not finite; the last of checkpoint.max_failures saves in a row
                failed; with `last`, this save failed. Older checkpoints are as they were.
        """
        self.settle()
        self._on_main(lambda: self._start(content))  # all ranks
        if last or not self._cfg.background:
            self.settle(final=last)

    def settle(self, *, final: bool = False) -> None:
        """Wait for the save in flight, if there is one, and agree on how it went; all ranks.

        final: at the end of a run, where no failure can be made good any more.

        Raises:
            CheckpointError: it failed, the last of checkpoint.max_failures in a row; or, `final`, at all.
        """
        settled = False
        while not settled:
            self._progress()
            settled, self.last_saved = self._on_main(lambda: self._join(final))  # all ranks

    def wait(self) -> None:
        """Wait for the save in flight without asking how it went: the run ends with an error; any rank."""
        if self._pending is not None:
            wait([self._pending])

    def _start(self, content: Checkpoint) -> None:
        """Check the tensors and hand them over; rank zero."""
        state = content.state
        check_finite(content[:3], state.step)
        self._pending = self._thread.submit(self._write, writers_of(content), state.step, state.best_step)

    def _write(
        self, writers: dict[str, Callable[[Path], object]], step: int, best_step: int | None
    ) -> _Outcome:
        """Write and prune; in the thread."""
        began = time.monotonic()
        try:
            commit(self._folder, step_name(step), writers, self._fence)
            seconds = time.monotonic() - began
            self._fence()
            return _Outcome(step, seconds, _prune(self._folder, self._cfg, step, best_step))
        except CheckpointError as error:
            return _Outcome(step, failure=str(error))

    def _join(self, final: bool) -> tuple[bool, int | None]:
        """Wait a while; (nothing is in flight any more, the newest committed step); rank zero."""
        pending, outcome = self._pending, None
        if pending is not None:
            wait([pending], timeout=self._round_s)
            if not pending.done():
                return False, self.last_saved
            self._pending = None
            outcome = pending.result()
            self._count(outcome)
        count = f"{self._failures} of {self._cfg.max_failures} failures in a row"
        if self._failure and (final or self._failures >= self._cfg.max_failures):
            newest = "the one it started from" if self.last_saved is None else f"step {self.last_saved}"
            raise CheckpointError(f"{self._failure}; {count}, the newest checkpoint is {newest}")
        if outcome is not None and outcome.failure:
            self._warn(f"{outcome.failure}; older checkpoints stay and training goes on ({count})")
        return True, self.last_saved

    def _count(self, outcome: _Outcome) -> None:
        """Take down how a save went, and warn of what a user should see to; rank zero."""
        self._failure = outcome.failure
        if outcome.failure:
            self._failures += 1
            self._failed(outcome.step, outcome.failure)
            return
        self._failures, self.last_saved = 0, outcome.step
        if outcome.left:
            self._warn(f"{listed(map(str, outcome.left))} can't be deleted; delete by hand")
        if self._cfg.notice_s and 2 * outcome.seconds > self._cfg.notice_s and not self._warned:
            self._warned = True
            self._warn(
                f"a checkpoint takes {outcome.seconds:.0f} s, and the job has {self._cfg.notice_s:.0f} s to "
                f"save before it is ended; resubmit with signal_delay_s={math.ceil(3 * outcome.seconds)}"
            )


def _prune(folder: Path, cfg: CheckpointConfig, newest: int, best_step: int | None) -> list[Path]:
    """Delete what is not kept, after `newest` has been committed; the folders that can't be deleted."""
    steps = list_steps(folder)
    kept = {newest, best_step, *steps[-cfg.keep_last :]}
    if cfg.keep_every:
        kept |= {step for step in steps if step % cfg.keep_every == 0}
    doomed = [folder / step_name(step) for step in steps if step not in kept]
    return [path for path in doomed if not delete(path)]
