"""Sample ids -> Batch, in a worker process: read, decode, crop and augment, put together.

The random numbers of a sample are Philox(seed, epoch, sample id): ranks and workers cannot change them.

A corrupt sample (crc32 that differs twice, or bytes that do not decode) is never skipped. It is named,
counted and replaced by the next good sample of its shard, which depends on the shards alone, so that ranks,
workers and restarts agree. One process that meets more corrupt samples than `budget` ends the run; the
trainer does the same for all ranks together. With a budget of 0 the first one is the error."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from segformer.data.loading.classification import ClassificationAugment, ClassificationGeometry
from segformer.data.loading.crop import AugmentConfig, RandomCrop
from segformer.data.loading.mixing import draw_donor, draw_mosaic, paste
from segformer.data.loading.photometric import Distortion, blur, draw_distortion
from segformer.data.shards.format import Split
from segformer.data.shards.reader import CorruptSampleError, ShardReader
from segformer.data.sources.decode import decode_label, decode_mask, decode_stored
from segformer.errors import DataError

NEIGHBORS = 16  # samples tried in the place of a corrupt one


@dataclass(frozen=True, slots=True)
class Replacement:
    """A corrupt sample that another one stands for, and what was wrong."""

    sample_id: int
    reason: str


@dataclass(slots=True)
class Sample:
    """One sample on its way into a batch. target: mask uint8 (h, w), or class id."""

    sample_id: int
    image: np.ndarray
    target: Any
    photometric: Distortion[float] | None = None
    valid: tuple[int, int] | None = None
    replaced: list[Replacement] | tuple[()] = ()


@dataclass(slots=True)
class Batch:
    """One micro batch. B samples of one size."""

    images: Tensor
    """uint8, uint16 or float32 (B, C, h, w), RGB where C is 3, in channels-last memory; padding is 0."""
    targets: Tensor
    """uint8 (B, h, w), train ids and 255; int64 (B,), class ids, for classification."""
    sample_ids: Tensor
    """int64 (B,)."""
    photometric: Tensor | None = None
    """float32 (B, 5), the fields of Distortion; None = no distortion."""
    valid: Tensor | None = None
    """int64 (B, 2), height and width that are not padding; None = all."""
    replaced: tuple[Replacement, ...] = ()
    """Corrupt samples among them that another one stands for."""
    sets: Tensor | None = None
    """int64 (B,), which set of a mixture each one is of; None = there is one data set."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the DataLoader calls this by name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever computes it."""
    key, counter = np.array([seed, 1], np.uint64), np.array([0, sample_id, epoch, 1], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Samples:
    """The samples of a split as training (with a seed) or evaluation (without) sees them.

    augment: of the training crop, or of the crops of a classification set; None = whole images. budget:
    corrupt samples that are replaced. table: label -> target, uint8 (256,); None where targets are labels.
    """

    def __init__(
        self,
        split: Split,
        augment: AugmentConfig | ClassificationAugment | None,
        *,
        seed: int | None = None,
        budget: int = 0,
        table: np.ndarray | None = None,
    ) -> None:
        self.split, self.augment, self.seed, self.budget = split, augment, seed, budget
        self.table = table
        self.reader = ShardReader(split)
        if isinstance(augment, AugmentConfig):
            self.crop = RandomCrop(augment, split.class_pixels)
        elif augment is not None:
            self.view = ClassificationGeometry(augment)
        self._corrupt: set[int] = set()
        self._replaced: list[Replacement] = []

    def batch(self, plan: list[tuple[int, int]]) -> Batch:
        """The batch of some (sample id, epoch) pairs."""
        self.reader.fetch(sample_id for sample_id, _ in plan)
        return collate([self.sample(sample_id, epoch) for sample_id, epoch in plan])

    def sample(self, sample_id: int, epoch: int) -> Sample:
        """One sample of one epoch."""
        rng = None if self.seed is None else sample_rng(self.seed, epoch, sample_id)
        if isinstance(self.augment, AugmentConfig):
            assert rng is not None
            sample = self._augmented(sample_id, self.augment, rng)
        else:
            image, target = self.picture(sample_id)
            if self.augment is not None:
                image = self.view.eval_view(image) if rng is None else self.view(image, rng)
            sample = Sample(sample_id, image, target)
        if self.table is not None:
            sample.target = self.table[sample.target]
        sample.replaced, self._replaced = self._replaced, []
        return sample

    def _augmented(self, sample_id: int, cfg: AugmentConfig, rng: np.random.Generator) -> Sample:
        """A crop of one to five pictures, and what the device needs to finish it."""
        if cfg.mosaic and rng.random() < cfg.mosaic:
            mosaic = draw_mosaic(self.split, sample_id, self.crop, rng)
            image, mask = mosaic.compose(list(map(self.picture, mosaic.sample_ids)), self.crop, rng)
            valid = self.crop.size
        else:
            image, mask, valid = self.crop(*self.picture(sample_id), rng)
        if cfg.copy_paste and rng.random() < cfg.copy_paste and self.crop.weights.any():
            donor = draw_donor(self.split, self.crop, rng)
            if donor is not None:
                label, donor_id = donor
                paste(label, self.picture(donor_id), (image, mask), valid, self.crop, rng)
        if cfg.blur and rng.random() < cfg.blur:
            blur(image, valid, rng.uniform(cfg.blur_sigma[0], cfg.blur_sigma[1]))
        distortion = draw_distortion(cfg.photometric_strength, rng) if cfg.photometric else None
        return Sample(sample_id, image, mask, distortion, valid)

    def picture(self, sample_id: int) -> tuple[np.ndarray, Any]:
        """Image (H, W, C) with train ids uint8 (H, W) or class id, of the first good candidate."""
        first = None
        for candidate in self._candidates(sample_id):
            try:
                picture = self._decoded(candidate)
            except CorruptSampleError as error:
                first = first or error
                self._corrupt.add(candidate)
                if (count := len(self._corrupt)) > self.budget:
                    text = over_budget(count, self.budget, str(error)) if self.budget else str(error)
                    raise DataError(text) from error
            else:
                if first is not None:
                    self._replaced.append(Replacement(sample_id, str(first)))
                return picture
        raise DataError(f"no good sample beside sample {sample_id}: {first}") from first

    def _candidates(self, sample_id: int) -> list[int]:
        """The sample, then those that follow it in its shard, round the end."""
        shard = self.split.shard_of(sample_id)
        begin, size = int(self.split.first_ids[shard]), self.split.shard_sizes[shard]
        return [begin + (sample_id - begin + step) % size for step in range(min(size, NEIGHBORS + 1))]

    def _decoded(self, sample_id: int) -> tuple[np.ndarray, Any]:
        raw, record = self.reader.read(sample_id), self.split.records[sample_id]
        size = (record["height"], record["width"])
        target: Any
        try:
            image = decode_stored(raw.image, self.split.pixels)
            if self.split.task == "classification":
                target, fits = decode_label(raw.target), image.shape[:2] == size
                if target != record["max_label"]:
                    raise DataError(f"class id {target} is not that of the index")
            else:
                target = decode_mask(raw.target)
                fits = image.shape[:2] == target.shape == size
            if not fits:
                raise DataError(f"image or mask is not {size[1]} x {size[0]} pixels")
        except DataError as error:
            where = self.split.describe(sample_id)
            raise CorruptSampleError(f"shard {where}: {error}; shard the data again") from error
        return image, target


def over_budget(count: int, budget: int, last: str) -> str:
    """The message that ends a run with too many corrupt samples."""
    return (
        f"{count} corrupt samples, and loader.max_corrupt allows {budget} of this split; data_prep/verify.py "
        f"names them all; copy the shards again or raise it; the last: {last}"
    )


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size. Images stay as they were decoded, channels last, behind a (C, h, w) view."""
    images, first = _stacked([sample.image for sample in samples]), samples[0]
    targets = [sample.target for sample in samples]
    valid = None if first.valid is None else torch.tensor([sample.valid for sample in samples])
    photometric = None
    if first.photometric is not None:
        photometric = torch.tensor([sample.photometric for sample in samples], dtype=torch.float32)
    return Batch(
        images.permute(0, 3, 1, 2),
        _stacked(targets) if isinstance(first.target, np.ndarray) else torch.tensor(targets),
        torch.tensor([sample.sample_id for sample in samples]),
        photometric,
        valid,
        tuple(replacement for sample in samples for replacement in sample.replaced),
    )


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    """Arrays as one tensor; a worker's lies in the shared memory through which the trainer gets it.

    Otherwise the batch would be copied there when it is sent: 0.15 ms of 2.8 an image of 512 x 512.
    """
    shape, dtype = (len(arrays), *arrays[0].shape), getattr(torch, str(arrays[0].dtype))
    if get_worker_info() is None:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        size = math.prod(shape) * dtype.itemsize
        storage: Any = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        tensor = torch.empty(0, dtype=dtype).set_(storage).view(shape)
    np.stack(arrays, out=tensor.numpy())
    return tensor
