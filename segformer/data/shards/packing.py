"""One shard: samples -> tar and its part of the index, in one process, from its task alone.

A JPEG or PNG goes in as the bytes of its file, unless the encoding says otherwise: images whose longer side
exceeds `long_side` are reduced to it (area interpolation; the mask by the nearest pixel), and `quality`
re-encodes every image as JPEG. Other files become PNGs, and where a set doesn't hold 3 x uint8 every image an
array (.npy), whose reading costs a copy. A mask becomes an 8-bit PNG of train ids, a class id decimal text.

A shard is complete when its note (<shard>.json) is there and tar, part and source files are what the note
says. Source files are compared by name, size and time, and by content where a time differs."""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segformer.data.shards.cutting import content_sum, facts_sum, file_stat, load_tile, sample_facts
from segformer.data.shards.index import INDEX, LABELS, pack_index
from segformer.data.shards.moments import Moments
from segformer.data.shards.tiling import Tiling
from segformer.data.shards.verify import members
from segformer.data.shards.workfolder import WorkFolder
from segformer.data.sources.content import Depth, check_depth
from segformer.data.sources.dataset import IGNORE_INDEX, RGB, DatasetConfig
from segformer.data.sources.decode import PNG_MAGIC, encode_array, is_deep, read_file
from segformer.data.sources.picture import by_four
from segformer.data.sources.sample import LoadedSample, Sample, load_sample
from segformer.errors import ConfigError, DataError, at_least, within
from segformer.files import read_json, sha256_of, staged, write_atomic

_SKIPPED = re.compile(r"__[^/]*__(/|$)")  # names of members that stock webdataset takes for its own
REDUCED_QUALITY = 95  # of JPEG images that are reduced while quality = 0 keeps the others as they are

# Label ids are no intensities: without row filters a mask decodes about twice as fast and is smaller.
# CamVid masks at level 7: 4.2 KB, encoded in 1.7 ms (level 9: 3.8 KB in 12 ms).
# OpenCV before 4.12 has no such setting.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 7, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):
    _PNG += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides the bytes of a set, beside its source."""

    cfg: DatasetConfig
    seed: int
    samples_per_shard: int
    long_side: int = 0
    """Pixels; larger images are reduced to it. 0 = none."""
    quality: int = 0
    """JPEG quality of every image; 0 = the bytes of the file."""
    tiling: Tiling | None = None
    """How larger images are cut into tiles; None = they are refused."""

    def __post_init__(self) -> None:
        at_least(self, "", samples_per_shard=1, long_side=0)
        within(self, "", seed=(0, 2**64 - 1), quality=(0, 100))
        foreign = {
            f"long_side={self.long_side}": self.long_side,
            f"data.min_share={self.cfg.min_share}": self.cfg.min_share,
            "data.task=classification": self.cfg.task == "classification",
        }
        if self.tiling and (other := [text for text, given in foreign.items() if given]):
            raise ConfigError(f"{other[0]} is about whole images, and tile cuts them; leave one of them out")
        if not self.cfg.splits:
            raise ConfigError("data.splits is empty; name at least one split, such as [train,val]")
        if self.quality and self.cfg.pixels != RGB:
            raise ConfigError(
                f"quality={self.quality} makes JPEGs, which hold {RGB}, and the set others; leave it out"
            )


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write; self-contained, so that any process can do it."""

    settings: Settings
    split: str
    name: str
    samples: list[Sample]
    work: WorkFolder
    sums: dict[str, str] = field(default_factory=dict)
    """content_sum of each image that was cut, by its path."""


def make_shard(task: ShardTask) -> tuple[dict[str, Any], bool]:
    """(note of the shard, True where it was complete already). The note: file, samples, bytes, sha256 and
    source_sha256 for dataset.json; part_sha256, stat, raw_ids, and turned: the images of an EXIF orientation
    other than 1, as [file below root, orientation]; levels: lowest and highest value of images of 16 bits;
    alike: key -> perceptual hash; moments: of the channels where they are not 3 x uint8."""
    note = _complete(task)
    return (_write(task), False) if note is None else (note, True)


