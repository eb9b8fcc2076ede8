"""The shard format, and reading it.

    out/dataset.json        classes, palette, label map, licence, splits with totals and class pixels, digest
    out/train-000000.tar    members <key>.jpg (or <key>.image.png: the file as it was) and <key>.png (8-bit
                            grey mask of train ids, 255 = ignore), as written; stock webdataset reads it
    out/train-000000.idx    one line of JSON {"samples", "key_bytes"}, then one INDEX record a sample, little
                            endian, then the keys joined by newlines

Every byte is covered: a crc32 per member in the index, a sha256 per tar and index in dataset.json, and
`digest`, the sha256 of dataset.json itself without that entry. A sample id is the position of a sample in
its split.

Opening checks dataset.json, every index and the size of every tar; each read checks the crc; verify.py
re-reads everything. Tars are never extracted: reading is `pread` at indexed offsets, and a short read is an
error."""

import hashlib
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.dataset import MAX_FILE_BYTES, MAX_PIXELS
from segformer.errors import DataError

FORMAT = "segformer-shards"
VERSION = 1
INDEX = np.dtype(
    [
        ("image_offset", "<i8"),
        ("image_size", "<i8"),
        ("mask_offset", "<i8"),
        ("mask_size", "<i8"),
        ("image_crc", "<u4"),
        ("mask_crc", "<u4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("max_label", "<i4"),
    ]
)
OPEN_FILES = 64  # per process; 1,000 shards must not meet the usual limit of 1,024 descriptors

_TAR_NAME = re.compile(r"[A-Za-z0-9_-]+-[0-9]{6}\.tar")


class Split:
    """The index of one split. Pickles as its folder and digest, so handing it to a worker is cheap."""

    def __init__(self, root: Path, name: str, entry: dict[str, Any], digest: str) -> None:
        self.root = root
        self.name = name
        self.digest = digest
        self.files: list[str] = [shard["file"] for shard in entry["shards"]]
        self.sha256: list[str] = [shard["sha256"] for shard in entry["shards"]]
        self.shard_sizes: list[int] = [shard["samples"] for shard in entry["shards"]]
        self.num_samples: int = sum(self.shard_sizes)
        self.first_ids = np.cumsum([0, *self.shard_sizes])  # sample id of each shard's first sample
        parts = [_read_index(root, shard) for shard in entry["shards"]]
        self.records = np.concatenate([records for records, _ in parts])
        self._keys = [keys for _, keys in parts]

    @property
    def heights(self) -> np.ndarray:
        """Image heights in pixels, int32 (num_samples,)."""
        return self.records["height"]

    @property
    def widths(self) -> np.ndarray:
        """Image widths in pixels, int32 (num_samples,)."""
        return self.records["width"]

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, by sample id."""
        return [key for keys in self._keys for key in keys.decode().split("\n")]

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1

    def key(self, sample_id: int) -> str:
        """The key of one sample."""
        shard = self.shard_of(sample_id)
        keys, place = self._keys[shard], sample_id - int(self.first_ids[shard])
        ends = [-1, *np.flatnonzero(np.frombuffer(keys, np.uint8) == ord("\n")), len(keys)]
        return keys[ends[place] + 1 : ends[place + 1]].decode()

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: file and key."""
        return f"{str(self.root / self.files[self.shard_of(sample_id)])!r}, key {self.key(sample_id)!r}"

    def __reduce__(self) -> tuple[Callable[..., "Split"], tuple[Path, str, str]]:
        return _reopen, (self.root, self.name, self.digest)


def _reopen(root: Path, name: str, digest: str) -> Split:
    shards = ShardSet.open(root, sizes=False)
    if shards.digest != digest:
        raise DataError(f"shards {str(root)!r} changed while they were in use; start again")
    return shards.split(name)


def _read_index(root: Path, shard: dict[str, Any]) -> tuple[np.ndarray, bytes]:
    """(records, joined keys) of one shard; DataError when the file is not what dataset.json says."""
    path = (root / shard["file"]).with_suffix(".idx")
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
        raise DataError(
            f"index {str(path)!r} is damaged (sha256 differs from dataset.json); shard the data again"
        )
    head, _, body = data.partition(b"\n")
    header = json.loads(head)
    split_at = header["samples"] * INDEX.itemsize
    records, keys = np.frombuffer(body[:split_at], INDEX), body[split_at:]
    image_end = records["image_offset"] + records["image_size"]
    mask_end = records["mask_offset"] + records["mask_size"]
    sane = (
        header["samples"] == shard["samples"] == len(keys.split(b"\n"))
        and len(keys) == header["key_bytes"]
        and (records["image_offset"] >= 0).all()
        and (records["image_size"] > 0).all()
        and (records["mask_offset"] > image_end).all()
        and (records["mask_size"] > 0).all()
        and (mask_end <= shard["bytes"]).all()
        and (mask_end - records["image_offset"] <= 2 * MAX_FILE_BYTES).all()
        and (records["height"].astype(np.int64) * records["width"] <= MAX_PIXELS).all()
    )
    if not sane:
        raise DataError(f"index {str(path)!r} contradicts itself or dataset.json; shard the data again")
    return records, keys


class ShardSet:
    """A finished folder of shards: classes, palette, digest and the index of every split."""

    def __init__(self, root: Path, content: dict[str, Any]) -> None:
        self.root = root
        self.content = content
        self.digest: str = content["digest"]
        self.classes: list[str] = content["classes"]
        self.palette = np.array(content["palette"], np.uint8)
        self.stats: dict[str, list[int]] = {
            name: entry["class_pixels"] for name, entry in content["splits"].items()
        }
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, path: str | Path, *, sizes: bool = True) -> "ShardSet":
        """Open a folder that sharding wrote; DataError when it is missing, damaged or incomplete.

        sizes: also check that every tar exists with its size (one stat a shard).
        """
        root = Path(path)
        if not (root / "dataset.json").is_file():
            raise DataError(
                f"no shards in {str(root)!r}; write them: python data_prep/shard.py data=<name> out={root}"
            )
        try:
            content = json.loads(_read(root / "dataset.json"))
            known = content["format"] == FORMAT and content["version"] == VERSION
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{str(root / 'dataset.json')!r} is not readable; shard the data again"
            ) from error
        if not known:
            raise DataError(
                f"{str(root / 'dataset.json')!r} is not of format {FORMAT} {VERSION}; shard the data again"
            )
        if content.get("digest") != content_digest(content):
            raise DataError(
                f"{str(root / 'dataset.json')!r} is damaged (its digest differs); shard the data again"
            )
        for shard in (shard for split in content["splits"].values() for shard in split["shards"]):
            _check_tar(root, shard, sizes)
        return cls(root, content)

    @property
    def splits(self) -> dict[str, Split]:
        """Every split by name."""
        return {name: self.split(name) for name in self.content["splits"]}

    def split(self, name: str) -> Split:
        """The index of one split; DataError names those that exist."""
        if name not in self.content["splits"]:
            raise DataError(
                f"shards {str(self.root)!r} have no split {name!r}, only "
                f"{', '.join(self.content['splits'])}; choose one of these or shard it too (data.splits)"
            )
        if name not in self._splits:
            self._splits[name] = Split(self.root, name, self.content["splits"][name], self.digest)
        return self._splits[name]


