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

import numpy as np
import torch

from segformer.checkpoint.format import TrainState
from segformer.data.formats.table import resolved
from segformer.data.loading.mixture import Mixture
from segformer.data.loading.order import MixedOrder
from segformer.data.shards.format import ShardSet
from segformer.data.sources.content import FAIL, OK, WARN, Labels, other_classes
from segformer.data.sources.dataset import DIVISION, class_palette
from segformer.data.sources.folder import no_root
from segformer.data.sources.listing import class_folders
from segformer.doctor.advice import facts_of, judge_recipe
from segformer.doctor.judge import (
    judge_alike,
    judge_batch,
    judge_labels,
    judge_memory,
    judge_sets,
    judge_settings,
    judge_source,
)
from segformer.doctor.measure import judge_measured, measure
from segformer.doctor.memory import forecast
from segformer.doctor.report import Report, as_json, as_text
from segformer.doctor.scan import SplitScan, scan_folder, scan_shards
from segformer.errors import ConfigError, DataError, at_least, reraise_as, say
from segformer.evaluation.drawing import beside, grid, legend, panels, write_picture
from segformer.files import write_atomic
from segformer.models.variants import LEAST_SIDE
from segformer.training.config import RunConfig
from segformer.training.directory import check_start
from segformer.training.header import set_lines
from segformer.training.run import sample_order
from segformer.training.sizing import Facts, needs_sizing, sized, with_values
from segformer.training.task import check_data, check_settings, open_shards, training_crop

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
    if report.shards or report.sets:
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
    shards: ShardSet | Mixture | None = None
    if cfg.mixture.sets:
        with report.failing("mixture"):
            check_start(cfg)
            shards = open_shards(cfg)
    elif cfg.data.shards:
        shards = _open(cfg, report)
    if isinstance(shards, Mixture):
        _look_at_sets(cfg, shards, report)
    elif shards is not None:
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


def _look_at_sets(cfg: DoctorConfig, mixture: Mixture, report: Report) -> None:
    """Each set as if it were alone, and what the run makes of them."""
    report.classes = list(mixture.classes)
    for name, shards in mixture.sets.items():
        report.sets[name] = one = Report()
        _look_at_shards(cfg, shards, one)
        for finding in one.findings:
            report.add(finding.level, f"{name}: {finding.about}", finding.text)
        report.sheets |= {f"{sheet}-{name}": picture for sheet, picture in one.sheets.items()}
    if not report.failures:
        with report.failing("mixture"):
            check_data(cfg, mixture)
    report.findings += judge_sets(
        {name: one.shards for name, one in report.sets.items()}, cfg.train_split, cfg.eval_split
    )


def _look_at_run(cfg: DoctorConfig, shards: ShardSet | Mixture | None, report: Report) -> None:
    scans, num_classes = report.shards or report.source, len(report.classes)
    samples = {scan.name: scan.samples for scan in scans}
    if isinstance(shards, Mixture):
        samples = {name: shards.split(name).num_samples for name in (cfg.train_split, cfg.eval_split)}
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
        if isinstance(shards, Mixture):
            order = sample_order(cfg, shards.split(cfg.train_split), TrainState())
            assert isinstance(order, MixedOrder)
            for line in set_lines(cfg, shards, order):
                report.add(OK, "mixture", line.strip())
        splits = shards.splits if isinstance(shards, ShardSet) else {}
        sizes = {name: split.shard_sizes for name, split in splits.items()}
        report.findings += judge_batch(cfg, batch, samples, sizes)
        if min(training_crop(cfg)) >= LEAST_SIDE:
            channels = cfg.data.channels if shards is None else shards.channels
            network = with_values(cfg, {"model.in_channels": channels})
            report.memory = forecast(network, num_classes, batch)
            report.findings.append(judge_memory(report.memory, cfg.gpu_gib))
    facts = facts_of(cfg, scans, report.classes, _device(cfg) != "cpu", cfg.ranks)
    if isinstance(shards, Mixture):
        facts = Facts.of(cfg, shards, _device(cfg), cfg.ranks)
    if facts:
        report.findings += judge_recipe(cfg, facts)


def _worked_out(cfg: DoctorConfig, shards: ShardSet | Mixture | None, report: Report) -> DoctorConfig:
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


def _measure(cfg: DoctorConfig, shards: ShardSet | Mixture | None, report: Report) -> None:
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
