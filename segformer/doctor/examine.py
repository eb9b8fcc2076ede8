"""Looks at data and settings before a run: everything that would end or spoil it, in one pass.

    source   every file of the folder that data_prep/shard.py would read   (source_scan.py)
    shards   what training reads: index, digest, a sample of the images   (scan.py)
    run      classes, batch arithmetic, readers against chunks, memory of a GPU   (preflight.py)

    out/doctor.json   verdicts and numbers
    out/source.png    contact sheets: samples beside their coloured masks   (contact.py)
    out/shards.png

What the settings do not name is not looked at: without `root` (or data.root) no source, without existing
data.shards no shards; one of them is needed. Ends with exit code 0 when training may start and 2 when a
verdict is FAIL; a WARN never stops anybody.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.dataset import class_palette
from segformer.data.sources.listing import class_folders
from segformer.doctor.contact import Picture, choose, write_sheet
from segformer.doctor.diagnosis import FAIL, OK, WARN, Verdict, judge_labels, judge_source
from segformer.doctor.memory import Forecast
from segformer.doctor.preflight import judge_run
from segformer.doctor.scan import SplitScan, load_from_shards, scan_split, sizes
from segformer.doctor.source_scan import load_from_folder, scan_folder
from segformer.errors import ConfigError, DataError, SegformerError
from segformer.training.config import RunConfig


@dataclass(kw_only=True, slots=True)
class DoctorConfig(RunConfig):
    """A run as launch/train.py takes it, and how to look at it."""

    root: str = ""
    "Source folder to scan; empty = data.root; '-' = none."
    output: str = "runs/doctor"
    "Folder for doctor.json and the contact sheets."
    ranks: int = 1
    "GPUs of the run that is planned."
    gpu_gib: float | None = None
    "Memory of one of them, GiB; null asks the first GPU here, where there is one."
    threads: int = -1
    "Threads that read the source; -1 = one per core."
    read: int = 256
    "Random images per split of the shards that are read; -1 = all."
    pictures: int = 24
    "Samples on a contact sheet; 0 = no sheets."

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for key, least in (("ranks", 1), ("threads", -1), ("read", -1), ("pictures", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)} must be {least} or more")
        if self.gpu_gib is not None and self.gpu_gib <= 0:
            raise ConfigError(f"gpu_gib={self.gpu_gib} must be above 0")


@dataclass(kw_only=True, slots=True)
class Report:
    """What a look has found."""

    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    source: list[SplitScan] = dataclasses.field(default_factory=list)
    shards: list[SplitScan] = dataclasses.field(default_factory=list)
    memory: Forecast | None = None

    @property
    def may_start(self) -> bool:
        """Whether no verdict is FAIL."""
        return all(verdict.level != FAIL for verdict in self.verdicts)


def doctor(cfg: DoctorConfig) -> None:
    """Look at everything, print it, write the files; DataError where training should not start."""
    report = examine(cfg)
    out = Path(cfg.output)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "doctor.json").write_text(json.dumps(as_json(report), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error.strerror}; choose another output=...") from error
    print(as_text(report))
    print(f"files: {out}")
    if not report.may_start:
        count = sum(verdict.level == FAIL for verdict in report.verdicts)
        raise DataError(
            f"training should not start: {count} of {len(report.verdicts)} checks failed (see FAIL)"
        )


def examine(cfg: DoctorConfig) -> Report:
    """Scan, judge and draw; nothing that is wrong with the data is raised."""
    report = Report(classes=list(cfg.data.classes))
    root = "" if cfg.root == "-" else cfg.root or cfg.data.root
    if root and (cfg.root or Path(root).is_dir()):
        _look_at_source(cfg, Path(root), report)
    shards = _open(cfg, report) if cfg.data.shards else None
    if shards is not None:
        _look_at_shards(cfg, shards, report)
    if not report.source and not report.shards and not report.verdicts:
        report.verdicts.append(
            Verdict(FAIL, "data", "nothing to look at; give root=<source folder> or data.shards=<shards>")
        )
    if cfg.data.task == "segmentation" and report.classes:
        verdicts, report.memory = judge_run(
            cfg,
            num_classes=len(report.classes),
            samples={scan.name: scan.samples for scan in report.shards or report.source},
            shard_sizes=None if shards is None else {n: s.shard_sizes for n, s in shards.splits.items()},
            ranks=cfg.ranks,
            gpu_gib=cfg.gpu_gib,
        )
        report.verdicts += verdicts
    return report


def _look_at_source(cfg: DoctorConfig, root: Path, report: Report) -> None:
    if not root.is_dir():
        report.verdicts.append(
            Verdict(FAIL, "source", f"{str(root)!r} is not a folder; give root=<folder of the data set>")
        )
        return
    report.source = [scan_folder(cfg.data, root, name, threads=cfg.threads) for name in cfg.data.splits]
    report.verdicts += judge_source(cfg.data, report.source)
    if cfg.data.task == "classification" and not report.classes:
        report.classes = _class_names(cfg, root)
    report.verdicts += judge_labels(
        report.classes, report.source, train=cfg.train_split, evaluation=cfg.eval_split
    )
    pictures: list[Picture] = []
    for scan, sample in _chosen(report.source, cfg.pictures):
        try:
            pictures.append((f"{scan.name}/{sample.key}", *load_from_folder(cfg.data, sample)))
        except DataError:
            continue  # a verdict names it
    if pictures:
        palette = class_palette(dataclasses.replace(cfg.data, classes=report.classes))
        write_sheet(Path(cfg.output) / "source.png", pictures, classes=report.classes, palette=palette)


def _class_names(cfg: DoctorConfig, root: Path) -> list[str]:
    try:
        return class_folders(cfg.data, root)
    except SegformerError:
        return []  # a verdict on the listing says why


def _chosen(scans: Sequence[SplitScan], count: int) -> list[tuple[SplitScan, Any]]:
    """Samples for a sheet; the first split, which is trained on, gets what the others leave."""
    rest = count // (2 * max(1, len(scans) - 1)) if len(scans) > 1 else 0
    picked: list[tuple[SplitScan, Any]] = []
    for place, scan in enumerate(scans):
        share = count - rest * (len(scans) - 1) if place == 0 else rest
        picked += [(scan, sample) for sample in choose(scan.holders, scan.class_images, share)]
    return picked


def _open(cfg: DoctorConfig, report: Report) -> ShardSet | None:
    """The shards; None where there are none yet, with a verdict where the source is not there either."""
    local = "://" not in cfg.data.shards
    if local and not Path(cfg.data.shards).exists() and report.source:
        report.verdicts.append(
            Verdict(
                WARN,
                "shards",
                f"{cfg.data.shards!r} is not there yet; write it with data_prep/shard.py",
            )
        )
        return None
    try:
        return ShardSet.open(cfg.data.shards, cfg.loader.storage)
    except SegformerError as error:
        report.verdicts.append(Verdict(FAIL, "shards", str(error)))
        return None


def _look_at_shards(cfg: DoctorConfig, shards: ShardSet, report: Report) -> None:
    for name, split in shards.splits.items():
        scan = scan_split(split, shards.content["splits"][name], read=cfg.read, seed=cfg.seed)
        report.shards.append(scan)
        about = f"shards {name}"
        for kind, defect in scan.defects.items():
            places = "; ".join(defect.examples)
            report.verdicts.append(
                Verdict(FAIL, about, f"{defect.count} {kind}: {places}; copy or shard the data again")
            )
        if not scan.defects:
            read = split.num_samples if cfg.read < 0 else min(cfg.read, split.num_samples)
            text = f"{split.num_samples} samples in {len(split.files)} shards; {read} read and decoded"
            report.verdicts.append(Verdict(OK, about, text))
    if report.classes and report.classes != shards.classes:
        report.verdicts.append(
            Verdict(
                FAIL,
                "shards: classes",
                f"data.classes has {len(report.classes)} classes, the shards were written with "
                f"{len(shards.classes)} ({', '.join(shards.classes[:4])}, ...); shard again or change data",
            )
        )
    report.verdicts += _same_source(report)
    report.classes = list(shards.classes)
    if not report.source:  # the same verdicts as on the source, which the shards were made of
        report.verdicts += judge_labels(
            shards.classes, report.shards, train=cfg.train_split, evaluation=cfg.eval_split
        )
    readers = {name: ShardReader(split) for name, split in shards.splits.items()}
    pictures: list[Picture] = []
    for scan, sample_id in _chosen(report.shards, cfg.pictures):
        split = shards.split(scan.name)
        try:
            image, mask = load_from_shards(split, readers[scan.name], sample_id)
        except DataError:
            continue
        pictures.append((f"{scan.name}/{split.key(sample_id)}", image, mask))
    if pictures:
        write_sheet(Path(cfg.output) / "shards.png", pictures, classes=shards.classes, palette=shards.palette)


def _same_source(report: Report) -> list[Verdict]:
    """A warning for each split of which the source has changed since it was sharded."""
    folder = {scan.name: scan for scan in report.source if scan.samples}
    return [
        Verdict(
            WARN,
            f"shards {scan.name}",
            f"{scan.samples} samples, the source folder has {folder[scan.name].samples}; "
            "shard again if none were left out on purpose (data.min_share)",
        )
        for scan in report.shards
        if scan.name in folder and folder[scan.name].samples != scan.samples
    ]


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values."""

    def split(scan: SplitScan) -> dict[str, Any]:
        return {
            "samples": scan.samples,
            "class_pixels": scan.class_pixels.tolist(),
            "class_images": scan.class_images.tolist(),
            "ignored_pixels": scan.ignored_pixels,
            "ignored_images": scan.ignored_images,
            "raw_pixels": {str(raw): pixels for raw, pixels in sorted(scan.raw_pixels.items())},
            "sizes": {name: [height, width] for name, height, width in sizes(scan)},
            "defects": {kind: dataclasses.asdict(defect) for kind, defect in scan.defects.items()},
        }

    memory = report.memory
    return {
        "may_start": report.may_start,
        "verdicts": [dataclasses.asdict(verdict) for verdict in report.verdicts],
        "classes": report.classes,
        "source": {scan.name: split(scan) for scan in report.source},
        "shards": {scan.name: split(scan) for scan in report.shards},
        "memory_bytes": None if memory is None else memory.parts | {"total": memory.total},
    }


