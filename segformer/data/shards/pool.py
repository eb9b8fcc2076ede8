"""Many tasks in processes: results in the order of the tasks, one progress bar, an error ends it all.

Processes are forked from a clean server process (forkserver), use one thread each, leave Ctrl-C to their
parent, and end when it dies, even by SIGKILL. Without a terminal there is no bar: an error is then the only
line on standard error."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import TypeVar

import cv2
from tqdm import tqdm

from segformer.errors import ConfigError, DataError, reraise_as

_T = TypeVar("_T")
_R = TypeVar("_R")


def run(
    function: Callable[[_T], _R],
    tasks: Sequence[_T],
    *,
    images: Sequence[int],
    workers: int,
    desc: str,
    preload: Sequence[str] = (),
) -> list[_R]:
    """[function(task) for task in tasks], in `workers` processes (-1: one per core; 0 and 1: in this one).

    images: how many each task works on, for the bar. preload: modules that are imported once, for all
    workers. Function, tasks and results must pickle. The first error that is seen ends the run. ConfigError
    for fewer workers than -1.
    """
    if workers < -1:
        raise ConfigError(f"workers={workers}; use -1 (one process per core) or a number from 0")
    count = min(len(tasks), workers if workers >= 0 else len(os.sched_getaffinity(0)))
    pool: ProcessPoolExecutor | nullcontext[None] = nullcontext()
    if count > 1:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", function.__module__, *preload])
        pool = ProcessPoolExecutor(count, context, _start)
    died, remedy = f"a worker process died while {desc}", "if memory ran out, give a smaller workers=<number>"
    results = []
    with (
        tqdm(total=sum(images), unit="image", desc=desc, leave=False, disable=None) as bar,
        reraise_as(DataError, died, remedy, on=BrokenProcessPool),
        pool as processes,
    ):
        found = processes.map(function, tasks) if processes else map(function, tasks)
        try:
            for result, done in zip(found, images, strict=True):
                results.append(result)
                bar.update(done)
        except BaseException:
            if processes:  # the end of its block would wait for all tasks
                processes.shutdown(cancel_futures=True)
            raise
    return results


def _start() -> None:
    """Begin a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
