"""Sample id -> arrays of one size, in a worker process: read, decode, augment.

A corrupt sample (crc32 that differs twice, or bytes that do not decode) is never skipped. It is named,
counted and replaced by the next good sample of its shard, which depends on the shards alone, so that ranks,
workers and restarts agree. One process that meets more corrupt samples than `budget` ends the run; the
trainer (train.py) does the same for all ranks together. With a budget of 0 the first one is the error."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from segformer.data.loading.classification import ClassificationAugment, ClassificationGeometry
from segformer.data.loading.mixing import TrainSample
from segformer.data.loading.transforms import AugmentConfig, draw_photometric, sample_rng
from segformer.data.shards.format import Split
from segformer.data.shards.reader import CorruptSampleError, ShardReader
from segformer.data.sources.decode import decode_image, decode_label, decode_mask
from segformer.errors import DataError

NEIGHBOURS = 16  # samples tried in the place of a corrupt one

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Replacement:
    """A corrupt sample, the one that took its place, and what was wrong."""

    sample_id: int
    used: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """One sample on its way into a batch. target: mask uint8 (h, w), or class id."""

    sample_id: int
    image: np.ndarray
    target: np.ndarray | int
    photometric: np.ndarray | None = None
    replaced: tuple[Replacement, ...] = ()


class SampleSource:
    """Decoded samples of a split by id, with corrupt ones replaced while the budget lasts."""

    def __init__(self, split: Split, budget: int) -> None:
        self.reader = ShardReader(split)
        self.split = split
        self.budget = budget
        self._corrupt: dict[int, str] = {}
        self._replaced: list[Replacement] = []

    def image_and_mask(self, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (H, W, 3) and train ids uint8 (H, W)."""
        return self._good(sample_id, self._image_and_mask)

    def image_and_label(self, sample_id: int) -> tuple[np.ndarray, int]:
        """RGB uint8 (H, W, 3) and class id."""
        return self._good(sample_id, self._image_and_label)

    def take_replaced(self) -> tuple[Replacement, ...]:
        """The replacements since the last call."""
        replaced, self._replaced = tuple(self._replaced), []
        return replaced

    def _good(self, sample_id: int, load: Callable[[int], _T]) -> _T:
        first = failure = None
        for candidate in self._candidates(sample_id):
            try:
                loaded = load(candidate)
            except CorruptSampleError as error:
                first, failure = first or error, error
                self._count(error)
                continue
            if first is not None:
                self._replaced.append(Replacement(sample_id, candidate, str(first)))
            return loaded
        assert failure is not None
        raise DataError(f"no good sample beside sample {sample_id}: {failure}") from failure

    def _candidates(self, sample_id: int) -> list[int]:
        """The sample, then those that follow it in its shard, round the end."""
        shard = self.split.shard_of(sample_id)
        begin, size = int(self.split.first_ids[shard]), self.split.shard_sizes[shard]
        return [begin + (sample_id - begin + step) % size for step in range(min(size, NEIGHBOURS + 1))]

    def _count(self, error: CorruptSampleError) -> None:
        self._corrupt[error.sample_id] = str(error)
        if not self.budget:
            raise DataError(str(error)) from error
        if len(self._corrupt) > self.budget:
            raise DataError(over_budget(len(self._corrupt), self.budget, str(error))) from error

    def _image_and_mask(self, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        raw = self.reader.read(sample_id)
        image = self._decode(sample_id, decode_image, raw.image)
        mask = self._decode(sample_id, decode_mask, raw.target)
        self._check_size(sample_id, image, mask)
        return image, mask

    def _image_and_label(self, sample_id: int) -> tuple[np.ndarray, int]:
        raw = self.reader.read(sample_id)
        image = self._decode(sample_id, decode_image, raw.image)
        label = self._decode(sample_id, decode_label, raw.target)
        self._check_size(sample_id, image)
        if label != self.split.records["max_label"][sample_id]:
            raise self._wrong(sample_id, f"class id {label} is not that of the index")
        return image, label

    def _decode(self, sample_id: int, decode: Callable[[bytes], Any], data: bytes) -> Any:
        try:
            return decode(data)
        except DataError as error:
            raise self._wrong(sample_id, str(error)) from error

    def _check_size(self, sample_id: int, *pixels: np.ndarray) -> None:
        size = (self.split.heights[sample_id], self.split.widths[sample_id])
        if any(array.shape[:2] != size for array in pixels):
            raise self._wrong(sample_id, f"image or mask is not {size[1]} x {size[0]} pixels")

    def _wrong(self, sample_id: int, what: str) -> CorruptSampleError:
        where = self.split.describe(sample_id)
        return CorruptSampleError(sample_id, f"shard {where}: {what}; shard the data again")


def over_budget(count: int, budget: int, last: str) -> str:
    """What ends a run with too many corrupt samples."""
    return (
        f"{count} corrupt samples, and loader.max_corrupt allows {budget} of this split; data_prep/verify.py "
        f"names them all; copy the shards again or raise it; the last: {last}"
    )


class Prepare:
    """The samples of one micro batch: (sample id, epoch) pairs -> Ready. Base of the four kinds below."""

    def __init__(self, split: Split, budget: int) -> None:
        self.source = SampleSource(split, budget)

    def __call__(self, plan: list[tuple[int, int]]) -> list[Ready]:
        self.source.reader.fetch(sample_id for sample_id, _ in plan)
        return [self._counted(sample_id, epoch) for sample_id, epoch in plan]

    def _counted(self, sample_id: int, epoch: int) -> Ready:
        ready = self.sample(sample_id, epoch)
        return replace(ready, replaced=self.source.take_replaced())

    def sample(self, sample_id: int, epoch: int) -> Ready:
        """One sample of one epoch."""
        raise NotImplementedError


class TrainSegmentation(Prepare):
    """Augmented crop, its mask and what the device needs to finish the augmentation."""

    def __init__(self, split: Split, budget: int, augment: AugmentConfig, seed: int) -> None:
        super().__init__(split, budget)
        self.augment, self.seed = augment, seed
        self.compose = TrainSample(augment, split)

    def sample(self, sample_id: int, epoch: int) -> Ready:
        rng = sample_rng(self.seed, epoch, sample_id)
        image, mask, valid = self.compose(sample_id, self.source.image_and_mask, rng)
        return Ready(sample_id, image, mask, draw_photometric(self.augment, rng, valid))


class EvalSegmentation(Prepare):
    """The whole image and mask."""

    def sample(self, sample_id: int, epoch: int) -> Ready:
        return Ready(sample_id, *self.source.image_and_mask(sample_id))


class TrainClassification(Prepare):
    """Augmented crop and class id."""

    def __init__(self, split: Split, budget: int, augment: ClassificationAugment, seed: int) -> None:
        super().__init__(split, budget)
        self.geometry, self.seed = ClassificationGeometry(augment), seed

    def sample(self, sample_id: int, epoch: int) -> Ready:
        image, label = self.source.image_and_label(sample_id)
        return Ready(sample_id, self.geometry(image, sample_rng(self.seed, epoch, sample_id)), label)


class EvalClassification(Prepare):
    """Centre crop and class id."""

    def __init__(self, split: Split, budget: int, augment: ClassificationAugment) -> None:
        super().__init__(split, budget)
        self.geometry = ClassificationGeometry(augment)

    def sample(self, sample_id: int, epoch: int) -> Ready:
        image, label = self.source.image_and_label(sample_id)
        return Ready(sample_id, self.geometry.eval_view(image), label)
