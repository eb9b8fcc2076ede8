"""Re-read shards completely, and name every defect.

    index     sha256, length, sense of every entry, class totals against dataset.json
    tar       size, sha256, members in name, kind, place and order as an independent reader of tars sees them
    sample    crc32 of both members, decoded size, channels and dtype, finite values, label histogram (or
              class) against the index

Opening a ShardSet looks at the indices only and reading at the samples used; this is the check after copying
or downloading shards. Tars are listed, never extracted, and hold regular files only. Remote shards are
fetched into a temporary file, one at a time per process."""

import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.format import AGAIN, ShardSet, Split
from segformer.data.shards.pool import run
from segformer.data.shards.storage import Storage
from segformer.data.sources.dataset import IGNORE_INDEX, RGB
from segformer.data.sources.decode import check_parts, decode_label, decode_mask, decode_stored
from segformer.errors import DataError, reason_of, reraise_as
from segformer.files import regular

_Stream = BufferedReader | BufferedRandom


@dataclass(frozen=True, slots=True)
class _Task:
    """One tar to check. split: None where the index is damaged, so that only the tar's bytes count."""

    storage: Storage
    shard: dict[str, Any]
    split: Split | None
    number: int


def find_defects(path: str | Path | Storage, *, workers: int = 1) -> list[str]:
    """Every defect of the shards at `path`, one line each, in the order of splits, shards and samples.

    workers: processes, -1 = one per core. What a damaged dataset.json or index describes is looked at as far
    as it can be.
    """
    storage = Storage.at(path)
    defects: list[str] = []
    tasks: list[_Task] = []
    with _noting(defects):
        content = ShardSet.open(storage, verify=False).content
        shards = ShardSet(storage, content, verify=True)
        for name, entry in content["splits"].items():
            split = None
            with _noting(defects):
                split = shards.split(name)
            tasks += [_Task(storage, shard, split, number) for number, shard in enumerate(entry["shards"])]
    images = [task.shard["samples"] for task in tasks]
    return sum(run(_check_tar, tasks, images=images, workers=workers, desc="verifying"), defects)


@contextmanager
def _noting(defects: list[str], where: str = "") -> Iterator[None]:
    """End the block at its first error and add that; `where`: the shard, which the error does not name."""
    try:
        yield
    except (DataError, OSError) as error:
        defects.append(f"shard {where}: {reason_of(error)}; {AGAIN}" if where else str(error))


def members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in order; only headers are read. DataError for what is no regular file."""
    stream.seek(0)
    with (
        reraise_as(DataError, "it is no readable tar", on=(tarfile.TarError, ValueError)),
        tarfile.open(fileobj=stream, mode="r:") as archive,
    ):
        for member in archive:
            if not member.isreg():
                raise DataError(f"it holds the special member {member.name!r}")
            yield member


def _check_tar(task: _Task) -> list[str]:
    """The defects of one tar and its samples."""
    storage, split, name = task.storage, task.split, task.shard["file"]
    where = repr(storage.where(name))
    defects: list[str] = []
    with _noting(defects, where), _open(storage, name, task.shard["bytes"]) as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != task.shard["sha256"]:
            defects.append(f"shard {where} is damaged (sha256 differs from dataset.json); copy it again")
        if split is not None:
            with _noting(defects, where):
                _check_members(split, task.number, stream)
            for sample_id in range(*split.first_ids[task.number : task.number + 2].tolist()):
                with _noting(defects, split.describe(sample_id)):
                    _check_sample(split, sample_id, stream)
    return defects


def _open(storage: Storage, name: str, size: int) -> _Stream:
    if storage.is_local:
        return regular(Path(storage.root, name)).open("rb")
    stream = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    stream.writelines(storage.pieces(name, limit=size))
    stream.seek(0)
    return stream


def _check_members(split: Split, number: int, stream: _Stream) -> None:
    """DataError unless the tar holds exactly the members of the index, in its order."""
    suffix = "png" if split.task == "segmentation" else "cls"
    expected: list[tuple[tuple[str, ...], int, int]] = []
    for sample_id in range(*split.first_ids[number : number + 2].tolist()):
        record, key = split.records[sample_id], split.key(sample_id)
        image = (f"{key}.jpg", f"{key}.image.png") if split.pixels == RGB else (f"{key}.npy",)
        expected.append((image, int(record["image_offset"]), int(record["image_size"])))
        expected.append(((f"{key}.{suffix}",), int(record["target_offset"]), int(record["target_size"])))
    for wanted, entry in zip_longest(expected, members(stream)):
        if entry is None:
            raise DataError(f"it ends before {wanted[0][0]!r}")
        if wanted is None:
            raise DataError(f"it holds {entry.name!r}, which the index does not know")
        names, offset, size = wanted
        if entry.name not in names or (entry.offset_data, entry.size) != (offset, size):
            where = f"{entry.name!r} at {entry.offset_data}"
            raise DataError(f"it holds {where}, where the index has {names[0]!r} at {offset}")


def _check_sample(split: Split, sample_id: int, stream: _Stream) -> None:
    """DataError unless both members are as written, decode, and agree with the index."""
    record = split.records[sample_id]
    data = {}
    for member in ("image", "target"):
        offset = int(record[f"{member}_offset"])
        stream.seek(offset)
        data[member] = stream.read(int(record[f"{member}_size"]))
        if zlib.crc32(data[member]) != record[f"{member}_crc"]:
            raise DataError(f"the {member} at offset {offset} is damaged (crc32 differs)")
    if split.pixels == RGB:
        with reraise_as(DataError, "the image cannot be decoded", on=ValueError):
            check_parts(data["image"])
    image = decode_stored(data["image"], split.pixels)
    if split.dtype == "float32" and not np.isfinite(image).all():
        raise DataError("the image holds NaN or infinite values")
    size = (int(record["height"]), int(record["width"]))
    ids, pixels = split.labels(sample_id)
    if split.task == "classification":
        found, counts = np.array([decode_label(data["target"])]), np.array([1])
        shapes = [image.shape[:2]]
    else:
        mask = decode_mask(data["target"])
        counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=1)
        found = np.flatnonzero(counts)
        counts = counts[found]
        shapes = [image.shape[:2], mask.shape]
    if any(shape != size for shape in shapes):
        raise DataError(f"image or mask is {shapes[-1]}, the index has {size} (height, width)")
    if not (np.array_equal(found, ids) and np.array_equal(counts, pixels)):
        raise DataError("its labels are not those of the index")
