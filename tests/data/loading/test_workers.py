import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from segformer.data.loading.loader import WorkerStream
from segformer.errors import DataError

SCRIPT = """
import os, signal, sys
from itertools import count
from segformer.data.loading.loader import WorkerStream

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    stream = iter(WorkerStream(count, workers=2, prefetch=2, timeout=60))
    items = [next(stream) for _ in range(4)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.killpg(0, number)
    items += [next(stream) for _ in range(40)]
    print(*items)
    # ends with the stream open: the workers must not keep the program alive
"""


MASKS = """
import multiprocessing
from itertools import count
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from segformer.data.loading.loader import WorkerStream, start_server

if __name__ == "__main__":
    start_server()
    stream = iter(WorkerStream(count, workers=2, prefetch=2, timeout=60))
    next(stream)
    for pid in [_forkserver._forkserver_pid, *(child.pid for child in multiprocessing.active_children())]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        print(next(line.split()[1] for line in status if line.startswith("SigBlk")))
"""


def sleep(items: list[float], worker: int, workers: int) -> Iterator[float]:
    for seconds in items[worker::workers]:
        time.sleep(seconds)
        yield seconds


def stream(items: list[float], *, workers: int, timeout: int = 60) -> WorkerStream[float]:
    """A stream whose workers sleep for each of the items."""
    return WorkerStream(
        partial(sleep, items), workers=workers, prefetch=1, timeout=timeout, length=len(items)
    )


def test_signals_to_the_whole_group_reach_the_trainer_only_and_an_open_stream_lets_it_end(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(number) for number in range(44)]


def test_the_fork_server_and_its_workers_are_born_with_the_signals_blocked(tmp_path: Path) -> None:
    """A fork server that dies of SIGTERM takes its workers with it, so the mask must be there from birth."""
    script = tmp_path / "script.py"
    script.write_text(MASKS)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    masks = [int(line, 16) for line in done.stdout.split()]
    assert len(masks) == 3
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert all(mask >> (number - 1) & 1 for mask in masks), number


def test_a_killed_worker_ends_in_an_error_and_not_in_a_hang() -> None:
    others = set(multiprocessing.active_children())
    items = iter(stream([0.0] * 3 + [60.0], workers=1))
    next(items)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process died"):
        list(items)


def test_a_worker_that_gives_nothing_ends_in_an_error_and_is_killed() -> None:
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="no batch from the loader processes for 1 s"):
        list(stream([60.0], workers=1, timeout=1))
    assert set(multiprocessing.active_children()) <= others


def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segformer.data.loading.loader.POLL_SECONDS", 1)
    assert list(stream([2.5, 0.0], workers=1)) == [2.5, 0.0]


def test_workers_end_with_their_stream() -> None:
    others = set(multiprocessing.active_children())
    items = iter(stream([0.0] * 9, workers=2))
    next(items)
    assert len(set(multiprocessing.active_children()) - others) == 2
    items.close()
    assert set(multiprocessing.active_children()) <= others


def test_only_a_finite_stream_has_a_length() -> None:
    assert len(stream([0.0], workers=0)) == 1
    with pytest.raises(TypeError, match="no end"):
        len(WorkerStream(count, workers=0, prefetch=1, timeout=1))
