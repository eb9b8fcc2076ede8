"""One rank's micro batches of a split."""

from typing import Any

from segformer.data.loading.loader import LoaderConfig, train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.loading.samples import Batch
from segformer.data.shards.format import Split


def micro_batches(
    split: Split,
    augment: Any,
    steps: int,
    *,
    global_batch: int = 6,
    micro: int | None = None,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    workers: int = 0,
    max_corrupt: float = 0,
    **order: int,
) -> list[Batch]:
    """Those of `steps` optimizer steps from step `start` on; the order has seed 5, the samples 11."""
    batch = BatchShape(global_batch, micro or global_batch // world, world)
    spec = make_order_spec(split.shard_sizes, seed=5, global_batch=global_batch, **order)
    loader = LoaderConfig(workers=workers, prefetch=2, max_corrupt=max_corrupt)
    iterator = iter(
        train_batches(
            split, SampleOrder(spec), augment, loader, batch=batch, seed=11, rank=rank, start_step=start
        )
    )
    taken = [next(iterator) for _ in range(steps * batch.accumulation)]
    iterator.close()
    return taken
