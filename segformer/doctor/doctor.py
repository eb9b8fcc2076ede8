"""Look at data and settings before a run: everything that would end or spoil it, in one pass.

    source   every file of the folder that data_prep/shard.py would read
    shards   what training reads: index, digest, a sample of the images
    run      classes, batch arithmetic, readers against chunks, memory of a GPU, and what would waste the hour
             (advice.py); with measure=true three steps of it (measure.py)

A recipe that sizes itself (experiment=scratch) is judged with the numbers that it takes from the shards.

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
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segformer.data.formats.table import resolved
from segformer.data.shards.format import ShardSet
from segformer.data.sources.content import FAIL, OK, WARN, Finding, Labels, other_classes
from segformer.data.sources.dataset import DIVISION, class_palette
from segformer.data.sources.folder import no_root
from segformer.data.sources.listing import class_folders
from segformer.doctor.advice import facts_of, judge_recipe
from segformer.doctor.judge import (
    judge_alike,
    judge_batch,
    judge_labels,
    judge_memory,
    judge_settings,
    judge_source,
)
from segformer.doctor.measure import Measured, judge_measured, measure
from segformer.doctor.memory import forecast
from segformer.doctor.scan import SplitScan, scan_folder, scan_shards
from segformer.errors import ConfigError, DataError, at_least, printable, reported, reraise_as, say
from segformer.evaluation.drawing import beside, grid, legend, panels, write_picture
from segformer.files import write_atomic
from segformer.models.variants import LEAST_SIDE
from segformer.training.config import RunConfig
from segformer.training.sizing import needs_sizing, sized, with_values
from segformer.training.task import check_settings, training_crop

CELL = 240  # long side of a picture on a contact sheet, pixels
COLUMNS = 3  # pairs beside each other
FONT = 18


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
    measure: bool = False
    "Train three steps on this device: seconds, memory and hours of the run. Needs shards."

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
    memory: dict[str, int] | None = None
    measured: Measured | None = None
    sheets: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Contact sheets, PIL images, by file name."""

    def add(self, level: str, about: str, text: str) -> None:
        self.findings.append(Finding(level, about, text))

    def failing(self, about: str) -> contextlib.AbstractContextManager[None]:
        """An error of the block becomes a finding."""
        return reported(lambda error: self.add(FAIL, about, str(error)))

    @property
    def failures(self) -> int:
        """The number of findings that are FAIL."""
        return sum(finding.level == FAIL for finding in self.findings)


def doctor(cfg: DoctorConfig) -> None:
    """Look at everything, print it, write the files; DataError where training should not start."""
    output = Path(cfg.output)
    report = look(cfg)
    with reraise_as(ConfigError, f"output={output} can't be written", "choose another"):
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "doctor.json", json.dumps(as_json(report), indent=1) + "\n")
        for name, sheet in report.sheets.items():
            write_picture(output / f"{name}.png", sheet)
    print(as_text(report))
    say(f"files: {output}")
    if report.failures:
        count = len(report.findings)
        raise DataError(f"training should not start: {report.failures} of {count} checks failed (see FAIL)")
    warnings = sum(finding.level == WARN for finding in report.findings)
    seen = f"{warnings} warnings, nothing that stops training" if warnings else "nothing was found"
    sheets = " and ".join(str(output / f"{name}.png") for name in report.sheets)
    say(f"{seen}; look at {sheets}: do the masks fit?" if sheets else seen)
    if report.shards:
        own = {field.name for field in dataclasses.fields(DoctorConfig)} - {
            field.name for field in dataclasses.fields(RunConfig)
        }
        kept = [word for word in sys.argv[1:] if "=" in word and word.partition("=")[0] not in own]
        say(f"next: python launch/train.py {shlex.join(kept)}".rstrip())


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
        _look_at_run(cfg, shards, report)
    if cfg.measure and not report.failures:
        _measure(cfg, shards, report)
    return report


def _look_at_source(cfg: DoctorConfig, root: Path, report: Report) -> None:
    if not root.is_dir():
        report.add(FAIL, "source", no_root(root))
        return
    with contextlib.suppress(DataError):  # a finding on the listing says why
        cfg = dataclasses.replace(cfg, data=resolved(cfg.data, root))
        is_named = cfg.data.classes or cfg.data.task == "segmentation"
        report.classes = list(cfg.data.classes) if is_named else class_folders(cfg.data, root)
    report.source = [
        scan_folder(cfg.data, root, name, num_classes=len(report.classes), threads=cfg.threads)
        for name in cfg.data.splits
    ]
    report.findings += judge_source(cfg.data, report.source)
    labels = Labels.configured(cfg.data, report.classes)
    report.findings += judge_labels(labels, report.source, cfg.train_split, cfg.eval_split)
    palette = class_palette(dataclasses.replace(cfg.data, classes=report.classes))
    _draw_sheet(cfg, report, "source", report.source, palette)


def _open(cfg: DoctorConfig, report: Report) -> ShardSet | None:
    """The shards; None where there are none yet, with a finding where the source is not there either."""
    where = cfg.data.shards
    if "://" not in where and not Path(where).exists() and report.source:
        report.add(WARN, "shards", f"{where!r} is not there yet; write it with data_prep/shard.py")
        return None
    with report.failing("shards"):
        return ShardSet.open(where, cfg.loader.storage)
    return None


