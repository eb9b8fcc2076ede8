"""Ours against its peers, side by side in one process: time, memory, operations and share of the roofline.

For every cell (mode, variant, size, batch) the contenders of contenders.py get the same weights and inputs.
First their results are compared: one that computes something else is not timed, and the error that the run
ends with names it. Then they take turns, round after round, and in every round another one begins. A turn is
one step that is not timed, to fill caches and the allocator again, and as many steps as take `turn_seconds`,
at least one; its time is their mean. Ratios are formed within a round, so that a slow minute of the machine
slows both sides.

A step of `inference` gives logits at a quarter of the image size in eval mode. A step of `training` clears
the gradients, computes the loss at the size of the labels, and all gradients; there is no optimizer.
"""

import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.contenders import COMPILED, EAGER, NAMES, Cell, write_weights
from bench.contest import Entry, Rules, first_line, hold
from bench.picture import draw
from bench.record import conditions, spread, table, write_csv
from bench.roofline import Peaks, peaks, work
from segformer.errors import ConfigError, SegformerError
from segformer.models.ops.native import keep_freed_memory

# The cells of the acceptance criteria, the most important first, and the larger set.
ACCEPT = {
    "cpu": (
        *(f"inference/{variant}/512x512/1" for variant in ("b0", "b2", "b5")),
        *("training/b0/256x256/8", "training/b2/512x512/1", "inference/b0/1024x2048/1"),
    ),
    "cuda": ("training/b5/512x512/max", "inference/b0/1024x2048/1", "inference/b5/1024x2048/1"),
}
ALL = {
    "cpu": (
        *ACCEPT["cpu"],
        *("training/b0/512x512/1", "training/b5/512x512/1"),
        *("inference/b2/1024x2048/1", "inference/b5/1024x2048/1"),
    ),
    "cuda": (
        *ACCEPT["cuda"],
        *(f"training/{variant}/512x512/max" for variant in ("b0", "b2")),
        *(f"inference/{variant}/512x512/1" for variant in ("b0", "b2", "b5")),
        "inference/b2/1024x2048/1",
        *(f"training/{variant}/1024x2048/max" for variant in ("b0", "b2", "b5")),
    ),
}
BESIDE = {"fused": "fused", "compiled": "fused+compile"}  # columns times_* and memory_*
PACKAGES = ("torch", "triton", "transformers", "segmentation_models_pytorch")
COMPILED_ON_CPU = "inference/b0/512x512/1"  # compiling the larger ones takes minutes each


@dataclass(kw_only=True, slots=True)
class PeersBench:
    """Which contenders are compared in which cells, and for how long."""

    cells: list[str] = field(default_factory=lambda: ["accept"])
    """mode/variant/HxW/batch, as training/b2/512x512/1; batch max (GPU): the largest power of two that fits.
    accept and all stand for the lists in bench/peers.py."""
    contenders: list[str] = field(default_factory=list)
    """Of bench/contenders.py; empty: all that aren't compiled, and fused+compile and transformers+compile, on
    a CPU only in inference/b0/512x512/1."""
    classes: int = 150
    """Classes that the network predicts."""
    precision: str = ""
    """fp32 or bf16 (autocast); empty: fp32 on a CPU, bf16 on a GPU."""
    rounds: int = 9
    """Turns of each contender in a cell."""
    turn_seconds: float = 0.5
    """Time that the steps of a turn fill, seconds; a turn has at least one."""
    cell_seconds: float = 300
    """After this many seconds of turns a cell ends, if it has had 3 rounds."""
    minutes: float = 0
    """After this many minutes nothing more is compiled and no cell begins; 0 = no limit."""
    threads: int = 0
    """Threads on a CPU; 0 = one for every core."""
    compile_mode: str = "default"
    """Mode that torch.compile is given."""
    memory: bool = True
    """Measure peak memory (on a CPU in a process for each contender)."""
    picture: str = ""
    """Also draw the results into this PNG file."""

    def __post_init__(self) -> None:
        for text in self.cells:
            if text not in ("accept", "all"):
                Cell.parse(text)
        if unknown := [name for name in self.contenders if name not in NAMES]:
            raise ConfigError(f"peers.contenders has {', '.join(unknown)}; use {', '.join(NAMES)}")
        if self.precision not in ("", "fp32", "bf16"):
            raise ConfigError(f"peers.precision={self.precision} is unknown; use fp32 or bf16")
        if min(self.classes, self.rounds, len(self.cells)) < 1:
            raise ConfigError("peers.classes, rounds and the number of cells must be 1 or more")
        if min(self.turn_seconds, self.cell_seconds, self.minutes, self.threads) < 0:
            raise ConfigError("peers.turn_seconds, cell_seconds, minutes and threads must not be negative")


