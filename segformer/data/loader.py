"""Sample order -> rank -> worker process -> Batch, as a webdataset pipeline over our own shard reader.

    plan (ids of micro batch u)  ->  read (pread + crc32)  ->  decode  ->  augment  ->  collate

Micro batch u = accumulation steps x step + accumulation index goes to worker u mod W, and the DataLoader
hands them out in the order of u. What a micro batch holds follows from the order spec, the seed and u
alone: rank count, worker count, prefetching and restarts cannot change one bit of it. Nothing is opened by
URL and no decoder of webdataset is used: bytes come from ShardReader, pixels from OpenCV after a look at
the header."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import webdataset
from torch import Tensor

from segformer.data.dataset import image_header
from segformer.data.order import SampleOrder, micro_batch_range
from segformer.data.shards import ShardReader, Split
from segformer.data.transforms import AugmentConfig, TrainGeometry, draw_photometric, sample_rng
from segformer.data.workers import WorkerStream, worker_place
from segformer.errors import ConfigError, DataError

MAX_WORKERS = 8


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    """How batches are produced; nothing here changes what they hold."""

    workers: int = -1
    """Worker processes per rank; -1 = cores / ranks on this machine, at most 8; 0 = none, in the trainer."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    timeout: int = 300
    """Seconds to wait for one batch before the run ends with an error."""

    def __post_init__(self) -> None:
        for name, least in (("workers", -1), ("prefetch", 1), ("timeout", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"loader.{name}={getattr(self, name)}; use {least} or more")


@dataclass(slots=True)
class Batch:
    """One micro batch. B samples of one size."""

    images: Tensor
    """uint8 (B, 3, h, w), RGB; padding is 0."""
    targets: Tensor
    """uint8 (B, h, w), train ids and 255."""
    photometric: Tensor | None
    """float32 (B, NUM_PHOTOMETRIC) for Normalize; None in evaluation."""
    sample_ids: Tensor
    """int64 (B,)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls this by name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        photometric = None if self.photometric is None else function(self.photometric)
        return Batch(function(self.images), function(self.targets), photometric, function(self.sample_ids))


@dataclass(frozen=True, slots=True)
class _Ready:
    """One decoded, augmented sample on its way into a batch."""

    sample_id: int
    image: np.ndarray
    mask: np.ndarray
    photometric: np.ndarray | None


def decode_image(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> RGB uint8 (H, W, 3), not turned by EXIF: masks belong to the stored pixels."""
    return _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, 3)


def decode_mask(data: bytes) -> np.ndarray:
    """PNG bytes of a shard -> train ids, uint8 (H, W)."""
    return _decode(data, cv2.IMREAD_UNCHANGED, 2)


def _decode(data: bytes, flags: int, dimensions: int) -> np.ndarray:
    try:
        _, height, width = image_header(data)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (ValueError, cv2.error) as error:
        raise DataError(f"image cannot be decoded: {error}") from error
    if (
        pixels is None
        or pixels.dtype != np.uint8
        or pixels.ndim != dimensions
        or pixels.shape[:2] != (height, width)
    ):
        found = "nothing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise DataError(f"image cannot be decoded: expected {height} x {width}, got {found}")
    decoded: np.ndarray = pixels
    return decoded


class _TrainPlan:
    """First stage: the (sample id, epoch) pairs of this worker's micro batches, without end."""

    def __init__(
        self,
        order: SampleOrder,
        *,
        rank: int,
        world_size: int,
        global_batch: int,
        micro_batch: int,
        start_step: int,
    ) -> None:
        self.order = order
        self.layout = {
            "rank": rank, "world_size": world_size, "global_batch": global_batch, "micro_batch": micro_batch
        }  # fmt: skip
        micro_batch_range(0, 0, **self.layout)  # fails here, not in a worker
        self.accumulation = global_batch // (world_size * micro_batch)
        self.first = start_step * self.accumulation

    def __call__(self) -> Iterator[list[tuple[int, int]]]:
        worker, workers = worker_place()
        unit = self.first + worker
        while True:
            q0, q1 = micro_batch_range(*divmod(unit, self.accumulation), **self.layout)
            ids = self.order.ids(q0, q1 - q0)
            yield [(int(sample_id), self.order.epoch_of(q0 + slot)) for slot, sample_id in enumerate(ids)]
            unit += workers


