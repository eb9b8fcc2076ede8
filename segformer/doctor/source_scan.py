"""The scan of a source folder: every file, as data_prep/shard.py would read it, without stopping at a defect.

Kinds of defects are listed in scan.py. Files are read by threads: reading and decoding leave Python's lock.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sources.decode import decode_image, image_orientation, orientation_text
from segformer.data.sources.listing import (
    Sample,
    class_folders,
    decode_pixels,
    find_files,
    list_samples,
    mask_ids,
    read_file,
    whole_image,
)
from segformer.doctor.scan import SHOWN, SplitScan, empty_scan
from segformer.errors import DataError

MAX_COLOURS = 64  # of one mask; more are noise of a lossy format, not a palette
_COLOUR_TYPES = (2, 4, 6)  # PNG: RGB, grey with alpha, RGB with alpha
_BATCH = 1024  # files handed to the threads at a time


@dataclass(slots=True)
class _Facts:
    """What one pair of files holds."""

    sample: Sample
    size: tuple[int, int] | None = None
    digest: bytes = b""
    raw_ids: dict[int, int] | None = None
    colours: list[tuple[int, ...]] = field(default_factory=list)
    defects: list[tuple[str, str]] = field(default_factory=list)


def scan_folder(cfg: DatasetConfig, root: Path, name: str, *, threads: int = -1) -> SplitScan:
    """Every file of one split of a source folder; threads: -1 = one per core."""
    if cfg.task == "classification":
        samples, scan = _classified(cfg, root, name)
    else:
        scan = empty_scan(name, len(cfg.classes))
        samples = _paired(cfg, root, scan)
    table = label_table(cfg) if cfg.classes and cfg.task == "segmentation" else None
    count = threads if threads > 0 else len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(count) as pool,
        tqdm(total=len(samples), unit="image", desc=f"scan {name}", leave=False, disable=None) as bar,
    ):
        rest = iter(samples)
        while batch := list(islice(rest, _BATCH)):
            for facts in pool.map(lambda sample: _look(cfg, sample), batch):
                _add(scan, facts, table)
                bar.update()
    return scan


def _classified(cfg: DatasetConfig, root: Path, name: str) -> tuple[list[Sample], SplitScan]:
    try:
        names = cfg.classes or class_folders(cfg, root)
        scan = empty_scan(name, len(names))
        return list_samples(cfg, root, name), scan
    except DataError as error:
        scan = empty_scan(name, len(cfg.classes))
        scan.note("listing", str(error))
        return [], scan


def _paired(cfg: DatasetConfig, root: Path, scan: SplitScan) -> list[Sample]:
    """The pairs that there are; what has no partner becomes a defect."""
    folders = {kind: root / cfg.folder(kind, scan.name) for kind in ("image", "mask")}
    for kind, folder in folders.items():
        if not folder.is_dir():
            scan.note(
                "listing", f"{kind} folder {str(folder)!r} is missing; set data.{kind}_dir or data.splits"
            )
    if "listing" in scan.defects:
        return []
    try:
        images, others = find_files(str(folders["image"]), cfg.image_suffix)
        masks = find_files(str(folders["mask"]), cfg.mask_suffix)[0]
        if scan.name in cfg.split_lists:
            return list_samples(cfg, root, scan.name)
    except DataError as error:
        scan.note("listing", str(error))
        return []
    if folders["image"] == folders["mask"]:
        others = [other for other in others if not other.endswith(cfg.mask_suffix)]
    _note_keys(
        scan, others, f"pictures do not end in {cfg.image_suffix!r}; set data.image_suffix or convert them"
    )
    _note_keys(
        scan, images - masks, f"images have no mask <key>{cfg.mask_suffix}; add the masks or remove them"
    )
    _note_keys(
        scan, masks - images, f"masks have no image <key>{cfg.image_suffix}; add the images or remove them"
    )
    if not images:
        scan.note(
            "listing",
            f"no file in {str(folders['image'])!r} ends in {cfg.image_suffix!r}; set data.image_suffix",
        )
    return [
        Sample(
            key, f"{folders['image']}/{key}{cfg.image_suffix}", f"{folders['mask']}/{key}{cfg.mask_suffix}"
        )
        for key in sorted(images & masks)
    ]


def _note_keys(scan: SplitScan, keys: Iterable[str], text: str) -> None:
    found = sorted(keys)
    if found:
        more = ", ..." if len(found) > SHOWN else ""
        scan.note("listing", f"{len(found)} {text} ({', '.join(found[:SHOWN])}{more})", len(found))


def _look(cfg: DatasetConfig, sample: Sample) -> _Facts:
    facts, hint = _Facts(sample), ""
    try:
        data = read_file(sample.image)
        facts.digest = hashlib.blake2b(data, digest_size=16).digest()
        height, width = whole_image(sample.image, data).shape[:2]
        facts.size, hint = (height, width), orientation_text(image_orientation(data))
    except DataError as error:
        facts.defects.append(("unreadable", str(error)))
    if sample.mask is None:
        facts.raw_ids = {} if sample.label is None else {sample.label: 1}
        return facts
    try:
        data = read_file(sample.mask)
        if not cfg.mask_colours and len(data) > 25 and data[25] in _COLOUR_TYPES:
            facts.colours = _colours(decode_pixels(sample.mask, data, "RGB"))
            facts.defects.append(("colour", str(sample.mask)))
            return facts
        raw = mask_ids(cfg, sample.mask)
    except DataError as error:
        kind = "painted" if cfg.mask_colours and "has the colour" in str(error) else "unreadable"
        facts.defects.append((kind, str(error)))
        return facts
    if facts.size is not None and raw.shape != facts.size:
        facts.defects.append(
            (
                "size",
                f"{str(sample.mask)!r} is {raw.shape[1]} x {raw.shape[0]} pixels, its image "
                f"{facts.size[1]} x {facts.size[0]}{hint}",
            )
        )
    counts = np.bincount(raw.reshape(-1))
    facts.raw_ids = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return facts


def _colours(pixels: np.ndarray) -> list[tuple[int, ...]]:
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found = np.unique(packed)[:MAX_COLOURS]
    return [(int(value) >> 16, int(value) >> 8 & 255, int(value) & 255) for value in found]


def _add(scan: SplitScan, facts: _Facts, table: np.ndarray | None) -> None:
    scan.samples += 1
    for kind, text in facts.defects:
        scan.note(kind, text)
    scan.colours.update(facts.colours)
    if facts.digest:
        scan.fingerprint(facts.digest, facts.sample.key)
    if facts.size is not None:
        scan.heights.append(facts.size[0])
        scan.widths.append(facts.size[1])
        scan.hold(-1, facts.sample)
    if facts.raw_ids is None:
        return
    scan.raw_pixels.update(facts.raw_ids)
    scan.raw_images.update(facts.raw_ids.keys())
    labels: Counter[int] = Counter()
    for raw, pixels in facts.raw_ids.items():
        labels[raw if table is None else int(table[raw])] += pixels
    _add_labels(scan, facts.sample, labels)


def _add_labels(scan: SplitScan, sample: Sample | int, labels: Counter[int]) -> None:
    known = {label: pixels for label, pixels in labels.items() if 0 <= label < len(scan.class_pixels)}
    for label, pixels in known.items():
        scan.class_pixels[label] += pixels
        scan.class_images[label] += 1
        scan.hold(label, sample)
    scan.ignored_pixels += labels[IGNORE_INDEX] if IGNORE_INDEX not in known else 0
    scan.ignored_images += not known


def load_from_folder(cfg: DatasetConfig, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
    """The same of a pair of files; mask None where it can't be understood."""
    image = decode_image(read_file(sample.image))
    if sample.mask is None or not cfg.classes:
        return image, None
    try:
        mask = label_table(cfg)[mask_ids(cfg, sample.mask)]
    except DataError:
        return image, None
    unknown = np.where(mask < 0, IGNORE_INDEX, mask).astype(np.uint8)
    return image, unknown if unknown.shape == image.shape[:2] else None
