"""Errors that a user can cause or must act on, and how a command ends with one.

    SegformerError                   one line on stderr      2, Preempted 75, RankLost and WorkerLost 76
    Ctrl-C                           "stopped" on stderr     130 = 128 + SIGINT, as shells count
    nobody reads stdout (| head)     nothing                 141 = 128 + SIGPIPE
    Incomplete                       one line on stderr      1: some inputs can't be used, all others are done
    any other exception              its traceback           1: a bug of this program

A message says what is wrong, where, what was found and what to do. Every script of launch/ and data_prep/
imports the library below `with importing(__name__):`, which takes seconds, and runs its command inside
`ending()`. Training handles Ctrl-C itself as long as it makes steps (distributed.world.StopFlag: it saves and
ends with 75). Only rank zero prints what all ranks would.
"""

from __future__ import annotations

import math
import os
import re
import select
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)
"Those that ask a run to stop."
STOPPED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGPIPE
_SCRIPT = r"(?:launch|data_prep)/(\w+)\.py"
START_ALONE = (
    "start with `deepspeed` or `torchrun`, or "
    "`unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT` for a single process"
)


class SegformerError(Exception):
    """An error that the user gets in one line."""

    exit_code = 2


class ConfigError(SegformerError):
    """A setting is wrong, alone or together with another one."""


class DataError(SegformerError):
    """A data set, shard, image or mask is missing, damaged or inconsistent."""


class Incomplete(DataError):
    """Some of the inputs can't be used; all others are done."""

    exit_code = 1


class CheckpointError(SegformerError):
    """A checkpoint or exported model is missing, damaged or belongs to another model."""


class Diverged(SegformerError):
    """Training can't go on: the loss or gradients are not finite, and going back did not help."""


class Preempted(SegformerError):
    """Training stopped at a signal after saving its state; the same command continues it."""

    exit_code = os.EX_TEMPFAIL  # 75


class RunTaken(SegformerError):
    """Another process has taken over the run directory of this one, which must not write any more."""


class RankLost(SegformerError):
    """Another rank has ended or did not join a collective in time; the same command continues the run."""

    exit_code = 76


class WorkerLost(SegformerError):
    """A loader process died twice; the state has been saved, and the same command continues the run."""

    exit_code = 76


def at_least(config: object, prefix: str, **least: float) -> None:
    """Refuse a field of `config` below its least value; null passes. `prefix` is that of its key: "optim.".

    Raises:
        ConfigError: it names the first one.
    """
    within(config, prefix, **{name: (low, math.inf) for name, low in least.items()})


def within(config: object, prefix: str, **bounds: tuple[float, float]) -> None:
    """Refuse a field of `config` outside of its (lowest, highest); otherwise as `at_least`."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{prefix}{name}={value} must be {limits}")


def reason_of(error: BaseException) -> str:
    """Why something failed, on one line: of an OSError without its number and path."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or str(error)).split()) or type(error).__name__


@contextmanager
def reraise_as(
    kind: type[Exception],
    what: str,
    do: str = "",
    *,
    on: type[BaseException] | tuple[type[BaseException], ...] = OSError,
) -> Iterator[None]:
    """Raise `kind` where the block raises one of `on`: "<what>: <reason>; <do>"."""
    try:
        yield
    except on as error:
        raise kind(f"{what}: {reason_of(error)}" + (f"; {do}" if do else "")) from error


@contextmanager
def reported(
    to: Callable[[Any], object], *, on: type[Exception] | tuple[type[Exception], ...] = SegformerError
) -> Iterator[None]:
    """Give an exception of the block, which ends there, to `to` in place of raising it."""
    try:
        yield
    except on as error:
        to(error)


def printable(text: str) -> str:
    """The text as it is, on one line, with an escape for every sign that would do more than show itself.

    Names of files and classes come from elsewhere: control characters move a terminal's cursor or write lines
    of their own, bidi marks reorder what stands beside them, and half of a Unicode pair can't be printed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_name(text: str) -> bool:
    """No sign breaks a line, moves the cursor, reorders what stands beside it, or is half of a pair.

    Spaces of any width and the joiners that Persian and Hindi need are in names; `printable` shows them.
    """
    return not any(
        unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(sign) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        for sign in text
    )


def as_started(text: str) -> str:
    """A message with commands as they were started: `python launch/train.py`, or `segformer train`."""
    if not any(os.path.basename(word) == "segformer" for word in sys.orig_argv[1:4]):
        return text
    text = re.sub(rf"(deepspeed [^\n]*?){_SCRIPT}", r"\1--module segformer \2", text)
    text = re.sub(rf"(torchrun [^\n]*?){_SCRIPT}", r"\1-m segformer \2", text)
    return re.sub(rf"(?:python )?{_SCRIPT}", r"segformer \1", text)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print one line, whatever is in it; on stdout unless `file` is given."""
    print(printable(as_started(text)), file=file, flush=True)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """The first few names for a message, and how many more there are: "a, b and 3 more"."""
    found = [printable(name) for name in names]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def is_main_rank() -> bool:
    """True on rank zero and where there are no ranks."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # what is no number is refused later, on every rank


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Ctrl-C ends the command `name` at once while the block runs.

    A worker that imports the script again (its name isn't __main__ then) and a process that ignores Ctrl-C
    keep what they have. A rank that is no number ends the command: libraries read it as they are imported.
    """
    before = signal.getsignal(signal.SIGINT)
    if name != "__main__" or before is not signal.default_int_handler:
        yield
        return
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not (value := os.environ.get(variable, "0")).isdecimal():
            what = f"{variable}={value!r} in the environment is no number"
            print(error_line(ConfigError(f"{what}; {START_ALONE}")), file=sys.stderr)
            sys.exit(ConfigError.exit_code)
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
        if isinstance(error, Preempted):
            for number in SIGNALS:  # the state is saved: a further one must not change the exit code
                signal.signal(number, signal.SIG_IGN)
        if is_main_rank():
            _say(error_line(error))
        elif not isinstance(error, Preempted):  # all ranks stop together, and rank zero says so
            _say(f"[rank {os.environ['RANK']}] {error_line(error)}")
    except KeyboardInterrupt:
        code = STOPPED
        if is_main_rank():
            _say("stopped")
    except OSError as error:
        if not (isinstance(error, BrokenPipeError) and _unread()) and not _unwritten(sys.stdout, "\n"):
            raise
        code = _code_of(error)
    except SystemExit as error:
        code = error.code
    if failed := _unwritten(sys.stdout):
        code = code or _code_of(failed)
    _unwritten(sys.stderr)  # a terminal that has gone
    if code:
        sys.exit(code)  # type: ignore[arg-type]


def error_line(error: SegformerError) -> str:
    """The line that a user reads: the kind of error, as this module names it, and its text."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    return printable(as_started(f"{kind.__name__}: {error}"))


def _say(text: str) -> None:
    """Print to stderr, where somebody may read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _unwritten(stream: TextIO | None, text: str = "") -> OSError | None:
    """Why `text` and the rest of what was printed can't be written; the interpreter, later, can."""
    if stream is None:
        return None
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def _code_of(failed: OSError) -> int:
    """The exit code of a command whose output can't be written: said, but where nobody reads it."""
    if isinstance(failed, BrokenPipeError):
        return UNREAD
    _say(f"what this command printed can't be written: {reason_of(failed)}")
    return SegformerError.exit_code


def _unread() -> bool:
    """True where the reader of stdout is gone; a broken pipe to a process of ours is a bug instead."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
