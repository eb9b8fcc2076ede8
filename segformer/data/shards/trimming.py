"""`data.min_share`: training images in which `data.drop_classes` have too small a share are left out.

The share is of all pixels, ignored ones included, after the label map. Splits named val... or test... stay
whole. Every mask is read once, in processes."""

from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.packing import stat_hash
from segformer.data.shards.pool import advance, run
from segformer.data.sources.dataset import DatasetConfig, label_table
from segformer.data.sources.listing import Defect, Sample, mask_ids
from segformer.errors import DataError

SCAN = 64  # images that one task looks at

Listing = dict[str, list[Sample]]  # by split


def is_training(split: str) -> bool:
    """True for a split that is shuffled and trimmed."""
    return not split.startswith(("val", "test"))


def scan(
    cfg: DatasetConfig, listing: Listing, earlier: dict[str, Any], workers: int
) -> dict[str, list[dict[str, Any]]]:
    """Split -> one {"stat", "dropped" keys} for every SCAN samples of it; empty without `min_share`.

    earlier: the result of an earlier scan, which is used for files whose sizes and times are still the same.
    Prints how many images are left out; DataError when none is left.
    """
    if not cfg.min_share:
        return {}
    tasks = []
    for split in filter(is_training, listing):
        known = earlier.get(split, [])
        for number, start in enumerate(range(0, len(listing[split]), SCAN)):
            part = listing[split][start : start + SCAN]
            tasks.append((cfg, split, part, known[number] if number < len(known) else None))
    total = sum(len(part) for _, _, part, _ in tasks)
    found = run(_scan_part, tasks, workers=workers, total=total, desc="scanning")
    scanned: dict[str, list[dict[str, Any]]] = {}
    for (_, split, _, _), result in zip(tasks, found, strict=True):
        scanned.setdefault(split, []).append(result)
    for split, parts in scanned.items():
        dropped = sum(len(part["dropped"]) for part in parts)
        print(
            f"{split}: {dropped} of {len(listing[split])} images are left out "
            f"({', '.join(cfg.drop_classes)} below {100 * cfg.min_share:g} % of the pixels)"
        )
        if dropped == len(listing[split]):
            raise DataError(f"data.min_share={cfg.min_share} leaves no image of {split}; lower it")
    return scanned


def _scan_part(task: tuple[DatasetConfig, str, list[Sample], dict[str, Any] | None]) -> dict[str, Any]:
    cfg, _, samples, known = task
    stat = stat_hash(samples)
    if known is not None and known.get("stat") == stat:
        advance(len(samples))
        return known
    counted = np.isin(label_table(cfg), [cfg.classes.index(name) for name in cfg.drop_classes])  # by raw id
    dropped = []
    for sample in samples:
        ids = mask_ids(cfg, Path(sample.mask_file or ""))
        if isinstance(ids, Defect):
            raise DataError(ids.text)
        if counted[ids].mean() < cfg.min_share:
            dropped.append(sample.key)
        advance()
    return {"stat": stat, "dropped": dropped}


def keep(listing: Listing, scanned: dict[str, list[dict[str, Any]]]) -> Listing:
    """The listing without the images that the scan has left out."""
    kept = {}
    for split, samples in listing.items():
        dropped = {key for part in scanned.get(split, []) for key in part["dropped"]}
        kept[split] = [sample for sample in samples if sample.key not in dropped]
    return kept
