"""Facts and settings -> findings: what is fine, what is suspicious, and what training must not start with.

FAIL   training would refuse the data or the settings, or learn nothing that can be meant (masks of 0 and 255,
       ids without a class, everything ignored)
WARN   training may start, and somebody should know
OK     checked and fine

Every WARN and FAIL ends in what to do, in settings that can be copied. All checks run; none hides another."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from segformer.data.loading.loader import worker_count
from segformer.data.loading.order import BatchShape, make_order_spec
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sources.folder import left_out_text
from segformer.doctor.scan import SplitScan
from segformer.errors import listed
from segformer.training.config import RunConfig
from segformer.training.task import training_crop

OK, WARN, FAIL = "OK", "WARN", "FAIL"
MUCH_IGNORED = 0.5  # share of ignored pixels above which somebody should look
LEAST_SIDE = 32  # pixels of a crop that the encoder takes
TIGHT = 0.85  # share of a GPU's memory above which the forecast is a warning: context and fragmentation
_LISTED = 12  # ids, classes or colors in one message

# Kind of a defect -> what its files are, and what to do.
_DEFECTS = {
    "unreadable": ("files cannot be used", "replace or remove them"),
    "size": (
        "masks have another size than their image",
        "an image and its mask must have the same pixels; export the masks again",
    ),
    "colour": ("masks hold colors, not label ids", ""),
    "painted": (
        "masks hold colors that data.mask_colours does not list",
        "add the colors to data.mask_colours, and map them in data.label_map (255 = ignore)",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement. about: what was looked at, such as `train: label ids`."""

    level: str
    about: str
    text: str


