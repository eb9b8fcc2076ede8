"""What a data set holds, as facts: the scan of a split, and how shards are scanned. Nothing is judged.

A scan never stops at a defect: it notes it, by kind, with its count and the first few places, and goes on.

    listing      folders, pairs and names that do not fit
    unreadable   files that are damaged, of another format, too large or locked
    size         masks of another size than their image
    colour       masks with colours where ids are expected; the colours are counted
    painted      painted masks with a colour that data.mask_colours does not list

Of shards the index tells sizes and labels, and a random sample of the images is read and decoded
(data_prep/verify.py re-reads everything). Of a folder (source_scan.py) every file is decoded.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from segformer.data.shards.format import Split
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.data.sources.listing import Sample
from segformer.errors import DataError

HELD = 32  # samples to choose from for a contact sheet, per class
SHOWN = 3  # places that are named for each kind of defect


@dataclass(slots=True)
class Defect:
    """One kind of defect: how often, and the first places as messages."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str, count: int = 1) -> None:
        self.count += count
        if len(self.examples) < SHOWN:
            self.examples.append(text)


@dataclass(slots=True)
class SplitScan:
    """The facts of one split of K classes; statistics are by train id, raw ones by the id in the masks."""

    name: str
    class_pixels: np.ndarray
    """int64 (K,), pixels; images in classification."""
    class_images: np.ndarray
    """int64 (K,), images that hold the class."""
    samples: int = 0
    ignored_pixels: int = 0
    ignored_images: int = 0
    """Images without any labelled pixel."""
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    raw_pixels: Counter[int] = field(default_factory=Counter)
    raw_images: Counter[int] = field(default_factory=Counter)
    colours: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Colours in masks where ids are expected -> masks that hold them."""
    digests: dict[bytes, str] = field(default_factory=dict)
    """Fingerprint of each image file -> its key."""
    twice: Defect = field(default_factory=Defect)
    """Images that the split holds more than once."""
    defects: dict[str, Defect] = field(default_factory=dict)
    holders: dict[int, list[Sample | int]] = field(default_factory=dict)
    """Train id -> some samples that hold it, as file names or as sample ids; -1: any."""
    _seen: Counter[int] = field(default_factory=Counter)
    _strides: dict[int, int] = field(default_factory=dict)

    def note(self, kind: str, text: str, count: int = 1) -> None:
        """Count a defect."""
        self.defects.setdefault(kind, Defect()).add(text, count)

    def hold(self, label: int, sample: Sample | int) -> None:
        """Remember a sample for the contact sheet; those kept are spread evenly over what was seen."""
        known, stride = self.holders.setdefault(label, []), self._strides.setdefault(label, 1)
        if self._seen[label] % stride == 0:
            known.append(sample)
        self._seen[label] += 1
        if len(known) == 2 * HELD:
            del known[1::2]
            self._strides[label] = 2 * stride

    def fingerprint(self, digest: bytes, key: str) -> None:
        """Note the bytes of an image."""
        if digest in self.digests:
            self.twice.add(f"{key} = {self.digests[digest]}")
        else:
            self.digests[digest] = key


def empty_scan(name: str, num_classes: int) -> SplitScan:
    """A scan that has seen nothing yet."""
    return SplitScan(name, np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64))


def scan_split(split: Split, content: dict[str, object], *, read: int, seed: int = 0) -> SplitScan:
    """One split of shards: the whole index, and `read` random samples (-1: all) from the tars.

    content: the split's entry of dataset.json.
    """
    records, classes = split.records, len(split.class_pixels)
    scan = empty_scan(split.name, classes)
    scan.samples = split.num_samples
    scan.heights, scan.widths = split.heights.tolist(), split.widths.tolist()
    scan.class_pixels = split.class_pixels.copy()
    holders = [split.samples_with(label) for label in range(classes)]
    scan.class_images = np.array([len(ids) for ids in holders], np.int64)
    labelled = np.zeros(split.num_samples, bool)
    for label, ids in enumerate(holders):
        labelled[ids] = True
        scan.holders[label] = [int(sample_id) for sample_id in ids[:3]]
    scan.ignored_images = int((~labelled).sum())
    ignored, raw_ids = content.get("ignored_pixels", 0), content.get("raw_ids", {})
    assert isinstance(ignored, int)
    assert isinstance(raw_ids, dict)
    scan.ignored_pixels = ignored
    scan.raw_pixels.update({int(raw): int(pixels) for raw, pixels in raw_ids.items()})
    members = np.stack([records["image_size"], records["image_crc"].astype(np.int64)], axis=1)
    for sample_id, member in enumerate(members):
        scan.fingerprint(member.tobytes(), str(sample_id))
    scan.digests = {digest: split.key(int(number)) for digest, number in scan.digests.items()}
    _read_some(split, scan, read, seed)
    return scan


def _read_some(split: Split, scan: SplitScan, read: int, seed: int) -> None:
    count = split.num_samples if read < 0 else min(read, split.num_samples)
    chosen = np.sort(np.random.default_rng(seed).choice(split.num_samples, count, replace=False))
    reader = ShardReader(split)
    for sample_id in tqdm(
        chosen.tolist(), unit="image", desc=f"read {split.name}", leave=False, disable=None
    ):
        try:
            image, target = load_from_shards(split, reader, sample_id)
            size = (int(split.heights[sample_id]), int(split.widths[sample_id]))
            if image.shape[:2] != size or (target is not None and target.shape != size):
                scan.note("size", f"{split.describe(sample_id)} is not {size[1]} x {size[0]} pixels")
            scan.hold(-1, sample_id)
        except DataError as error:
            scan.note("unreadable", str(error))


def load_from_shards(
    split: Split, reader: ShardReader, sample_id: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(image uint8 (H, W, 3), mask uint8 (H, W) of train ids or None) of one sample."""
    raw = reader.read(sample_id)
    mask = decode_mask(raw.target) if split.task == "segmentation" else None
    return decode_image(raw.image), mask


def sizes(scan: SplitScan) -> Iterator[tuple[str, int, int]]:
    """(min, median or max; height; width) by area; nothing for a split without images."""
    if not scan.heights:
        return
    order = np.argsort(np.array(scan.heights, np.int64) * np.array(scan.widths, np.int64), kind="stable")
    for name, place in (("min", 0), ("median", len(order) // 2), ("max", -1)):
        yield name, scan.heights[order[place]], scan.widths[order[place]]
