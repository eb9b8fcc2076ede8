"""The real DataLoader with real worker processes: any ranks x workers give one stream, bit for bit."""

from collections.abc import Callable, Iterator

import pytest
import torch

from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig, train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.loading.samples import Batch
from segformer.data.shards.format import ShardSet

GLOBAL_BATCH = 6
STEPS = 9  # 54 samples: two ends of an epoch of 21 samples, both inside a batch
SEED = 23
AUGMENT = AugmentConfig(crop=[24, 40], resize=[], rot90=0.5, vflip=0.5)
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def stream(shards: ShardSet) -> Callable[..., Iterator[Batch]]:
    """Open the stream of one rank; its worker processes start at once and prepare batches."""

    def open_stream(rank: int, ranks: int, workers: int) -> Iterator[Batch]:
        split = shards.split("train")
        spec = make_order_spec(split.shard_sizes, seed=SEED, global_batch=GLOBAL_BATCH, chunk=4, block=2)
        batches = train_batches(
            split,
            SampleOrder(spec),
            AUGMENT,
            LoaderConfig(workers=workers, prefetch=1),
            seed=SEED,
            rank=rank,
            batch=BatchShape(
                GLOBAL_BATCH, 1 if workers == 1 else GLOBAL_BATCH // ranks, ranks
            ),  # with and without accumulation
            start_step=0,
        )
        return iter(batches)

    return open_stream


def global_stream(stream: Callable[..., Iterator[Batch]], ranks: int, workers: int) -> Tensors:
    """(images, targets, photometric, sample ids) of STEPS global batches, in the order of their slots."""
    parts: list[list[Tensors]] = [[] for _ in range(ranks)]
    for rank in range(ranks):
        batches = stream(rank, ranks, workers)
        taken = 0
        while taken < STEPS * GLOBAL_BATCH // ranks:
            batch = next(batches)
            assert batch.photometric is not None
            parts[rank].append((batch.images, batch.targets, batch.photometric, batch.sample_ids))
            taken += len(batch.sample_ids)
        batches.close()  # type: ignore[attr-defined]
    joined = [[torch.cat(field) for field in zip(*part, strict=True)] for part in parts]
    return tuple(
        torch.cat([field.unflatten(0, (STEPS, -1)) for field in fields], 1).flatten(0, 1)
        for fields in zip(*joined, strict=True)
    )


@pytest.fixture(scope="module")
def reference(stream: Callable[..., Iterator[Batch]]) -> Tensors:
    return global_stream(stream, ranks=1, workers=0)


def test_the_reference_ledger_is_the_order_and_loses_nothing(reference: Tensors, shards: ShardSet) -> None:
    sizes = shards.split("train").shard_sizes
    spec = make_order_spec(sizes, seed=SEED, global_batch=GLOBAL_BATCH, chunk=4, block=2)
    ledger = reference[3].tolist()
    assert ledger == SampleOrder(spec).ids(0, STEPS * GLOBAL_BATCH).tolist()
    for epoch in (ledger[:21], ledger[21:42]):
        assert sorted(epoch) == list(range(21))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # on purpose, on any machine
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ledger_and_batches_are_the_same_bits(
    ranks: int, workers: int, stream: Callable[..., Iterator[Batch]], reference: Tensors
) -> None:
    images, targets, photometric, ids = global_stream(stream, ranks, workers)
    assert ids.tolist() == reference[3].tolist()
    assert torch.equal(images, reference[0])
    assert torch.equal(targets, reference[1])
    assert torch.equal(photometric, reference[2])
