"""Many tasks in processes: results in the order of the tasks, one progress bar, an error ends it all.

Processes are forked from a clean server process (forkserver), use one thread each, leave Ctrl-C to their
parent, and end when it dies, even by SIGKILL. A task says `advance()` after each of its images; that is what
the bar counts, so that images/s and the remaining time move while a large task runs. Without a terminal there
is no bar: an error is then the only line on standard error."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

from segformer.errors import ConfigError, DataError

POLL_SECONDS = 0.2  # how often the bar moves

_T = TypeVar("_T")
_R = TypeVar("_R")
_advance: Callable[[int], Any] = int  # what `advance` calls; set where tasks run


def advance(images: int = 1) -> None:
    """Count images of the running task."""
    _advance(images)


def run(
    function: Callable[[_T], _R],
    tasks: Sequence[_T],
    *,
    workers: int,
    total: int,
    desc: str,
    preload: Sequence[str] = (),
) -> list[_R]:
    """[function(task) for task in tasks], in `workers` processes (-1: one per core; 0 and 1: in this one).

    total: images that all tasks count together. preload: modules that are imported once, for all workers.
    Function, tasks and results must pickle. The first error that is seen ends the run. ConfigError for fewer
    workers than -1.
    """
    global _advance
    if workers < -1:
        raise ConfigError(f"workers={workers}; use -1 (one process per core) or a number from 0")
    count = min(len(tasks), workers if workers >= 0 else len(os.sched_getaffinity(0)))
    with tqdm(total=total, unit="image", desc=desc, leave=False, disable=None) as bar:
        if count > 1:
            return _in_processes(function, tasks, count, bar, desc, preload)
        _advance = bar.update
        try:
            return [function(task) for task in tasks]
        finally:
            _advance = int


def _in_processes(
    function: Callable[[_T], _R],
    tasks: Sequence[_T],
    workers: int,
    bar: "tqdm[Any]",
    desc: str,
    preload: Sequence[str],
) -> list[_R]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__, *preload])
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start, (counter,)) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died while {desc}; if memory ran out, give a smaller workers=<number>"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _start(counter: Any) -> None:
    """Begin a worker process."""
    global _advance
    parent = multiprocessing.parent_process()
    if parent is None or wait_for([parent.sentinel], 0):
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()

    def count(images: int) -> None:
        with counter.get_lock():
            counter.value += images

    _advance = count


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
