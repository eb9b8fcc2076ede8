"""Look at data and settings before a run: everything that would end or spoil it, in one pass.

    source   every file of the folder that data_prep/shard.py would read
    shards   what training reads: index, digest, a sample of the images
    run      classes, batch arithmetic, readers against chunks, memory of a GPU

    output/doctor.json   findings and numbers
    output/source.png    contact sheets: samples beside their colored masks, rare classes first
    output/shards.png

What the settings do not name is not looked at: without `root` (or data.root) no source, without existing
data.shards no shards; one of them is needed. Ends with exit code 0 when training may start and 2 when a
finding is FAIL; a WARN never stops anybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segformer.data.loading.order import BatchShape
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.dataset import class_palette
from segformer.data.sources.listing import class_folders
from segformer.distributed.engine import resolve_stage
from segformer.doctor.judge import (
    FAIL,
    LEAST_SIDE,
    OK,
    WARN,
    Finding,
    judge_batch,
    judge_labels,
    judge_memory,
    judge_settings,
    judge_source,
)
from segformer.doctor.memory import Forecast, forecast
from segformer.doctor.scan import SplitScan, load_from_folder, load_from_shards, scan_folder, scan_shards
from segformer.errors import ConfigError, DataError, SegformerError, at_least
from segformer.evaluation.drawing import beside, grid, legend, panels
from segformer.training.config import RunConfig
from segformer.training.optim import OPTIMIZERS
from segformer.training.task import training_crop

CELL = 240  # long side of a picture on a contact sheet, pixels
COLUMNS = 3  # pairs beside each other
FONT = 18

Picture = tuple[np.ndarray, np.ndarray | None]
"""(image uint8 (H, W, 3), mask uint8 (H, W) of train ids and 255, or None)"""


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
        at_least(self, "", ranks=1, threads=-1, read=-1, pictures=0)
        if self.gpu_gib is not None and self.gpu_gib <= 0:
            raise ConfigError(f"gpu_gib={self.gpu_gib} must be above 0")


@dataclass(kw_only=True, slots=True)
class Report:
    """Findings, and the facts behind them."""

    findings: list[Finding] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)
    source: list[SplitScan] = dataclasses.field(default_factory=list)
    shards: list[SplitScan] = dataclasses.field(default_factory=list)
    memory: Forecast | None = None
    sheets: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Contact sheets, PIL images, by file name."""

    def add(self, level: str, about: str, text: str) -> None:
        self.findings.append(Finding(level, about, text))

    @property
    def failures(self) -> int:
        """The number of findings that are FAIL."""
        return sum(finding.level == FAIL for finding in self.findings)


def doctor(cfg: DoctorConfig) -> None:
    """Look at everything, print it, write the files; DataError where training should not start."""
    output = Path(cfg.output)
    report = look(cfg)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "doctor.json").write_text(json.dumps(as_json(report), indent=1) + "\n")
        for name, sheet in report.sheets.items():
            sheet.save(output / f"{name}.png")
    except OSError as error:
        raise ConfigError(f"output={output} can't be written: {error.strerror}; choose another") from error
    print(as_text(report))
    print(f"files: {output}")
    if report.failures:
        count = len(report.findings)
        raise DataError(f"training should not start: {report.failures} of {count} checks failed (see FAIL)")


def look(cfg: DoctorConfig) -> Report:
    """Scan, judge and draw; nothing that is wrong with the data is raised."""
    report = Report(classes=list(cfg.data.classes))
    root = "" if cfg.root == "-" else cfg.root or cfg.data.root
    if root and (cfg.root or Path(root).is_dir()):
        _look_at_source(cfg, Path(root), report)
    shards = _open(cfg, report) if cfg.data.shards else None
    if shards is not None:
        _look_at_shards(cfg, shards, report)
    if not report.findings:
        report.add(FAIL, "data", "nothing to look at; give root=<source folder> or data.shards=<shards>")
    if cfg.data.task == "segmentation" and report.classes:
        sizes = {} if shards is None else {n: split.shard_sizes for n, split in shards.splits.items()}
        _look_at_run(cfg, sizes, report)
    return report


