import hashlib
import itertools
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segformer.data.loading.order import (
    PERIOD,
    BatchShape,
    MixedOrder,
    OrderSpec,
    SampleOrder,
    make_order_spec,
    shared_slots,
)
from segformer.errors import ConfigError, DataError

specs = st.builds(
    lambda sizes, seed, lanes, chunk, block: OrderSpec(sum(sizes), tuple(sizes), seed, lanes, chunk, block),
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.integers(0, 2**64 - 1),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(1, 6),
)


def philox(key: tuple[int, int], counter: list[int], count: int) -> list[int]:
    """`count` words of 64 bits; the 256-bit counter is raised before each four words, as NumPy does."""
    words: list[int] = []
    number = sum(word << (64 * place) for place, word in enumerate(counter))
    while len(words) < count:
        number = (number + 1) % 2**256
        c0, c1, c2, c3 = ((number >> (64 * place)) & (2**64 - 1) for place in range(4))
        k0, k1 = key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & (2**64 - 1), (p0 >> 64) ^ c3 ^ k1, p0 & (2**64 - 1)
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & (2**64 - 1), (k1 + 0xBB67AE8584CAA73B) & (2**64 - 1)
        words += [c0, c1, c2, c3]
    return words[:count]


def naive(spec: OrderSpec, epoch: int) -> list[int]:
    """One epoch, written out from the description of the order with lists, down to its random numbers."""

    def shuffle(items: list, stream: int, block: int) -> list:
        draws = philox((spec.seed, 1), [0, block, epoch, stream], len(items))
        return [item for _, item in sorted(zip(draws, items, strict=True), key=lambda pair: pair[0])]

    chunks, first = [], 0
    for size in spec.shard_sizes:
        ids = list(range(first, first + size))
        chunks += [ids[start : start + spec.chunk] for start in range(0, size, spec.chunk)]
        first += size
    chunks = shuffle(chunks, 0, 0)
    sequence: list[int] = []
    for number, start in enumerate(range(0, len(chunks), spec.block)):
        sequence += shuffle([i for chunk in chunks[start : start + spec.block] for i in chunk], 1, number)
    share, rest = divmod(spec.num_samples, spec.lanes)
    lanes, at = [], 0
    for lane in range(spec.lanes):
        length = share + (lane < rest)
        lanes.append(sequence[at : at + length])
        at += length
    return [lane[depth] for depth in range(share + 1) for lane in lanes if depth < len(lane)]


@settings(max_examples=150, deadline=None)
@given(specs, st.integers(0, 3) | st.just(2**40), st.floats(0, 1), st.floats(0, 1))
@example(OrderSpec(1, (1,), 2**64 - 1, 1, 1, 1), 0, 0.0, 1.0)
@example(OrderSpec(300, (300,), 0, 1000, 16, 16), 1, 0.0, 1.0)
@example(OrderSpec(121, (7, 64, 16, 1, 33), 2**64 - 1, 3, 1000, 1000), 2, 0.0, 1.0)
def test_any_stretch_of_the_stream_is_the_order_described(
    spec: OrderSpec, epoch: int, start: float, length: float
) -> None:
    first = int(start * (spec.num_samples - 1))
    count = int(length * (2 * spec.num_samples - first))
    found = SampleOrder(spec).ids(epoch * spec.num_samples + first, count)
    assert found.tolist() == (naive(spec, epoch) + naive(spec, epoch + 1))[first : first + count]


@settings(max_examples=100, deadline=None)
@given(specs, st.data())
def test_every_epoch_holds_every_sample_once(spec: OrderSpec, data: st.DataObject) -> None:
    count, epochs = spec.num_samples, 3
    seen = np.zeros((epochs + 1, count), np.int64)
    q = 0
    while q < epochs * count:  # each round is a restart with another layout, or another global batch
        micro = data.draw(st.integers(1, 5))
        world = data.draw(st.integers(1, 4))
        accumulation = data.draw(st.integers(1, 3))
        steps = data.draw(st.integers(1, 40))
        batch = BatchShape(micro * world * accumulation, micro, world)
        order = SampleOrder(spec)
        taken = []
        for rank, micro_step in itertools.product(range(world), range(steps * accumulation)):
            q0, q1 = batch.positions(rank, micro_step)
            taken += range(q + q0, q + q1)
            ids = order.ids(q + q0, q1 - q0)
            for position, sample_id in zip(range(q + q0, q + q1), ids, strict=True):
                if position < epochs * count:
                    seen[order.epoch_of(position), sample_id] += 1
        assert sorted(taken) == list(range(q, q + len(taken)))
        q += len(taken)
    assert (seen[:epochs] == 1).all()


