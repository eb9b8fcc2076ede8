"""Ours beside another checkout of the project and beside transformers' network in two runtimes, in turns.

    ours          this checkout, model.ops=fused
    baseline      the same of the checkout that `rivals.baseline` names, an older commit for example
    onnxruntime   transformers' network as an ONNX file, traced at the size that is timed (inference alone)
    openvino      the same file

Each turn is a process of its own; ratios are formed within a round. Weights and inputs are the same, and a
contender whose result differs ends the measurement. `peak_mib` is the most memory that the process held.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.contenders import Cell, build, write_weights
from bench.exports import trace
from bench.record import ROOT, conditions, spread, table, write_csv
from segformer.errors import ConfigError, SegformerError, at_least

TURN = Path(__file__).with_name("turn.py")
ACCEPT = (
    *("training/b0/256x256/8", "training/b2/512x512/1"),
    *(f"inference/{variant}/512x512/1" for variant in ("b0", "b2", "b5")),
)
RUNTIMES = ("onnxruntime", "openvino")
TOLERANCE = 1e-4  # of the result
FILE = "transformers.onnx"


@dataclass(kw_only=True, slots=True)
class RivalsBench:
    """What is timed, and how long."""

    cells: list[str] = field(default_factory=lambda: ["accept"])
    "mode/variant/HxW/batch; accept stands for the list in bench/rivals.py."
    baseline: str = ""
    "Another checkout of the project; empty: none."
    runtimes: list[str] = field(default_factory=lambda: list(RUNTIMES))
    "onnxruntime, openvino: transformers' ONNX file in them."
    classes: int = 150
    "Classes of the network."
    threads: int = 2
    "Threads of a process."
    rounds: int = 5
    "Turns of each contender in a cell."
    seconds: float = 4
    "Time of a turn, after two steps that are not timed."

    def __post_init__(self) -> None:
        at_least(self, "rivals.", classes=1, threads=1, rounds=1, seconds=0)
        if unknown := set(self.runtimes) - set(RUNTIMES):
            raise ConfigError(f"rivals.runtimes has {', '.join(sorted(unknown))}; use {', '.join(RUNTIMES)}")
        if self.baseline and not (Path(self.baseline) / "bench/contenders.py").is_file():
            raise ConfigError(
                f"rivals.baseline={self.baseline} is no checkout of the project; make one: "
                "git worktree add <folder> <commit>"
            )
        if any(cell.batch is None for cell in self.chosen()):
            raise ConfigError(
                "rivals.cells asks for the largest batch, which only bench=peers seeks; name it"
            )

    def chosen(self) -> list[Cell]:
        """The cells, `accept` spelled out."""
        texts = [each for text in self.cells for each in (ACCEPT if text == "accept" else (text,))]
        return [Cell.parse(text) for text in dict.fromkeys(texts)]


def measure(cfg: RivalsBench, out: Path) -> list[dict[str, Any]]:
    """Measure every cell and write rivals.csv into `out`."""
    rows: list[dict[str, Any]] = []
    found = conditions(("torch", "transformers", *cfg.runtimes))
    for cell in cfg.chosen():
        with TemporaryDirectory() as scratch:
            write_weights(cell.variant, cfg.classes, Path(scratch) / "weights")
            names = ["ours", *(["baseline"] if cfg.baseline else [])]
            if cell.mode == "inference" and cfg.runtimes:
                theirs = build("transformers", cell.variant, cfg.classes, Path(scratch) / "weights").model
                trace(theirs, (cell.batch or 1, 3, *cell.size), Path(scratch) / FILE)
                names += cfg.runtimes
            part = _rows(cell, names, cfg, Path(scratch))
        print(table(part), flush=True)
        rows += part
        write_csv(out / "rivals.csv", rows, found)
    return rows


def _rows(cell: Cell, names: Sequence[str], cfg: RivalsBench, folder: Path) -> list[dict[str, Any]]:
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(cfg.rounds):
        for name in (*names,) if number % 2 else (*reversed(names),):
            turns[name].append(_turn(name, cell, cfg, folder))
        right = turns["ours"][0]["result"]
        differences = {name: abs(taken[-1]["result"] / right - 1) for name, taken in turns.items()}
        for name, difference in differences.items():
            if not difference <= TOLERANCE:
                raise SegformerError(f"{cell}: the results of ours and {name} differ by {difference:.2g}")
    rows = []
    for name, taken in turns.items():
        ratios = [other["seconds"] / own["seconds"] for other, own in zip(taken, turns["ours"], strict=True)]
        times, share = spread([1e3 * turn["seconds"] for turn in taken], 3), spread(ratios)
        row = {"cell": str(cell), "threads": cfg.threads, "contender": name, "rounds": cfg.rounds}
        row |= {f"ms_{key}": times[key] for key in ("median", "min", "max")}
        row |= {f"times_ours_{key}": f"{share[key]:.2f}" for key in ("median", "min", "max")}
        row["peak_mib"] = round(median(turn["mib"] for turn in taken))
        rows.append(row | {"difference": f"{differences[name]:.1g}"})
    return rows


def _turn(name: str, cell: Cell, cfg: RivalsBench, folder: Path) -> dict[str, float]:
    """One process: its seconds of a step, its result and its memory."""
    place = Path(cfg.baseline).resolve() if name == "baseline" else ROOT
    given = {"cell": str(cell), "classes": cfg.classes, "threads": cfg.threads, "seconds": cfg.seconds}
    given |= {"folder": str(folder / "weights"), "file": str(folder / FILE), "runtime": name}
    env = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": str(cfg.threads)}
    command = [sys.executable, "-P", str(TURN), json.dumps(given)]  # -P: bench/ is no place to import from
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell}: {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
