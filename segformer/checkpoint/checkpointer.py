"""Checkpoints: saved while training goes on, old ones deleted; reader.py finds the newest good one again.

    runs/x/checkpoints/
      step-00016000/             a committed folder (atomic.py) of the files of format.py
      step-00016500/

    checkpointer = Checkpointer(cfg.checkpoint, folder, world, warn=..., failed=...)      # all ranks, always
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

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from segformer.checkpoint.atomic import commit, delete
from segformer.checkpoint.format import Checkpoint, check_finite, step_name, writers_of
from segformer.checkpoint.reader import list_steps
from segformer.distributed.world import World
from segformer.errors import CheckpointError, ConfigError, at_least


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
        if self.keep_every % self.save_every:
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of "
                f"checkpoint.save_every={self.save_every}: other steps are not saved"
            )


@dataclass(slots=True)
class _Write:
    """A save in the writer's hands."""

    step: int
    thread: threading.Thread = field(init=False)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    "From the beginning to the commit."
    failure: str = ""
    "Why the disk did not take it."
    bug: BaseException | None = None
    complaints: list[str] = field(default_factory=list)
    "What could not be deleted afterwards."


class Checkpointer:
    """Saves a run while it goes on; one on every rank, every method called by all of them.

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
        world: World,
        *,
        warn: Callable[[str], None],
        failed: Callable[[int, str], None],
        fence: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
        round_s: float = 5.0,
        last_saved: int | None = None,
    ) -> None:
        self.last_saved = last_saved
        "The newest committed step, as far as the ranks have learned."
        self._progress, self._round_s, self._fence = progress, round_s, fence
        self._cfg, self._folder, self._world = cfg, folder, world
        self._warn, self._failed = warn, failed
        self._write: _Write | None = None  # this and what follows: rank zero only
        self._failures, self._failure, self._warned = 0, "", False

    def save(self, content: Checkpoint, *, last: bool = False) -> None:
        """Save `content`, whose tensors are {} off rank zero; all ranks.

        The tensors belong to the writer from now on, the state is copied. Waits for the save before this
        one, and for this one only where `last` is set or checkpoint.background is not.

        Raises:
            CheckpointError: a tensor is not finite; the last of checkpoint.max_failures saves in a row
                failed; with `last`, this save failed. Older checkpoints are as they were.
        """
        self.settle()
        self._world.on_main(lambda: self._start(content))  # all ranks
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
            settled, self.last_saved = self._world.on_main(lambda: self._join(final))  # all ranks

    def wait(self) -> None:
        """Wait for the save in flight without asking how it went: the run ends with an error; any rank."""
        if self._write is not None:
            self._write.thread.join()

    def _start(self, content: Checkpoint) -> None:
        """Check the tensors and hand them over; rank zero."""
        state = content.state
        check_finite(content[:3], state.step)
        write, writers = _Write(state.step), writers_of(content)
        job = partial(_write, write, writers, self._folder, self._cfg, state.best_step, self._fence)
        # No daemon: the interpreter waits for it also where the main thread ends with an error.
        write.thread = threading.Thread(target=job, name=f"checkpoint {state.step}", daemon=False)
        write.thread.start()
        self._write = write

    def _join(self, final: bool) -> tuple[bool, int | None]:
        """Wait a while; whether nothing is in flight any more, and the newest committed step; rank zero."""
        write = self._write
        if write is not None:
            write.thread.join(self._round_s)
            if write.thread.is_alive():
                return False, self.last_saved
            self._write = None
            self._take(write)
        count = f"{self._failures} of {self._cfg.max_failures} failures in a row"
        if self._failure and (final or self._failures >= self._cfg.max_failures):
            newest = "the one it started from" if self.last_saved is None else f"step {self.last_saved}"
            raise CheckpointError(f"{self._failure}; {count}, the newest checkpoint is {newest}")
        if write is not None and write.failure:
            self._warn(f"{write.failure}; older checkpoints stay and training goes on ({count})")
        return True, self.last_saved

    def _take(self, write: _Write) -> None:
        """Count the outcome of a write that has ended; rank zero."""
        if write.bug is not None:
            raise write.bug
        for complaint in write.complaints:
            self._warn(complaint)
        self._failure = write.failure
        if write.failure:
            self._failures += 1
            with contextlib.suppress(OSError):  # what it records in may be on the same full disk
                self._failed(write.step, write.failure)
        else:
            self._failures, self.last_saved = 0, write.step
            self._compare(write.seconds)

    def _compare(self, seconds: float) -> None:
        """Warn, once, of a save that leaves too little of the notice; rank zero."""
        if self._cfg.notice_s and 2 * seconds > self._cfg.notice_s and not self._warned:
            self._warned = True
            self._warn(
                f"a checkpoint takes {seconds:.0f} s, and the job has {self._cfg.notice_s:.0f} s to save "
                f"before it is ended; resubmit with signal_delay_s={math.ceil(3 * seconds)}"
            )


def _write(
    write: _Write,
    writers: Mapping[str, Callable[[Path], object]],
    folder: Path,
    cfg: CheckpointConfig,
    best_step: int | None,
    fence: Callable[[], None],
) -> None:
    """Write and prune, in the thread; the outcome is left in `write`."""
    try:
        commit(folder, step_name(write.step), writers, fence)
        write.seconds = time.monotonic() - write.began
        fence()
        write.complaints = _prune(folder, cfg, write.step, best_step)
    except CheckpointError as error:
        write.failure = str(error)  # not the error itself: the frames of its traceback keep the tensors
    except BaseException as error:  # the main thread raises it
        write.bug = error


def _prune(folder: Path, cfg: CheckpointConfig, newest: int, best_step: int | None) -> list[str]:
    """Delete what is not kept, after `newest` has been committed; what can't be deleted, as lines."""
    steps = list_steps(folder)
    kept = {newest, best_step, *steps[-cfg.keep_last :]}
    if cfg.keep_every:
        kept |= {step for step in steps if step % cfg.keep_every == 0}
    return delete(folder / step_name(step) for step in steps if step not in kept)
