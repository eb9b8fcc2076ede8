"""A webdataset pipeline in worker processes: starting them, telling them from the trainer, noticing their
death.

Workers are forked from a small clean server process (forkserver), never from the training process with its
threads; the server imports this package once, so that a worker starts in milliseconds. They do not receive
SIGINT, SIGTERM, SIGUSR1 and SIGUSR2, which Slurm sends to every process of a job: the trainer decides. A
worker that dies, or gives nothing for `timeout` seconds, ends in an error. An error of the data travels as
it is, without the traceback that the DataLoader would wrap around it."""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any, Generic, TypeVar

import cv2
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from segformer.errors import DataError, SegformerError

POLL_SECONDS = 5  # how often a waiting trainer looks whether its workers are alive

_LEFT_TO_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_T = TypeVar("_T")


def worker_place() -> tuple[int, int]:
    """(number of this worker, number of workers); (0, 1) in the trainer itself."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def start_server() -> None:
    """Start the process that workers are forked from, and return at once.

    It imports torch for more than a second: begun early, that happens beside the building of the model.
    """
    _context()
    with _signals_blocked():
        forkserver.ensure_running()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "segformer.data.loading.loader"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside is born with the trainer's signals blocked."""
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


class Deferred(Generic[_T]):
    """A value that another process makes only when it asks for it.

    What fails while a worker unpickles its task is a traceback; what fails in a stage is an error of the
    stream. So a stage holds whatever must be opened again in this wrapping.
    """

    def __init__(self, value: _T) -> None:
        self._value: _T | None = value
        self._make: Any = None

    def get(self) -> _T:
        """The value, made when it is first asked for."""
        if self._value is None:
            function, arguments = self._make
            self._value = function(*arguments)
        return self._value

    def __getstate__(self) -> Any:
        return self._make if self._value is None else self._value.__reduce__()

    def __setstate__(self, make: Any) -> None:
        self._value, self._make = None, make


class WorkerStream(Generic[_T]):
    """What a pipeline of stages yields, computed by `workers` processes (0 = here) and handed out in turn.

    stages: a source called without arguments, then functions from iterator to iterator; all must pickle.
    Worker w computes the items w, w + W, ... of the whole stream; `worker_place` tells the source. Each
    `iter` starts its own workers, which end with the iterator. length: what `len` says, for finite streams.
    """

    def __init__(
        self,
        stages: list[Callable[..., Any]],
        *,
        workers: int,
        prefetch: int,
        timeout: int,
        length: int | None = None,
    ) -> None:
        self.workers = workers
        self.timeout = timeout
        self.length = length
        context = _context() if workers else None
        self._loader: DataLoader[Any] = DataLoader(
            webdataset.DataPipeline(*stages, _errors_as_values),
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=torch.cuda.is_available(),
            timeout=min(POLL_SECONDS, timeout) if workers else 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            prefetch_factor=prefetch if workers else None,
            generator=torch.Generator(),  # else every `iter` would draw from the model's random numbers
        )

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a training stream has no end")
        return self.length

    def __iter__(self) -> Generator[_T, None, None]:
        stream = self._stream()
        _OPEN.add(stream)
        return stream

    def _stream(self) -> Generator[_T, None, None]:
        others = set(multiprocessing.active_children())
        with _signals_blocked():
            iterator = iter(self._loader)
        mine = set(multiprocessing.active_children()) - others
        try:
            while (item := self._next(iterator)) is not None:
                if isinstance(item, SegformerError):
                    raise item
                yield item
        finally:
            del iterator  # asks the workers to end and waits for them
            for process in mine:
                process.kill()

    def _next(self, iterator: Iterator[Any]) -> Any:
        """The next item, None at the end; waits in short turns, to see a dead worker soon."""
        for _ in range(0, self.timeout, POLL_SECONDS):
            try:
                return next(iterator, None)
            except RuntimeError as error:
                if "exited unexpectedly" in str(error):
                    raise DataError(
                        f"a loader process died ({str(error).splitlines()[0]}); "
                        "if memory or /dev/shm ran out, lower loader.workers or loader.prefetch"
                    ) from error
                if "timed out" not in str(error):
                    raise
        raise DataError(
            f"no batch from the loader processes for {self.timeout} s; "
            "check the storage of the shards or raise loader.timeout"
        )


# Streams still open when the program ends are closed before multiprocessing waits for their processes.
_OPEN: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    for stream in list(_OPEN):
        stream.close()


def _errors_as_values(items: Iterator[_T]) -> Iterator[_T | SegformerError]:
    try:
        yield from items
    except SegformerError as error:
        yield error


def _same(item: _T) -> _T:
    return item


def _start_worker(_: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_TRAINER)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
