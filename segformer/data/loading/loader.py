"""Sample order -> rank -> worker process -> Batch, as a webdataset pipeline over our own shard reader.

    plan (ids of micro batch u)  ->  read, crc32, decode, augment (prepare.py)  ->  collate

Micro batch u = accumulation x step + index of the micro batch goes to worker u mod W, and the DataLoader
hands them out in the order of u. What a micro batch holds follows from the order spec, the seed and u
alone: rank count, worker count, prefetching and restarts cannot change one bit of it. Nothing is opened by
URL by webdataset and none of its decoders is used: bytes come from ShardReader, pixels from decode.py."""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import get_worker_info

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.order import BatchShape, SampleOrder
from segformer.data.loading.prepare import (
    EvalClassification,
    EvalSegmentation,
    Prepare,
    Ready,
    Replacement,
    TrainClassification,
    TrainSegmentation,
)
from segformer.data.loading.transforms import AugmentConfig
from segformer.data.loading.workers import Deferred, WorkerStream, worker_place
from segformer.data.shards.format import Split
from segformer.data.shards.storage import StorageConfig
from segformer.errors import ConfigError, DataError

MAX_WORKERS = 8
MOST_PER_CORE = 16  # a worker has 0.2 GiB: hundreds on a small machine take it down


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    """How batches are produced; nothing here changes what they hold."""

    workers: int = -1
    """Worker processes per rank; -1 = cores / ranks on this machine, at most 8; 0 = none, in the trainer."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    timeout: int = 300
    """Seconds to wait for one batch before the run ends with an error."""
    max_corrupt: float = 1e-4
    """Share of a training split that may be corrupt and is replaced by its neighbours, named and counted; a
    run that meets more ends. The share is rounded down to whole samples: of 9,999 none."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.max_corrupt <= 0.1:
            raise ConfigError(f"loader.max_corrupt={self.max_corrupt}; use 0 to 0.1")
        for name, least in (("workers", -1), ("prefetch", 1), ("timeout", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"loader.{name}={getattr(self, name)}; use {least} or more")


@dataclass(slots=True)
class Batch:
    """One micro batch. B samples of one size."""

    images: Tensor
    """uint8 (B, 3, h, w), RGB, in channels-last memory; padding is 0."""
    targets: Tensor
    """uint8 (B, h, w), train ids and 255; int64 (B,), class ids, for classification."""
    photometric: Tensor | None
    """float32 (B, NUM_PHOTOMETRIC) for Normalize; None in evaluation."""
    sample_ids: Tensor
    """int64 (B,)."""
    replaced: tuple[Replacement, ...] = ()
    """Corrupt samples among them that another one stands for."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls this by name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        photometric = None if self.photometric is None else function(self.photometric)
        ids = function(self.sample_ids)
        return Batch(function(self.images), function(self.targets), photometric, ids, self.replaced)


class _TrainPlan:
    """First stage: the (sample id, epoch) pairs of this worker's micro batches, without end."""

    def __init__(self, order: SampleOrder, batch: BatchShape, rank: int, start_step: int) -> None:
        self.order, self.batch, self.rank = order, batch, rank
        self.first = start_step * batch.accumulation

    def __call__(self) -> Iterator[list[tuple[int, int]]]:
        worker, workers = worker_place()
        for unit in itertools.count(self.first + worker, workers):
            q0, q1 = self.batch.positions(self.rank, unit)
            ids = self.order.ids(q0, q1 - q0)
            yield [(int(sample_id), self.order.epoch_of(q0 + slot)) for slot, sample_id in enumerate(ids)]


class _EvalPlan:
    """First stage: the (sample id, epoch 0) pairs of this worker's share of a fixed list of batches."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches = batches

    def __call__(self) -> Iterator[list[tuple[int, int]]]:
        worker, workers = worker_place()
        for batch in self.batches[worker::workers]:
            yield [(int(sample_id), 0) for sample_id in batch]


class _Prepared:
    """Middle stage: lists of (sample id, epoch) -> lists of Ready. Opens the shards when first called."""

    def __init__(self, split: Split, make: Callable[[Split], Prepare]) -> None:
        self.split = Deferred(split)
        self.make = make
        self.prepare: Prepare | None = None

    def __call__(self, plan: list[tuple[int, int]]) -> list[Ready]:
        if self.prepare is None:
            self.prepare = self.make(self.split.get())
        return self.prepare(plan)


def collate(samples: list[Ready]) -> Batch:
    """Stack samples of one size. Images stay as they were decoded, colours last, behind a (3, h, w) view."""
    images = _empty((len(samples), *samples[0].image.shape))
    np.stack([sample.image for sample in samples], out=images.numpy())
    masks = [sample.target for sample in samples if isinstance(sample.target, np.ndarray)]
    if masks:
        targets = _empty((len(masks), *masks[0].shape))
        np.stack(masks, out=targets.numpy())
    else:
        targets = torch.tensor([sample.target for sample in samples], dtype=torch.int64)
    photometric = [sample.photometric for sample in samples if sample.photometric is not None]
    return Batch(
        images.permute(0, 3, 1, 2),
        targets,
        torch.from_numpy(np.stack(photometric)) if photometric else None,
        torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
        tuple(replacement for sample in samples for replacement in sample.replaced),
    )


def _empty(shape: tuple[int, ...]) -> Tensor:
    """A uint8 tensor to fill; a worker's lies in the shared memory through which the trainer gets it.

    Otherwise the batch would be copied there when it is sent: 0.15 ms of 2.8 an image of 512 x 512.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage: Any = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, strides)


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
    split: Split,
    order: SampleOrder,
    augment: AugmentConfig | ClassificationAugment,
    loader: LoaderConfig,
    *,
    batch: BatchShape,
    seed: int,
    rank: int,
    start_step: int,
    local_world_size: int = 1,
) -> WorkerStream[Batch]:
    """The endless stream of one rank's micro batches from optimiser step `start_step` on."""
    if order.spec.shard_sizes != tuple(split.shard_sizes):
        raise DataError(
            f"the sample order is of {order.spec.num_samples} samples in {len(order.spec.shard_sizes)} "
            f"shards, split {split.name!r} has {split.num_samples} in {len(split.shard_sizes)}; "
            "continue with the shards that the run began with"
        )
    budget = corrupt_budget(loader, split)
    prepare: Callable[[Split], Prepare]
    if isinstance(augment, ClassificationAugment):
        prepare = partial(TrainClassification, budget=budget, augment=augment, seed=seed)
    else:
        prepare = partial(TrainSegmentation, budget=budget, augment=augment, seed=seed)
    plan = _TrainPlan(order, batch, rank, start_step)
    stages = [plan, webdataset.map(_Prepared(split, prepare)), webdataset.map(collate)]
    workers = worker_count(loader, local_world_size)
    return WorkerStream(stages, workers=workers, prefetch=loader.prefetch, timeout=loader.timeout)


