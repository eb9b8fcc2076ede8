"""Write a data set as shards (the format is drawn in format.py): folder -> out/dataset.json, indices, tars.

    list    the samples of every split; training splits are shuffled once (seeded), splits named val... or
            test... keep the order of their keys
    trim    only with data.min_share: training images are left out (trimming.py)
    cut     only with a tiling: larger images become tiles, which are the samples from here on (cutting.py)
    write   shard by shard, in processes, into a folder beside `out` (workfolder.py, packing.py)
    join    parts -> one index a split, class statistics, dataset.json, then `out` appears by one rename

The bytes depend on the input and the settings only, never on the number of processes or on how often the
work was interrupted. A run that ends early, even by SIGKILL, leaves its finished shards; the same command
keeps them, other settings or files start over.

`out/.sources.json` holds hashes of the source files' names, sizes and times: with it the same command knows
a finished set again without reading the source (but for the training masks, with data.min_share). It also
counts the images that EXIF would turn, and says which splits have images that look alike. It is no part of
the set.

Refused: an `out` that holds something else, keys that stock webdataset would misread, a second process on
the same `out`, every defect of the source that listing.py names, and a set from which nothing, or not what is
meant, would be learnt (content.py)."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segformer.data.formats.table import resolved
from segformer.data.shards.cutting import cut_tiles, plan_tiles
from segformer.data.shards.format import FORMAT, VERSION, ShardSet, content_digest
from segformer.data.shards.joining import check_joined, join, mean_std
from segformer.data.shards.packing import (
    Settings,
    ShardTask,
    check_keys,
    make_shard,
    member_key,
    source_hash,
    stat_hash,
)
from segformer.data.shards.pool import run
from segformer.data.shards.tiling import Tiling
from segformer.data.shards.trimming import Listing, trim
from segformer.data.shards.workfolder import WorkFolder
from segformer.data.sources.content import Labels, check_content
from segformer.data.sources.dataset import DIVISION, RGB, DatasetConfig, class_palette, voc_palette
from segformer.data.sources.division import is_training, same_files
from segformer.data.sources.folder import LeftOut
from segformer.data.sources.listing import class_folders, find_samples
from segformer.data.sources.masks import Defect, explained
from segformer.data.sources.picture import with_dtype
from segformer.data.sources.sample import Sample
from segformer.data.sources.similar import near_copies
from segformer.errors import ConfigError, DataError, is_name, listed, reraise_as
from segformer.files import read_json, write_atomic

NOTE = ".sources.json"
ALLOWANCES = ("allow_unseen", "allow_duplicates")  # settings that change no shard
_OTHER_PLACE = "give another output=<folder> or remove it"


class OtherSet(DataError):  # noqa: N818  a state of the folder
    """The folder holds other shards, or something else."""


def _description(settings: Settings) -> dict[str, Any]:
    """The first part of dataset.json."""
    cfg = settings.cfg
    return (
        {
            "format": FORMAT,
            "version": VERSION,
            "task": cfg.task,
            "name": cfg.name,
            "classes": list(cfg.classes),
            "palette": class_palette(cfg).tolist(),
            "label_map": {str(raw): train for raw, train in sorted(cfg.label_map.items())},
            "mask_colours": [list(color) for color in cfg.mask_colours],
            "license": cfg.license,
            "citation": cfg.citation,
            "seed": settings.seed,
            "samples_per_shard": settings.samples_per_shard,
            "long_side": settings.long_side,
            "quality": settings.quality,
            "drop_classes": list(cfg.drop_classes),
            "min_share": cfg.min_share,
        }
        | ({"image_range": list(cfg.image_range)} if cfg.image_range else {})
        | ({"labels": _label_settings(cfg)} if cfg.format else {})
        | (cfg.pixels._asdict() if cfg.pixels != RGB else {})
        | ({"val_share": cfg.val_share, "val_seed": cfg.val_seed} if cfg.is_divided else {})
        | {key: value for key in DIVISION[2:] if (value := getattr(cfg, key))}
        | (settings.tiling.described() if settings.tiling else {})
    )


def _label_settings(cfg: DatasetConfig) -> dict[str, Any]:
    return {"format": cfg.format, "uncovered": cfg.uncovered, "category_map": dict(cfg.category_map)}


def _identity(settings: Settings, listing: Listing) -> str:
    """A hash of settings, sample names and encoders; equal: what is finished can be kept."""
    free: dict[str, Any] = {"root": "", "shards": "", "labels": ""} | {key: [] for key in ALLOWANCES}
    deciding = replace(settings, cfg=replace(settings.cfg, **free))
    names = {split: [(s.key, s.label) for s in samples] for split, samples in listing.items()}
    whole = [FORMAT, VERSION, asdict(deciding), names, cv2.__version__]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def write_shards(
    cfg: DatasetConfig,
    root: Path,
    out: Path,
    *,
    seed: int,
    samples_per_shard: int,
    workers: int,
    long_side: int = 0,
    quality: int = 0,
    tiling: Tiling | None = None,
    part: tuple[int, int] | None = None,
) -> None:
    """Write every split of `cfg` from the folder `root` as shards into `out`.

    workers: processes, -1 = one per core. long_side, quality, tiling: see packing.Settings. part: (index,
    count), to make every count-th shard only, from the index-th; several processes on several nodes may do so
    at a time, and the same call without `part` then joins what they made. An `out` that already holds exactly
    this set is left as it is; one that holds anything else is refused. DataError for whatever is wrong with
    the source.
    """
    if cfg.task == "classification" and not cfg.classes:
        cfg = replace(cfg, classes=class_folders(cfg, root))
    cfg = resolved(cfg, root)
    if unfit := [name for name in cfg.classes if not is_name(name)]:
        raise ConfigError(f"data.classes: {listed(unfit)} hold control characters; leave these out")
    check_content(Labels.configured(cfg, cfg.classes), {}, ())
    settings = Settings(cfg, seed, samples_per_shard, long_side, quality, tiling)
    target = Path(os.path.realpath(out))
    if not target.name:
        raise ConfigError(f"output={str(out)!r} has no name, a set becomes one folder; give output=/<folder>")
    what = f"shards cannot be written to {str(out)!r}"
    remedy = "give another output=<folder>, or make room and run this again: it keeps what is finished"
    with reraise_as(DataError, what, remedy):
        if _occupied(target) and not (target / "dataset.json").is_file():
            raise OtherSet(f"{str(out)!r} exists and holds something else; {_OTHER_PLACE}")
    listing, left_out = _list(cfg, root)
    settings = replace(settings, cfg=with_dtype(cfg, Path(listing[cfg.splits[0]][0].image_file)))
    work = WorkFolder(target, _identity(settings, listing))
    kept, beside = _samples(settings, listing, left_out, workers)
    tasks = _plan(settings, kept, work)
    with reraise_as(DataError, what, remedy):
        if _occupied(target):
            _check_finished(settings, tasks, work, workers)
            print(f"{out} already holds exactly these shards; nothing to do")
            return
        with work.hold(shared=part is not None):
            if _occupied(target):
                raise DataError(f"{str(out)!r} has just been written by another process; run this again")
            if part is None:
                _write(settings, tasks, beside, work, workers)
            else:
                _make(tasks[part[0] :: part[1]], workers)


def _list(cfg: DatasetConfig, root: Path) -> tuple[Listing, dict[str, dict[str, LeftOut]]]:
    """The samples of every split, and what else its folders hold; DataError for the first defect."""
    listing: Listing = {}
    left_out = {}
    for split in cfg.splits:
        listing[split], defects, left_out[split] = find_samples(cfg, root, split)
        if defects:
            raise defects[0]
        check_keys(listing[split])
    images = {split: [(s.key, s.image_file) for s in samples] for split, samples in listing.items()}
    for text in same_files(cfg, images):
        raise DataError(text)
    return listing, left_out


def _samples(
    settings: Settings, listing: Listing, left_out: dict[str, dict[str, LeftOut]], workers: int
) -> tuple[Listing, dict[str, dict[str, Any]]]:
    """What is packed, trimmed and as tiles, and what dataset.json says of the source of each split."""
    kept = trim(settings.cfg, listing, workers)
    beside: dict[str, dict[str, Any]] = {
        split: {"dropped": len(listing[split]) - len(samples)}
        | ({"left_out": left_out[split]} if left_out[split] else {})
        for split, samples in kept.items()
    }
    if settings.tiling is None:
        return kept, beside
    tiles = plan_tiles(settings.cfg, settings.tiling, kept, workers)
    for split, samples in tiles.samples.items():
        check_keys(samples)
        if split in tiles.wholes:
            beside[split]["tiled"] = settings.tiling.entry(
                whole._replace(key=member_key(whole.key)) for whole in tiles.wholes[split]
            )
    return tiles.samples, beside


def _write(
    settings: Settings,
    tasks: list[ShardTask],
    beside: dict[str, dict[str, Any]],
    work: WorkFolder,
    workers: int,
) -> None:
    """Make all shards, join them and publish the set. beside: what is known of each split's source."""
    notes = _make(tasks, workers)
    content = _description(settings) | {"splits": {}}
    for split in settings.cfg.splits:
        own = [note for task, note in zip(tasks, notes, strict=True) if task.split == split]
        content["splits"][split] = join(settings.cfg, split, own, work) | beside[split]
    check_joined(settings.cfg, content, tasks, work)
    if settings.cfg.pixels != RGB:
        content |= mean_std(tasks, notes)
    # Only what was allowed is written, so that all other sets keep their digest.
    content |= {key: allowed for key in ALLOWANCES if (allowed := list(getattr(settings.cfg, key)))}
    content["digest"] = content_digest(content)
    write_atomic(work.set / "dataset.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    stats = {task.name: note["stat"] for task, note in zip(tasks, notes, strict=True)}
    turned = sorted(tuple(found) for note in notes for found in note["turned"])
    known: dict[str, Any] = {"shards": stats, "turned": [len(turned), *turned[0]] if turned else None}
    alike: dict[str, dict[str, int]] = {split: {} for split in settings.cfg.splits}
    for task, note in zip(tasks, notes, strict=True):
        alike[task.split].update(note.get("alike", {}))
    known |= {"alike": [found.text for found in near_copies(settings.cfg, alike, ", and shard again")]}
    write_atomic(work.set / NOTE, json.dumps(known))
    indices = [entry["index"]["file"] for entry in content["splits"].values()]
    work.publish(["dataset.json", NOTE, *indices, *(note["file"] for note in notes)])


def _make(tasks: list[ShardTask], workers: int) -> list[dict[str, Any]]:
    """Make the shards that are not there yet; the note of each."""
    try:
        tiles = [sample for task in tasks for sample in task.samples if sample.window]
        if tiles:
            sums = cut_tiles(tasks[0].settings.cfg, tiles, tasks[0].work, workers)
            tasks = [
                replace(task, sums={name: sums[name] for s in task.samples if (name := s.image_file) in sums})
                for task in tasks
            ]
        results = run(
            make_shard,
            tasks,
            images=[len(task.samples) for task in tasks],
            workers=workers,
            desc="sharding",
            preload=["webdataset"],
        )
    except Defect as defect:
        masks = [sample.mask for task in tasks for sample in task.samples if sample.mask is not None]
        raise explained(tasks[0].settings.cfg, defect, masks) from defect
    earlier = sum(complete for _, complete in results)
    if earlier:
        print(f"{earlier} of {len(tasks)} shards were complete already and are kept")
    return [note for note, _ in results]


def find_turned(out: Path) -> tuple[int, str, int] | None:
    """The images of a finished set that EXIF would turn: how many, the first file (below root), its
    orientation. None without any, or where it is not known."""
    found = _read_json(out / NOTE).get("turned")
    return tuple(found) if found else None


def find_alike(out: Path) -> list[str]:
    """What is to be said of near copies over the splits of a finished set."""
    return list(_read_json(out / NOTE).get("alike", []))


def _plan(settings: Settings, listing: Listing, work: WorkFolder) -> list[ShardTask]:
    tasks = []
    for number, (split, samples) in enumerate(listing.items()):
        if is_training(split):
            # random_raw and a stable sort: NumPy does not promise to keep Generator.permutation.
            key = np.array([settings.seed, number], np.uint64)
            draws = np.random.Philox(key=key).random_raw(len(samples))
            samples = [samples[index] for index in np.argsort(draws, kind="stable")]
        for shard, start in enumerate(range(0, len(samples), settings.samples_per_shard)):
            own, name = samples[start : start + settings.samples_per_shard], f"{split}-{shard:06d}"
            tasks.append(ShardTask(settings, split, name, own, work))
    return tasks


def _occupied(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _check_finished(settings: Settings, tasks: list[ShardTask], work: WorkFolder, workers: int) -> None:
    """DataError unless `out` holds, complete, what this call would write. Reads no source file that rests."""
    what, refusal = f"{str(work.out)!r} exists and holds something else", _OTHER_PLACE
    with reraise_as(DataError, what, refusal, on=DataError):
        content = ShardSet.open(work.out).content
    wanted, count = _description(settings), len(settings.cfg.classes)
    if not settings.cfg.palette and content.get("palette") == voc_palette(count).tolist():
        wanted["palette"] = content["palette"]  # that of few classes was once this one, too
    differing = [key for key, value in wanted.items() if content.get(key) != value]
    other = [_changed(key, content.get(key), wanted[key]) for key in differing]
    if not other:
        shards = [shard for split in content["splits"].values() for shard in split["shards"]]
        sources = {shard["file"]: shard["source_sha256"] for shard in shards}
        stats = _read_json(work.out / NOTE).get("shards", {})
        checks = [(task.samples, stats.get(task.name), sources.get(f"{task.name}.tar")) for task in tasks]
        images = [len(task.samples) for task in tasks]
        same = run(_is_same, checks, images=images, workers=workers, desc="comparing")
        other = [] if len(tasks) == len(sources) and all(same) else ["the source"]
    if other:
        raise OtherSet(f"{what} (differing: {', '.join(other)}); {refusal}")
    work.clear()


def _changed(key: str, there: Any, here: Any) -> str:
    """A setting that differs from that of finished shards, with both values where they are short."""
    old, new = (str(value).replace("'", "") for value in (there, here))
    return f"{key}: {old} there, {new} here" if len(old + new) < 160 else key


def _is_same(check: tuple[Sequence[Sample], str | None, str | None]) -> bool:
    samples, stat, source = check
    return stat_hash(samples) == stat or source_hash(samples) == source


def _read_json(path: Path) -> dict[str, Any]:
    """An object, empty where there is none: what these files hold can be found out again."""
    with suppress(OSError, ValueError):
        content: dict[str, Any] = read_json(path)
        return content
    return {}
