"""Sample order -> rank -> worker process -> Batch.

    plan (ids of micro batch u)  ->  read, crc32, decode, augment, collate (samples.py)  ->  trainer

Micro batch u = accumulation x step + index of the micro batch goes to worker u mod W, and the DataLoader
hands them out in the order of u. What a micro batch holds follows from the order spec, the seed and u
alone: rank count, worker count, prefetching and restarts cannot change one bit of it.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.mixture import MixedSamples, MixedSplit
from segformer.data.loading.order import BatchShape, MixedOrder, SampleOrder
from segformer.data.loading.samples import Batch, Samples
from segformer.data.loading.workers import WorkerStream, print_line
from segformer.data.shards.format import Split
from segformer.data.shards.storage import StorageConfig
from segformer.data.sources.dataset import RGB
from segformer.errors import ConfigError, at_least, within

MAX_WORKERS = 8
MOST_PER_CORE = 16  # a worker has 0.2 GiB: hundreds on a small machine take it down

_Plan = Iterator[list[tuple[int, int]]]  # (sample id, epoch) pairs, batch by batch


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    """Production of batches; nothing here changes what they hold."""

    workers: int = -1
    """Worker processes per rank; -1 = cores / ranks on this machine, at most 8; 0 = none, in the trainer."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    timeout: int = 300
    """Seconds to wait for one batch before the run ends with an error."""
    max_corrupt: float = 1e-4
    """Share of a training split that may be corrupt and is replaced by its neighbors, named and counted; a
    run that meets more ends. The share is rounded down to whole samples: of 9,999 none."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        within(self, "loader.", max_corrupt=(0, 0.1), workers=(-1, 1024), prefetch=(1, 1024))
        at_least(self, "loader.", timeout=1)


def worker_count(cfg: LoaderConfig, local_world_size: int) -> int:
    """Worker processes of one rank, where `local_world_size` ranks share the machine.

    ConfigError for more of them than MOST_PER_CORE of the cores that this process may use.
    """
    cores = len(os.sched_getaffinity(0))
    if cfg.workers < 0:
        return max(1, min(MAX_WORKERS, cores // local_world_size))
    most = max(1, MOST_PER_CORE * cores // local_world_size)
    if cfg.workers > most:
        raise ConfigError(
            f"loader.workers={cfg.workers} for each of {local_world_size} ranks is too much for {cores} "
            f"cores; use 0 to {most}, or -1 for cores / ranks"
        )
    return cfg.workers


def train_batches(
    split: Split | MixedSplit,
    order: SampleOrder | MixedOrder,
    augment: AugmentConfig | ClassificationAugment,
    loader: LoaderConfig,
    *,
    batch: BatchShape,
    seed: int,
    rank: int,
    start_step: int,
    local_world_size: int = 1,
    warn: Callable[[str], None] = print_line,
) -> WorkerStream[Batch]:
    """The endless stream of one rank's micro batches from optimizer step `start_step` on."""
    if isinstance(augment, ClassificationAugment) and augment.magnitude and split.pixels != RGB:
        what = (
            f"classification.magnitude={augment.magnitude}: RandAugment is of {RGB}, the set {split.pixels}"
        )
        raise ConfigError(f"{what}; give classification.magnitude=0")
    plan = partial(_train_plan, order, batch, rank, start_step)
    make: Callable[[Any], Samples | MixedSamples]
    if isinstance(split, MixedSplit):
        assert isinstance(order, MixedOrder)
        assert isinstance(augment, AugmentConfig)
        seeds = [one.spec.seed for one in order.orders]
        budgets = [corrupt_budget(loader, part) for part in split.parts]
        make = partial(MixedSamples, augment=augment, seeds=seeds, budgets=budgets)
    else:
        make = partial(Samples, augment=augment, seed=seed, budget=corrupt_budget(loader, split))
    return _batches(split, plan, make, loader, worker_count(loader, local_world_size), warn)


