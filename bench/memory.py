"""Memory of the trainer and of each worker process after every epoch: does it stay?

MiB of private pages, which belong to one process alone; the index is mapped and shared."""

import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import resident_mib
from bench.record import conditions, table, write_csv
from bench.synthetic import KINDS, write_folder
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig, train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class MemoryBench:
    """How long the loader runs."""

    images: int = 512
    "Pictures of the set."
    epochs: int = 10
    "Epochs that the loader goes through."
    workers: int = 2
    "Worker processes of the loader."
    batch: int = 16
    "Images of a batch."

    def __post_init__(self) -> None:
        if min(self.images, self.epochs, self.workers, self.batch) < 1:
            raise ConfigError("memory.images, epochs, workers and batch must be 1 or more")


def measure(cfg: MemoryBench, root: str, out: Path) -> list[dict[str, Any]]:
    """Run the epochs and write memory.csv into `out`; root: a real folder, "" = pictures made here."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(root) if root else write_folder(Path(scratch) / "folder", KINDS["camvid"], cfg.images)
        classes = [str(label) for label in range(150)]
        data = DatasetConfig(name="bench", classes=classes, splits=["train"], allow_unseen=["*"])
        write_shards(data, folder, Path(scratch) / "shards", seed=0, samples_per_shard=128, workers=1)
        rows = _epochs(cfg, ShardSet.open(Path(scratch) / "shards"))
    write_csv(out / "memory.csv", rows, conditions())
    print(table(rows))
    return rows


def _epochs(cfg: MemoryBench, shards: ShardSet) -> list[dict[str, Any]]:
    split = shards.split("train")
    before = set(multiprocessing.active_children())
    stream = iter(
        train_batches(
            split,
            SampleOrder(make_order_spec(split.shard_sizes, seed=3, global_batch=cfg.batch)),
            AugmentConfig(),
            LoaderConfig(workers=cfg.workers),
            seed=3,
            rank=0,
            batch=BatchShape(cfg.batch, cfg.batch, 1),
            start_step=0,
        )
    )
    rows = []
    for epoch in range(cfg.epochs):
        for _ in range(-(-split.num_samples // cfg.batch)):
            next(stream)
        workers = sorted(set(multiprocessing.active_children()) - before, key=lambda process: process.name)
        row = {"epoch": epoch + 1, "samples": split.num_samples, "trainer_mib": resident_mib(os.getpid())}
        row |= {f"worker_{n}_mib": resident_mib(w.pid) for n, w in enumerate(workers) if w.pid is not None}
        rows.append({key: round(value, 1) for key, value in row.items()})
    stream.close()
    return rows
