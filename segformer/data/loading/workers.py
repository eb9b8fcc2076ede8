"""Worker processes: a stream of items that they compute and hand out in turn.

Workers are forked from a small clean server process (forkserver), never from the training process with its
threads; the server imports this package once, so that a worker starts in milliseconds. They do not receive
the signals of a job or a terminal, which Slurm and the kernel send to every process of it: the trainer
decides. They end with the trainer, also where that is killed, and then their server does: the kernel closes
the trainer's end of a pipe, on which a thread of each worker waits.

An item is a function of its place in the stream, so that workers can begin at any place. Where one has died
all are started again at the place that was reached, once; the second death is an error, and so is a stream
that gives nothing for `timeout` seconds. An error of the data travels as it is, without the traceback that
the DataLoader would wrap around it.
"""

import atexit
import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from segformer.errors import ConfigError, DataError, SegformerError, WorkerLost, listed, reraise_as

POLL_SECONDS = 5  # how often a waiting trainer looks whether its workers are alive

_LEFT_TO_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SHM = "/dev/shm, by which they hand batches over"
_MORE_SHM = "use loader.workers=0, or enlarge it (docker run --shm-size=8g)"
_SECOND_RUN = os.EX_CONFIG  # exit code
_T = TypeVar("_T")
print_line = partial(print, file=sys.stderr, flush=True)


def refuse_second_run() -> None:
    """End a worker that, as it imports the script of its trainer, comes to the call that has started it.

    Its trainer says so: see `WorkerStream`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing's own check
        os._exit(_SECOND_RUN)


def start_server() -> None:
    """Start the process that workers are forked from, and return at once.

    It imports torch for more than a second: begun early, that happens beside the building of the model.
    """
    _context()
    with signals_blocked():
        forkserver.ensure_running()


def _context() -> ForkServerContext:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file for each tensor of a batch in flight
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "segformer.data.loading.loader"])
    return context


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that are started inside are born with the signals of the job blocked."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


class _Source(IterableDataset[Any]):
    """The items of one process from place `first` of the stream on, its error among them as a value."""

    def __init__(self, items: Callable[[int, int], Iterator[Any]]) -> None:
        self.items, self.first = items, 0

    def __iter__(self) -> Iterator[Any]:
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        try:
            yield from self.items(self.first + worker, workers)
        except SegformerError as error:
            yield error


class WorkerStream(Generic[_T]):
    """Items computed by `workers` processes (0 = here) and handed out in turn.

    items: (p, W) -> the items p, p + W, ... of the whole stream; must pickle. Each `iter` starts its own
    workers, which end with the iterator. `warn` gets a line where they had to be started again.
    """

    def __init__(
        self,
        items: Callable[[int, int], Iterator[_T]],
        *,
        workers: int,
        prefetch: int,
        timeout: int,
        warn: Callable[[str], None] = print_line,
    ) -> None:
        self.timeout, self._warn, self._source = timeout, warn, _Source(items)
        self._loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            timeout=min(POLL_SECONDS, timeout) if workers else 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if workers else None,
            prefetch_factor=prefetch if workers else None,
            generator=torch.Generator(),  # else every `iter` would draw from the model's random numbers
        )

    def __iter__(self) -> Generator[_T, None, None]:
        stream = self._stream()
        _OPEN.add(stream)
        return stream

    def _stream(self) -> Generator[_T, None, None]:
        done = 0
        try:
            for item in self._from(0):
                yield item
                done += 1
            return
        except WorkerLost as lost:
            self._warn(f"{lost}; started again at the same batch, once")
        yield from self._from(done)

    def _from(self, first: int) -> Generator[_T, None, None]:
        """The items from place `first` on, by workers of their own."""
        self._source.first = first
        others = set(multiprocessing.active_children())
        do = "use loader.workers=0, which needs none"
        with (
            signals_blocked(),
            reraise_as(ConfigError, "loader processes, which need /dev/shm, can't be started", do),
        ):
            if self._loader.num_workers:
                _context().Lock()  # what needs /dev/shm; the DataLoader would leave more than the error
            iterator = iter(self._loader)
        mine = set(multiprocessing.active_children()) - others
        try:
            while (item := self._next(iterator, mine)) is not None:
                if isinstance(item, SegformerError):
                    raise item
                yield item
        finally:
            del iterator  # asks the workers to end and waits for them
            for process in mine:
                process.kill()

    def _next(self, iterator: Iterator[Any], processes: set[Any]) -> Any:
        """The next item, None at the end; waits in short turns, to see a dead worker soon."""
        for _ in range(0, self.timeout, POLL_SECONDS):
            try:
                return next(iterator, None)
            except RuntimeError as error:
                if "exited unexpectedly" in str(error):
                    codes = {process.exitcode for process in processes}
                    if _SECOND_RUN in codes:
                        raise ConfigError(
                            "loader processes import the script that started them; put what it does below "
                            'if __name__ == "__main__": (or give loader={"workers": 0})'
                        ) from None
                    raise WorkerLost(_cause(codes)) from error
                if "Too many open files" in str(error):
                    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                    do = "raise the limit, or lower loader.workers or loader.prefetch"
                    raise ConfigError(
                        f"{files} open files (ulimit -n) are too few for the loader; {do}"
                    ) from error
                if "timed out" not in str(error):
                    raise
        raise DataError(
            f"no batch from the loader processes for {self.timeout} s; "
            "check the storage of the shards or raise loader.timeout"
        )


def _cause(codes: set[int | None]) -> str:
    """How a worker died, by the exit codes of all, and what to do."""
    what = "a loader process died"
    if codes & {-signal.SIGBUS, errno.ENOSPC}:
        return f"{what}: {_SHM}, is full; {_MORE_SHM}"
    if -signal.SIGKILL in codes:
        return f"{what} (SIGKILL); if memory ran out, lower loader.workers or loader.prefetch"
    return f"{what} ({listed(f'exit code {code}' for code in codes if code)})"


# Streams still open when the program ends are closed before multiprocessing waits for their processes.
_OPEN: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    for stream in list(_OPEN):
        stream.close()


def _start_worker(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    Queue._on_queue_feeder_error = staticmethod(_can_not_send)  # type: ignore[attr-defined]
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _can_not_send(error: Exception, batch: Any) -> None:
    """End a worker whose batch does not fit into /dev/shm; the trainer would wait for it."""
    if "No space left" in str(error):
        os._exit(errno.ENOSPC)
    traceback.print_exception(error)
    os._exit(1)


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
