"""One cell of peers.py: compare the results of the contenders, then let them take turns.

A contender that can't run keeps an entry with the reason and no numbers: a library that is missing, too
little memory, a model that torch.compile refuses. So does one that computes something else, which is never
timed, and one of ours that fails; these two are `wrong`, and peers.py ends with an error that names them,
after everything else has been measured.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.contenders import (
    COMPILED,
    Cell,
    Contender,
    Functions,
    UnavailableError,
    batch_of,
    build,
    gradient_norm,
    step_of,
)
from bench.footprint import Request, cpu_peak_mib, cuda_peak_mib

OURS = ("fused", "reference")
SHARED = ("fused", "transformers")  # the largest batch is the largest of these two
YARDSTICKS = ("transformers", "original", "reference", "fused")  # the first one that runs, in float32
# Largest relative differences from the yardstick: of the logits or the loss, of the norm of all gradients.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (5e-2, 5e-2)}
LARGEST_BATCH = 1024
FEWEST_ROUNDS = 3
NO_MEMORY = "out of memory"
SHORTAGES = ("out of memory", "OutOfMemoryError", "ALLOC_FAILED")  # CUDA, torch.compile, cuBLAS and cuDNN


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How a cell is measured; times in seconds, `deadline` on the clock of time.monotonic."""

    device: torch.device
    precision: str
    num_classes: int
    threads: int
    rounds: int
    turn_seconds: float
    cell_seconds: float
    deadline: float
    compile_mode: str
    memory: bool


def first_line(text: object) -> str:
    """What an error says, short enough for a table."""
    return (str(text).strip().splitlines() or ["unknown"])[0][:200]


@dataclass(slots=True)
class Entry:
    """A contender in a cell, and what has been found out about it."""

    name: str
    contender: Contender | None = None
    note: str = ""
    wrong: bool = False
    difference: float | None = None
    gradient_difference: float | None = None
    peak_mib: float | None = None
    weights_mib: float | None = None
    step: Callable[[], Tensor] | None = None
    steps: int = 1
    seconds: list[float] = field(default_factory=list)

    def leave(self, reason: str, *, wrong: bool = False) -> None:
        """Take the contender out and say why; `wrong`: that is an error, not how things are."""
        self.note, self.wrong = first_line(reason), wrong
        self.contender = self.step = None
        self.seconds = []


def hold(cell: Cell, names: Sequence[str], folder: Path, rules: Rules) -> tuple[int, list[Entry]]:
    """Measure the contenders in a cell; `folder` has their weights. Returns the batch and their entries."""
    entries = [Entry(name) for name in names]
    for entry in entries:
        _enter(entry, cell, folder, rules)
    compare(cell, entries, rules)
    batch = cell.batch or largest_batch(cell, entries, rules)
    while True:
        began = time.monotonic()
        torch.compiler.reset()  # what is compiled is compiled for this batch alone
        data = batch_of(cell, batch, rules.num_classes, rules.device)
        for entry in entries:
            _warm(cell, entry, data, rules)
        short = [entry for entry in entries if entry.name in COMPILED and entry.note == NO_MEMORY]
        again = 2 * time.monotonic() - began  # the end of another one that takes as long
        if cell.batch or batch == 1 or not short or again > rules.deadline:
            break
        batch //= 2
        print(f"{cell}: {short[0].name} is out of memory; all with {batch} images in place of {2 * batch}")
        for entry in entries:
            if entry.note == NO_MEMORY and (entry.name in COMPILED or entry.difference is not None):
                _enter(entry, cell, folder, rules)
    if rules.memory:
        _memory(cell, batch, entries, folder, rules)
    take_turns(entries, rules)
    for entry in entries:
        entry.contender = entry.step = None  # the models, not what was found out
    _release(rules.device)
    return batch, entries


def _enter(entry: Entry, cell: Cell, folder: Path, rules: Rules) -> None:
    entry.note = ""
    with _may_leave(entry, rules.device):
        try:
            contender = build(entry.name, cell.variant, rules.num_classes, folder, mode=rules.compile_mode)
        except UnavailableError as error:
            entry.leave(str(error))
            return
        contender.model.to(rules.device)
        entry.contender, entry.weights_mib = contender, contender.weights_mib


@contextmanager
def _may_leave(entry: Entry, device: torch.device) -> Iterator[None]:
    """Turn too little memory and any other failure into a note."""
    try:
        yield
    except Exception as error:  # Triton's are of no common kind
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORTAGES):
            entry.leave(NO_MEMORY)
        else:
            ours = entry.name.partition("+")[0] in OURS
            entry.leave(f"{type(error).__name__}: {first_line(error)}", wrong=ours)
    finally:
        if entry.contender is None:
            _release(device)


def _release(device: torch.device) -> None:
    gc.collect()
    _empty_cache(device)


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        with suppress(RuntimeError):  # after an error of CUDA, which has its note
            torch.cuda.empty_cache()


def _results(
    contender: Contender, functions: Functions, mode: str, data: tuple[Tensor, Tensor], precision: str
) -> tuple[Tensor, float | None]:
    """Logits and None, or loss and the norm of the gradients; float32 on the CPU."""
    out = step_of(contender.model, functions, mode, data, precision)()
    norm = gradient_norm(contender.model) if mode == "training" else None
    contender.model.zero_grad(set_to_none=True)
    return out.float().cpu(), norm