def content_digest(content: dict[str, Any]) -> str:
    """sha256 (hex) of dataset.json without its own digest; it covers every tar and index by theirs."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_tar(root: Path, shard: dict[str, Any], sizes: bool) -> None:
    if not _TAR_NAME.fullmatch(shard["file"]):
        raise DataError(
            f"{str(root / 'dataset.json')!r} names the shard {shard['file']!r}, which is no plain tar name"
        )
    path = root / shard["file"]
    if not sizes:
        return
    if not path.is_file():
        raise DataError(
            f"shard {str(path)!r} is missing; copy the whole folder again or shard the data again"
        )
    if path.stat().st_size != shard["bytes"]:
        raise DataError(
            f"shard {str(path)!r} has {path.stat().st_size} bytes instead of {shard['bytes']}; "
            "copy it again or shard the data again"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror}; copy or shard the data again"
        ) from error


@dataclass(frozen=True, slots=True)
class RawSample:
    """The encoded members of one sample."""

    key: str
    image: bytes
    mask: bytes


class ShardReader:
    """Reads samples of a split by id. Opens tars when first needed; pickles without open files."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._files: OrderedDict[int, int] = (
            OrderedDict()
        )  # shard number -> descriptor, least recently used first

    def read(self, sample_id: int) -> RawSample:
        """One ranged read over image and mask; DataError names shard, key and offset of what is damaged."""
        record = self.split.records[sample_id]
        start, image_size = int(record["image_offset"]), int(record["image_size"])
        mask_at = int(record["mask_offset"]) - start
        length = mask_at + int(record["mask_size"])
        data = os.pread(self._descriptor(self.split.shard_of(sample_id)), length, start)
        if len(data) != length:
            raise DataError(
                f"shard {self.split.describe(sample_id)}: {len(data)} of {length} bytes at offset {start}; "
                "copy it again"
            )
        image, mask = data[:image_size], data[mask_at:]
        for member, content in (("image", image), ("mask", mask)):
            if zlib.crc32(content) != record[f"{member}_crc"]:
                offset = int(record[f"{member}_offset"])
                raise DataError(
                    f"shard {self.split.describe(sample_id)}: the {member} at offset {offset} is damaged "
                    "(crc32 differs); copy the shard again"
                )
        return RawSample(self.split.key(sample_id), image, mask)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            path = self.split.root / self.split.files[shard]
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"shard {str(path)!r} cannot be opened: {error.strerror}") from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Split]]:
        return ShardReader, (self.split,)