def member_key(key: str) -> str:
    """The key inside a tar: webdataset splits a file name at its first dot, so the key must have none."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.replace(".", "_")


def check_keys(samples: Iterable[Sample]) -> None:
    """DataError for samples whose keys a tar can't tell apart or stock webdataset would misread."""
    seen: dict[str, str] = {}
    for sample in samples:
        key = member_key(sample.key)
        if not key.isprintable() or "\\" in key or key.startswith("/") or len(key.encode()) > 90:
            raise DataError(f"the name {sample.key!r} cannot be a key; use at most 90 printable characters")
        if _SKIPPED.match(key):
            raise DataError(
                f"the name {sample.key!r} cannot be a key, webdataset skips names like __x__; "
                f"rename {key.partition('/')[0]!r}"
            )
        if key in seen:
            raise DataError(
                f"{sample.key!r} and {seen[key]!r} differ only by dots, which keys cannot hold; rename one"
            )
        seen[key] = sample.key


def stat_hash(samples: Iterable[Sample]) -> str:
    """sha256 over names, classes, shapes, sizes and times of the source files: enough while they rest."""
    return _hash(samples, file_stat, lambda sample: facts_sum(sample, file_stat), {})


def source_hash(samples: Iterable[Sample], sums: dict[str, str] | None = None) -> str:
    """sha256 over names, classes, shapes and contents of the source files. sums: as those of ShardTask."""

    def content(path: Path) -> bytes:
        data = read_file(path)
        return len(data).to_bytes(8, "little") + data

    return _hash(samples, content, content_sum, sums or {})


def _hash(
    samples: Iterable[Sample],
    facts: Callable[[Path], bytes],
    of_image: Callable[[Sample], str],
    sums: dict[str, str],
) -> str:
    """sha256 over name and class of each sample, and its facts or, of a tile, the sum of its image's."""
    digest, known = hashlib.sha256(), dict(sums)
    for sample in samples:
        digest.update(f"{sample.key}\0{sample.label}".encode())
        if sample.window is None:
            for part in sample_facts(sample, facts):
                digest.update(part)
            continue
        if sample.image_file not in known:
            known[sample.image_file] = of_image(sample)
        digest.update(known[sample.image_file].encode())
    return digest.hexdigest()


def _complete(task: ShardTask) -> dict[str, Any] | None:
    """The note of a shard that an earlier run has finished, None where it must be written (again)."""
    stat = stat_hash(task.samples)
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        note: dict[str, Any] = read_json(task.work.note(task.name))
        if (
            sha256_of(task.work.tar(task.name)) == note["sha256"]
            and sha256_of(task.work.part(task.name)) == note["part_sha256"]
            and (note["stat"] == stat or note["source_sha256"] == source_hash(task.samples, task.sums))
        ):
            return note | {"stat": stat}
    return None


def _write(task: ShardTask) -> dict[str, Any]:
    """Write the tar, its part of the index and, last, the note."""
    # Before a sample is read: a later change must show.
    before = {"stat": stat_hash(task.samples), "source_sha256": source_hash(task.samples, task.sums)}
    with staged(task.work.tar(task.name)) as tar:
        records, labels, facts = _write_tar(task, tar)
        check_depth(task.settings.cfg.image_range, facts.depth)
        part = pack_index(records, labels, _index_members(tar, records))
        note = before | {
            "file": f"{task.name}.tar",
            "samples": len(records),
            "bytes": tar.stat().st_size,
            "sha256": sha256_of(tar),
            "part_sha256": hashlib.sha256(part).hexdigest(),
            **asdict(facts),
            "raw_ids": {str(raw): pixels for raw, pixels in sorted(facts.raw_ids.items())},
        }
    write_atomic(task.work.part(task.name), part)
    write_atomic(task.work.note(task.name), json.dumps(note))
    return note


@dataclass(slots=True)
class _Facts:
    """What the note of a shard says of its samples (make_shard)."""

    raw_ids: Counter[int] = field(default_factory=Counter)
    turned: list[tuple[str, int]] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    depth: Depth = field(default_factory=Depth)
    alike: dict[str, int] = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)


