"""Write a data set as shards (the format is drawn in shards.py): folder -> out/dataset.json, tars and
indices.

The bytes depend on the input, the seed and samples_per_shard only, never on the number of worker processes:
the samples of every shard are fixed before the first one is written, and a shard is the work of one
process. Training splits are shuffled once (seeded); splits named val... or test... keep the order of their
keys. `out` appears complete, by one rename, or not at all.

Refused: an `out` that holds something else, keys that stock webdataset would misread, and every defect of
the source that dataset.py names."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from segformer.data.dataset import (
    IGNORE_INDEX,
    DatasetConfig,
    Sample,
    class_palette,
    image_header,
    list_samples,
    load_sample,
)
from segformer.data.shards import FORMAT, INDEX, VERSION, ShardSet, content_digest
from segformer.data.verify import member_pairs
from segformer.errors import ConfigError, DataError

# Label ids are no intensities: without row filters a mask decodes about twice as fast and is smaller.
# CamVid masks at level 7: 4.2 KB, encoded in 1.7 ms (level 9: 3.8 KB in 12 ms).
# OpenCV before 4.12 has no such setting.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 7, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):
    _PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to write; self-contained, so that any process can do it."""

    cfg: DatasetConfig
    split: str
    name: str
    samples: list[Sample]


def write_shards(
    cfg: DatasetConfig, root: Path, out: Path, *, seed: int, samples_per_shard: int, workers: int
) -> None:
    """Write every split of `cfg` from the folder `root` as shards into `out`.

    workers: processes, -1 = one per core. An `out` that already holds exactly this set is left as it is; one
    that holds anything else is refused. DataError for whatever is wrong with the source.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard}; use 1 or more")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed}; use 0 to 2^64 - 1")
    tasks = _plan(cfg, root, seed=seed, samples_per_shard=samples_per_shard)
    settings = {"seed": seed, "samples_per_shard": samples_per_shard}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_finished(out, tasks, _description(cfg) | settings)
        print(f"{out} already holds exactly these shards; nothing to do")
        return
    temp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temp.mkdir(parents=True)
    try:
        shards = _run(tasks, temp, workers)
        content: dict[str, Any] = _description(cfg) | settings | {"splits": _splits(cfg, tasks, shards)}
        content["digest"] = content_digest(content)
        _write_synced(
            temp / "dataset.json", json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
        )
        temp.rename(out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _plan(cfg: DatasetConfig, root: Path, *, seed: int, samples_per_shard: int) -> list[_Task]:
    tasks = []
    for number, split in enumerate(cfg.splits):
        samples = list_samples(cfg, root, split)
        _check_keys(samples)
        if not split.startswith(("val", "test")):
            # random_raw and a stable sort: NumPy does not promise to keep Generator.permutation.
            draws = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(len(samples))
            samples = [samples[index] for index in np.argsort(draws, kind="stable")]
        for shard, start in enumerate(range(0, len(samples), samples_per_shard)):
            tasks.append(
                _Task(cfg, split, f"{split}-{shard:06d}", samples[start : start + samples_per_shard])
            )
    if not tasks:
        raise ConfigError("data.splits is empty; name at least one split, such as [train,val]")
    return tasks


def _member_key(key: str) -> str:
    """The key inside a tar: webdataset splits a file name at its first dot, so the key must have none."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "_")


def _check_keys(samples: list[Sample]) -> None:
    seen: dict[str, str] = {}
    for sample in samples:
        key = _member_key(sample.key)
        if not key.isprintable() or "\\" in key or key.startswith("/") or len(key.encode()) > 90:
            raise DataError(f"the name {sample.key!r} cannot be a key; use at most 90 printable characters")
        if key in seen:
            raise DataError(
                f"{sample.key!r} and {seen[key]!r} differ only by dots, which keys cannot hold; rename one"
            )
        seen[key] = sample.key


def _run(tasks: list[_Task], folder: Path, workers: int) -> list[dict[str, Any]]:
    count = min(len(tasks), workers if workers >= 0 else len(os.sched_getaffinity(0)))
    results = []
    with tqdm(
        total=sum(len(task.samples) for task in tasks),
        unit="image",
        desc="sharding",
        leave=False,
        disable=None,  # no bar where standard error is no terminal: an error is then the only line
    ) as bar:
        for result in _map(_write_shard, tasks, folder, count):
            results.append(result)
            bar.update(result["samples"])
    return results


