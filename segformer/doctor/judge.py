"""Facts and settings -> findings: what is fine, what is suspicious, and what training must not start with.

What the labels must hold is judged by data/sources/content, as in sharding and training; here stand files,
settings, batch and memory. FAIL: training would refuse it, or learn nothing that can be meant.

Every WARN and FAIL ends in what to do, in settings that can be copied. All checks run; none hides another."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from segformer.data.loading.loader import worker_count
from segformer.data.loading.order import BatchShape, make_order_spec
from segformer.data.sources.content import (
    FAIL,
    LISTED,
    OK,
    SMOOTH,
    WARN,
    Finding,
    Histogram,
    Labels,
    id_remedy,
    judge_content,
    no_classes,
    runs,
    turned_text,
)
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig
from segformer.data.sources.division import same_bytes, same_files
from segformer.data.sources.folder import left_out_text
from segformer.data.sources.masks import color_remedy, unknown_ids
from segformer.data.sources.similar import near_copies
from segformer.doctor.scan import SplitScan
from segformer.errors import listed
from segformer.training.config import RunConfig
from segformer.training.sizing import written

MUCH_IGNORED = 0.5  # share of ignored pixels above which somebody should look
TIGHT = 0.85  # share of a GPU's memory above which the forecast is a warning: context and fragmentation

# Kind of a defect -> what its files are, and what to do.
_DEFECTS = {
    "unreadable": ("files cannot be used", "replace or remove them"),
    "size": (
        "masks have another size than their image",
        "an image and its mask must have the same pixels; export the masks again",
    ),
    "colour": ("masks hold colors, not label ids", ""),
    "blended": ("masks hold blends of the colors in data.mask_colours", SMOOTH),
    "painted": (
        "masks hold colors that data.mask_colours does not list",
        "add the colors to data.mask_colours, and map them in data.label_map (255 = ignore)",
    ),
}


def judge_source(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> Iterator[Finding]:
    """Findings on a source folder: its files, and the ids in its masks."""
    for scan in scans:
        yield from _files(cfg, scan)
    if turned := [scan.turned for scan in scans if scan.turned]:
        text = turned_text(
            cfg.task, sum(map(len, turned)), sum(scan.samples for scan in scans), *turned[0][0]
        )
        yield Finding(WARN, "EXIF", text)
    images = {scan.name: [(s.key, s.image_file) for s in scan.holders[-1]] for scan in scans}
    yield from (Finding(FAIL, "splits", text) for text in same_files(cfg, images))
    yield from judge_alike(cfg, scans)
    if cfg.task == "segmentation":
        yield _label_ids(cfg, scans)
        yield from _label_map(cfg, {raw for scan in scans for raw in scan.raw_pixels})


def _files(cfg: DatasetConfig, scan: SplitScan) -> Iterator[Finding]:
    about = f"{scan.name}: files"
    for kind, places in scan.defects.items():
        if kind == "listing":
            yield from (Finding(FAIL, about, text) for text in places.examples)
            continue
        what, remedy = _DEFECTS[kind]
        remedy = remedy or color_remedy(scan.colors, len(cfg.classes))
        yield Finding(FAIL, about, f"{places.count} {what} ({places}); {remedy}")
    if not scan.defects:
        yield Finding(OK, about, f"{scan.samples} samples, every file read and decoded")
    for folder, kinds in scan.left_out.items():
        yield Finding(OK, about, f"not used of {folder}: {left_out_text(kinds)}")


def _label_ids(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> Finding:
    """The raw ids of all splits together: a data set has one label map."""
    about = "label ids"
    found = {raw for scan in scans for raw in scan.raw_pixels}
    if not cfg.classes:
        return Finding(FAIL, about, no_classes(found))
    if not found:
        return Finding(FAIL, about, "no mask could be read; see the findings on files")
    unknown = unknown_ids(cfg, list(found))
    if not unknown:
        how = "label map" if cfg.label_map else "ids are train ids"
        return Finding(OK, about, f"{runs(found)}: all known ({how})")
    images: Counter[int] = Counter()
    for scan in scans:
        images.update(scan.raw_images)
    where = listed([f"{value} in {images[value]} images" for value in unknown], LISTED)
    count, do = len(cfg.classes), "add the missing names to data.classes, or map every id in data.label_map"
    have = f"{count} classes have ids 0 to {count - 1}; " if not cfg.label_map else ""
    remedy = id_remedy(Labels.configured(cfg, cfg.classes), found) or f"{do} (255 = ignore)"
    return Finding(FAIL, about, f"ids without a class: {where}; {have}{remedy}")


def _label_map(cfg: DatasetConfig, seen: set[int]) -> Iterator[Finding]:
    missing = sorted(raw for raw, train in cfg.label_map.items() if raw not in seen and train != IGNORE_INDEX)
    if missing and seen:
        text = f"{len(missing)} of {len(cfg.label_map)} mapped ids are in no mask ({runs(missing)})"
        yield Finding(WARN, "label map", f"{text}; check that the map is that of these masks")
    count = len(cfg.classes)
    reduces = {0: IGNORE_INDEX} | {raw: raw - 1 for raw in range(1, count + 1)}
    if reduces.items() <= cfg.label_map.items() and max(seen - {IGNORE_INDEX}, default=-1) == count - 1:
        text = (  # on masks that hold train ids already it drops a class and shifts the rest
            f"it maps 0 to ignored and {count} to the last class, but no mask holds {count}: they may hold "
            "train ids already; then leave data.label_map empty"
        )
        yield Finding(WARN, "label map", text)


def judge_labels(labels: Labels, scans: Sequence[SplitScan], train: str, scored: str) -> Iterator[Finding]:
    """Findings on the train ids and images of a folder's or of shards' splits."""
    by_name = {scan.name: scan for scan in scans if scan.samples}
    # A split whose masks could not be understood has its own findings.
    held = {
        name: Histogram(scan.samples, scan.class_pixels, scan.raw_pixels, scan.depth)
        for name, scan in by_name.items()
        if scan.raw_pixels or scan.ignored_pixels or scan.class_pixels.any()
    }
    yield from (content := list(judge_content(labels, held, [train], scored)))
    judged = {finding.about for finding in content}
    for scan in by_name.values():
        if (finding := _ignored(scan)) and finding.about not in judged:
            yield finding
        if scan.twice.count:
            text = f"{scan.twice.count} images are there more than once ({scan.twice})"
            yield Finding(WARN, f"{scan.name}: copies", f"{text}; remove the copies")
    if train in held and labels.classes and f"{train}: classes" not in judged and "classes" not in judged:
        yield _rarest(labels.classes, by_name[train])
    images = {name: scan.digests for name, scan in by_name.items()}
    shared = list(same_bytes(labels.allow_duplicates, images, [train] if labels.sharded else None))
    for found in shared:
        level = WARN if labels.sharded and not found.whole else FAIL  # or older ones could not go on
        yield Finding(level, f"{found.first} and {found.second}", found.text)
    if len(images) > 1 and not shared:
        allowed = ", but as allowed" if labels.allow_duplicates else ""
        yield Finding(OK, " and ".join(images), f"no image is in two splits{allowed}")


def judge_alike(cfg: DatasetConfig, scans: Sequence[SplitScan], again: str = "") -> Iterator[Finding]:
    """A WARN for each two splits whose images look alike, but for those that are equal."""
    times = Counter(digest for scan in scans for digest in scan.digests)
    equal = {(scan.name, key) for scan in scans for digest, key in scan.digests.items() if times[digest] > 1}
    hashes = {
        scan.name: {key: value for key, value in scan.alike.items() if (scan.name, key) not in equal}
        for scan in scans
    }
    for found in near_copies(cfg, hashes, again):
        yield Finding(WARN, f"{found.first} and {found.second}", found.text)


def judge_sets(sets: Mapping[str, Sequence[SplitScan]], train: str, scored: str) -> Iterator[Finding]:
    """A WARN for each set of a mixture that is scored on images which another one is trained on."""
    for name, scans in sets.items():
        others = [
            scan for other, found in sets.items() if other != name for scan in found if scan.name == train
        ]
        learned = {digest for scan in others for digest in scan.digests}
        held = {
            key for scan in scans if scan.name == scored for d, key in scan.digests.items() if d in learned
        }
        if held:
            which = f"{len(held)} images of its {scored} ({listed(sorted(held), 3)})"
            text = f"{which} are trained on in another set, so that its scores flatter"
            yield Finding(WARN, name, f"{text}; leave them out there and shard it again")


def _ignored(scan: SplitScan) -> Finding | None:
    about = f"{scan.name}: ignored pixels"
    total = int(scan.class_pixels.sum()) + scan.ignored_pixels
    share = f"{100 * scan.ignored_pixels / max(1, total):.1f} %"
    if scan.ignored_images or scan.ignored_pixels > MUCH_IGNORED * total:
        empty = f", {scan.ignored_images} images without any label" if scan.ignored_images else ""
        return Finding(WARN, about, f"{share}{empty}; look at the contact sheet whether this is meant")
    return Finding(OK, about, share) if total else None


def _rarest(classes: Sequence[str], train: SplitScan) -> Finding:
    rarest = int(np.argmin(train.class_pixels))
    share = 100 * train.class_pixels[rarest] / max(1, train.class_pixels.sum())
    of = "images" if np.array_equal(train.class_pixels, train.class_images) else "labelled pixels"
    unseen = int((train.class_images == 0).sum())
    text = f"all {len(classes)} seen" if not unseen else f"{unseen} of {len(classes)} never seen, as allowed"
    return Finding(
        OK,
        f"{train.name}: classes",
        f"{text}; the rarest is {classes[rarest]!r}, {share:.3g} % of the {of}, in "
        f"{int(train.class_images[rarest])} of {train.samples} images",
    )


def judge_settings(
    cfg: RunConfig, num_classes: int, channels: int, samples: Mapping[str, int]
) -> Iterator[Finding]:
    """Findings on a run's settings; channels: of the images; samples: by split."""
    if cfg.model.num_classes not in (None, num_classes):
        text = f"model.num_classes={cfg.model.num_classes}, the data has {num_classes} classes; leave it null"
        yield Finding(FAIL, "model", text)
    if cfg.model.in_channels not in (None, channels):
        text = f"model.in_channels={cfg.model.in_channels}, the images have {channels}; leave it null"
        yield Finding(FAIL, "model", text)
    for key in ("train_split", "eval_split"):
        if (name := getattr(cfg, key)) not in samples:
            text = f"{key}={name} is not there, only {', '.join(samples)}"
            yield Finding(FAIL, "splits", f"{text}; choose one of these or add the split")