def as_text(report: Report) -> str:
    """Tables of splits and classes, then the verdicts, worst last."""
    lines = []
    for title, scans in (("source", report.source), ("shards", report.shards)):
        for scan in scans:
            area = ", ".join(f"{name} {width} x {height}" for name, height, width in sizes(scan))
            lines.append(f"{title} {scan.name}: {scan.samples} samples{'; ' + area if area else ''}")
    lines += _class_table(report)
    width = max((len(verdict.about) for verdict in report.verdicts), default=0)
    for level in (OK, WARN, FAIL):
        lines += [
            f"{verdict.level:<4}  {verdict.about:<{width}}  {verdict.text}"
            for verdict in report.verdicts
            if verdict.level == level
        ]
    return "\n".join(lines)


def _class_table(report: Report) -> list[str]:
    """Share of the labelled pixels, and images that hold the class, per split."""
    scans = [scan for scan in report.shards or report.source if len(scan.class_pixels) == len(report.classes)]
    if not scans or not report.classes:
        return []
    width = max(len("class"), *(len(name) for name in report.classes))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{scan.name:>8} %  {'images':>7}" for scan in scans)])]
    for label, name in enumerate(report.classes):
        cells = [
            f"{100 * scan.class_pixels[label] / max(1, int(scan.class_pixels.sum())):>8.2f}    "
            f"{scan.class_images[label]:>6}"
            for scan in scans
        ]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    totals = [int(scan.class_pixels.sum()) + scan.ignored_pixels for scan in scans]
    ignored = [
        f"{100 * scan.ignored_pixels / max(1, total):>8.2f}    {scan.ignored_images:>6}"
        for scan, total in zip(scans, totals, strict=True)
    ]
    return [*lines, "  ".join([f"{'ignored':<{width}}", *ignored])]
