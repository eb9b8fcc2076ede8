"""Re-read shards completely, and name every defect.

    index     sha256, length, sense of every entry, class totals against dataset.json
    tar       size, sha256, members in name, kind, place and order as an independent reader of tars sees them
    sample    crc32 of both members, decoded size, label histogram (or class) against the index

Opening a ShardSet looks at the indices only and reading at the samples used; this is the check after copying
or downloading shards. Tars are listed, never extracted, and hold regular files only. Remote shards are
fetched into a temporary file, one at a time per process."""

import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.format import ShardSet, Split, check_size
from segformer.data.shards.pool import advance, run
from segformer.data.shards.storage import PIECE, Storage
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.data.sources.decode import decode_image, decode_label, decode_mask
from segformer.errors import DataError

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
    try:
        shards = ShardSet.open(storage, verify=False)
    except DataError as error:
        return [str(error)]
    defects, tasks = [], []
    for name, entry in shards.content["splits"].items():
        split = None
        try:
            split = Split(storage, name, shards.content, shards.digest)
        except DataError as error:
            defects.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            defects.append(
                f"{storage.where('dataset.json')!r} is not complete ({error!r}); shard the data again"
            )
            continue
        tasks += [_Task(storage, shard, split, number) for number, shard in enumerate(entry["shards"])]
    total = sum(task.shard["samples"] for task in tasks)
    for found in run(_check_tar, tasks, workers=workers, total=total, desc="verifying"):
        defects += found
    return defects


def members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in order; only headers are read. DataError for what is no regular file."""
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if not member.isreg():
                    raise DataError(f"holds the special member {member.name!r}")
                yield member
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"is no readable tar ({error})") from error


def _check_tar(task: _Task) -> list[str]:
    """The defects of one tar and its samples."""
    name, defects = task.shard["file"], []
    where = task.storage.where(name)
    try:
        check_size(task.storage, name, task.shard["bytes"])
    except DataError as error:
        defects.append(str(error))
    try:
        with _open(task.storage, name) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != task.shard["sha256"]:
                text = "is damaged (sha256 differs from dataset.json); copy it again"
                defects.append(f"shard {where!r} {text}")
            if task.split is not None:
                return defects + _content_defects(task.split, task.number, stream)
    except (DataError, OSError) as error:  # missing, which check_size has said, or unreachable
        text = f"shard {where!r} cannot be read: {error}; check the disk or copy it again"
        defects = defects or [text]
    advance(task.shard["samples"])
    return defects


def _content_defects(split: Split, number: int, stream: _Stream) -> list[str]:
    defects = []
    try:
        _check_members(split, number, stream)
    except DataError as error:
        where = split.storage.where(split.files[number])
        defects.append(f"shard {where!r} {error}; copy it again or shard the data again")
    for sample_id in range(*split.first_ids[number : number + 2].tolist()):
        try:
            _check_sample(split, sample_id, stream)
        except DataError as error:
            defects.append(f"shard {split.describe(sample_id)}: {error}; copy it again or shard again")
        advance()
    return defects


def _open(storage: Storage, name: str) -> _Stream:
    if storage.is_local:
        return Path(storage.root, name).open("rb")
    stream = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    size = storage.size(name)
    for start in range(0, size, PIECE):
        stream.write(storage.read_range(name, start, min(PIECE, size - start)))
    stream.seek(0)
    return stream


def _check_members(split: Split, number: int, stream: _Stream) -> None:
    """DataError unless the tar holds exactly the members of the index, in its order."""
    found = members(stream)
    suffix = "png" if split.task == "segmentation" else "cls"
    for sample_id in range(*split.first_ids[number : number + 2].tolist()):
        record, key = split.records[sample_id], split.key(sample_id)
        for member, names in (
            ("image", (f"{key}.jpg", f"{key}.image.png")),
            ("target", (f"{key}.{suffix}",)),
        ):
            entry = next(found, None)
            if entry is None:
                raise DataError(f"ends before the {member} of {key!r}")
            place = (int(record[f"{member}_offset"]), int(record[f"{member}_size"]))
            if entry.name not in names or (entry.offset_data, entry.size) != place:
                raise DataError(
                    f"holds {entry.name!r} at {entry.offset_data}, where the index has the {member} "
                    f"of {key!r} at {place[0]}"
                )
    more = next(found, None)
    if more is not None:
        raise DataError(f"holds {more.name!r}, which the index does not know")


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
    size = (int(record["height"]), int(record["width"]))
    ids, pixels = split.labels(sample_id)
    if split.task == "classification":
        found, counts = np.array([decode_label(data["target"])]), np.array([1])
        shapes = [decode_image(data["image"]).shape[:2]]
    else:
        mask = decode_mask(data["target"])
        counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=1)
        found = np.flatnonzero(counts)
        counts = counts[found]
        shapes = [decode_image(data["image"]).shape[:2], mask.shape]
    if any(shape != size for shape in shapes):
        raise DataError(f"image or mask is {shapes[-1]}, the index has {size} (height, width)")
    if not (np.array_equal(found, ids) and np.array_equal(counts, pixels)):
        raise DataError("its labels are not those of the index")
