"""The sample order under restarts, for 1,000 random runs, against a second implementation.

The reference is written from the description in order.py with lists and integers, down to the random
numbers (Philox 4x64-10, Salmon et al. 2011), so that it can't repeat a mistake of NumPy's or ours."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from segformer.data.loading.order import BatchShape, OrderSpec, SampleOrder

RUNS = 1000
EPOCHS = 2
_WORD = 2**64 - 1


def philox(key: tuple[int, int], counter: list[int], count: int) -> list[int]:
    """`count` words of 64 bits; the 256-bit counter is raised before each four words, as NumPy does."""
    words: list[int] = []
    number = sum(word << (64 * place) for place, word in enumerate(counter))
    while len(words) < count:
        number = (number + 1) % 2**256
        c0, c1, c2, c3 = ((number >> (64 * place)) & _WORD for place in range(4))
        k0, k1 = key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _WORD, (p0 >> 64) ^ c3 ^ k1, p0 & _WORD
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _WORD, (k1 + 0xBB67AE8584CAA73B) & _WORD
        words += [c0, c1, c2, c3]
    return words[:count]


def shuffled(items: list, seed: int, stream: int, epoch: int, block: int) -> list:
    draws = philox((seed, 1), [0, block, epoch, stream], len(items))
    return [items[place] for place in sorted(range(len(items)), key=lambda place: (draws[place], place))]


def reference_epoch(spec: OrderSpec, epoch: int) -> list[int]:
    """The ids of one epoch, in the order of their positions."""
    chunks, first = [], 0
    for size in spec.shard_sizes:
        for start in range(0, size, spec.chunk):
            chunks.append([first + i for i in range(start, min(start + spec.chunk, size))])
        first += size
    chunks = shuffled(chunks, spec.seed, 0, epoch, 0)
    sequence: list[int] = []
    for block in range(-(-len(chunks) // spec.block)):
        inside = chunks[block * spec.block : (block + 1) * spec.block]
        sequence += shuffled([i for chunk in inside for i in chunk], spec.seed, 1, epoch, block)
    rest = iter(sequence)
    share, more = divmod(spec.num_samples, spec.lanes)
    lanes = [list(islice(rest, share + (lane < more))) for lane in range(spec.lanes)]
    return [lane[depth] for depth in range(share + 1) for lane in lanes if depth < len(lane)]


@dataclass(frozen=True)
class Segment:
    """One start of a run: its layout, and how many optimiser steps it lasts."""

    ranks: int
    workers: int
    accumulation: int
    micro_batch: int
    steps: int

    @property
    def global_batch(self) -> int:
        return self.ranks * self.accumulation * self.micro_batch


def random_spec(rng: np.random.Generator) -> OrderSpec:
    sizes = tuple(int(size) for size in rng.integers(1, 60, rng.integers(1, 6)))
    seed = int(rng.integers(0, 2**64, dtype=np.uint64))
    lanes, chunk, block = (int(rng.integers(1, high)) for high in (90, 20, 7))
    return OrderSpec(sum(sizes), sizes, seed, lanes, chunk, block)


def random_segment(rng: np.random.Generator) -> Segment:
    values = [int(rng.integers(1, high)) for high in (5, 5, 4, 9, 10)]
    return Segment(*values)


def consumed(spec: OrderSpec, segment: Segment, q: int) -> list[tuple[int, np.ndarray]]:
    """(first stream position, ids) of every micro batch of a segment that starts at stream position q.

    Each worker of each rank has its own order and computes every W-th micro batch, as in the loader.
    """
    taken = []
    batch = BatchShape(segment.global_batch, segment.micro_batch, segment.ranks)
    for rank in range(segment.ranks):
        for worker in range(segment.workers):
            order = SampleOrder(spec)
            for unit in range(worker, segment.steps * segment.accumulation, segment.workers):
                low, high = batch.positions(rank, unit)
                taken.append((q + low, order.ids(q + low, high - low)))
    return taken


def test_a_thousand_random_runs_with_restarts_lose_and_repeat_nothing() -> None:
    restarts = 0
    for case in range(RUNS):
        rng = np.random.default_rng([17, case])
        spec = random_spec(rng)
        stream = np.full((EPOCHS + 1) * spec.num_samples + 10_000, -1, np.int64)
        q = 0
        while q < EPOCHS * spec.num_samples:
            segment = random_segment(rng)
            for first, ids in consumed(spec, segment, q):
                place = stream[first : first + len(ids)]
                assert (place == -1).all(), f"case {case}: a position was computed twice"
                place[:] = ids
            q += segment.steps * segment.global_batch
            restarts += 1
        assert (stream[:q] >= 0).all(), f"case {case}: a position was left out"
        for epoch in range(EPOCHS):
            ids = stream[epoch * spec.num_samples : (epoch + 1) * spec.num_samples]
            counts = np.bincount(ids, minlength=spec.num_samples)
            assert counts.tolist() == [1] * spec.num_samples, f"case {case}, epoch {epoch}"
        epoch = int(rng.integers(0, EPOCHS))
        if case % 5 == 0:
            expected = reference_epoch(spec, epoch)
            ids = stream[epoch * spec.num_samples : (epoch + 1) * spec.num_samples]
            assert ids.tolist() == expected, f"case {case}, epoch {epoch}"
    assert restarts > 2 * RUNS


@pytest.mark.parametrize("epoch", [0, 1, 2**40])
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (300,), (7, 64, 16, 1, 33)])
def test_edge_cases_are_the_order_described(sizes: tuple[int, ...], epoch: int) -> None:
    for lanes, chunk, block in ((1, 1, 1), (1000, 16, 16), (3, 1000, 1000), (sum(sizes), 5, 2)):
        spec = OrderSpec(sum(sizes), sizes, 2**64 - 1, lanes, chunk, block)
        count = spec.num_samples
        assert SampleOrder(spec).ids(epoch * count, count).tolist() == reference_epoch(spec, epoch)
