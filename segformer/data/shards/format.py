"""The shard format, version 2, and opening it.

    out/dataset.json        task, classes, palette, label map, license; per split totals, class statistics,
                            shards (bytes, sha256) and index (bytes, sha256); digest. Where images are not
                            3 x uint8: channels, dtype, and mean and std per channel over the training splits
    out/train-000000.tar    members <key>.jpg (or <key>.image.png, or <key>.npy where not 3 x uint8: the
                            image) and <key>.png (8-bit grey mask of train ids, 255 = ignore) or <key>.cls
                            (decimal class id); stock webdataset reads it
    out/train.idx           one index a split (index.py)

Every byte is covered: a crc32 per member in the index, a sha256 per tar and index in dataset.json, and
`digest`, the sha256 of dataset.json itself without that entry. A sample id is the position of a sample in its
split.

Opening checks dataset.json, every index and the size of every tar, in time that hardly grows with the
samples: an index is one array, not parsed. Each read checks the crc (reader.py); verify.py re-reads
everything. Tars are never extracted."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.index import NOT_AN_INDEX, is_sane, parse_index
from segformer.data.shards.storage import Storage, StorageConfig
from segformer.data.shards.tiling import TiledSplit
from segformer.data.sources.dataset import DTYPES, MAX_CHANNELS, RGB, TASKS, Pixels
from segformer.errors import DataError, reraise_as
from segformer.files import parse_json

FORMAT = "segformer-shards"
VERSION = 2
DESCRIPTION_LIMIT = 2**28  # bytes of dataset.json; 1 million shards need less

_REQUESTS = 16  # sizes of remote shards asked for at a time
_FILE = "dataset.json"
AGAIN = "copy it again or shard the data again"
_TAR_NAME = re.compile(r"[A-Za-z0-9_-]+-[0-9]{6}\.tar")
_INDEX_NAME = re.compile(r"[A-Za-z0-9_-]+\.idx")


class Split:
    """The index of one split. Pickles as storage, name and digest: a worker reads the index again.

    records: INDEX (num_samples,), read-only. class_pixels: int64 (K,), images per class for classification.
    first_ids: int64 (shards + 1,), the sample id of each shard's first sample, then num_samples.
    """

    def __init__(
        self, storage: Storage, name: str, content: dict[str, Any], digest: str, *, verify: bool = True
    ) -> None:
        entry = content["splits"][name]
        self.storage = storage
        self.name = name
        self.digest = digest
        self.task: str = content["task"]
        self.pixels = stored_pixels(content)
        self.files: list[str] = [shard["file"] for shard in entry["shards"]]
        self.shard_sizes: list[int] = [shard["samples"] for shard in entry["shards"]]
        self.num_samples: int = sum(self.shard_sizes)
        self.first_ids = np.cumsum([0, *self.shard_sizes], dtype=np.int64)
        self.class_pixels = np.array(entry["class_pixels"], np.int64)
        self._with_label: dict[int, np.ndarray] = {}
        self.records, self._labels, self._keys = self._read(entry, verify)
        self._tiled: dict[str, Any] | None = entry.get("tiled")
        self._of_tiles = "tile" in content

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.pixels.channels

    @property
    def dtype(self) -> str:
        """Type of every channel, one of DTYPES."""
        return self.pixels.dtype

    @property
    def heights(self) -> np.ndarray:
        """Image heights in pixels, int32 (num_samples,)."""
        return self.records["height"]

    @property
    def widths(self) -> np.ndarray:
        """Image widths in pixels, int32 (num_samples,)."""
        return self.records["width"]

    @cached_property
    def tiled(self) -> TiledSplit | None:
        """The whole images that are scored, where the samples are their tiles."""
        if self._tiled is None:
            return None
        what = f"split {self.name} of {self.storage.where(_FILE)!r} contradicts its index"
        with reraise_as(DataError, what, AGAIN, on=NOT_AN_INDEX):
            return TiledSplit.parse(self._tiled, self.heights, self.widths)

    @property
    def extent(self) -> str:
        """How many images these are, for a line of text."""
        whole = f"{len(self.tiled.images):,} images in " if self.tiled else ""
        return f"{whole}{self.num_samples:,} {'tiles' if self._of_tiles else 'images'}"

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, by sample id."""
        return str(self._keys.tobytes(), "utf-8").split("\n")

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1

    def key(self, sample_id: int) -> str:
        """The key of one sample."""
        start = int(self.records["key_end"][sample_id - 1]) + 1 if sample_id else 0
        return str(self._keys[start : int(self.records["key_end"][sample_id])].tobytes(), "utf-8")

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, for messages: file and key."""
        return f"{self.storage.where(self.files[self.shard_of(sample_id)])!r}, key {self.key(sample_id)!r}"

    def labels(self, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(label ids, pixels) of one sample, ids ascending, without 255."""
        start = int(self.records["labels_end"][sample_id - 1]) if sample_id else 0
        part = self._labels[start : int(self.records["labels_end"][sample_id])]
        return part["label"], part["pixels"]

    def samples_with(self, label: int) -> np.ndarray:
        """The samples that hold a label, sorted ids, int64."""
        if label not in self._with_label:
            places = np.flatnonzero(self._labels["label"] == label)
            self._with_label[label] = np.searchsorted(self.records["labels_end"], places, side="right")
        return self._with_label[label]

    def __reduce__(self) -> tuple[Callable[..., "Split"], tuple[Storage, str, str]]:
        return _reopen, (self.storage, self.name, self.digest)

    def _read(self, entry: dict[str, Any], verify: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(records, labels, keys) as views of the file's bytes; DataError where it is not as promised."""
        index, name = entry["index"], entry["index"]["file"]
        where = f"index {self.storage.where(name)!r}"
        with reraise_as(DataError, f"{where} cannot be read", AGAIN, on=(OSError, *NOT_AN_INDEX)):
            # Not mapped: a file that shrinks while it is mapped ends the process (SIGBUS).
            data = self.storage.whole(name, size=index["bytes"], sha256=index["sha256"], verify=verify)
            parts = parse_index(np.frombuffer(data, np.uint8))
        if len(parts[0]) != self.num_samples or (verify and not is_sane(parts, entry, self.task)):
            raise DataError(f"{where} contradicts itself or dataset.json; {AGAIN}")
        return parts


def _reopen(storage: Storage, name: str, digest: str) -> Split:
    shards = ShardSet.open(storage, verify=False)
    if shards.digest != digest:
        raise DataError(f"shards {storage.where('')!r} changed while they were in use; start again")
    return shards.split(name)


class ShardSet:
    """A finished folder of shards: classes, palette, digest and the index of every split.

    palette: uint8 (K, 3). channels, dtype: of every image. mean, std: per channel, in stored units over the
    training splits; None for 3 x uint8. content: dataset.json.
    """

    def __init__(self, storage: Storage, content: dict[str, Any], *, verify: bool) -> None:
        self.storage = storage
        self.root = storage.root
        self.content = content
        self.digest: str = content["digest"]
        self.task: str = content["task"]
        self.classes: list[str] = content["classes"]
        self.palette = np.array(content["palette"], np.uint8).reshape(-1, 3)
        self.channels, self.dtype = self.pixels = stored_pixels(content)
        self.long_side: int | None = content.get("long_side")
        self.mean: list[float] | None = content.get("mean")
        self.std: list[float] | None = content.get("std")
        self._verify = verify
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(
        cls,
        path: str | Path | Storage,
        config: StorageConfig | None = None,
        *,
        verify: bool = True,
        source: str = "data=<name>",
    ) -> "ShardSet":
        """Open what sharding wrote, at a path or URL; DataError when it is missing, damaged or incomplete.

        config: how remote shards are read. verify: check sha256 and sense of every index and the size of
        every tar; without it only dataset.json, and the length of an index when its split is used.
        source: the overrides that name the data set, for the message that there are no shards.
        """
        storage = Storage.at(path, config)
        with _complete(storage):
            shards = cls(storage, _description(storage, source), verify=verify)
        if verify:
            tars = [shard for entry in shards.content["splits"].values() for shard in entry["shards"]]
            with ThreadPoolExecutor(1 if storage.is_local else _REQUESTS) as pool:
                list(pool.map(lambda tar: _check_size(storage, tar["file"], tar["bytes"]), tars))
            for name in shards.content["splits"]:
                shards.split(name)
        return shards

    @property
    def splits(self) -> dict[str, Split]:
        """Every split by name."""
        return {name: self.split(name) for name in self.content["splits"]}

    def split(self, name: str) -> Split:
        """The index of one split; DataError names those that exist."""
        if name not in self.content["splits"]:
            raise DataError(
                f"shards {self.root!r} have no split {name!r}, only "
                f"{', '.join(self.content['splits'])}; choose one of these or shard it too (data.splits)"
            )
        if name not in self._splits:
            with _complete(self.storage):
                self._splits[name] = Split(self.storage, name, self.content, self.digest, verify=self._verify)
        return self._splits[name]


def stored_pixels(content: Mapping[str, Any]) -> Pixels:
    """Channels and dtype of the images, by dataset.json."""
    return Pixels(content.get("channels", RGB.channels), content.get("dtype", RGB.dtype))


def content_digest(content: dict[str, Any]) -> str:
    """sha256 (hex) of dataset.json without its own digest and what is said of files that are not used; it
    covers every tar and index by theirs."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    rest["splits"] = {
        name: {key: value for key, value in entry.items() if key != "left_out"}
        for name, entry in content.get("splits", {}).items()
    }
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _complete(storage: Storage) -> AbstractContextManager[None]:
    """Around what reads dataset.json: an entry that is missing, or of another type, is one line."""
    what, wrong = f"{storage.where(_FILE)!r} is not complete", (AttributeError, RecursionError, *NOT_AN_INDEX)
    return reraise_as(DataError, what, AGAIN, on=wrong)


def _check_size(storage: Storage, name: str, size: int) -> None:
    found = storage.size(name)
    if found != size:
        raise DataError(f"shard {storage.where(name)!r} has {found} bytes instead of {size}; {AGAIN}")


def _description(storage: Storage, source: str) -> dict[str, Any]:
    """dataset.json, its digest checked."""
    if storage.is_local and not Path(storage.root, _FILE).is_file():
        raise DataError(
            f"no shards in {storage.root!r}; "
            f"write them: python data_prep/shard.py {source} output={storage.root}"
        )
    content: dict[str, Any] = parse_json(storage.read(_FILE, limit=DESCRIPTION_LIMIT))
    if (content["format"], content["version"]) != (FORMAT, VERSION) or content["task"] not in TASKS:
        raise _unreadable(storage, f"is not of format {FORMAT} {VERSION}")
    if content["digest"] != content_digest(content):
        raise _unreadable(storage, "is damaged (its digest differs)")
    classes = content["classes"]
    if not all(isinstance(name, str) for name in classes) or len(content["palette"]) != len(classes):
        raise _unreadable(storage, "is not complete")
    if not _pixels_are_sane(content):
        raise _unreadable(storage, "says nothing sane of channels, dtype, mean and std")
    for split in content["splits"].values():
        index, shards = split["index"], split["shards"]
        numbers = [*split["class_pixels"], *(shard["samples"] for shard in shards)]
        numbers += [entry["bytes"] for entry in (index, *shards) if entry["sha256"]]
        sane = all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
        if not sane or len(split["class_pixels"]) != len(classes):
            raise _unreadable(storage, "is not complete")
        names = [shard["file"] for shard in shards]
        if not (_INDEX_NAME.fullmatch(index["file"]) and all(map(_TAR_NAME.fullmatch, names))):
            raise _unreadable(storage, "names a shard or index that is no plain file name")
    return content


def _pixels_are_sane(content: dict[str, Any]) -> bool:
    """One of DTYPES, and a mean and a std above 0 for each channel where not 3 x uint8."""
    channels, dtype = pixels = stored_pixels(content)
    mean: Any = content.get("mean")
    std: Any = content.get("std")
    if mean is None and std is None:
        return pixels == RGB
    return (
        type(channels) is int
        and 1 <= channels <= MAX_CHANNELS
        and dtype in DTYPES
        and all(isinstance(values, list) and len(values) == channels for values in (mean, std))
        and all(type(value) in (int, float) and isfinite(value) for value in (*mean, *std))
        and min(std) > 0
    )


def _unreadable(storage: Storage, what: str) -> DataError:
    return DataError(f"{storage.where(_FILE)!r} {what}; {AGAIN}")
