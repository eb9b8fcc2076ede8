"""The order in which a run sees its samples: a pure function of (spec, stream position), called "lanes".

    chunks   every shard cut into contiguous chunks of at most `chunk` samples
    epoch e  a permutation of the chunks (seed, e); `block` consecutive chunks form a block, inside which all
             samples are permuted (seed, e, block). V_e, all blocks in turn, is a bijection on [0, N).
    lanes    D, rem = divmod(N, L); lane l owns V_e[l*D + min(l, rem) :][: D + (l < rem)]
    order    position p of the epoch -> lane p % L, depth p // L
    stream   q = 0, 1, 2, ... -> epoch q // N, position q % N; global batch t = stream [t*G, (t+1)*G)

So batches span epoch ends (no padding, no dropped or short batch), every epoch holds each sample exactly
once, and ranks, workers, restarts and even another global batch cannot change what comes at q. The whole
state of a run is q and the frozen spec. Lanes keep reads sequential: a lane walks through its chunks one
after another.

Permutations are the stable argsort of Philox.random_raw, which NumPy keeps across versions (it does not
promise that for Generator.permutation); golden hashes in the tests pin them. Any change of the order needs
a new `version`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from segformer.errors import ConfigError, DataError, at_least, within

VERSION = 1
LANES_PER_SLOT = 8  # lanes per slot of the global batch
PERIOD = 1024  # slots that several sets share

_CHUNKS, _BLOCK = 0, 1  # which permutation a random stream is for


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """Everything that the order depends on; frozen when a run starts and kept in its checkpoints."""

    num_samples: int
    shard_sizes: tuple[int, ...]
    seed: int
    lanes: int
    chunk: int = 16
    block: int = 16
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise DataError(
                f"sample order of version {self.version}; this program implements version {VERSION} only"
            )
        if self.num_samples < 1 or sum(self.shard_sizes) != self.num_samples or min(self.shard_sizes) < 1:
            raise DataError(
                f"sample order over {self.num_samples} samples in shards of {list(self.shard_sizes[:4])}..."
            )
        at_least(self, "sample order: ", lanes=1, chunk=1, block=1)
        within(self, "", seed=(0, 2**64 - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"shard_sizes": list(self.shard_sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OrderSpec":
        """The inverse of to_dict."""
        return cls(**{**values, "shard_sizes": tuple(values["shard_sizes"])})


def make_order_spec(
    shard_sizes: Iterable[int], *, seed: int, global_batch: int, chunk: int = 16, block: int = 16
) -> OrderSpec:
    """The spec of a new run; `global_batch` only sets the number of lanes, which then stays."""
    sizes = tuple(int(size) for size in shard_sizes)
    return OrderSpec(sum(sizes), sizes, seed, LANES_PER_SLOT * global_batch, chunk, block)


class SampleOrder:
    """Stream position -> sample id. Holds the chunk tables of two epochs and the blocks in use."""

    def __init__(self, spec: OrderSpec) -> None:
        self.spec = spec
        self._chunk_starts, self._chunk_sizes = _chunks(spec)
        self._epoch = lru_cache(2)(self._make_epoch)
        self._block = lru_cache(2 * spec.lanes)(self._make_block)  # about one a lane is in use at a time

    def __reduce__(self) -> tuple[type["SampleOrder"], tuple[OrderSpec]]:
        return SampleOrder, (self.spec,)

    def epoch_of(self, q: int) -> int:
        """The epoch that stream position q belongs to."""
        return q // self.spec.num_samples

    def ids(self, start: int, count: int) -> np.ndarray:
        """Sample ids, int64 (count,), at the stream positions start .. start + count - 1."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, positions = np.divmod(positions, self.spec.num_samples)
        ids = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            ids[inside] = self._epoch_ids(int(epoch), positions[inside])
        return ids

    def _epoch_ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        share, rest = divmod(self.spec.num_samples, self.spec.lanes)
        depth, lane = np.divmod(positions, self.spec.lanes)
        index = lane * share + np.minimum(lane, rest) + depth  # into V_e
        block_starts = self._epoch(epoch)[1]
        blocks = np.searchsorted(block_starts, index, side="right") - 1
        ids = np.empty(len(index), np.int64)
        by_block = np.argsort(blocks, kind="stable")
        edges = np.flatnonzero(np.diff(blocks[by_block], prepend=-1))
        for part in np.split(by_block, edges[1:]):
            if len(part):
                block = int(blocks[part[0]])
                ids[part] = self._block(epoch, block)[index[part] - block_starts[block]]
        return ids

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(permuted chunk numbers, start of every block in V_e)."""
        order = _permutation(len(self._chunk_sizes), self.spec.seed, _CHUNKS, epoch, 0)
        ends = np.cumsum(self._chunk_sizes[order])
        return order, np.concatenate([[0], ends[self.spec.block - 1 : -1 : self.spec.block]])

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        """Sample ids of one block of V_e, in order."""
        size = self.spec.block
        chunks = self._epoch(epoch)[0][block * size : (block + 1) * size]
        parts = [np.arange(self._chunk_sizes[c]) + self._chunk_starts[c] for c in chunks]
        ids: np.ndarray = np.concatenate(parts)
        return ids.take(_permutation(len(ids), self.spec.seed, _BLOCK, epoch, block))


def _chunks(spec: OrderSpec) -> tuple[np.ndarray, np.ndarray]:
    """(first sample id, number of samples) of every chunk."""
    sizes = np.asarray(spec.shard_sizes, np.int64)
    counts = -(-sizes // spec.chunk)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(sizes) - sizes, counts) + within * spec.chunk
    return starts, np.minimum(spec.chunk, np.repeat(np.cumsum(sizes), counts) - starts)


def _permutation(count: int, seed: int, stream: int, epoch: int, block: int) -> np.ndarray:
    # The counter's lowest word runs while drawing; the other three tell the streams apart.
    key, counter = np.array([seed, VERSION], np.uint64), np.array([0, block, epoch, stream], np.uint64)
    draws = np.random.Philox(key=key, counter=counter).random_raw(count)
    return np.argsort(draws, kind="stable")


def shared_slots(weights: Mapping[str, float]) -> dict[str, int]:
    """PERIOD slots by weight, rounded by largest remainder; ConfigError for a set that would get none."""
    total = sum(weights.values())
    exact = {name: PERIOD * weight / total for name, weight in weights.items()}
    slots = {name: int(share) for name, share in exact.items()}
    rest = PERIOD - sum(slots.values())
    for name in sorted(exact, key=lambda name: slots[name] - exact[name])[:rest]:
        slots[name] += 1
    for name, count in slots.items():
        if not count:
            raise ConfigError(
                f"mixture.sets.{name} gets {100 * weights[name] / total:.2g} % of the samples, less than one "
                f"of {PERIOD}; give it more weight, or leave it out"
            )
    return slots


class MixedOrder:
    """Stream position -> sample id over several sets, whose ids follow one another in their order."""

    def __init__(self, orders: Mapping[str, SampleOrder], slots: Sequence[int]) -> None:
        """slots: how many of PERIOD each set has; they are spread evenly."""
        self.orders = list(orders.values())
        self._names, self._slots = list(orders), np.array(slots, np.int64)
        if len(slots) != len(orders) or sum(slots) != PERIOD or min(slots) < 1:
            raise DataError(f"sample order of {len(orders)} sets with {list(slots)} of {PERIOD} slots")
        owner = np.repeat(np.arange(len(slots)), slots)
        nth = np.concatenate([np.arange(count) for count in slots])
        # The middle of the k-th of n slots lies at (2k + 1) / 2n of the period; ties in their order.
        self._pattern = owner[np.argsort((2 * nth + 1) * 2**40 // self._slots[owner], kind="stable")]
        inside = self._pattern[:, None] == np.arange(len(slots))
        self._before = np.cumsum(inside, axis=0) - inside  # (PERIOD, sets)
        sizes = [order.spec.num_samples for order in self.orders]
        self._first_ids = np.cumsum([0, *sizes])[:-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedOrder, (dict(zip(self._names, self.orders, strict=True)), self._slots.tolist())

    @property
    def shares(self) -> dict[str, float]:
        """Share of the samples of each set."""
        return {name: int(count) / PERIOD for name, count in zip(self._names, self._slots, strict=True)}

    def positions(self, q: int) -> dict[str, int]:
        """How many samples of each set lie before stream position q."""
        counts = q // PERIOD * self._slots + self._before[q % PERIOD]
        return dict(zip(self._names, counts.tolist(), strict=True))

    def epoch_of(self, q: int) -> int:
        """The epoch of its own set that stream position q belongs to."""
        owner = int(self._pattern[q % PERIOD])
        return self.orders[owner].epoch_of(self.positions(q)[self._names[owner]])

    def ids(self, start: int, count: int) -> np.ndarray:
        """As SampleOrder.ids."""
        periods, places = np.divmod(np.arange(start, start + count, dtype=np.int64), PERIOD)
        owners, ids = self._pattern[places], np.empty(count, np.int64)
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)  # neighbors in the set's own stream
            first = int(periods[mine[0]] * self._slots[owner] + self._before[places[mine[0]], owner])
            ids[mine] = self.orders[owner].ids(first, len(mine)) + self._first_ids[owner]
        return ids

    def to_dict(self, q: int) -> dict[str, Any]:
        """Plain values, for JSON: of each set its spec, its slots and where it is at stream position q."""
        parts = zip(self._slots.tolist(), self.positions(q).values(), self.orders, strict=True)
        return {
            name: {"slots": slots, "position": position, "spec": order.spec.to_dict()}
            for name, (slots, position, order) in zip(self._names, parts, strict=True)
        }

    @classmethod
    def from_dict(cls, sets: Mapping[str, Any], q: int) -> "MixedOrder":
        """The inverse of to_dict; DataError where the sets are not where stream position q has them."""
        specs = {name: OrderSpec.from_dict(entry["spec"]) for name, entry in sets.items()}
        orders = {name: SampleOrder(spec) for name, spec in specs.items()}
        order = cls(orders, [entry["slots"] for entry in sets.values()])
        saved = {name: entry["position"] for name, entry in sets.items()}
        if saved != order.positions(q):
            raise DataError(f"the sets are at {saved}, and {order.positions(q)} belong to {q} samples")
        return order


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How the images of an optimizer step are shared out: micro_batch x accumulation x world_size of them.

    Raises:
        ConfigError: global_batch is not divisible by micro_batch x world_size; it names what would do.
    """

    global_batch: int
    micro_batch: int
    "Images per forward and rank."
    world_size: int

    def __post_init__(self) -> None:
        batch, micro, world = self.global_batch, self.micro_batch, self.world_size
        if batch % (micro * world) == 0:
            return
        if batch % world == 0:
            share = batch // world
            remedy = f"micro_batch={' or '.join(str(m) for m in range(1, share + 1) if share % m == 0)}"
        else:
            sizes = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
            near = sorted({max(1, batch // world) * world, -(-batch // world) * world})
            remedy = f"a world size of {sizes} or global_batch={' or '.join(map(str, near))}"
        raise ConfigError(
            f"global_batch={batch} is not divisible by micro_batch x world_size = {micro} x {world}; "
            f"use {remedy}"
        )

    def __str__(self) -> str:
        return (
            f"{self.global_batch} = {self.micro_batch} a forward x {self.accumulation} accumulated x "
            f"{self.world_size} ranks"
        )

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def positions(self, rank: int, micro_step: int) -> tuple[int, int]:
        """Stream positions [q0, q1) of a rank's micro batch, counted over the steps of the run.

        Slot j of a global batch belongs to rank j // (global_batch / world_size).
        """
        step, index = divmod(micro_step, self.accumulation)
        q0 = step * self.global_batch + (rank * self.accumulation + index) * self.micro_batch
        return q0, q0 + self.micro_batch
