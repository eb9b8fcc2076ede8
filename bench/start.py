"""Seconds from "continue at step t" to the first batch, with a million samples, in a process that is warm.

open_s          ShardSet.open with every check that a start makes (index, sizes of all tars)
first_batch_s   train_batches at a step in the middle of the second epoch -> the first batch
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inflated import inflate
from bench.record import conditions, spread, table, write_csv
from bench.synthetic import KINDS, write_folder
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig, train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.shards.format import ShardSet
from segformer.errors import ConfigError

GLOBAL_BATCH = 16


@dataclass(kw_only=True, slots=True)
class StartBench:
    """How large the set is, and how often it is started."""

    samples: int = 1_000_000
    "Samples of the set."
    images: int = 256
    "Different pictures among them; also the samples of one shard."
    workers: str = "0,2"
    "Numbers of worker processes, by commas."
    repeats: int = 5
    "Starts for each of them."

    def __post_init__(self) -> None:
        if min(self.samples, self.images, self.repeats) < 1:
            raise ConfigError("start.samples, images and repeats must be 1 or more")


def measure(cfg: StartBench, out: Path) -> list[dict[str, Any]]:
    """Measure starts and write start.csv into `out`."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch) / "folder", KINDS["camvid"], cfg.images)
        path = Path(scratch) / "shards"
        samples = inflate(folder, path, cfg.samples, KINDS["camvid"].classes).split("train").num_samples
        for workers in (int(number) for number in cfg.workers.split(",")):
            runs = [_start(path, workers) for _ in range(cfg.repeats)]
            row: dict[str, Any] = {"samples": samples, "workers": workers, "repeats": cfg.repeats}
            for key in runs[0]:
                found = spread([run[key] for run in runs], 3)
                row |= {key: found["median"], f"{key}_min": found["min"], f"{key}_max": found["max"]}
            row["first_start_first_batch_s"] = round(runs[0]["first_batch_s"], 3)
            rows.append(row)
    write_csv(out / "start.csv", rows, conditions())
    print(table(rows))
    return rows


def _start(path: Path, workers: int) -> dict[str, float]:
    began = time.perf_counter()
    split = ShardSet.open(path).split("train")
    opened = time.perf_counter()
    order = SampleOrder(make_order_spec(split.shard_sizes, seed=3, global_batch=GLOBAL_BATCH))
    stream = iter(
        train_batches(
            split,
            order,
            AugmentConfig(),
            LoaderConfig(workers=workers),
            seed=3,
            rank=0,
            batch=BatchShape(GLOBAL_BATCH, GLOBAL_BATCH, 1),
            start_step=3 * split.num_samples // (2 * GLOBAL_BATCH),
        )
    )
    next(stream)
    ready = time.perf_counter()
    stream.close()
    return {"open_s": opened - began, "first_batch_s": ready - opened}