def _look_at_source(cfg: DoctorConfig, root: Path, report: Report) -> None:
    if not root.is_dir():
        report.add(FAIL, "source", f"{str(root)!r} is not a folder; give root=<folder of the data set>")
        return
    if cfg.data.task == "classification" and not report.classes:
        with contextlib.suppress(DataError):  # a finding on the listing says why
            report.classes = class_folders(cfg.data, root)
    report.source = [
        scan_folder(cfg.data, root, name, num_classes=len(report.classes), threads=cfg.threads)
        for name in cfg.data.splits
    ]
    report.findings += judge_source(cfg.data, report.source)
    report.findings += judge_labels(
        report.classes, report.source, train=cfg.train_split, evaluation=cfg.eval_split
    )
    palette = class_palette(dataclasses.replace(cfg.data, classes=report.classes))

    def load(scan: SplitScan, sample: Any) -> tuple[str, Picture | None]:
        return f"{scan.name}/{sample.key}", load_from_folder(cfg.data, sample)

    _draw_sheet(cfg, report, "source", load, palette)


def _open(cfg: DoctorConfig, report: Report) -> ShardSet | None:
    """The shards; None where there are none yet, with a finding where the source is not there either."""
    where = cfg.data.shards
    if "://" not in where and not Path(where).exists() and report.source:
        report.add(WARN, "shards", f"{where!r} is not there yet; write it with data_prep/shard.py")
        return None
    try:
        return ShardSet.open(where, cfg.loader.storage)
    except SegformerError as error:
        report.add(FAIL, "shards", str(error))
        return None


def _look_at_shards(cfg: DoctorConfig, shards: ShardSet, report: Report) -> None:
    folder = {scan.name: scan.samples for scan in report.source if scan.samples}
    for name, split in shards.splits.items():
        scan = scan_shards(split, shards.content["splits"][name], read=cfg.read, seed=cfg.seed)
        report.shards.append(scan)
        for kind, places in scan.defects.items():
            text = f"{places.count} {kind}: {'; '.join(places.examples)}; copy or shard the data again"
            report.add(FAIL, f"shards {name}", text)
        if not scan.defects:
            read = split.num_samples if cfg.read < 0 else min(cfg.read, split.num_samples)
            text = f"{split.num_samples} samples in {len(split.files)} shards; {read} read and decoded"
            report.add(OK, f"shards {name}", text)
        if folder.get(name, scan.samples) != scan.samples:
            text = f"{scan.samples} samples, the source folder has {folder[name]}; shard again"
            report.add(WARN, f"shards {name}", f"{text} if none were left out on purpose (data.min_share)")
    if report.classes and report.classes != shards.classes:
        text = (
            f"data.classes has {len(report.classes)} classes, the shards were written with "
            f"{len(shards.classes)} ({', '.join(shards.classes[:4])}, ...); shard again or change data"
        )
        report.add(FAIL, "shards: classes", text)
    report.classes = list(shards.classes)
    if not report.source:  # the same findings as on the source, which the shards were made of
        report.findings += judge_labels(
            shards.classes, report.shards, train=cfg.train_split, evaluation=cfg.eval_split
        )
    readers = {name: ShardReader(split) for name, split in shards.splits.items()}

    def load(scan: SplitScan, sample_id: Any) -> tuple[str, Picture | None]:
        split = shards.split(scan.name)
        try:
            picture = load_from_shards(split, readers[scan.name], sample_id)
        except DataError:
            picture = None  # a finding names it
        return f"{scan.name}/{split.key(sample_id)}", picture

    _draw_sheet(cfg, report, "shards", load, shards.palette)


def _look_at_run(cfg: DoctorConfig, shard_sizes: dict[str, list[int]], report: Report) -> None:
    samples = {scan.name: scan.samples for scan in report.shards or report.source}
    num_classes = len(report.classes)
    report.findings += judge_settings(cfg, num_classes, samples)
    try:
        batch = cfg.batch_shape(cfg.ranks)
    except ConfigError as error:
        report.add(FAIL, "batch", str(error))
        return
    report.findings += judge_batch(cfg, batch, samples, shard_sizes)
    if min(training_crop(cfg)) >= LEAST_SIDE:
        report.memory = _forecast(cfg, num_classes, batch)
        report.findings.append(judge_memory(report.memory, cfg.gpu_gib))