def _look_at_shards(cfg: DoctorConfig, shards: ShardSet, report: Report) -> None:
    folder = {scan.name: scan.samples for scan in report.source if scan.samples}
    for name, split in shards.splits.items():
        about, content = f"shards {name}", shards.content["splits"][name]
        scan = scan_shards(split, content, read=cfg.read, seed=cfg.seed)
        report.shards.append(scan)
        for kind, places in scan.defects.items():
            report.add(FAIL, about, f"{places.count} {kind}: {places}; copy or shard the data again")
        if not scan.defects:
            text = f"{scan.samples} samples in {len(split.files)} shards; {len(scan.holders[-1])} read"
            report.add(OK, about, f"{text} and decoded")
        if folder.get(name, scan.samples) != scan.samples:
            text = f"{scan.samples} samples, the source folder has {folder[name]}; shard again"
            report.add(WARN, about, f"{text} if none were left out on purpose (data.min_share)")
    if report.classes and report.classes != shards.classes:
        text = other_classes(report.classes, shards.classes, cfg.data.shards)
        report.add(FAIL, "shards: classes", text)
    report.classes = list(shards.classes)
    labels = Labels.of(shards.content, cfg.data)
    judged = judge_labels(labels, report.shards, cfg.train_split, cfg.eval_split)
    report.findings += [finding for finding in judged if finding not in report.findings]
    division = {key: shards.content[key] for key in DIVISION if key in shards.content}
    pool = dataclasses.replace(cfg.data, splits=list(shards.splits), **division)
    alike = judge_alike(pool, report.shards, ", and shard again")
    report.findings += [] if report.source else [*alike]
    _draw_sheet(cfg, report, "shards", report.shards, shards.palette)


def _look_at_run(cfg: DoctorConfig, shards: ShardSet | None, report: Report) -> None:
    scans = report.shards or report.source
    samples, num_classes = {scan.name: scan.samples for scan in scans}, len(report.classes)
    with report.failing("settings"):
        check_settings(cfg)
    report.findings += judge_settings(cfg, num_classes, (shards or cfg.data).channels, samples)
    if report.failures and needs_sizing(cfg):
        return
    with report.failing("recipe"):
        cfg = _worked_out(cfg, shards, report)
    if needs_sizing(cfg):
        return
    with report.failing("batch"):
        batch = cfg.batch_shape(cfg.ranks)
        sizes = {} if shards is None else {n: split.shard_sizes for n, split in shards.splits.items()}
        report.findings += judge_batch(cfg, batch, samples, sizes)
        if min(training_crop(cfg)) >= LEAST_SIDE:
            channels = cfg.data.channels if shards is None else shards.channels
            network = with_values(cfg, {"model.in_channels": channels})
            report.memory = forecast(network, num_classes, batch)
            report.findings.append(judge_memory(report.memory, cfg.gpu_gib))
    if facts := facts_of(cfg, scans, report.classes, _device(cfg) != "cpu", cfg.ranks):
        report.findings += judge_recipe(cfg, facts)


def _worked_out(cfg: DoctorConfig, shards: ShardSet | None, report: Report) -> DoctorConfig:
    """The settings with the numbers that the recipe takes from the shards; as they are without these."""
    if shards is None:
        if needs_sizing(cfg):
            text = "its numbers are worked out from the shards; look again when they are there"
            report.add(OK, "recipe", text)
        return cfg
    found, lines = sized(cfg, shards, device=_device(cfg), world_size=cfg.ranks)
    for line in lines:
        report.add(OK, "recipe", line)
    assert isinstance(found, DoctorConfig)
    return found


def _device(cfg: DoctorConfig) -> str:
    """Type of the devices of the run that is planned."""
    return "cuda" if cfg.gpu_gib is not None or torch.cuda.is_available() else "cpu"


def _measure(cfg: DoctorConfig, shards: ShardSet | None, report: Report) -> None:
    if shards is None:
        report.add(WARN, "measured", "measure=true needs shards; write them with data_prep/shard.py")
        return
    with report.failing("measured"):
        found, _ = sized(cfg, shards, device=_device(cfg), world_size=cfg.ranks)
        report.measured = measure(found, shards, found.batch_shape(cfg.ranks))
        report.findings.append(judge_measured(found, report.measured))


def _draw_sheet(
    cfg: DoctorConfig, report: Report, name: str, scans: list[SplitScan], palette: np.ndarray
) -> None:
    """A contact sheet of the first split, which is trained on, and half as many samples of the others."""
    rest = cfg.pictures // (2 * (len(scans) - 1)) if len(scans) > 1 else 0
    cells, masks = [], []
    for index, scan in enumerate(scans):
        for sample in scan.choose(rest if index else cfg.pictures - rest * (len(scans) - 1)):
            caption, picture = scan.load(sample)
            if picture is None:
                continue
            image, mask = picture
            shown = [] if mask is None else [mask]
            masks += shown
            caption += " (mask not understood)" if mask is None and cfg.data.task == "segmentation" else ""
            cells.append((f"{scan.name}/{caption}", beside(panels(image, shown, palette, CELL, 0.7))))
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
        "memory_bytes": memory and memory | {"total": sum(memory.values())},
        "measured": report.measured and report.measured.to_dict(),
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
    return "\n".join(map(printable, lines))


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