@pytest.mark.parametrize(
    ("sizes", "batch", "golden"),
    [
        ([100], 8, "0cab6dae1ad689a8"),
        ([500, 500, 337], 16, "e062e1136fb8c22e"),
        ([1000] * 20 + [210], 16, "9f29fda3e2faf06c"),
    ],
)
def test_the_first_ten_thousand_positions_never_change(sizes: list[int], batch: int, golden: str) -> None:
    ids = SampleOrder(make_order_spec(sizes, seed=20210531, global_batch=batch)).ids(0, 10_000)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == golden


def test_batches_of_sorted_shards_are_mixed_like_a_full_shuffle() -> None:
    count, batch = 20_000, 16
    order = SampleOrder(make_order_spec([1000] * 20, seed=1, global_batch=batch))
    means = (order.ids(0, count) / count).reshape(-1, batch).mean(1)
    assert 0.8 < means.var() / (1 / 12 / batch) < 1.2
    centred = means - means.mean()
    for lag in (1, 8, 64):
        assert abs((centred[lag:] * centred[:-lag]).mean() / means.var()) < 0.2


def test_the_spec_survives_json() -> None:
    spec = make_order_spec([3, 4], seed=5, global_batch=2)
    assert OrderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_another_version_of_the_order_is_refused() -> None:
    values = make_order_spec([3, 4], seed=5, global_batch=2).to_dict() | {"version": 99}
    with pytest.raises(DataError, match="version 99"):
        OrderSpec.from_dict(values)


def test_a_batch_that_cannot_be_shared_out_names_what_would_do() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=16 is not .* 3 x 4; use micro_batch=1 or 2 or 4"):
        BatchShape(16, 3, world_size=4)
    with pytest.raises(ConfigError, match="a world size of 1, 2, 4, 8, 16 or global_batch=15 or 18"):
        BatchShape(16, 1, world_size=3)
    assert str(BatchShape(16, 2, world_size=2)) == "16 = 2 a forward x 4 accumulated x 2 ranks"


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 5000),
    st.integers(1, 3000),
)
@settings(max_examples=12, deadline=None)
def test_several_sets_come_in_a_fixed_period_and_each_in_its_own_order(sets, start, count):
    """Against a walk that counts the samples of each set one by one."""
    weights = {f"s{k}": weight for k, (_, weight) in enumerate(sets)}
    orders = {
        f"s{k}": SampleOrder(make_order_spec([size], seed=k, global_batch=2))
        for k, (size, _) in enumerate(sets)
    }
    slots = shared_slots(weights)
    total = sum(weights.values())
    assert sum(slots.values()) == PERIOD
    assert all(abs(slots[name] - PERIOD * weight / total) < 1 for name, weight in weights.items())
    order = MixedOrder(orders, list(slots.values()))
    firsts = dict(zip(orders, np.cumsum([0, *(size for size, _ in sets)]).tolist(), strict=False))
    # The k-th of a set's n slots stands where (2k + 1) / 2n of the period is over.
    middles = [
        (Fraction(2 * k + 1, 2 * n), i, name) for i, (name, n) in enumerate(slots.items()) for k in range(n)
    ]
    pattern = [name for *_, name in sorted(middles)]
    seen, expected, epochs = dict.fromkeys(orders, 0), [], []
    for q in range(start + count):
        name = pattern[q % PERIOD]
        if q == start:
            assert order.positions(q) == seen
        if q >= start:
            expected.append(firsts[name] + int(orders[name].ids(seen[name], 1)[0]))
            epochs.append(seen[name] // orders[name].spec.num_samples)
        seen[name] += 1
    assert order.ids(start, count).tolist() == expected
    places = range(0, count, max(1, count // 20))
    assert [order.epoch_of(start + k) for k in places] == [epochs[k] for k in places]
    again = MixedOrder.from_dict(json.loads(json.dumps(order.to_dict(start))), start)
    assert again.ids(start, count).tolist() == expected
    assert pickle.loads(pickle.dumps(order)).ids(start, count).tolist() == expected


def test_an_order_of_sets_that_is_not_where_its_run_is_is_refused():
    order = MixedOrder({"a": SampleOrder(make_order_spec([5], seed=0, global_batch=2))}, [PERIOD])
    with pytest.raises(DataError, match=r"the sets are at \{'a': 8\}, and \{'a': 9\} belong to 9 samples"):
        MixedOrder.from_dict(order.to_dict(8), 9)
    with pytest.raises(ConfigError, match=r"sets\.b gets 0\.02 % of the samples, less than one of 1024"):
        shared_slots({"a": 5000, "b": 1})