def judge_batch(
    cfg: RunConfig, batch: BatchShape, samples: Mapping[str, int], shard_sizes: Mapping[str, Sequence[int]]
) -> Iterator[Finding]:
    """Findings on the batches of training; samples, shard_sizes: by split, without sizes before sharding."""
    ranks, count = batch.world_size, samples.get(cfg.train_split)
    if count is not None:
        epochs = cfg.steps * cfg.global_batch / max(1, count)
        text = f"{batch}; {cfg.steps} steps are {written(epochs)} epochs of {count}"
        if count < cfg.global_batch:
            yield Finding(WARN, "batch", f"{text}: one step holds images more than once; lower global_batch")
        else:
            yield Finding(OK, "batch", text)
    if sizes := shard_sizes.get(cfg.train_split):
        workers = max(1, worker_count(cfg.loader, ranks))
        spec = make_order_spec(sizes, seed=cfg.seed, global_batch=cfg.global_batch)
        chunks, readers = sum(math.ceil(size / spec.chunk) for size in sizes), ranks * workers
        text = f"{ranks} ranks x {workers} workers = {readers} readers"
        text += f" of {chunks} chunks, {len(sizes)} shards"
        if chunks < readers:
            text += ": several will read the same chunk (nothing is lost or repeated)"
            yield Finding(WARN, "readers", f"{text}; loader.workers={max(1, chunks // ranks)} is enough")
        else:
            yield Finding(OK, "readers", text)


def judge_memory(found: Mapping[str, int], gib: float | None) -> Finding:
    """The forecast of memory against a GPU of `gib` GiB; None = the one here."""
    if gib is None and torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in found.items() if size)
    total = sum(found.values())
    text = f"forecast {_gib(total)} a GPU ({parts})"
    if gib is None:
        text = f"forecast {_gib(total)} on each GPU, should it run on some ({parts})"
        return Finding(OK, "memory", f"{text}; gpu_gib=<GiB of one> compares it")
    share = total / 2**30 / gib
    text += f", {100 * share:.0f} % of {gib:.0f} GiB"
    if share <= TIGHT:
        return Finding(OK, "memory", text)
    text += "; lower micro_batch (the global batch stays), or use engine.precision=bf16"
    return Finding(FAIL if share > 1 else WARN, "memory", text)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
