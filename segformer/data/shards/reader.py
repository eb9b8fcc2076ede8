"""Sample id -> the encoded members of one sample, every byte checked against its crc32.

    local    one ranged read a sample, image and target together; the page cache does the rest
    remote   one ranged request a chunk (neighbouring samples, which the order uses close together), several
             at a time; chunks stay in memory up to `memory_mb` and on disk up to `cache_gb`

A member whose crc32 differs is read once more, past the caches, because the fault may be in the transport;
if it differs again the sample is corrupt. What cannot be read at all is another error: it says nothing about
the sample."""

import contextlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from segformer.data.shards.format import Split
from segformer.data.shards.storage import write_atomic
from segformer.errors import DataError

CHUNK = 16  # samples fetched by one request; the order (order.py) uses chunks of as many
MAX_CHUNK_BYTES = 64 * 2**20  # chunks of larger samples are fetched one sample at a time
REQUESTS = 8  # at a time, per process
CACHE_SHARE = 16  # a process looks at the size of the disk cache after writing 1/16 of its limit


class CorruptSampleError(DataError):
    """The bytes of one sample are not the ones that were written; `sample_id` tells which sample."""

    def __init__(self, sample_id: int, message: str) -> None:
        super().__init__(message)
        self.sample_id = sample_id

    def __reduce__(self) -> tuple[type["CorruptSampleError"], tuple[int, str]]:
        return CorruptSampleError, (self.sample_id, str(self))


@dataclass(frozen=True, slots=True)
class RawSample:
    """The encoded members of one sample. target: a PNG mask, or the class id as text."""

    key: str
    image: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring samples of one shard and where their members lie."""

    shard: int
    first: int
    start: int
    length: int


class ShardReader:
    """Reads samples of a split by id. Opens files and connections when first needed, and pickles without."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.storage = split.storage
        self._chunks: OrderedDict[int, bytes] = OrderedDict()  # first sample id -> bytes, oldest use first
        self._held = 0
        config = self.storage.config
        self._disk = _DiskCache(config.cache / "parts", split.digest[:32], config.cache_gb)
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Split]]:
        return ShardReader, (self.split,)

    def fetch(self, sample_ids: Iterable[int]) -> None:
        """Get the remote chunks of these samples side by side; nothing to do for local shards."""
        if self.storage.is_local:
            return
        spans = {span.first: span for span in map(self._span, sample_ids)}
        missing = [span for first, span in spans.items() if first not in self._chunks]
        if len(missing) > 1:
            self._pool = self._pool or ThreadPoolExecutor(REQUESTS)
            for span, data in zip(missing, self._pool.map(self._load, missing), strict=True):
                self._keep(span, data)

    def read(self, sample_id: int) -> RawSample:
        """One sample; CorruptSampleError names shard, key and offset of what is damaged."""
        record = self.split.records[sample_id]
        start, image_size = int(record["image_offset"]), int(record["image_size"])
        target_at = int(record["target_offset"]) - start
        length = target_at + int(record["target_size"])
        for fresh in (False, True):
            data = self._bytes(sample_id, start, length, fresh)
            image, target = data[:image_size], data[target_at:]
            if zlib.crc32(image) != record["image_crc"]:
                damaged = f"the image at offset {start}"
            elif zlib.crc32(target) != record["target_crc"]:
                damaged = f"the target at offset {start + target_at}"
            else:
                return RawSample(self.split.key(sample_id), image, target)
        raise CorruptSampleError(
            sample_id,
            f"shard {self.split.describe(sample_id)}: {damaged} is damaged (crc32 differs); "
            "copy the shard again",
        )

    def close(self) -> None:
        """Close the files and let go of the chunks; a later read gets them again."""
        self.storage.close()
        self._chunks.clear()
        self._held = 0
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _bytes(self, sample_id: int, start: int, length: int, fresh: bool) -> bytes:
        shard = self.split.shard_of(sample_id)
        if self.storage.is_local:
            return self.storage.read_range(self.split.files[shard], start, length)
        span = self._span(sample_id)
        if fresh:
            self._drop(span)
        if span.first not in self._chunks:
            self._keep(span, self._load(span))
        self._chunks.move_to_end(span.first)
        offset = start - span.start
        return self._chunks[span.first][offset : offset + length]

    def _span(self, sample_id: int) -> _Span:
        """The chunk that a sample belongs to."""
        shard = self.split.shard_of(sample_id)
        begin, end = int(self.split.first_ids[shard]), int(self.split.first_ids[shard + 1])
        first = begin + (sample_id - begin) // CHUNK * CHUNK
        last = min(first + CHUNK, end) - 1
        if self._end(last) - self._start(first) > MAX_CHUNK_BYTES:
            first = last = sample_id
        start = self._start(first)
        return _Span(shard, first, start, self._end(last) - start)

    def _start(self, sample_id: int) -> int:
        return int(self.split.records["image_offset"][sample_id])

    def _end(self, sample_id: int) -> int:
        record = self.split.records[sample_id]
        return int(record["target_offset"]) + int(record["target_size"])

    def _load(self, span: _Span) -> bytes:
        """A chunk from the disk cache or its source; several threads at a time."""
        name = f"{self.split.files[span.shard]}-{span.start}-{span.length}"
        data = self._disk.get(name, span.length)
        if data is None:
            data = self.storage.read_range(self.split.files[span.shard], span.start, span.length)
            self._disk.put(name, data)
        return data

    def _keep(self, span: _Span, data: bytes) -> None:
        if span.first not in self._chunks:
            self._held += len(data)
        self._chunks[span.first] = data
        while self._held > self.storage.config.memory_mb * 2**20 and len(self._chunks) > 1:
            self._held -= len(self._chunks.popitem(last=False)[1])

    def _drop(self, span: _Span) -> None:
        """Forget a chunk, in memory and on disk."""
        self._held -= len(self._chunks.pop(span.first, b""))
        self._disk.remove(f"{self.split.files[span.shard]}-{span.start}-{span.length}")


class _DiskCache:
    """Parts of remote shards in a folder that the processes of a machine share; oldest use goes first.

    A part appears by a rename, so readers never see half of one; its crc32 is checked like that of any
    other bytes. The limit may be passed by 1/16 of it for each process that writes.
    """

    def __init__(self, root: Path, name: str, limit_gb: float) -> None:
        self.root = root  # of all data sets together, for which the limit is
        self.folder = root / name
        self.limit = int(limit_gb * 10**9)
        self._written = self.limit  # the first write looks at what earlier runs have left

    def get(self, name: str, length: int) -> bytes | None:
        if not self.limit:
            return None
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == length else None

    def put(self, name: str, data: bytes) -> None:
        if not self.limit or len(data) > self.limit:
            return
        with contextlib.suppress(OSError):  # a full disk: training goes on without the cache
            write_atomic(self.folder / name, data)
            self._written += len(data)
            if self._written > self.limit / CACHE_SHARE:
                self._written = 0
                self._shrink()

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _shrink(self) -> None:
        """Remove the parts of any data set that were used longest ago, until those left fit the limit."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):  # another process removed it
                    stat = os.stat(path)
                    found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