def measure(cfg: PeersBench, device: str, out: Path) -> list[dict[str, Any]]:
    """Measure every cell on cpu or cuda; write peers.csv (cuda: peers-cuda.csv) into `out` cell by cell.

    Raises SegformerError at the end, all rows written, where a contender differs or one of ours fails.
    """
    place = _device(device)
    cells = _cells(cfg, device)
    precision = cfg.precision or {"cpu": "fp32", "cuda": "bf16"}[device]
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    if device == "cpu":
        keep_freed_memory()  # for all contenders, as our commands do for themselves
    with _threads(cfg.threads) as threads, TemporaryDirectory() as scratch:
        rules = _rules(cfg, place, precision, threads)
        found = _conditions(place, threads)
        limits = peaks(place, precision)
        held: list[tuple[Cell, int, list[Entry]]] = []
        for cell in cells:
            if time.monotonic() > rules.deadline:
                print(f"{cell}: left out, the time limit of peers.minutes")
                continue
            folder = Path(scratch) / cell.variant
            if not folder.exists():
                write_weights(cell.variant, cfg.classes, folder)
            try:
                batch, entries = hold(cell, _names(cfg, cell, device), folder, rules)
            except Exception as error:  # the other cells are measured
                traceback.print_exc()
                wrong.append(f"{cell}: {type(error).__name__}: {first_line(error)}")
                continue
            held.append((cell, batch, entries))
            wrong += [f"{cell}: {entry.name}: {entry.note}" for entry in entries if entry.wrong]
            if limits and (again := peaks(place, precision)):
                limits = limits.best(again)
            rows = [row for part in held for row in rows_of(*part, rules, limits)]
            print(shown(cell, batch, rows[-len(entries) :]), flush=True)
            write_csv(out / ("peers.csv" if device == "cpu" else f"peers-{device}.csv"), rows, found)
    if cfg.picture and rows:
        draw(rows, Path(cfg.picture))
    if wrong:
        raise SegformerError("all others were measured, but " + "; ".join(wrong))
    return rows


def _rules(cfg: PeersBench, device: torch.device, precision: str, threads: int) -> Rules:
    return Rules(
        device=device,
        precision=precision,
        num_classes=cfg.classes,
        threads=threads,
        rounds=cfg.rounds,
        turn_seconds=cfg.turn_seconds,
        cell_seconds=cfg.cell_seconds,
        deadline=time.monotonic() + 60 * cfg.minutes if cfg.minutes else float("inf"),
        compile_mode=cfg.compile_mode,
        memory=cfg.memory,
    )


def _device(device: str) -> torch.device:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device={device} is unknown; use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; use device=cpu")
    return torch.device(device)


def _cells(cfg: PeersBench, device: str) -> list[Cell]:
    texts: list[str] = []
    for text in cfg.cells:
        texts += {"accept": ACCEPT[device], "all": ALL[device]}.get(text, (text,))
    cells = [Cell.parse(text) for text in dict.fromkeys(texts)]
    if device == "cpu" and any(cell.batch is None for cell in cells):
        raise ConfigError(
            "peers.cells asks for the largest batch, which is sought on a GPU only; use device=cuda"
        )
    return cells


def _names(cfg: PeersBench, cell: Cell, device: str) -> Sequence[str]:
    if cfg.contenders:
        return cfg.contenders
    return (*EAGER, *COMPILED) if device == "cuda" or str(cell) == COMPILED_ON_CPU else EAGER