def _forecast(cfg: RunConfig, num_classes: int, batch: BatchShape) -> Forecast:
    return forecast(
        cfg.model,
        num_classes,
        crop=training_crop(cfg),
        micro_batch=batch.micro_batch,
        world_size=batch.world_size,
        zero_stage=resolve_stage(cfg.engine, torch.device("cuda")),
        precision="fp32" if cfg.engine.precision == "fp32" else "bf16",
        loss_terms=max(1, len(cfg.loss.terms)),
        bucket=cfg.engine.extra.get("zero_optimization", {}).get("reduce_bucket_size"),
        offload=cfg.engine.offload_optimizer,
        ema=cfg.optim.ema > 0,
        moments=len(OPTIMIZERS[cfg.optim.name].states),
        task=cfg.data.task,
    )


def _draw_sheet(
    cfg: DoctorConfig,
    report: Report,
    name: str,
    load: Callable[[SplitScan, Any], tuple[str, Picture | None]],
    palette: np.ndarray,
) -> None:
    """A contact sheet of the first split, which is trained on, and half as many samples of the others."""
    scans = report.source if name == "source" else report.shards
    rest = cfg.pictures // (2 * (len(scans) - 1)) if len(scans) > 1 else 0
    counts = [cfg.pictures - rest * (len(scans) - 1), *[rest] * (len(scans) - 1)]
    cells, masks = [], []
    for scan, count in zip(scans, counts, strict=True):
        for sample in scan.choose(count):
            caption, picture = load(scan, sample)
            if picture is None:
                continue
            image, mask = picture
            masks += [] if mask is None else [mask]
            caption += " (mask not understood)" if mask is None and cfg.data.task == "segmentation" else ""
            shown = panels(image, [] if mask is None else [mask], palette, CELL, 0.7)
            cells.append((caption, beside(shown)))
    if cells:
        entries = legend(masks, report.classes, palette)
        report.sheets[name] = grid(cells, entries, columns=COLUMNS, font_size=FONT)


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
            "sizes": {name: [height, width] for name, height, width in scan.sizes()},
            "defects": {kind: dataclasses.asdict(places) for kind, places in scan.defects.items()},
        }

    memory = report.memory
    return {
        "may_start": not report.failures,
        "verdicts": [dataclasses.asdict(finding) for finding in report.findings],
        "classes": report.classes,
        "source": {scan.name: split(scan) for scan in report.source},
        "shards": {scan.name: split(scan) for scan in report.shards},
        "memory_bytes": None if memory is None else memory.parts | {"total": memory.total},
    }


def as_text(report: Report) -> str:
    """Tables of splits and classes, then the findings, worst last."""
    lines = []
    for title, scans in (("source", report.source), ("shards", report.shards)):
        for scan in scans:
            area = ", ".join(f"{name} {width} x {height}" for name, height, width in scan.sizes())
            lines.append(f"{title} {scan.name}: {scan.samples} samples{'; ' + area if area else ''}")
    lines += _class_table(report)
    width = max((len(finding.about) for finding in report.findings), default=0)
    for finding in sorted(report.findings, key=lambda finding: (OK, WARN, FAIL).index(finding.level)):
        lines.append(f"{finding.level:<4}  {finding.about:<{width}}  {finding.text}")
    return "\n".join(lines)


def _class_table(report: Report) -> list[str]:
    """Share of the labelled pixels, and images that hold the class, per split; `ignored` of all pixels."""
    scans = [scan for scan in report.shards or report.source if scan.num_classes == len(report.classes)]
    if not scans or not report.classes:
        return []
    rows = [("class", [f"{scan.name:>8} %  {'images':>7}" for scan in scans])]

    def cell(scan: SplitScan, pixels: int, images: int, more: int = 0) -> str:
        return f"{100 * pixels / max(1, int(scan.class_pixels.sum()) + more):>8.2f}    {images:>6}"

    for k, name in enumerate(report.classes):
        rows.append((name, [cell(scan, scan.class_pixels[k], scan.class_images[k]) for scan in scans]))
    width = max(len(name) for name, _ in rows)
    ignored = [cell(s, s.ignored_pixels, s.ignored_images, more=s.ignored_pixels) for s in scans]
    return ["  ".join([f"{name:<{width}}", *cells]) for name, cells in [*rows, ("ignored", ignored)]]
