"""How long a rank's host waits, in every step, for the ranks' agreement to go on (training/stopping.py).

    ask and wait   all ranks exchange their flags before a step and wait for the answer
    ask ahead      they ask before a step and read the answer before the next one

A step is a sleep to the next tick of a clock that all ranks share, as steps on GPUs end together, in their
collectives. Both ways take turns in one start of all ranks (`python -m bench.agreement '<settings>'`), gloo
on one machine: among nodes an exchange takes longer, and so does the first way.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench.processes import on_ranks
from bench.record import conditions, spread, table, write_csv
from segformer.distributed.world import World, init_world
from segformer.errors import at_least

WAYS = ("ask and wait", "ask ahead")


@dataclass(kw_only=True, slots=True)
class AgreementBench:
    """How many ranks agree, and how often."""

    ranks: int = 8
    "Processes, one thread each."
    step_ms: int = 50
    "Length of a step."
    steps: int = 40
    "Steps of a turn."
    rounds: int = 5
    "Turns of each way."

    def __post_init__(self) -> None:
        at_least(self, "agreement.", ranks=2, step_ms=1, steps=2, rounds=1)


def measure(cfg: AgreementBench, out: Path) -> list[dict[str, Any]]:
    """Measure both ways and write agreement.csv into `out`."""
    found = on_ranks("bench.agreement", asdict(cfg), cfg.ranks)
    rows = []
    for way in WAYS:
        turns = [[wait for rank in found for wait in rank[way][turn]] for turn in range(cfg.rounds)]
        middle, late = spread([*map(median, turns)]), spread([quantiles(turn, n=100)[98] for turn in turns])
        row = {"way": way, "ranks": cfg.ranks, "step_ms": cfg.step_ms, "waits": sum(map(len, turns))}
        row |= {f"wait_ms_{name}": value for name, value in middle.items()}
        rows.append(row | {f"p99_ms_{name}": value for name, value in late.items()})
    print(table(rows))
    write_csv(out / "agreement.csv", rows, conditions(("torch",)))
    return rows


def run_rank(cfg: AgreementBench) -> dict[str, list[list[float]]]:
    """Milliseconds that this rank waited: by way, turn and step; all ranks."""
    torch.set_num_threads(1)
    world = init_world()
    start: float = world.gather(time.monotonic() + 0.5)[0]  # one clock: one machine
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(cfg.rounds):
        for way in WAYS:
            found[way].append(_turn(cfg, world, start, ahead=way == WAYS[1]))
            start += cfg.step_ms * (cfg.steps + 1) / 1000
    world.close()
    return found


def _turn(cfg: AgreementBench, world: World, start: float, *, ahead: bool) -> list[float]:
    waits: list[float] = []
    answer: Callable[[], bool] = world.begin_any(False) if ahead else lambda: False
    for step in range(cfg.steps):
        time.sleep(max(0.0, start + step * cfg.step_ms / 1000 - time.monotonic()))
        begun = time.monotonic()
        if ahead:
            answer()
            answer = world.begin_any(False)
        else:
            world.any(False)
        waits.append(1000 * (time.monotonic() - begun))
    answer()
    return waits


if __name__ == "__main__":
    print(json.dumps(run_rank(AgreementBench(**json.loads(sys.argv[1])))))
