"""Parts of an index -> the index of a split and its statistics; what the joined set must hold."""

import hashlib
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from segformer.data.shards.index import image_sums, pack_index, parse_index
from segformer.data.shards.moments import Moments, total
from segformer.data.shards.packing import ShardTask
from segformer.data.shards.workfolder import WorkFolder
from segformer.data.sources.content import Depth, Histogram, Labels, check_content
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.division import EVAL_SPLIT, is_training, pairs, same_bytes
from segformer.data.sources.sample import Sample
from segformer.errors import DataError
from segformer.files import sha256_of, write_atomic


def join(cfg: DatasetConfig, split: str, notes: list[dict[str, Any]], work: WorkFolder) -> dict[str, Any]:
    """Write the index of a split from its parts; returns the split's entry of dataset.json."""
    parts = [parse_index(np.fromfile(work.part(note["file"][: -len(".tar")]), np.uint8)) for note in notes]
    records = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    keys = b"\n".join(part[2].tobytes() for part in parts)
    sizes = [len(part[0]) for part in parts]
    label_starts = np.cumsum([0, *(len(part[1]) for part in parts[:-1])])
    key_starts = np.cumsum([0, *(len(part[2]) + 1 for part in parts[:-1])])
    records["labels_end"] += np.repeat(label_starts, sizes)
    records["key_end"] += np.repeat(key_starts, sizes)
    index = pack_index(records, labels, keys)
    write_atomic(work.set / f"{split}.idx", index)
    pixels, total = labels["pixels"].astype(np.int64), len(cfg.classes)
    class_pixels = np.zeros(total, np.int64)
    np.add.at(class_pixels, labels["label"], pixels)
    area = int((records["height"].astype(np.int64) * records["width"]).sum())
    raw_ids: Counter[int] = Counter()
    for note in notes:
        raw_ids.update({int(raw): count for raw, count in note["raw_ids"].items()})
    levels = [value for note in notes for value in note["levels"]]
    depth = Depth()
    for note in notes:
        depth.add(Depth(**note.get("depth", {})))
    shard_keys = ("file", "samples", "bytes", "sha256", "source_sha256")
    return {
        "samples": len(records),
        "class_pixels": class_pixels.tolist(),
        "class_images": np.bincount(labels["label"], minlength=total).tolist(),
        "ignored_pixels": area - int(pixels.sum()) if cfg.task == "segmentation" else 0,
        "raw_ids": {str(raw): count for raw, count in sorted(raw_ids.items())},
        **({"levels": [min(levels), max(levels)], "depth": asdict(depth)} if levels else {}),
        "index": {
            "file": f"{split}.idx",
            "bytes": len(index),
            "sha256": hashlib.sha256(index).hexdigest(),
        },
        "shards": [{key: note[key] for key in shard_keys} for note in notes],
    }


def mean_std(tasks: list[ShardTask], notes: list[dict[str, Any]]) -> dict[str, list[float]]:
    """`mean` and `std` of dataset.json: over the training splits, or over all where there is none."""
    own = [note for task, note in zip(tasks, notes, strict=True) if is_training(task.split)]
    mean, std = total(Moments(**note["moments"]) for note in own or notes).mean_std()
    return {"mean": mean, "std": std}


def _refuse_duplicates(cfg: DatasetConfig, tasks: list[ShardTask], work: WorkFolder) -> None:
    """Refuse images that two splits share, byte for byte; files are read where sizes and sums agree."""
    samples: dict[str, list[Sample]] = {split: [] for split in cfg.splits}
    for task in tasks:
        samples[task.split] += task.samples
    found = {
        split: image_sums(parse_index(np.fromfile(work.set / f"{split}.idx", np.uint8))[0])
        for split in cfg.splits
    }
    places: dict[str, set[int]] = {split: set() for split in cfg.splits}
    for first, second in pairs(cfg.splits, cfg.allow_duplicates):
        shared = np.intersect1d(found[first], found[second])
        for split in (first, second):
            places[split].update(np.flatnonzero(np.isin(found[split], shared)).tolist())
    digests: dict[str, dict[str, str]] = {split: {} for split in cfg.splits}
    sums: dict[str, str] = {}  # of the source: tiles of nothing but sky are alike in any two images
    for split, known in places.items():
        for place in sorted(known):
            sample = samples[split][place]
            if sample.image_file not in sums:
                sums[sample.image_file] = sha256_of(sample.image)
            digests[split].setdefault(sums[sample.image_file], sample.key)
    for shared_by in same_bytes(cfg.allow_duplicates, digests):
        raise DataError(shared_by.text)


def check_joined(
    cfg: DatasetConfig, content: dict[str, Any], tasks: list[ShardTask], work: WorkFolder
) -> None:
    """Refuse a set that nothing, or not what is meant, would be learnt from, or splits that share images."""
    splits = {name: Histogram.of(entry) for name, entry in content["splits"].items()}
    train = [*filter(is_training, splits)]
    check_content(Labels.configured(cfg, cfg.classes), splits, train, EVAL_SPLIT)
    _refuse_duplicates(cfg, tasks, work)
