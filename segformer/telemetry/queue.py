"""A thread of its own for what watches a run from outside, so that it can neither hold the run up nor end it.

A step of training puts a small object into a bounded list and goes on; one thread makes the calls, in order.
Where the thread doesn't keep up (a server that hangs, a disk that is slow) entries are dropped and counted;
what a tracker raises is counted too. Both are said at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

MAX_ENTRIES = 1000  # of an outbox: 10,000 steps of training at one entry every ten
MAX_BYTES = 128 * 2**20  # likewise, of pictures


class Tracker(Protocol):
    """What an outbox feeds; called in its thread only."""

    def begin(self, step: int) -> None:
        """Training starts, or continues, after `step`."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name."""

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """uint8 (H, W, 3) by name."""

    def close(self) -> None:
        """Write what is left."""


def one_line(error: Exception) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class Outbox:
    """A tracker and the thread that it lives in."""

    def __init__(self, name: str, opener: Callable[[Callable[[str], None]], Tracker]) -> None:
        """Open the tracker in a new thread; `opener` is given a function that keeps a line to be said."""
        self.name = name
        self.dropped = 0
        self.failed = 0
        self._lines: deque[str] = deque()
        self._items: deque[tuple[Callable[[Tracker], None], int]] = deque()
        self._bytes = 0
        self._closing = False
        self._change = threading.Condition()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(opener,), name=f"{name} outbox", daemon=True)
        self._thread.start()

    def wait_open(self, timeout_s: float) -> None:
        """Wait until the tracker is open, or has failed to open, for at most `timeout_s` seconds."""
        if not self._opened.wait(timeout_s):
            self._lines.append(f"{self.name} has not started after {timeout_s:g} s; training goes on without")

    def put(self, call: Callable[[Tracker], None], size: int = 0) -> None:
        """Let the thread make `call`, which holds `size` bytes; never waits for it."""
        with self._change:
            if len(self._items) >= MAX_ENTRIES or self._bytes + size > MAX_BYTES or self._closing:
                self.dropped += 1
                return
            self._items.append((call, size))
            self._bytes += size
            self._change.notify()

    def lines(self) -> list[str]:
        """What has to be said since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def finish(self, timeout_s: float) -> None:
        """Let the thread work off what is left, for at most `timeout_s` seconds."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.dropped += len(self._items)
            self._lines.append(f"{self.name} has not finished after {timeout_s:g} s and is left behind")
        if self.dropped or self.failed:
            self._lines.append(
                f"{self.name} missed {self.dropped + self.failed} entries ({self.dropped} dropped, "
                f"{self.failed} failed); metrics.jsonl has them all"
            )

    def _run(self, opener: Callable[[Callable[[str], None]], Tracker]) -> None:
        tracker = None
        try:
            tracker = opener(self._lines.append)
        except Exception as error:
            self._lines.append(f"{self.name} can't be started and is left out: {one_line(error)}")
        self._opened.set()
        while (call := self._next()) is not None:
            if tracker is None:
                self.dropped += 1
                continue
            self._attempt(lambda tracker=tracker, call=call: call(tracker))  # type: ignore[misc]
        if tracker is not None:
            self._attempt(tracker.close)

    def _next(self) -> Callable[[Tracker], None] | None:
        with self._change:
            self._change.wait_for(lambda: self._items or self._closing)
            if not self._items:
                return None
            call, size = self._items.popleft()
            self._bytes -= size
            return call

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self.failed:
                self._lines.append(f"{self.name}: {one_line(error)}")
            self.failed += 1
