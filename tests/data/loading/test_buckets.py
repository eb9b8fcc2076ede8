"""Shards in object stores, on real servers that speak S3 and the JSON API of Google Cloud Storage."""

from collections.abc import Iterator
from multiprocessing.forkserver import _forkserver
from pathlib import Path

import pytest
import torch
from servers import gs_with, s3_with
from streams import micro_batches

from segformer.data.loading.crop import AugmentConfig
from segformer.data.shards.format import ShardSet
from segformer.data.shards.storage import Storage, StorageConfig
from segformer.errors import DataError


@pytest.fixture(scope="module", params=["s3", "gs"])
def url(request: pytest.FixtureRequest, shard_dir: Path) -> Iterator[str]:
    with {"s3": s3_with, "gs": gs_with}[request.param](shard_dir) as url:
        _forkserver._stop()  # workers have the environment that their fork server was started with
        yield url
    _forkserver._stop()


@pytest.fixture
def settings(tmp_path: Path) -> StorageConfig:
    return StorageConfig(timeout=10, retry_seconds=20, cache_dir=str(tmp_path / "cache"))


def test_ranges_and_sizes_are_those_of_the_files(url: str, settings: StorageConfig, shard_dir: Path) -> None:
    source = Storage.at(url, settings)
    for path in sorted(shard_dir.iterdir()):
        content = path.read_bytes()
        assert source.size(path.name) == len(content)
        assert source.read(path.name) == content
        assert source.read_range(path.name, 100, 17) == content[100:117]


def test_what_is_missing_is_one_error(url: str, settings: StorageConfig) -> None:
    with pytest.raises(DataError, match=rf"{url}/none.tar' cannot be read: FileNotFoundError"):
        Storage.at(url, settings).read_range("none.tar", 0, 1)
    with pytest.raises(DataError, match=r"nowhere/dataset.json' cannot be read: FileNotFoundError"):
        ShardSet.open(url + "/nowhere", settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_is_that_of_the_folder(
    url: str, settings: StorageConfig, shard_dir: Path, workers: int
) -> None:
    augment = AugmentConfig(crop=[32, 32], resize=[])
    streams = [
        micro_batches(
            ShardSet.open(root, settings).split("train"), augment, 7, global_batch=3, workers=workers
        )
        for root in (url, shard_dir)
    ]
    for remote, local in zip(*streams, strict=True):
        assert torch.equal(remote.sample_ids, local.sample_ids)
        assert torch.equal(remote.images, local.images)
        assert torch.equal(remote.targets, local.targets)
