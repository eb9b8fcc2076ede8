"""Watchdog of a rank, and the errors of collectives that mean a lost rank: both end it with exit code 76.

The collectives' own timeout (engine.timeout_s) would end it later, and without a word.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from segformer.distributed.world import World
from segformer.errors import RankLost

DUMP_SHARE, EXIT_SHARE = 0.8, 0.95  # of the collectives' timeout
# What gloo, NCCL, the store and the operating system say when the other side, or the way to it, is gone.
_LOST = re.compile(
    r"connection (closed|reset|refused|timed out)|broken pipe|no route to host|network is unreachable|"
    r"(read|write|connect|wait|socket) ?timeout|timed out waiting|socket closed|pair closure|"
    r"remote process exited|communicator was aborted|failed to recv|failed to send|client socket|"
    r"unhandled system error|Dist(Network|Store)Error|uncorrectable|ECC error|Xid",
    re.IGNORECASE,
)


class Watchdog:
    """Timer of a rank's progress: writes down where the rank hangs, and then ends the process.

    After DUMP_SHARE of `timeout_s` without progress the stacks of all threads go to
    <run_dir>/stacks/rank-00003.txt. The dump is made by a thread of the interpreter's C code, so that it
    works while Python code holds the interpreter and while the rank waits in a collective; a fatal signal
    (segmentation fault) is dumped there, too. After EXIT_SHARE, where there are other ranks to wait for and
    the loop has begun, the process says so and ends: NCCL would end it by SIGABRT without a word. The file
    is removed at the end where nothing was written.
    """

    def __init__(self, folder: Path, world: World, timeout_s: float) -> None:
        self.path = folder / f"rank-{world.rank:05d}.txt"
        self.begun = False
        self.record: Callable[[str], None] = lambda line: None
        "Takes down the line that it ends the process with."
        self._world = world
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._left = threading.Event()

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a")
        faulthandler.enable(self._file)
        faulthandler.dump_traceback_later(self._timeout_s * DUMP_SHARE, file=self._file)
        return self

    def progress(self) -> None:
        """Reset the timer. The first call is that of the loop."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self._timeout_s * DUMP_SHARE, file=self._file)
        if not self.begun:
            self.begun = True
            if self._world.size > 1:
                threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        limit = self._timeout_s * EXIT_SHARE
        while not self._left.wait(max(0.05, self._last + limit - time.monotonic())):
            if time.monotonic() - self._last >= limit:
                rank = "" if self._world.is_main else f"[rank {self._world.rank}] "
                reason = self.lost(f"no progress for {limit:.0f} s")
                self.record(f"RankLost: {reason}")
                print(f"{rank}RankLost: {reason}", file=sys.stderr, flush=True)
                os._exit(RankLost.exit_code)

    def lost(self, why: str) -> str:
        """The message of a rank whose others are gone."""
        stacks = f"; where this rank was: {self.path}" if self.path.stat().st_size else ""
        return (
            f"another rank has ended or hangs ({why}){stacks}; look at the first error of the other ranks; "
            "the same command continues from the newest checkpoint"
        )

    def __exit__(self, *_: object) -> None:
        self._left.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._file.close()
        with contextlib.suppress(OSError):  # the stacks of others; or the run has been removed
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()


def is_lost_rank(error: BaseException) -> bool:
    """True for an error of a collective, or of the rendezvous, whose other side is gone."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def lost_ranks(watchdog: Watchdog) -> Iterator[None]:
    """Turn the errors of collectives whose other side is gone into RankLost, once the loop has begun.

    Before that they are more often a wrong network or device, which starting again does not mend.
    """
    try:
        yield
    except RuntimeError as error:
        if not watchdog.begun or not is_lost_rank(error):
            raise
        raise RankLost(watchdog.lost(str(error).strip().splitlines()[0][:200])) from error