def _judge(
    entry: Entry, found: tuple[Tensor, float | None], right: tuple[Tensor, float | None], precision: str
) -> None:
    """Note how far `found` is from `right`, and take the contender out where that is too far."""
    entry.difference = float((found[0] - right[0]).abs().max() / right[0].abs().max())
    if found[1] is not None and right[1] is not None:
        entry.gradient_difference = abs(found[1] - right[1]) / right[1]
    allowed = TOLERANCE[precision]
    for kind, value, most in (
        ("logits or loss", entry.difference, allowed[0]),
        ("gradients", entry.gradient_difference, allowed[1]),
    ):
        if value is not None and not value <= most:
            reason = f"{kind} differ by {value:.2g} of the largest, at most {most:.0e} is allowed; not timed"
            entry.leave(reason, wrong=True)
            return


def compare(cell: Cell, entries: Sequence[Entry], rules: Rules) -> None:
    """Compare what isn't compiled with a yardstick in float32, and take out what differs."""
    data = batch_of(cell, cell.batch or 1, rules.num_classes, rules.device)
    right = _yardstick(cell, entries, data, rules)
    for entry in entries:
        if right and entry.contender and not entry.contender.compiled:
            with _may_leave(entry, rules.device):
                found = _results(entry.contender, entry.contender.run, cell.mode, data, rules.precision)
                _judge(entry, found, right, rules.precision)


def _yardstick(
    cell: Cell, entries: Sequence[Entry], data: tuple[Tensor, Tensor], rules: Rules
) -> tuple[Tensor, float | None] | None:
    """Results of the first contender of YARDSTICKS that runs, or else of any."""
    order = [*YARDSTICKS, *(entry.name for entry in entries if entry.name not in YARDSTICKS)]
    for entry in sorted(entries, key=lambda entry: order.index(entry.name)):
        if entry.contender is not None:
            with _may_leave(entry, rules.device), _full_precision():
                return _results(entry.contender, entry.contender.eager, cell.mode, data, "fp32")
    return None


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 convolutions without TF32, which cuDNN uses by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def largest_batch(cell: Cell, entries: Sequence[Entry], rules: Rules) -> int:
    """The largest power of two at which a step of both SHARED contenders fits, or of all where they lack."""
    eager = [entry for entry in entries if entry.contender and not entry.contender.compiled]
    tried = [entry for entry in eager if entry.name in SHARED] or eager
    batch = 1
    while batch < LARGEST_BATCH and all(_fits(cell, 2 * batch, entry, rules) for entry in tried):
        batch *= 2
    return batch


def _fits(cell: Cell, batch: int, entry: Entry, rules: Rules) -> bool:
    contender = entry.contender
    assert contender is not None
    fits = True
    try:
        data = batch_of(cell, batch, rules.num_classes, rules.device)
        step_of(contender.model, contender.run, cell.mode, data, rules.precision)()
        del data
    except RuntimeError as error:  # also cuBLAS and cuDNN without memory, or more elements than they count
        print(f"{cell}: {entry.name} does not fit {batch} images: {first_line(error)}")
        fits = False
    contender.model.zero_grad(set_to_none=True)
    _release(rules.device)
    return fits


def _warm(cell: Cell, entry: Entry, data: tuple[Tensor, Tensor], rules: Rules) -> None:
    """Compile, compare what was compiled, and find out how many steps fill a turn."""
    contender = entry.contender
    if contender is None:
        return
    if contender.compiled and time.monotonic() > rules.deadline:
        entry.leave("left out: the time limit of peers.minutes")
        return
    with _may_leave(entry, rules.device):
        if contender.compiled:
            right = _results(contender, contender.eager, cell.mode, data, rules.precision)
            found = _results(contender, contender.run, cell.mode, data, rules.precision)
            _judge(entry, found, right, rules.precision)
            if entry.wrong:
                return
        entry.step = step_of(contender.model, contender.run, cell.mode, data, rules.precision)
        entry.step()
        taken = timed(entry.step, 1, rules.device)
        entry.steps = max(1, round(rules.turn_seconds / taken))
        contender.model.zero_grad(set_to_none=True)


def _memory(cell: Cell, batch: int, entries: Sequence[Entry], folder: Path, rules: Rules) -> None:
    for entry in entries:
        if entry.contender is None or entry.step is None:
            continue
        if rules.device.type == "cuda":
            with _may_leave(entry, rules.device):
                entry.peak_mib = cuda_peak_mib(entry.step)
                entry.contender.model.zero_grad(set_to_none=True)
        elif not entry.contender.compiled:
            with _may_leave(entry, rules.device):
                request = Request(
                    contender=entry.name,
                    cell=str(Cell(cell.mode, cell.variant, cell.size, batch)),
                    num_classes=rules.num_classes,
                    folder=str(folder),
                    precision=rules.precision,
                    threads=rules.threads,
                )
                entry.peak_mib = cpu_peak_mib(request)


def timed(step: Callable[[], Tensor], steps: int, device: torch.device) -> float:
    """Seconds of one of `steps` steps, the device idle before and after them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - began) / steps


def take_turns(entries: Sequence[Entry], rules: Rules) -> None:
    """Fill `seconds` of the entries, a number a round; all have as many rounds."""
    began = time.monotonic()
    for number in range(rules.rounds):
        if number >= FEWEST_ROUNDS and time.monotonic() - began > rules.cell_seconds:
            return
        running = [entry for entry in entries if entry.step is not None]
        first = number % max(1, len(running))
        for entry in [*running[first:], *running[:first]]:
            with _may_leave(entry, rules.device):
                assert entry.step is not None
                assert entry.contender is not None
                entry.step()
                entry.seconds.append(timed(entry.step, entry.steps, rules.device))
                entry.contender.model.zero_grad(set_to_none=True)
            _empty_cache(rules.device)  # the next contender finds the memory as this one did