def judge_source(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> Iterator[Finding]:
    """Findings on a source folder: its files, and the ids in its masks."""
    for scan in scans:
        yield from _files(cfg, scan)
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
        remedy = remedy or _color_remedy(cfg, scan)
        yield Finding(FAIL, about, f"{places.count} {what} ({places}); {remedy}")
    if not scan.defects:
        yield Finding(OK, about, f"{scan.samples} samples, every file read and decoded")
    for folder, kinds in scan.left_out.items():
        yield Finding(OK, about, f"not used of {folder}: {left_out_text(kinds)}")


def _color_remedy(cfg: DatasetConfig, scan: SplitScan) -> str:
    if len(scan.colors) > 4 * max(_LISTED, len(cfg.classes)):
        return (
            f"the masks have {len(scan.colors)} colors or more, as after a lossy format or smooth resize; "
            "export label ids as PNG"
        )
    found = [list(color) for color, _ in scan.colors.most_common(_LISTED)]
    more = ", ..." if len(scan.colors) > _LISTED else ""
    return (
        f"give their colors in the order of the raw ids: data.mask_colours={found}{more} "
        "(found, most frequent first)"
    )


def _label_ids(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> Finding:
    """The raw ids of all splits together: a data set has one label map."""
    about, count = "label ids", len(cfg.classes)
    found = {raw for scan in scans for raw in scan.raw_pixels}
    if not cfg.classes:
        return Finding(FAIL, about, f"data.classes is empty, masks hold {_runs(found)}; name the classes")
    if not found:
        return Finding(FAIL, about, "no mask could be read; see the findings on files")
    table = label_table(cfg)
    if IGNORE_INDEX in found <= {0, IGNORE_INDEX} and table[IGNORE_INDEX] == IGNORE_INDEX and count > 1:
        text = "masks hold 0 and 255 only; 255 means ignored, so one class would be left; if 255 is class 1: "
        return Finding(FAIL, about, f"{text}'+data.label_map={{0: 0, 255: 1}}'")
    unknown = sorted(value for value in found if table[value] < 0)
    if not unknown:
        how = "label map" if cfg.label_map else "ids are train ids"
        return Finding(OK, about, f"{_runs(found)}: all known ({how})")
    images: Counter[int] = Counter()
    for scan in scans:
        images.update(scan.raw_images)
    where = listed([f"{value} in {images[value]} images" for value in unknown], _LISTED)
    return Finding(FAIL, about, f"ids without a class: {where}; {_id_remedy(cfg, found, unknown)}")


def _id_remedy(cfg: DatasetConfig, found: set[int], unknown: list[int]) -> str:
    count = len(cfg.classes)
    have = f"{count} classes have ids 0 to {count - 1}"
    if cfg.label_map:
        return "add them to data.label_map (id: train id, or 255 to ignore)"
    if unknown != [count]:
        return (
            f"{have}; add the missing names to data.classes, or map every id in data.label_map (255 = ignore)"
        )
    pairs = (["0: 255"] if 0 in found else []) + [f"{raw}: {raw - 1}" for raw in range(1, count + 1)]
    shown = pairs if len(pairs) <= 6 else [*pairs[:3], "...", pairs[-1]]
    shifted = f"'+data.label_map={{{', '.join(shown)}}}'"
    if 0 not in found:
        return f"ids start at 1; shift them: {shifted}"
    return (
        f"{have}; if 0 means 'no label' (reduce_zero_label): {shifted}; if every id is a class, data.classes "
        "lacks one name"
    )


def _label_map(cfg: DatasetConfig, seen: set[int]) -> Iterator[Finding]:
    missing = sorted(raw for raw, train in cfg.label_map.items() if raw not in seen and train != IGNORE_INDEX)
    if missing and seen:
        text = f"{len(missing)} of {len(cfg.label_map)} mapped ids are in no mask ({_runs(missing)})"
        yield Finding(WARN, "label map", f"{text}; check that the map is that of these masks")
    count = len(cfg.classes)
    reduces = {0: IGNORE_INDEX} | {raw: raw - 1 for raw in range(1, count + 1)}
    if reduces.items() <= cfg.label_map.items() and max(seen - {IGNORE_INDEX}, default=-1) == count - 1:
        text = (  # on masks that hold train ids already it drops a class and shifts the rest
            f"it maps 0 to ignored and {count} to the last class, but no mask holds {count}: they may hold "
            "train ids already; then leave data.label_map empty"
        )
        yield Finding(WARN, "label map", text)


def judge_labels(
    classes: Sequence[str], scans: Sequence[SplitScan], *, train: str, evaluation: str
) -> Iterator[Finding]:
    """Findings on the train ids and images of a folder's or of shards' splits."""
    by_name = {scan.name: scan for scan in scans if scan.samples}
    for scan in by_name.values():
        yield from _ignored(scan)
    if train in by_name:
        yield from _seen_classes(classes, by_name[train], by_name.get(evaluation))
    for scan in by_name.values():
        if scan.twice.count:
            text = f"{scan.twice.count} images are there more than once ({scan.twice})"
            yield Finding(WARN, f"{scan.name}: copies", f"{text}; remove the copies")
    for first, second in combinations(sorted(by_name), 2):
        yield _overlap(by_name[first], by_name[second])


def _ignored(scan: SplitScan) -> Iterator[Finding]:
    about = f"{scan.name}: ignored pixels"
    labelled = int(scan.class_pixels.sum())
    share = f"{100 * scan.ignored_pixels / max(1, labelled + scan.ignored_pixels):.1f} %"
    if not labelled:
        if scan.raw_pixels or scan.ignored_pixels:  # else no mask was understood, which other findings say
            text = "every pixel is ignored, nothing can be learnt; check data.label_map and 255"
            yield Finding(FAIL, about, text)
    elif scan.ignored_images or scan.ignored_pixels > MUCH_IGNORED * (labelled + scan.ignored_pixels):
        empty = f", {scan.ignored_images} images without any label" if scan.ignored_images else ""
        yield Finding(WARN, about, f"{share}{empty}; look at the contact sheet whether this is meant")
    else:
        yield Finding(OK, about, share)


def _seen_classes(
    classes: Sequence[str], train: SplitScan, evaluation: SplitScan | None
) -> Iterator[Finding]:
    about = f"{train.name}: classes"
    seen = train.class_images > 0
    if not seen.any():
        return
    lost = np.zeros_like(seen) if evaluation is None else ~seen & (evaluation.class_images > 0)
    only = len(classes) > 1 and seen.sum() == 1
    if only:
        name = classes[int(np.flatnonzero(seen)[0])]
        yield Finding(FAIL, about, f"only {name!r} is ever seen; check the masks and data.label_map")
    if evaluation is not None and lost.any():
        text = (
            f"{_names(classes, lost)} never seen in {train.name} but in {evaluation.name}: its IoU will be 0"
        )
        yield Finding(WARN, about, f"{text}; move images between the splits, or map the class to 255")
    never = ~seen & ~lost
    if never.any():
        text = f"{_names(classes, never)} never seen; remove the class or check data.label_map"
        yield Finding(WARN, about, text)
    if seen.all() and not only:
        rarest = int(np.argmin(train.class_pixels))
        share = 100 * train.class_pixels[rarest] / train.class_pixels.sum()
        of = "images" if np.array_equal(train.class_pixels, train.class_images) else "labelled pixels"
        text = (
            f"all {len(classes)} seen; the rarest is {classes[rarest]!r}, {share:.3g} % of the {of}, in "
            f"{int(train.class_images[rarest])} of {train.samples} images"
        )
        yield Finding(OK, about, text)


def _overlap(first: SplitScan, second: SplitScan) -> Finding:
    about = f"{first.name} and {second.name}"
    shared = first.digests.keys() & second.digests.keys()
    if not shared:
        return Finding(OK, about, "no image is in both")
    pairs = sorted(f"{first.digests[digest]} = {second.digests[digest]}" for digest in shared)
    text = f"{len(shared)} images are in both, byte for byte ({listed(pairs, 3)}): scores would be too good"
    return Finding(WARN, about, f"{text}; remove them from one")


def judge_settings(cfg: RunConfig, num_classes: int, samples: Mapping[str, int]) -> Iterator[Finding]:
    """Findings on a run's settings; samples: by split."""
    if cfg.model.num_classes not in (None, num_classes):
        text = f"model.num_classes={cfg.model.num_classes}, the data has {num_classes} classes; leave it null"
        yield Finding(FAIL, "model", text)
    if min(training_crop(cfg)) < LEAST_SIDE:
        key = "classification.size" if cfg.data.task == "classification" else "augment.crop"
        text = f"{key}: crops of {training_crop(cfg)}; the encoder needs {LEAST_SIDE} pixels a side"
        yield Finding(FAIL, "crop", text)
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
        text = f"{batch}; {cfg.steps} steps are {epochs:.1f} epochs of {count}"
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
        return Finding(OK, "memory", f"{text}; gpu_gib=<GiB of a GPU> compares it")
    share = total / 2**30 / gib
    text += f", {100 * share:.0f} % of {gib:.0f} GiB"
    if share <= TIGHT:
        return Finding(OK, "memory", text)
    text += "; lower micro_batch (the global batch stays), or use engine.precision=bf16"
    return Finding(FAIL if share > 1 else WARN, "memory", text)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _runs(values: set[int] | list[int]) -> str:
    """Numbers with runs shortened: 0 to 10, 255."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return listed([str(low) if low == high else f"{low} to {high}" for low, high in runs], _LISTED)


def _names(classes: Sequence[str], chosen: np.ndarray) -> str:
    names = [classes[int(place)] for place in np.flatnonzero(chosen)]
    return f"{len(names)} classes ({listed(names, _LISTED)})" if len(names) > 1 else f"{names[0]!r}"
