"""The sample order at 10^4 to 10^8 samples: time to plan, to seek, to name the ids of a batch, and memory.

Each size is measured in a process of its own, which imports the order and NumPy only:

    python -m bench.order <samples> <batches>      prints one JSON object
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.record import ROOT, conditions, spread, table, write_csv
from segformer.data.loading.order import SampleOrder, make_order_spec
from segformer.errors import ConfigError

GLOBAL_BATCH = 16
SHARD = 1000  # samples
SEED = 1


@dataclass(kw_only=True, slots=True)
class OrderBench:
    """Which sizes are measured, and how often."""

    samples: str = "10000,100000,1000000,10000000,100000000"
    "Numbers of samples, by commas."
    batches: int = 500
    "Batches whose ids are asked for after a seek."
    repeats: int = 3
    "Processes that are measured per size."

    def __post_init__(self) -> None:
        if not all(number.strip().isdigit() and int(number) for number in self.samples.split(",")):
            raise ConfigError(f"order.samples={self.samples!r}; use whole numbers above 0, by commas")
        if min(self.batches, self.repeats) < 1:
            raise ConfigError("order.batches and order.repeats must be 1 or more")


def measure(cfg: OrderBench, out: Path) -> list[dict[str, Any]]:
    """Measure every size and write order.csv into `out`."""
    rows = []
    for samples in (int(number) for number in cfg.samples.split(",")):
        runs = [_in_a_process(samples, cfg.batches) for _ in range(cfg.repeats)]
        row: dict[str, Any] = {"samples": samples, "shards": -(-samples // SHARD), "repeats": cfg.repeats}
        for key in runs[0]:
            found = spread([run[key] for run in runs], 3)
            row |= {key: found["median"], f"{key}_min": found["min"], f"{key}_max": found["max"]}
        rows.append(row)
    write_csv(out / "order.csv", rows, conditions(("numpy",)))
    print(table([{key: row[key] for key in row if not key.endswith(("_min", "_max"))} for row in rows]))
    return rows


def _in_a_process(samples: int, batches: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.order", str(samples), str(batches)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def plan(samples: int, batches: int) -> dict[str, float]:
    """Seconds and MiB of one order: chunk tables, a seek into epoch 3, batches there, the next epoch."""
    SampleOrder(make_order_spec([1], seed=0, global_batch=1)).ids(0, 1)  # loads what is loaded once
    before = _peak_mib()
    sizes = [SHARD] * (samples // SHARD) + ([samples % SHARD] if samples % SHARD else [])
    clock = [time.perf_counter()]
    order = SampleOrder(make_order_spec(sizes, seed=SEED, global_batch=GLOBAL_BATCH))
    clock.append(time.perf_counter())
    start = 3 * samples + samples // 3
    order.ids(start, GLOBAL_BATCH)
    clock.append(time.perf_counter())
    for batch in range(1, batches + 1):
        order.ids(start + batch * GLOBAL_BATCH, GLOBAL_BATCH)
    clock.append(time.perf_counter())
    order.ids(4 * samples, GLOBAL_BATCH)
    clock.append(time.perf_counter())
    build, seek, rest, epoch = (after - earlier for earlier, after in pairwise(clock))
    return {
        "build_s": build,
        "first_ids_s": seek,
        "batch_ms": 1e3 * rest / batches,
        "next_epoch_s": epoch,
        "peak_mib": _peak_mib() - before,
    }


def _peak_mib() -> float:
    """Highest resident memory so far; getrusage would count the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    print(json.dumps(plan(int(sys.argv[1]), int(sys.argv[2]))))
