import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import list_samples
from servers import FAULTS, serving
from streams import micro_batches

from segformer.data.loading.classification import ClassificationAugment, ClassificationGeometry
from segformer.data.loading.crop import AugmentConfig, RandomCrop
from segformer.data.loading.loader import (
    LoaderConfig,
    corrupt_budget,
    eval_batches,
    num_eval_batches,
    train_batches,
    worker_count,
)
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.loading.photometric import draw_distortion
from segformer.data.loading.samples import Batch, sample_rng
from segformer.data.loading.workers import WorkerStream
from segformer.data.shards import reader as reader_module
from segformer.data.shards import storage
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.storage import StorageConfig
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.data.sources.sample import load_sample
from segformer.errors import ConfigError, DataError, WorkerLost

AUGMENT = AugmentConfig(crop=[32, 48], resize=[], rot90=0.5, vflip=0.5)
STEPS = 7  # 42 samples: the two epochs of 21 samples end inside and at the end of a batch
ORDER = {"chunk": 4, "block": 2}


def stream(shards: ShardSet, *, start: int = 0, **options: Any) -> list[Batch]:
    """One rank's micro batches of global batches of 6, from step `start` to STEPS."""
    return micro_batches(shards.split("train"), AUGMENT, STEPS - start, start=start, **ORDER, **options)


