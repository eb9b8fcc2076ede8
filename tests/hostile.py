"""Hostile inputs, each read in a forked child: nothing in them may run, they end soon and in one line."""

import json
import os
import re
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from segformer.errors import SegformerError, error_line

SECONDS, MEMORY = 10.0, 2**30
Reading = Callable[[], object]


@dataclass(slots=True)
class Outcome:
    """How the reading of one input ended."""

    line: str = ""
    """What the user reads; empty: it was read."""
    bug: str = ""
    """A traceback, a signal or a hang."""
    seconds: float = 0
    peak: int = 0
    """Bytes of memory beyond those at the start."""
    ran: bool = False
    """The canary is there."""


def outcomes(inputs: Mapping[str, Callable[[Path], Reading]], canary: Path) -> dict[str, Outcome]:
    """(canary -> a reading) of each input, made and called in a child; one child serves many."""
    found: dict[str, Outcome] = {}
    while left := [name for name in inputs if name not in found]:
        reader, writer = os.pipe()
        with warnings.catch_warnings(action="ignore"):  # Python 3.12: a fork beside threads; none is used
            child = os.fork()
        if not child:
            os.close(reader)
            _serve(inputs, left, canary, writer)
        os.close(writer)
        with open(reader, "rb") as lines:
            for name in left:
                ready, _, _ = select.select([lines], [], [], SECONDS + 5)  # 5: making it
                line = lines.readline() if ready else b""
                if not line:
                    os.kill(child, signal.SIGKILL)
                    status = os.waitpid(child, 0)[1]
                    found[name] = Outcome(bug=f"ended with {status}" if ready else "hangs")
                    break
                found[name] = Outcome(**json.loads(line))
                found[name].ran = canary.exists()
                canary.unlink(missing_ok=True)
            else:
                os.waitpid(child, 0)
    return found


def _serve(
    inputs: Mapping[str, Callable[[Path], Reading]], names: list[str], canary: Path, writer: int
) -> None:
    """Read the inputs one after the other and write a line for each; never returns."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        torch.set_num_threads(1)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, -1))  # the machine has others, too
        for name in names:
            reading = inputs[name](canary)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            outcome, before, began = Outcome(), _peak(), time.monotonic()
            try:
                reading()
            except SegformerError as error:
                outcome.line = error_line(error)
            except BaseException:
                outcome.bug = traceback.format_exc()
            outcome.seconds, outcome.peak = time.monotonic() - began, _peak() - before
            os.write(writer, json.dumps(asdict(outcome)).encode() + b"\n")
    finally:
        os._exit(0)


def _peak() -> int:
    """The most memory (VmHWM) so far, bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def check(outcome: Outcome, message: str) -> None:
    """It ended as it must; `message`: a pattern of the line, empty where it may be read."""

    assert not outcome.bug, outcome.bug
    assert not outcome.ran
    assert outcome.seconds < SECONDS
    assert outcome.peak < MEMORY
    assert re.search(message, outcome.line) if message else not outcome.line, outcome.line
    assert outcome.line.isprintable()
    assert len(outcome.line) < 1000
