"""Facts of a data set: scans of a source folder and of shards. Nothing is judged.

A scan never stops at a defect: it counts it by kind (listing.Defect) with the first few places, and goes on.
Of a folder every file is decoded, as sharding would, by threads: reading and decoding leave Python's lock. Of
shards the index tells sizes and labels, and a random sample of the images is read and decoded
(data_prep/verify.py re-reads everything).
"""

import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segformer.data.shards.format import Split
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.content import Depth
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sources.decode import decode_mask, decode_stored
from segformer.data.sources.folder import LeftOut
from segformer.data.sources.listing import find_samples
from segformer.data.sources.masks import Defect, mask_colors
from segformer.data.sources.picture import with_dtype
from segformer.data.sources.sample import LoadedSample, Sample, inspect_sample
from segformer.data.sources.similar import perceptual_hash
from segformer.errors import DataError, reported
from segformer.evaluation.drawing import displayed

SHOWN = 3  # places that are named for each kind of defect
_BATCH = 1024  # files handed to the threads at a time

Picture = tuple[np.ndarray, np.ndarray | None]
"""(image uint8 (H, W, 3), mask uint8 (H, W) of train ids and 255, or None)"""


@dataclass(slots=True)
class Places:
    """How often something was found, and the first places as messages."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str, count: int = 1) -> None:
        self.count += count
        if len(self.examples) < SHOWN:
            self.examples.append(text)

    def __str__(self) -> str:
        return "; ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")


@dataclass(slots=True)
class SplitScan:
    """The facts of one split of K classes; statistics are by train id, raw ones by the id in the masks."""

    name: str
    num_classes: int
    load: Callable[[Any], tuple[str, Picture | None]]
    """A sample of `holders` -> its key and, where it can be shown, its picture."""
    class_pixels: np.ndarray = field(init=False)
    """int64 (K,), pixels; images in classification."""
    class_images: np.ndarray = field(init=False)
    """int64 (K,), images that hold the class."""
    samples: int = 0
    ignored_pixels: int = 0
    ignored_images: int = 0
    """Images without any labelled pixel."""
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    raw_pixels: Counter[int] = field(default_factory=Counter)
    raw_images: Counter[int] = field(default_factory=Counter)
    colors: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Colors in masks where ids are expected -> masks that hold them."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """Fingerprint of each image file -> its key."""
    alike: dict[str, int] = field(default_factory=dict)
    """Key -> perceptual hash of each image that was read."""
    twice: Places = field(default_factory=Places)
    """Images that the split holds more than once."""
    depth: Depth = field(default_factory=Depth)
    turned: list[tuple[str, int]] = field(default_factory=list)
    """Images that EXIF would turn: file, orientation."""
    defects: defaultdict[str, Places] = field(default_factory=lambda: defaultdict(Places))
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """Folder -> what it holds that is not used."""
    holders: defaultdict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Train id -> the samples that hold it, as Sample or as sample ids; -1: all that were read."""

    def __post_init__(self) -> None:
        self.class_pixels, self.class_images = np.zeros((2, self.num_classes), np.int64)

    def fingerprint(self, digest: bytes, key: str) -> None:
        """Note the bytes of an image."""
        if digest in self.digests:
            self.twice.add(f"{key} = {self.digests[digest]}")
        else:
            self.digests[digest] = key

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """(min, median or max; height; width) by area; nothing for a split without images."""
        if self.heights:
            areas = np.array(self.heights, np.int64) * np.array(self.widths, np.int64)
            order = np.argsort(areas, kind="stable")
            for name, place in (("min", 0), ("median", len(order) // 2), ("max", -1)):
                yield name, self.heights[order[place]], self.widths[order[place]]

    def choose(self, count: int) -> list[Any]:
        """Up to `count` samples for a contact sheet: one of each class, rarest class first, then any."""
        present = np.flatnonzero(self.class_images)
        rarest_first = present[np.argsort(self.class_images[present], kind="stable")].tolist()
        holders = [self.holders[label] for label in rarest_first]
        others = self.holders[-1]
        places = np.linspace(0, len(others) - 1, min(count, len(others))).round().astype(int)
        # From the middle and spread evenly: neighbors in a folder look alike.
        chosen = [known[len(known) // 2] for known in holders] + [others[place] for place in places]
        return list(dict.fromkeys(chosen))[:count]


def scan_folder(
    cfg: DatasetConfig, root: Path, name: str, *, num_classes: int, threads: int = -1
) -> SplitScan:
    """Every file of one split of a source folder; threads: -1 = one per core."""
    scan = SplitScan(name, num_classes, partial(_from_folder, cfg))
    samples, defects, scan.left_out = find_samples(cfg, root, name)
    for defect in defects:
        scan.defects[defect.kind].add(defect.text, defect.count)
    if samples:
        cfg = with_dtype(cfg, samples[0].image)
        scan.load = partial(_from_folder, cfg)
    table = label_table(cfg) if cfg.classes and cfg.task == "segmentation" else None
    with (
        ThreadPoolExecutor(threads if threads > 0 else len(os.sched_getaffinity(0))) as pool,
        tqdm(total=len(samples), unit="image", desc=f"scan {name}", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            for sample, found in zip(batch, pool.map(partial(_look, cfg), batch), strict=True):
                _add(scan, sample, *found, table)
                scan.depth.look(cfg.image_range, found[0].levels)
                bar.update()
    return scan


def _look(cfg: DatasetConfig, sample: Sample) -> tuple[LoadedSample, list[Defect], list[tuple[int, ...]]]:
    """The sample, with a digest in the place of the image's bytes; its defects; its colors instead of ids."""
    loaded, defects = inspect_sample(cfg, sample)
    loaded.image = loaded.image and hashlib.blake2b(loaded.image, digest_size=16).digest()
    loaded.ids = loaded.pixels = None
    colors: list[tuple[int, ...]] = []
    if sample.mask is not None and any(defect.kind == "colour" for defect in defects):
        colors = mask_colors(sample.mask)
    return loaded, defects, colors


def _add(
    scan: SplitScan,
    sample: Sample,
    loaded: LoadedSample,
    defects: list[Defect],
    colors: list[tuple[int, ...]],
    table: np.ndarray | None,
) -> None:
    scan.samples += 1
    for defect in defects:
        scan.defects[defect.kind].add(str(sample.mask) if defect.kind == "colour" else defect.text)
    scan.colors.update(colors)
    if loaded.image:
        scan.fingerprint(loaded.image, sample.key)
        scan.alike[sample.key] = loaded.alike
    if loaded.orientation != 1:
        scan.turned.append((sample.image_file, loaded.orientation))
    if loaded.height:
        scan.heights.append(loaded.height)
        scan.widths.append(loaded.width)
        scan.holders[-1].append(sample)
    raw_ids = loaded.raw_ids if sample.label is None else {sample.label: 1}
    scan.raw_pixels.update(raw_ids)
    scan.raw_images.update(raw_ids.keys())
    labels: Counter[int] = Counter()
    for raw, pixels in raw_ids.items():
        labels[raw if table is None else int(table[raw])] += pixels
    known = {label: pixels for label, pixels in labels.items() if 0 <= label < scan.num_classes}
    for label, pixels in known.items():
        scan.class_pixels[label] += pixels
        scan.class_images[label] += 1
        scan.holders[label].append(sample)
    scan.ignored_pixels += labels[IGNORE_INDEX] if IGNORE_INDEX not in known else 0
    scan.ignored_images += bool(raw_ids) and not known


def _from_folder(cfg: DatasetConfig, sample: Sample) -> tuple[str, Picture | None]:
    loaded, defects = inspect_sample(cfg, sample)
    if loaded.pixels is None:
        return sample.key, None
    image = displayed(loaded.pixels)
    if loaded.ids is None or defects or not cfg.classes:
        return sample.key, (image, None)
    mask = label_table(cfg)[loaded.ids]
    return sample.key, (image, np.where(mask < 0, IGNORE_INDEX, mask).astype(np.uint8))


def scan_shards(split: Split, content: dict[str, Any], *, read: int, seed: int = 0) -> SplitScan:
    """One split of shards: the whole index, and `read` random samples (-1: all) from the tars.

    content: the split's entry of dataset.json.
    """
    reader = ShardReader(split)
    scan = SplitScan(split.name, len(split.class_pixels), partial(_from_shards, reader))
    scan.samples = split.num_samples
    scan.heights, scan.widths = split.heights.tolist(), split.widths.tolist()
    scan.class_pixels = split.class_pixels.copy()
    labelled = np.zeros(split.num_samples, bool)
    for label in range(scan.num_classes):
        ids = split.samples_with(label)
        labelled[ids], scan.class_images[label], scan.holders[label] = True, len(ids), ids.tolist()
    scan.ignored_images = int((~labelled).sum())
    scan.ignored_pixels = content.get("ignored_pixels", 0)
    scan.depth = Depth(**content.get("depth", {}))
    scan.raw_pixels.update({int(raw): int(pixels) for raw, pixels in content.get("raw_ids", {}).items()})
    members = np.stack([split.records["image_size"], split.records["image_crc"].astype(np.int64)], axis=1)
    for sample_id, member in enumerate(members):
        scan.fingerprint(member.tobytes(), str(sample_id))
    scan.digests = {digest: split.key(int(number)) for digest, number in scan.digests.items()}
    count = split.num_samples if read < 0 else min(read, split.num_samples)
    chosen = np.sort(np.random.default_rng(seed).choice(split.num_samples, count, replace=False)).tolist()
    for sample_id in tqdm(chosen, unit="image", desc=f"read {split.name}", leave=False, disable=None):
        with reported(lambda error: scan.defects["unreadable"].add(str(error)), on=DataError):
            image, mask = _read(reader, sample_id)
            size = (int(split.heights[sample_id]), int(split.widths[sample_id]))
            if image.shape[:2] != size or (mask is not None and mask.shape != size):
                text = f"{split.describe(sample_id)} is not {size[1]} x {size[0]} pixels"
                scan.defects["size"].add(text)
            scan.alike[split.key(sample_id)] = perceptual_hash(image)
            scan.holders[-1].append(sample_id)
    return scan


def _read(reader: ShardReader, sample_id: int) -> Picture:
    raw = reader.read(sample_id)
    mask = decode_mask(raw.target) if reader.split.task == "segmentation" else None
    return decode_stored(raw.image, reader.split.pixels), mask


def _from_shards(reader: ShardReader, sample_id: int) -> tuple[str, Picture | None]:
    picture = None
    with contextlib.suppress(DataError):  # a finding names it
        image, mask = _read(reader, sample_id)
        picture = displayed(image), mask
    return reader.split.key(sample_id), picture