def fields(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The tensors of a training batch."""
    assert batch.photometric is not None
    assert batch.valid is not None
    return batch.images, batch.targets, batch.photometric, batch.sample_ids, batch.valid


def joined(batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """All samples of some batches, in order."""
    return tuple(torch.cat(parts) for parts in zip(*map(fields, batches), strict=True))


@pytest.fixture(scope="module")
def reference(shards: ShardSet) -> tuple[torch.Tensor, ...]:
    """The stream of one rank without worker processes."""
    return joined(stream(shards))


@pytest.mark.parametrize(
    ("world", "micro", "workers"),
    [(1, 6, 2), (1, 2, 0), (2, 1, 2), (2, 3, 1), (3, 2, 0)],
)
def test_any_ranks_workers_and_accumulation_give_the_same_bits(
    world: int, micro: int, workers: int, shards: ShardSet, reference: tuple[torch.Tensor, ...]
) -> None:
    ranks = [
        joined(stream(shards, rank=rank, world=world, micro=micro, workers=workers)) for rank in range(world)
    ]
    for whole, expected in zip(global_batches(ranks), reference, strict=True):
        assert torch.equal(whole, expected)


def global_batches(ranks: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """All samples in the order of the stream, from those of each rank."""
    steps = [[field.unflatten(0, (STEPS, -1)) for field in rank] for rank in ranks]
    return [torch.cat(parts, 1).flatten(0, 1) for parts in zip(*steps, strict=True)]


def test_the_stream_is_the_sample_order(shards: ShardSet, reference: tuple[torch.Tensor, ...]) -> None:
    spec = make_order_spec(shards.split("train").shard_sizes, seed=5, global_batch=6, **ORDER)
    assert reference[3].tolist() == SampleOrder(spec).ids(0, STEPS * 6).tolist()


def test_a_stream_continues_at_any_step(shards: ShardSet, reference: tuple[torch.Tensor, ...]) -> None:
    for ours, expected in zip(joined(stream(shards, start=3, workers=2)), reference, strict=True):
        assert torch.equal(ours, expected[18:])


def test_a_training_sample_is_its_augmented_pair(
    shards: ShardSet, folder: Path, config: DatasetConfig, reference: tuple[torch.Tensor, ...]
) -> None:
    split = shards.split("train")
    sources = {sample.key: sample for sample in list_samples(config, folder, "train")}
    images, targets, photometric, ids, sizes = reference
    for slot in (0, 20, 21, 41):
        sample_id = int(ids[slot])
        source = load_sample(config, sources[split.keys[sample_id]])
        assert source.mask is not None
        rng = sample_rng(11, slot // 21, sample_id)
        image, mask, valid = RandomCrop(AUGMENT)(decode_image(source.image), source.mask, rng)
        np.testing.assert_array_equal(images[slot].permute(1, 2, 0), image)
        np.testing.assert_array_equal(targets[slot], mask)
        assert torch.equal(photometric[slot], torch.tensor(draw_distortion(1.0, rng)))
        assert sizes[slot].tolist() == list(valid)


def test_batches_have_the_promised_types_and_layout(shards: ShardSet) -> None:
    batch = stream(shards)[0]
    assert batch.images.shape == (6, 3, 32, 48)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    types = [torch.uint8, torch.uint8, torch.float32, torch.int64, torch.int64]
    assert [tensor.dtype for tensor in fields(batch)] == types
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in fields(moved)} == {"meta"}


def test_the_models_random_numbers_are_not_touched(shards: ShardSet) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    stream(shards)
    list(eval_batches(shards.split("val"), LoaderConfig(workers=0), rank=0, world_size=1, batch_size=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("world", "size", "workers"), [(1, 1, 2), (2, 2, 0), (12, 4, 0)])
def test_evaluation_reads_every_sample_once_in_batches_of_one_size(
    world: int, size: int, workers: int, shards: ShardSet, folder: Path, config: DatasetConfig
) -> None:
    split = shards.split("val")
    masks = {sample.key: load_sample(config, sample).mask for sample in list_samples(config, folder, "val")}
    seen: list[int] = []
    for rank in range(world):
        batches = eval_batches(
            split, LoaderConfig(workers=workers), rank=rank, world_size=world, batch_size=size
        )
        taken = list(batches)
        assert len(taken) == num_eval_batches(split, world, size)[rank]
        for batch in taken:
            assert batch.photometric is None
            assert len(batch.sample_ids) <= size
            for target, sample_id in zip(batch.targets, batch.sample_ids.tolist(), strict=True):
                np.testing.assert_array_equal(target, masks[split.keys[sample_id]])
            seen += batch.sample_ids.tolist()
    assert sorted(seen) == list(range(10))


@pytest.fixture
def damaged(copy: Path) -> Callable[..., ShardSet]:
    """A copy of the shards with a flipped byte in the image of some training samples."""

    def make(*sample_ids: int) -> ShardSet:
        shards = ShardSet.open(copy)
        split = shards.split("train")
        for sample_id in sample_ids:
            with (copy / split.files[split.shard_of(sample_id)]).open("r+b") as tar:
                tar.seek(int(split.records[sample_id]["image_offset"]) + 30)
                tar.write(b"\0\xff\0")
        return shards

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_ends_the_stream_with_one_line(
    workers: int, damaged: Callable[..., ShardSet]
) -> None:
    with pytest.raises(DataError, match=r"train-000001.tar', key '.*': the image at offset") as caught:
        stream(damaged(9), workers=workers)
    assert "\n" not in str(caught.value)


def test_a_corrupt_sample_is_replaced_by_its_neighbor(
    shards: ShardSet, damaged: Callable[..., ShardSet], reference: tuple[torch.Tensor, ...]
) -> None:
    """Samples 6 and 7 end the first shard of 8: both are replaced by its sample 0."""
    hurt = damaged(6, 7)
    whole = joined(stream(hurt, max_corrupt=0.1))
    assert torch.equal(whole[3], reference[3]), "the order is that of the whole set"
    untouched = ~torch.isin(reference[3], torch.tensor([6, 7]))
    assert (~untouched).sum() == 4
    decoded = decode_image(ShardReader(shards.split("train")).read(0).image)
    mask = decode_mask(ShardReader(shards.split("train")).read(0).target)
    for slot in range(42):
        if untouched[slot]:
            assert torch.equal(whole[0][slot], reference[0][slot])
        else:
            rng = sample_rng(11, slot // 21, int(reference[3][slot]))
            image, target, _ = RandomCrop(AUGMENT)(decoded, mask, rng)
            np.testing.assert_array_equal(whole[0][slot].permute(1, 2, 0), image)
            np.testing.assert_array_equal(whole[1][slot], target)
    ranks = [joined(stream(hurt, max_corrupt=0.1, rank=rank, world=2, micro=3, workers=2)) for rank in (0, 1)]
    assert all(map(torch.equal, global_batches(ranks), whole))
    found = [replaced for batch in stream(hurt, max_corrupt=0.1) for replaced in batch.replaced]
    assert sorted(replaced.sample_id for replaced in found) == [6, 6, 7, 7]
    assert all("damaged (crc32 differs)" in replaced.reason for replaced in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_are_gone_when_a_worker_opens_them_are_one_error(
    workers: int, damaged: Callable[..., ShardSet]
) -> None:
    shards = damaged()
    shards.split("train")
    shutil.rmtree(shards.root)
    with pytest.raises(DataError, match=r"no shards in .*copy'|train-00000.\.tar' cannot be read"):
        stream(shards, workers=workers)


def test_more_corrupt_samples_than_the_budget_end_the_stream(damaged: Callable[..., ShardSet]) -> None:
    hurt = damaged(3, 6, 7)
    assert corrupt_budget(LoaderConfig(max_corrupt=0.1), hurt.split("train")) == 2
    with pytest.raises(DataError, match=r"3 corrupt samples, and loader.max_corrupt allows 2 of this split"):
        stream(hurt, max_corrupt=0.1)


def test_evaluation_never_replaces(damaged: Callable[..., ShardSet]) -> None:
    split = damaged(3).split("train")
    loader = LoaderConfig(workers=0, max_corrupt=0.1)
    with pytest.raises(DataError, match="the image at offset"):
        list(eval_batches(split, loader, rank=0, world_size=1, batch_size=2))


def test_a_failing_server_gives_the_local_epoch(
    shard_dir: Path,
    tmp_path: Path,
    reference: tuple[torch.Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(reader_module, "CHUNK", 2)
    config = StorageConfig(timeout=1, cache_dir=str(tmp_path))
    with serving(shard_dir, fail=0.2, seed=4) as server:
        got = joined(stream(ShardSet.open(server.url, config)))
        assert sum(server.done[fault] for fault in FAULTS) >= 4
    for ours, expected in zip(got, reference, strict=True):
        assert torch.equal(ours, expected)


def test_the_default_shares_the_cores_among_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)))
    assert [worker_count(LoaderConfig(), ranks) for ranks in (1, 4, 8, 48)] == [8, 6, 3, 1]
    assert worker_count(LoaderConfig(workers=5), 8) == 5
    assert worker_count(LoaderConfig(workers=48), 8) == 48
    with pytest.raises(ConfigError, match=r"workers=49 for each of 8 ranks .* 24 cores; use 0 to 48, or -1"):
        worker_count(LoaderConfig(workers=49), 8)


@pytest.mark.parametrize("settings", [{"workers": -2}, {"prefetch": 0}, {"timeout": 0}])
def test_a_wrong_setting_is_refused_by_name(settings: dict) -> None:
    with pytest.raises(ConfigError, match=f"loader.{next(iter(settings))}="):
        LoaderConfig(**settings)


CLASSIFY = ClassificationAugment(size=24, eval_resize=28, magnitude=5)


def class_stream(shards: ShardSet, **options: int) -> list[tuple[torch.Tensor, ...]]:
    """One rank's micro batches of two epochs of 13 images, 2 a global batch."""
    taken = micro_batches(shards.split("train"), CLASSIFY, 13, global_batch=2, **options)
    assert all(batch.photometric is None and not batch.replaced for batch in taken)
    return [(batch.images, batch.targets, batch.sample_ids) for batch in taken]


def test_classification_batches_are_crops_and_class_ids(class_shards: ShardSet) -> None:
    whole = class_stream(class_shards)
    reader = ShardReader(class_shards.split("train"))
    geometry = ClassificationGeometry(CLASSIFY)
    for position, sample_id in enumerate(torch.cat([ids for _, _, ids in whole]).tolist()):
        raw = reader.read(sample_id)
        images, targets, _ = whole[position // 2]
        expected = geometry(decode_image(raw.image), sample_rng(11, position // 13, sample_id))
        np.testing.assert_array_equal(images[position % 2].permute(1, 2, 0), expected)
        assert targets[position % 2] == int(raw.target)
        assert targets.dtype == torch.int64
    split_up = [class_stream(class_shards, rank=rank, world=2, workers=rank) for rank in range(2)]
    for step, expected_parts in enumerate(whole):
        for field, expected_part in enumerate(expected_parts):
            assert torch.equal(torch.cat([part[step][field] for part in split_up]), expected_part)


def test_classification_evaluation_reads_every_image_once_at_one_size(class_shards: ShardSet) -> None:
    split = class_shards.split("val")
    batches = eval_batches(
        split, LoaderConfig(workers=0), rank=0, world_size=1, batch_size=4, augment=CLASSIFY
    )
    taken = list(batches)
    assert [tuple(batch.images.shape) for batch in taken] == [(4, 3, 24, 24), (2, 3, 24, 24)]
    assert torch.cat([batch.sample_ids for batch in taken]).tolist() == list(range(6))
    assert torch.cat([batch.targets for batch in taken]).tolist() == split.records["max_label"].tolist()


SCRIPT = """
import multiprocessing, os, signal
from itertools import count
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from segformer.data.loading.workers import WorkerStream, start_server

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    start_server()
    stream = iter(WorkerStream(count, workers=2, prefetch=2, timeout=60))
    items = [next(stream) for _ in range(4)]
    for pid in [_forkserver._forkserver_pid, *(child.pid for child in multiprocessing.active_children())]:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        print(next(line.split()[1] for line in status if line.startswith("SigBlk")))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        os.killpg(0, number)
    items += [next(stream) for _ in range(40)]
    print(*items)
    # ends with the stream open: the workers must not keep the program alive
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The script, run in a session of its own."""
    path = tmp_path_factory.mktemp("signals") / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)


def test_signals_reach_the_trainer_only_and_an_open_stream_lets_it_end(
    ran: subprocess.CompletedProcess[str],
) -> None:
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].split() == [str(number) for number in range(44)]


def test_the_fork_server_and_its_workers_are_born_with_the_signals_blocked(
    ran: subprocess.CompletedProcess[str],
) -> None:
    """A fork server that dies of SIGTERM takes its workers with it, so the mask must be there from birth."""
    masks = [int(line, 16) for line in ran.stdout.splitlines()[:-1]]
    assert len(masks) == 3
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        assert all(mask >> (number - 1) & 1 for mask in masks), number


TRAINER = """
import multiprocessing
from itertools import count
from multiprocessing.forkserver import _forkserver
from multiprocessing.resource_tracker import _resource_tracker
from segformer.data.loading.workers import WorkerStream, start_server

if __name__ == "__main__":
    start_server()
    stream = iter(WorkerStream(count, workers=2, prefetch=2, timeout=60))
    next(stream)
    workers = [child.pid for child in multiprocessing.active_children()]
    print(_forkserver._forkserver_pid, _resource_tracker._pid, *workers, flush=True)
    for _ in stream:
        pass
"""


def alive(pid: int) -> bool:
    """False also for a process that has ended and that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_trainer_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        left = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(left) == 4
    end = time.monotonic() + 10
    while any(map(alive, left)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, left))


def sleep(items: list[float], first: int, workers: int) -> Iterator[float]:
    for seconds in items[first::workers]:
        time.sleep(seconds)
        yield seconds


def sleeping(items: list[float], *, workers: int, timeout: int = 60, **options: Any) -> WorkerStream[float]:
    """A stream whose workers sleep for each of the items."""
    return WorkerStream(partial(sleep, items), workers=workers, prefetch=1, timeout=timeout, **options)


def kill_one(others: set[Any]) -> None:
    """End a worker as the kernel does where memory runs out."""
    worker = next(iter(set(multiprocessing.active_children()) - others))
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


def test_workers_start_again_where_one_died_and_the_second_death_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segformer.data.loading.workers.POLL_SECONDS", 1)
    others, log = set(multiprocessing.active_children()), list[str]()
    items = [number / 10**6 for number in range(20)]
    stream = iter(sleeping(items, workers=2, warn=log.append))
    got = [next(stream) for _ in range(3)]
    kill_one(others)
    got += [next(stream) for _ in range(8)]
    assert got == items[:11]
    (line,) = log
    assert line.startswith("a loader process died (SIGKILL); if memory ran out, lower loader.workers")
    kill_one(others)
    with pytest.raises(WorkerLost, match=r"a loader process died \(SIGKILL\)"):
        list(stream)
    assert len(log) == 1
    assert set(multiprocessing.active_children()) <= others


class TooLarge:
    """What a full /dev/shm does not take."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")


def too_large(first: int, workers: int) -> Iterator[Any]:
    yield TooLarge()


def test_a_full_shm_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segformer.data.loading.workers.POLL_SECONDS", 1)
    stream: WorkerStream[Any] = WorkerStream(too_large, workers=1, prefetch=1, timeout=60)
    with pytest.raises(WorkerLost, match=r"/dev/shm, .* is full; use loader.workers=0, or enlarge it"):
        list(stream)


FEW_FILES = """
import resource, sys
import torch
from segformer.data.loading.workers import WorkerStream
from segformer.errors import ending

def tensors(place, workers):
    for _ in range(40):
        yield [torch.zeros(8) for _ in range(8)]

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with ending():
        held = list(WorkerStream(tensors, workers=2, prefetch=2, timeout=60))
"""


@pytest.mark.slow
def test_too_few_open_files_are_one_line(tmp_path: Path) -> None:
    script = tmp_path / "few.py"
    script.write_text(FEW_FILES)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("ConfigError: 64 open files (ulimit -n) are too few for the loader;")
    assert ended.stderr.count("\n") == 1


def test_batches_are_the_same_where_a_worker_died(
    shards: ShardSet, reference: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segformer.data.loading.workers.POLL_SECONDS", 1)
    others = set(multiprocessing.active_children())
    spec = make_order_spec(shards.split("train").shard_sizes, seed=5, global_batch=6, **ORDER)
    batches = iter(
        train_batches(
            shards.split("train"),
            SampleOrder(spec),
            AUGMENT,
            LoaderConfig(workers=2, prefetch=1),
            batch=BatchShape(6, 2, 1),
            seed=11,
            rank=0,
            start_step=0,
        )
    )
    got = [next(batches) for _ in range(4)]
    kill_one(others)
    got += [next(batches) for _ in range(3 * STEPS - 4)]
    batches.close()
    assert all(map(torch.equal, joined(got), reference))


def test_a_worker_that_gives_nothing_ends_in_an_error_and_is_killed() -> None:
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="no batch from the loader processes for 1 s"):
        list(sleeping([60.0], workers=1, timeout=1))
    assert set(multiprocessing.active_children()) <= others


def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segformer.data.loading.workers.POLL_SECONDS", 1)
    assert list(sleeping([1.3, 0.0], workers=1)) == [1.3, 0.0]


def test_workers_end_with_their_stream() -> None:
    others = set(multiprocessing.active_children())
    items = iter(sleeping([0.0] * 9, workers=2))
    next(items)
    assert len(set(multiprocessing.active_children()) - others) == 2
    items.close()
    assert set(multiprocessing.active_children()) <= others