class _EvalPlan:
    """First stage: the (sample id, epoch 0) pairs of this worker's share of a fixed list of batches."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches = batches

    def __call__(self) -> Iterator[list[tuple[int, int]]]:
        worker, workers = worker_place()
        for batch in self.batches[worker::workers]:
            yield [(int(sample_id), 0) for sample_id in batch]


class _Prepare:
    """Middle stages for one list of samples: read, decode and, for training, augment."""

    def __init__(self, split: Split, augment: AugmentConfig | None, seed: int) -> None:
        self.reader = ShardReader(split)
        self.augment = augment
        self.geometry = None if augment is None else TrainGeometry(augment)
        self.seed = seed

    def __call__(self, plan: list[tuple[int, int]]) -> list[_Ready]:
        return [self._sample(sample_id, epoch) for sample_id, epoch in plan]

    def _sample(self, sample_id: int, epoch: int) -> _Ready:
        split = self.reader.split
        raw = self.reader.read(sample_id)
        try:
            image, mask = decode_image(raw.image), decode_mask(raw.mask)
        except DataError as error:
            raise DataError(f"shard {split.describe(sample_id)}: {error}; shard the data again") from error
        size = (split.heights[sample_id], split.widths[sample_id])
        if image.shape[:2] != size or mask.shape != size:
            raise DataError(
                f"shard {split.describe(sample_id)}: image or mask is not {size[1]} x {size[0]} pixels"
            )
        if self.augment is None or self.geometry is None:
            return _Ready(sample_id, image, mask, None)
        rng = sample_rng(self.seed, epoch, sample_id)
        image, mask, valid = self.geometry(image, mask, rng)
        return _Ready(sample_id, image, mask, draw_photometric(self.augment, rng, valid))


def _collate(samples: list[_Ready]) -> Batch:
    """Stack samples of one size; images become planes (3, h, w)."""
    height, width = samples[0].mask.shape
    images = np.empty((len(samples), 3, height, width), np.uint8)
    for planes, sample in zip(images, samples, strict=True):
        for channel in range(3):
            cv2.extractChannel(sample.image, channel, planes[channel])
    photometric = [sample.photometric for sample in samples if sample.photometric is not None]
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(np.stack([sample.mask for sample in samples])),
        torch.from_numpy(np.stack(photometric)) if photometric else None,
        torch.tensor([sample.sample_id for sample in samples], dtype=torch.int64),
    )


def worker_count(cfg: LoaderConfig, local_world_size: int) -> int:
    """Worker processes of one rank, where `local_world_size` ranks share the machine."""
    if cfg.workers >= 0:
        return cfg.workers
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world_size))


def train_batches(
    split: Split,
    order: SampleOrder,
    augment: AugmentConfig,
    loader: LoaderConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch: int,
    micro_batch: int,
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
    plan = _TrainPlan(
        order,
        rank=rank,
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=micro_batch,
        start_step=start_step,
    )
    stages = [plan, webdataset.map(_Prepare(split, augment, seed)), webdataset.map(_collate)]
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
) -> WorkerStream[Batch]:
    """Every sample of the split once over the ranks, whole and unscaled; a batch holds images of one size."""
    batches = _eval_plan(split, rank, world_size, batch_size)
    workers = min(worker_count(loader, local_world_size), len(batches))
    stages = [_EvalPlan(batches), webdataset.map(_Prepare(split, None, 0)), webdataset.map(_collate)]
    return WorkerStream(
        stages, workers=workers, prefetch=loader.prefetch, timeout=loader.timeout, length=len(batches)
    )


def num_eval_batches(split: Split, world_size: int, batch_size: int) -> list[int]:
    """How many batches each rank evaluates; ranks may differ."""
    return [len(_eval_plan(split, rank, world_size, batch_size)) for rank in range(world_size)]


def _eval_plan(split: Split, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """One rank's batches: every world_size-th id in the order of sizes, cut where the size changes."""
    heights, widths = split.heights, split.widths
    ids = np.lexsort((np.arange(split.num_samples), widths, heights))[rank::world_size]
    changes = np.flatnonzero((np.diff(heights[ids]) != 0) | (np.diff(widths[ids]) != 0)) + 1
    return [
        run[start : start + batch_size]
        for run in np.split(ids, changes)
        for start in range(0, len(run), batch_size)
    ]
