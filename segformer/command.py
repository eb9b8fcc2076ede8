"""How every command of launch/ and data_prep/ begins and ends.

    with importing(__name__):                       first lines of a script: the next ones take seconds
        from segformer.config import RunConfig, cli

    event                            printed on stderr       exit code
    SegformerError                   its one line            its own: 2; 75 after a signal; 76
    Ctrl-C                           "stopped"               130 = 128 + SIGINT, as shells count
    nobody reads stdout (| head)     nothing                 141 = 128 + SIGPIPE
    any other exception              its traceback           1

Training sees to Ctrl-C itself as long as it makes steps (dist.StopFlag: it saves, 75). Only rank zero prints
what all ranks would.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from segformer.errors import Preempted, SegformerError

STOPPED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def is_main_rank() -> bool:
    """Whether this is rank zero, or there are no ranks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Ctrl-C ends the command `name` at once while the block runs.

    A worker that imports the script again (its name isn't __main__ then) and a process that ignores Ctrl-C
    keep what they have.
    """
    before = signal.getsignal(signal.SIGINT)
    if name != "__main__" or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End without an exception: a library that is being imported might catch it."""
    try:
        if is_main_rank():
            os.write(2, b"stopped\n")
    finally:
        os._exit(STOPPED)


@contextmanager
def ending() -> Iterator[None]:
    """End the process as the table says where the block raises; leave it alone where it doesn't."""
    code: object = 0
    try:
        yield
    except SegformerError as error:
        code = error.exit_code
        if is_main_rank():
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, Preempted):  # all ranks stop together, and rank zero says so
            print(f"[rank {os.environ['RANK']}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = STOPPED
        if is_main_rank():
            print("stopped", file=sys.stderr, flush=True)
    except BrokenPipeError:
        if not _unread():
            raise
        code = UNREAD
    except SystemExit as error:
        code = error.code
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        code = code or UNREAD
    if code:
        sys.exit(code)  # type: ignore[arg-type]


def _unread() -> bool:
    """Whether the reader of stdout is gone; a pipe to a process of ours may break, too, and that is a bug."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