def _map(
    function: Callable[[_Task, Path], dict[str, Any]], tasks: list[_Task], folder: Path, workers: int
) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        yield from (function(task, folder) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "webdataset"])
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield from pool.map(function, tasks, [folder] * len(tasks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(task: _Task, folder: Path) -> dict[str, Any]:
    """Write one tar and its index; returns its entry of dataset.json plus the label counts of its masks."""
    from webdataset import TarWriter  # imports torch: 2 s that reading shards does not pay

    cv2.setNumThreads(1)
    source = hashlib.sha256()
    labels = np.zeros(256, np.int64)
    records = np.zeros(len(task.samples), INDEX)
    tar = folder / f"{task.name}.tar"
    with tar.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
        for sample, record in zip(task.samples, records, strict=True):
            _hash_source(source, sample)
            image, mask = load_sample(task.cfg, sample)
            encoded = cv2.imencode(".png", mask, _PNG)[1].tobytes()
            counts = np.bincount(mask.reshape(-1), minlength=256)
            suffix = "jpg" if image_header(image)[0] == "jpeg" else "image.png"
            writer.write({"__key__": _member_key(sample.key), suffix: image, "png": encoded})
            record["image_crc"], record["mask_crc"] = zlib.crc32(image), zlib.crc32(encoded)
            record["height"], record["width"] = mask.shape
            record["max_label"] = max(np.flatnonzero(counts[:IGNORE_INDEX]), default=-1)
            labels += counts
    keys = _index_members(tar, records)
    packed = (
        json.dumps({"samples": len(records), "key_bytes": len(keys)}).encode()
        + b"\n"
        + records.tobytes()
        + keys
    )
    _write_synced(folder / f"{task.name}.idx", packed)
    return {
        "file": tar.name,
        "samples": len(records),
        "bytes": tar.stat().st_size,
        "sha256": _synced_sha256(tar),
        "index_sha256": hashlib.sha256(packed).hexdigest(),
        "source_sha256": source.hexdigest(),
        "labels": labels,
    }


def _index_members(tar: Path, records: np.ndarray) -> bytes:
    """Fill in where the members lie, as an independent reader of tars sees it; returns the keys, joined."""
    keys = []
    for number, (image, mask) in enumerate(member_pairs(tar)):
        record = records[number]
        record["image_offset"], record["image_size"] = image.offset_data, image.size
        record["mask_offset"], record["mask_size"] = mask.offset_data, mask.size
        keys.append(mask.name.removesuffix(".png"))
    return "\n".join(keys).encode()


def _hash_source(source: Any, sample: Sample) -> None:
    """Add what a sample is on disk to the hash that tells whether a finished set is still the same."""
    source.update(sample.key.encode())
    for path in (sample.image, sample.mask):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{str(path)!r} cannot be read: {error.strerror}; check the file") from error
        source.update(len(data).to_bytes(8, "little") + data)


def _check_finished(out: Path, tasks: list[_Task], description: dict[str, Any]) -> None:
    """DataError unless `out` holds, complete, what these tasks would write."""
    refusal = f"{str(out)!r} exists and holds something else; give another out=<folder> or remove it"
    if not (out / "dataset.json").is_file():
        raise DataError(refusal)
    content = ShardSet.open(out).content
    shards = [shard for split in content["splits"].values() for shard in split["shards"]]
    same = all(content.get(key) == value for key, value in description.items())
    if not same or [shard["file"] for shard in shards] != [f"{task.name}.tar" for task in tasks]:
        raise DataError(refusal)
    for shard, task in zip(shards, tasks, strict=True):
        source = hashlib.sha256()
        for sample in task.samples:
            _hash_source(source, sample)
        if shard["source_sha256"] != source.hexdigest():
            raise DataError(refusal)


def _description(cfg: DatasetConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": cfg.name,
        "classes": list(cfg.classes),
        "palette": class_palette(cfg).tolist(),
        "label_map": {str(raw): train for raw, train in sorted(cfg.label_map.items())},
        "license": cfg.license,
        "citation": cfg.citation,
    }


def _splits(cfg: DatasetConfig, tasks: list[_Task], shards: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    for split in cfg.splits:
        own = [shard for task, shard in zip(tasks, shards, strict=True) if task.split == split]
        labels = sum(shard["labels"] for shard in own)
        splits[split] = {
            "samples": sum(shard["samples"] for shard in own),
            "class_pixels": labels[: len(cfg.classes)].tolist(),
            "ignored_pixels": int(labels[IGNORE_INDEX]),
            "shards": [{key: value for key, value in shard.items() if key != "labels"} for shard in own],
        }
    return splits


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _synced_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()