@contextmanager
def _threads(number: int) -> Iterator[int]:
    """Set torch's threads to `number`, or to the cores of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or len(os.sched_getaffinity(0)))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _conditions(device: torch.device, threads: int) -> dict[str, str]:
    installed = packages_distributions()
    found = conditions([installed[name][0] for name in PACKAGES if name in installed])
    found["hardware"] += f", {threads} threads"
    if device.type == "cuda":
        found["hardware"] = f"{torch.cuda.get_device_name(device)}, {found['hardware']}"
    return found


def rows_of(
    cell: Cell, batch: int, entries: Sequence[Entry], rules: Rules, limits: Peaks | None
) -> list[dict[str, Any]]:
    """A row for every contender of a cell; bench/README.md says what each column is. None: not known."""
    size, training = cell.size, cell.mode == "training"
    least = work(cell.variant, size, rules.num_classes, batch=batch, folded=True, training=training)
    bound = limits.bound(least, rules.precision) if limits else None
    rows = []
    for entry in entries:
        folded = entry.name.startswith("fused")
        own = work(cell.variant, size, rules.num_classes, batch=batch, folded=folded, training=training)
        row: dict[str, Any] = {
            "mode": cell.mode,
            "variant": cell.variant,
            "size": f"{size[0]}x{size[1]}",
            "batch": batch,
            "precision": rules.precision,
            "contender": entry.name,
            "note": entry.note,
        }
        row |= _times(entry, batch)
        others = {name: next((e for e in entries if e.name == other), None) for name, other in BESIDE.items()}
        for name, other in others.items():
            row |= _ratios(f"times_{name}", entry, other)
        seconds = median(entry.seconds) if entry.seconds else None
        row |= {
            "peak_mib": _rounded(entry.peak_mib),
            **{f"memory_{name}": _memory_ratio(entry, other) for name, other in others.items()},
            "weights_mib": _rounded(entry.weights_mib),
            "gflop": _rounded(2e-9 * own.macs),
            "gflop_per_s": _rounded(2e-9 * own.macs / seconds) if seconds else None,
            "bound_ms": _rounded(1e3 * bound) if bound else None,
            "roofline_share": _rounded(bound / seconds, 3) if bound and seconds else None,
            "difference": _rounded(entry.difference, 2),
            "gradient_difference": _rounded(entry.gradient_difference, 2),
            "peak_gflop_per_s": _rounded(1e-9 * limits.flops) if limits else None,
            "peak_gb_per_s": _rounded(1e-9 * limits.bandwidth) if limits else None,
            "peaks": limits.source if limits else None,
        }
        rows.append(row)
    return rows


def _times(entry: Entry, batch: int) -> dict[str, Any]:
    names = ("ms_median", "ms_min", "ms_max")
    found = spread([1e3 * taken for taken in entry.seconds]) if entry.seconds else {}
    row: dict[str, Any] = {name: found.get(name.removeprefix("ms_")) for name in names}
    rate = batch / median(entry.seconds) if entry.seconds else None
    return row | {"images_per_s": _rounded(rate), "rounds": len(entry.seconds)}


def _ratios(name: str, entry: Entry, other: Entry | None) -> dict[str, Any]:
    """Median, least and most of the time over that of `other` in the same round."""
    keys = {name: "median", f"{name}_min": "min", f"{name}_max": "max"}
    if other is None or not entry.seconds or not other.seconds:
        return dict.fromkeys(keys)
    ratios = spread([a / b for a, b in zip(entry.seconds, other.seconds, strict=True)], 3)
    return {key: ratios[kind] for key, kind in keys.items()}


def _memory_ratio(entry: Entry, other: Entry | None) -> float | None:
    """Peak memory over that of `other`."""
    if other is None or entry.peak_mib is None or not other.peak_mib:
        return None
    return _rounded(entry.peak_mib / other.peak_mib, 3)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def shown(cell: Cell, batch: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a cell for a reader: what was measured, and why the others were not."""
    lines = []
    compiled = any(row["times_compiled"] is not None for row in rows)
    for row in rows:
        ratio = "{times_fused} ({times_fused_min} to {times_fused_max})".format_map(row)
        line = {
            "contender": row["contender"],
            "ms": row["ms_median"],
            "time / fused": None if row["times_fused"] is None else ratio,
            **({"time / compiled": row["times_compiled"]} if compiled else {}),
            "images/s": row["images_per_s"],
            "peak MiB": row["peak_mib"],
            "MiB / fused": row["memory_fused"],
            **({"MiB / compiled": row["memory_compiled"]} if compiled else {}),
            "weights MiB": row["weights_mib"],
            "GFLOP": row["gflop"],
            "GFLOP/s": row["gflop_per_s"],
            "of roofline": row["roofline_share"],
            "difference": row["difference"],
            "of gradients": row["gradient_difference"],
        }
        if row["ms_median"] is not None:
            lines.append({key: "-" if value is None else value for key, value in line.items()})
    head = f"{cell.mode} {cell.variant}, {cell.size[0]} x {cell.size[1]}, batch {batch}"
    notes = [f"{row['contender']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([head, *([table(lines)] if lines else []), *notes])