def eval_batches(
    split: Split,
    loader: LoaderConfig,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    local_world_size: int = 1,
    augment: ClassificationAugment | None = None,
) -> WorkerStream[Batch]:
    """Every sample of the split once over the ranks, whole and unscaled; a batch holds images of one size.

    augment: for classification, whose images are cropped to its evaluation view. A corrupt sample is an
    error here: a score must not come from another image.
    """
    prepare: Callable[[Split], Prepare] = partial(EvalSegmentation, budget=0)
    if augment is not None:
        prepare = partial(EvalClassification, budget=0, augment=augment)
    batches = _eval_plan(split, rank, world_size, batch_size)
    workers = min(worker_count(loader, local_world_size), len(batches))
    stages = [_EvalPlan(batches), webdataset.map(_Prepared(split, prepare)), webdataset.map(collate)]
    return WorkerStream(
        stages, workers=workers, prefetch=loader.prefetch, timeout=loader.timeout, length=len(batches)
    )


def corrupt_budget(cfg: LoaderConfig, split: Split) -> int:
    """Samples of a split that may be corrupt before a run ends."""
    return int(cfg.max_corrupt * split.num_samples)


def num_eval_batches(split: Split, world_size: int, batch_size: int) -> list[int]:
    """How many batches each rank evaluates; ranks may differ."""
    return [len(_eval_plan(split, rank, world_size, batch_size)) for rank in range(world_size)]


def _eval_plan(split: Split, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """One rank's batches: every world_size-th id in the order of sizes, cut where the size changes."""
    heights, widths = split.heights, split.widths
    if split.task == "classification":  # cropped to one size
        heights = widths = np.zeros(split.num_samples, np.int32)
    ids = np.lexsort((np.arange(split.num_samples), widths, heights))[rank::world_size]
    changes = np.flatnonzero((np.diff(heights[ids]) != 0) | (np.diff(widths[ids]) != 0)) + 1
    return [
        run[start : start + batch_size]
        for run in np.split(ids, changes)
        for start in range(0, len(run), batch_size)
    ]
