from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import FileServer, serving

from segformer.data.shards import reader as reader_module
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.reader import CHUNK, CorruptSampleError, RawSample, ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.storage import StorageConfig
from segformer.data.sources.dataset import DatasetConfig


@pytest.fixture
def remote(shard_dir: Path, tmp_path: Path) -> Callable[..., Split]:
    """The training split as a server gives it."""

    def opened(server: FileServer, **options: Any) -> Split:
        config = StorageConfig(**{"timeout": 0.5, "cache_dir": str(tmp_path / "cache"), **options})
        return ShardSet.open(server.url, config).split("train")

    return opened


def tar_requests(server: FileServer) -> list[tuple[str, str]]:
    return [(name, asked) for kind, name, asked in server.requests if kind == "GET" and name.endswith(".tar")]


def all_samples(split: Split) -> list[RawSample]:
    reader = ShardReader(split)
    return [reader.read(sample_id) for sample_id in range(split.num_samples)]


def test_a_remote_epoch_is_the_local_one_with_one_request_a_chunk(
    shard_dir: Path, remote: Callable[..., Split]
) -> None:
    local = ShardSet.open(shard_dir).split("train")
    with serving(shard_dir) as server:
        split = remote(server)
        assert all_samples(split) == all_samples(local)
        chunks = sum(-(-size // CHUNK) for size in split.shard_sizes)
        assert len(tar_requests(server)) == chunks
        assert all(asked for _, asked in tar_requests(server))


def test_chunks_are_fetched_side_by_side_and_once(shard_dir: Path, remote: Callable[..., Split]) -> None:
    with serving(shard_dir) as server:
        reader = ShardReader(remote(server))
        reader.fetch(range(reader.split.num_samples))
        requests = tar_requests(server)
        assert len(requests) == len(set(requests)) == len(reader.split.files)
        for sample_id in range(reader.split.num_samples):
            reader.read(sample_id)
        assert len(tar_requests(server)) == len(requests)


def test_memory_is_limited(
    shard_dir: Path, remote: Callable[..., Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "CHUNK", 2)
    with serving(shard_dir) as server:
        reader = ShardReader(remote(server, memory_mb=0))
        for sample_id in (0, 1, 0, 2, 3, 0):
            reader.read(sample_id)
        assert len(tar_requests(server)) == 3


def test_large_samples_are_fetched_one_by_one(
    shard_dir: Path, remote: Callable[..., Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_CHUNK_BYTES", 1)
    with serving(shard_dir) as server:
        split = remote(server)
        assert all_samples(split) == all_samples(ShardSet.open(shard_dir).split("train"))
        assert len(tar_requests(server)) == split.num_samples


def test_the_disk_cache_serves_the_second_reader_and_survives_damage(
    shard_dir: Path, remote: Callable[..., Split], tmp_path: Path
) -> None:
    with serving(shard_dir) as server:
        split = remote(server, cache_gb=1)
        first = all_samples(split)
        asked = len(tar_requests(server))
        assert all_samples(split) == first
        assert len(tar_requests(server)) == asked, "the second reader asks for nothing"
        parts = sorted((tmp_path / "cache" / "parts" / split.digest[:32]).iterdir())
        assert len(parts) == asked
        data = bytearray(parts[0].read_bytes())
        data[700] ^= 1  # the first member begins at 512
        parts[0].write_bytes(data)
        parts[1].write_bytes(b"half")
        assert all_samples(split) == first
        assert len(tar_requests(server)) == asked + 2, "damaged parts are fetched again"
        assert all_samples(split) == first
        assert len(tar_requests(server)) == asked + 2


def test_the_disk_cache_keeps_to_its_limit_for_all_data_sets_together(
    shard_dir: Path, tmp_path: Path, config: DatasetConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "CHUNK", 1)
    other, cache, limit = tmp_path / "other", tmp_path / "cache", 30_000
    write_shards(config, folder, other, seed=4, samples_per_shard=8, workers=1)
    settings = StorageConfig(cache_dir=str(cache), cache_gb=limit / 1e9, memory_mb=0)
    for root in (shard_dir, other):
        with serving(root) as server:
            reader, largest = ShardReader(ShardSet.open(server.url, settings).split("train")), 0
            for sample_id in range(reader.split.num_samples):
                reader.read(sample_id)
                parts = [path for path in (cache / "parts").rglob("*") if path.is_file()]
                largest = max(largest, sum(path.stat().st_size for path in parts))
        assert limit / 2 < largest <= limit * (1 + 1 / reader_module.CACHE_SHARE)


@pytest.mark.parametrize("member", ["image", "target"])
def test_a_flipped_bit_is_named_with_shard_key_and_offset(
    copy: Path, member: str, remote: Callable[..., Split]
) -> None:
    split = ShardSet.open(copy).split("train")
    tar = copy / split.files[split.shard_of(9)]
    data = bytearray(tar.read_bytes())
    data[int(split.records[9][f"{member}_offset"]) + 30] ^= 4
    tar.write_bytes(data)
    with serving(copy) as server:
        for damaged in (split, remote(server)):
            message = rf"{tar.name}.*{split.key(9)}.*{member} at offset"
            with pytest.raises(CorruptSampleError, match=message):
                ShardReader(damaged).read(9)
            ShardReader(damaged).read(10)