def eval_batches(
    split: Split,
    loader: LoaderConfig,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    local_world_size: int = 1,
    augment: ClassificationAugment | None = None,
    table: np.ndarray | None = None,
    warn: Callable[[str], None] = print_line,
) -> WorkerStream[Batch]:
    """Every sample of the split once over the ranks, whole and unscaled; a batch holds images of one size.

    augment: for classification, whose images are cropped to its evaluation view. table: as of Samples. A
    corrupt sample is an error here: a score must not come from another image.
    """
    batches = _eval_ids(split, rank, world_size, batch_size)
    workers = min(worker_count(loader, local_world_size), len(batches))
    make = partial(Samples, augment=augment, table=table)
    return _batches(split, partial(_eval_plan, batches), make, loader, workers, warn)


def _batches(
    split: Split | MixedSplit,
    plan: Callable[[int, int], _Plan],
    make: Callable[[Any], Samples | MixedSamples],
    cfg: LoaderConfig,
    workers: int,
    warn: Callable[[str], None],
) -> WorkerStream[Batch]:
    """The batches of a plan. A worker opens the split itself: an error in unpickling would be a traceback."""
    reopen, address = split.__reduce__()
    opened = partial(reopen, *address) if workers else lambda: split
    items = partial(_items, opened, plan, make)
    return WorkerStream(items, workers=workers, prefetch=cfg.prefetch, timeout=cfg.timeout, warn=warn)


def _items(
    opened: Callable[[], Split | MixedSplit],
    plan: Callable[[int, int], _Plan],
    make: Callable[[Any], Samples | MixedSamples],
    worker: int,
    workers: int,
) -> Iterator[Batch]:
    samples = make(opened())
    for part in plan(worker, workers):
        yield samples.batch(part)


def _train_plan(
    order: SampleOrder | MixedOrder,
    batch: BatchShape,
    rank: int,
    start_step: int,
    worker: int,
    workers: int,
) -> _Plan:
    """The micro batches of a worker, without end."""
    for micro_step in count(start_step * batch.accumulation + worker, workers):
        q0, q1 = batch.positions(rank, micro_step)
        ids = order.ids(q0, q1 - q0)
        yield [(int(sample_id), order.epoch_of(q0 + slot)) for slot, sample_id in enumerate(ids)]


def _eval_plan(batches: list[np.ndarray], worker: int, workers: int) -> _Plan:
    for ids in batches[worker::workers]:
        yield [(int(sample_id), 0) for sample_id in ids]


def corrupt_budget(cfg: LoaderConfig, split: Split) -> int:
    """Samples of a split that may be corrupt before a run ends."""
    return int(cfg.max_corrupt * split.num_samples)


def spent_budget(
    cfg: LoaderConfig, split: Split | MixedSplit, corrupt: Collection[int]
) -> tuple[int, int] | None:
    """(corrupt samples, as many may be) of a set that has too many of them; None where none has."""
    parts = split.parts if isinstance(split, MixedSplit) else [split]
    first = 0
    for part in parts:
        count = sum(first <= sample_id < first + part.num_samples for sample_id in corrupt)
        if count > (budget := corrupt_budget(cfg, part)):
            return count, budget
        first += part.num_samples
    return None


def num_eval_batches(split: Split, world_size: int, batch_size: int) -> list[int]:
    """How many batches each rank evaluates; ranks may differ."""
    return [len(_eval_ids(split, rank, world_size, batch_size)) for rank in range(world_size)]


def _eval_ids(split: Split, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """One rank's batches: every world_size-th id in the order of sizes, cut where the size changes.

    Tiles, which of one image have one size, stay together and in order.
    """
    heights, widths = split.heights, split.widths
    if split.task == "classification":  # cropped to one size
        heights = widths = np.zeros(split.num_samples, np.int32)
    ids = np.lexsort((np.arange(split.num_samples), widths, heights))
    ids = ids[split.tiled.owners(world_size)[ids] == rank] if split.tiled else ids[rank::world_size]
    changes = np.flatnonzero((np.diff(heights[ids]) != 0) | (np.diff(widths[ids]) != 0)) + 1
    return [
        run[start : start + batch_size]
        for run in np.split(ids, changes)
        for start in range(0, len(run), batch_size)
    ]