def _write_tar(task: ShardTask, path: Path) -> tuple[np.ndarray, np.ndarray, _Facts]:
    """Write the tar; returns records without places and keys, LABELS, and what the note says."""
    from webdataset import TarWriter  # imports torch: 2 s that reading shards does not pay

    cv2.setNumThreads(1)
    cfg = task.settings.cfg
    facts = _Facts()
    records, labels = np.zeros(len(task.samples), INDEX), []
    with (
        path.open("xb") as stream,
        TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample, record in zip(task.samples, records, strict=True):
            loaded = load_tile(cfg, sample, task.work) if sample.window else load_sample(cfg, sample)
            facts.raw_ids.update(loaded.raw_ids)
            levels = [*facts.levels, *(loaded.levels or ())]
            facts.levels = [min(levels), max(levels)] if levels else []
            facts.depth.look(cfg.image_range, loaded.levels)
            facts.alike[sample.key] = loaded.alike
            if loaded.orientation != 1:
                file = Path(cfg.folder("image", task.split), sample.key).with_name(sample.image.name)
                facts.turned.append((str(file), loaded.orientation))
            (suffix, image), pixels, mask = _encoded(loaded, task.settings)
            if cfg.pixels != RGB:
                facts.moments.add_image(pixels)
            ending, target, found = _target(sample, mask)
            key = member_key(sample.key)
            writer.write({"__key__": key, suffix: image})  # apart: the writer would sort the two by name
            writer.write({"__key__": key, ending: target})
            record["image_crc"], record["target_crc"] = zlib.crc32(image), zlib.crc32(target)
            record["height"], record["width"] = pixels.shape[:2]
            record["max_label"] = found["label"][-1] if len(found) else -1
            labels.append(found)
    records["labels_end"] = np.cumsum([len(found) for found in labels])
    return records, np.concatenate(labels), facts


def reduced_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """Height and width of an image after it is reduced to `long_side`; 0 leaves it as it is."""
    longest = max(size)
    if not 0 < long_side < longest:
        return size
    height, width = (max(1, round(side * long_side / longest)) for side in size)
    return height, width


def _encoded(
    loaded: LoadedSample, settings: Settings
) -> tuple[tuple[str, bytes], np.ndarray, np.ndarray | None]:
    """((suffix, bytes) of the image, its pixels, mask) as they are stored."""
    pixels, mask, cfg = loaded.pixels, loaded.mask, settings.cfg
    assert pixels is not None  # a sample that can't be decoded is not loaded
    size = reduced_size((loaded.height, loaded.width), settings.long_side)
    reduce = size != (loaded.height, loaded.width)
    if reduce:
        height, width = size
        pixels = by_four(lambda part: cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA), pixels)
        if mask is not None:
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if cfg.pixels != RGB:
        return ("npy", encode_array(pixels)), pixels, mask
    jpeg, png = loaded.image[:2] == b"\xff\xd8", loaded.image[:8] == PNG_MAGIC
    deep = cfg.image_range and is_deep(loaded.image)
    if (jpeg or png) and not (reduce or settings.quality or deep):
        return ("jpg" if jpeg else "image.png", loaded.image), pixels, mask
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    if settings.quality or jpeg:
        quality = [cv2.IMWRITE_JPEG_QUALITY, settings.quality or REDUCED_QUALITY]
        return ("jpg", cv2.imencode(".jpg", bgr, quality)[1].tobytes()), pixels, mask
    return ("image.png", cv2.imencode(".png", bgr)[1].tobytes()), pixels, mask


def _target(sample: Sample, mask: np.ndarray | None) -> tuple[str, bytes, np.ndarray]:
    """(suffix, bytes, LABELS entries) of the target."""
    if mask is None:
        return "cls", b"%d" % (sample.label or 0), np.array([(sample.label, 1)], LABELS)
    counts = np.bincount(mask.reshape(-1), minlength=256)
    counts[IGNORE_INDEX] = 0
    present = np.flatnonzero(counts)
    found = np.zeros(len(present), LABELS)
    found["label"], found["pixels"] = present, counts[present]
    return "png", cv2.imencode(".png", mask, _PNG)[1].tobytes(), found


def _index_members(tar: Path, records: np.ndarray) -> bytes:
    """Fill in where the members lie, as an independent reader of tars sees it; returns the keys, joined."""
    keys = []
    with tar.open("rb") as stream:
        found = members(stream)
        for record, image, target in zip(records, found, found, strict=True):
            record["image_offset"], record["image_size"] = image.offset_data, image.size
            record["target_offset"], record["target_size"] = target.offset_data, target.size
            keys.append(target.name[: -len(".png")].encode())
    records["key_end"] = np.cumsum([len(key) + 1 for key in keys]) - 1
    return b"\n".join(keys)
