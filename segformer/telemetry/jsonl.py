"""Files of lines: each appended in one write, and read back in spite of the torn end of a crash."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class LineFile:
    """A text file that lines are appended to, each in one write; what can't be written is counted."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lost = 0
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def write(self, line: str) -> None:
        """Append a line; never raises OSError."""
        data = (("\n" if self._torn else "") + line + "\n").encode()
        try:
            self._torn = os.write(self._fd, data) < len(data)
            self.lost += self._torn
        except OSError:
            self.lost += 1

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Ledger:
    """Samples of each step of a rank: {"from": first step of this process, "step", "ids"} a line."""

    def __init__(self, folder: Path, rank: int, begin: int) -> None:
        self._file, self._begin = LineFile(folder / f"rank-{rank:05d}.jsonl"), begin

    def add(self, step: int, ids: list[int]) -> None:
        """Append the samples of optimizer step `step`, counted from 1."""
        self._file.write(json.dumps({"from": self._begin, "step": step, "ids": ids}))


def read_metrics(run_dir: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    """Rows of a run's metrics.jsonl as they were written, of these kinds, or all; none without the file.

    A torn line is left out: its step was logged again after the restart.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return
    wanted = tuple(f'{{"kind": "{kind}"'.encode() for kind in kinds) or b"{"
    with path.open("rb") as file:
        for line in file:
            if line.startswith(wanted):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def newest_row(run_dir: Path, *kinds: str) -> dict[str, Any] | None:
    """The last row of these kinds in a run's metrics.jsonl; None without one."""
    rows = deque(read_metrics(run_dir, *kinds), maxlen=1)
    return rows[0] if rows else None
