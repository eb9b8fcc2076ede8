"""Sample id -> the encoded members of one sample, every byte checked against its crc32.

    local    one ranged read a sample, image and target together; the page cache does the rest
    remote   one ranged request a chunk (neighboring samples, which the order uses close together), several
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
from segformer.errors import DataError
from segformer.files import remove, write_atomic

CHUNK = 16  # samples fetched by one request; the order (order.py) uses chunks of as many
MAX_CHUNK_BYTES = 64 * 2**20  # chunks of larger samples are fetched one sample at a time
REQUESTS = 8  # at a time, per process
CACHE_SHARE = 16  # a process looks at the size of the disk cache after writing 1/16 of its limit


class CorruptSampleError(DataError):
    """The bytes of one sample are not the ones that were written."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """The encoded members of one sample. target: a PNG mask, or the class id as text."""

    key: str
    image: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighboring samples from `first` on, and the bytes of a file in which their members lie."""

    first: int
    file: str
    start: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.file}-{self.start}-{self.length}"


class ShardReader:
    """Reads samples of a split by id. Opens files and connections when first needed."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.storage = split.storage
        self._chunks: OrderedDict[int, bytes] = OrderedDict()  # first sample id -> bytes, oldest use first
        config = self.storage.config
        self._disk = _DiskCache(config.cache / "parts", split.digest[:32], config.cache_gb)
        self._pool: ThreadPoolExecutor | None = None

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
            f"shard {self.split.describe(sample_id)}: {damaged} is damaged (crc32 differs); "
            "copy the shard again"
        )

    def _bytes(self, sample_id: int, start: int, length: int, fresh: bool) -> bytes:
        if self.storage.is_local:
            return self.storage.read_range(self.split.files[self.split.shard_of(sample_id)], start, length)
        span = self._span(sample_id)
        if fresh:
            self._chunks.pop(span.first, None)
            self._disk.drop(span.name)
        if span.first not in self._chunks:
            self._keep(span, self._load(span))
        self._chunks.move_to_end(span.first)
        offset = start - span.start
        return self._chunks[span.first][offset : offset + length]

    def _span(self, sample_id: int) -> _Span:
        """The chunk that a sample belongs to."""
        split, shard = self.split, self.split.shard_of(sample_id)
        begin, end = int(split.first_ids[shard]), int(split.first_ids[shard + 1])
        first = begin + (sample_id - begin) // CHUNK * CHUNK
        last = min(first + CHUNK, end) - 1
        if self._end(last) - int(split.records["image_offset"][first]) > MAX_CHUNK_BYTES:
            first = last = sample_id
        start = int(split.records["image_offset"][first])
        return _Span(first, split.files[shard], start, self._end(last) - start)

    def _end(self, sample_id: int) -> int:
        record = self.split.records[sample_id]
        return int(record["target_offset"]) + int(record["target_size"])

    def _load(self, span: _Span) -> bytes:
        """A chunk from the disk cache or its source; several threads at a time."""
        data = self._disk.get(span.name)
        if data is None or len(data) != span.length:
            data = self.storage.read_range(span.file, span.start, span.length)
            self._disk.put(span.name, data)
        return data

    def _keep(self, span: _Span, data: bytes) -> None:
        self._chunks[span.first] = data
        held = sum(map(len, self._chunks.values()))
        while held > self.storage.config.memory_mb * 2**20 and len(self._chunks) > 1:
            held -= len(self._chunks.popitem(last=False)[1])


class _DiskCache:
    """Parts of remote shards in a folder that the processes of a machine share; oldest use goes first.

    The limit is for the parts of all data sets below `root` together, and may be passed by 1/16 of it for
    each process that writes. What is read is checked by its crc32 like any other bytes; where the disk is
    full or a file is gone, training goes on without the cache.
    """

    def __init__(self, root: Path, name: str, limit_gb: float) -> None:
        self.root = root
        self.folder = root / name
        self.limit = int(limit_gb * 10**9)
        self._written = self.limit  # the first write looks at what earlier runs have left

    def get(self, name: str) -> bytes | None:
        if self.limit:
            with contextlib.suppress(OSError):
                os.utime(self.folder / name)
                return (self.folder / name).read_bytes()
        return None

    def put(self, name: str, data: bytes) -> None:
        if not self.limit or len(data) > self.limit:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(self.folder / name, data, mode=0o600, durable=False)
            self._written += len(data)
            if self._written > self.limit / CACHE_SHARE:
                self._written = 0
                self._shrink()

    def drop(self, name: str) -> None:
        remove(self.folder / name)

    def _shrink(self) -> None:
        """Remove the parts that were used longest ago, until those left fit the limit."""
        found = []
        for path in self.root.rglob("*"):
            with contextlib.suppress(OSError):  # another process removed it
                if path.is_file():
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            remove(path)
            total -= size
