"""The ranks' agreement to end a run: because of a signal, or of an error, on any of them.

SIGTERM, SIGHUP, SIGUSR2 and Ctrl-C only set a flag on whichever rank receives them, and an error in the data
is kept by the rank that met it: raised at once, it would leave the other ranks in a collective.

The loop asks before a step and reads the answer after it, so that the exchange, tens of milliseconds among
hundreds of ranks, goes on beside the step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from segformer.distributed.watchdog import Watchdog
from segformer.distributed.world import StopFlag, World
from segformer.errors import Preempted, SegformerError, error_line

MEANING = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGHUP: "the terminal was closed",
    signal.SIGUSR2: "the time limit of a job is near",
}


class Stopping:
    """Reasons of this rank to end the run, and the question to all ranks."""

    def __init__(self, world: World, flag: StopFlag, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.waited = 0.0
        "Seconds that this rank waited for the others when they last agreed."
        self._world, self._flag = world, flag
        self._failure: SegformerError | None = None
        self._answer: Callable[[], bool] | None = None

    def fail(self, error: SegformerError) -> None:
        """Keep an error of this rank until the ranks agree to stop."""
        self._failure = error

    def ask(self) -> None:
        """Begin to ask whether a rank has received a signal or can't go on; all ranks."""
        if self._answer is not None:
            self._answer()  # a reason to stop stays one
        self._answer = self._world.begin_any(self._flag.signal is not None or self._failure is not None)

    def agreed(self) -> bool:
        """The answer to what was asked last, or asked now: True where all stop; all ranks."""
        self.watchdog.progress()
        start = time.monotonic()
        if self._answer is None:
            self.ask()
        assert self._answer is not None
        stop, self._answer = self._answer(), None
        self.waited = time.monotonic() - start
        return stop

    def reason(self, step: int, folder: Path) -> BaseException:
        """The error on the rank that has one, a silent exit on the others; or Preempted. All ranks."""
        signals = [number for number in self._world.gather(self._flag.signal) if number is not None]
        mine = None if self._failure is None else (self._failure.exit_code, error_line(self._failure))
        failures = [(*one, rank) for rank, one in enumerate(self._world.gather(mine)) if one is not None]
        if failures:
            code, line, rank = min(failures)  # 2 before 76: starting again would not mend it
            silent = SystemExit(code)
            silent.add_note(f"rank {rank}: {line}")  # for the log
            return self._failure or silent
        name = signal.Signals(signals[0]).name
        name += f" ({MEANING[signals[0]]})" if signals[0] in MEANING else ""
        self._flag.signal = signals[0]  # on all ranks: they end now, deaf to further ones
        if not step:
            return Preempted(f"stopped before the first step by {name}; the same command begins again")
        where = f"the state is in {folder}; the same command continues"
        return Preempted(f"stopped at step {step} by {name}; {where}")
