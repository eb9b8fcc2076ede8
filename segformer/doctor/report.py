"""What the doctor found: findings, the facts behind them, and both as text and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

from segformer.data.sources.content import FAIL, OK, WARN, Finding
from segformer.doctor.measure import Measured
from segformer.doctor.scan import SplitScan
from segformer.errors import printable, reported


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
    sets: dict[str, Report] = dataclasses.field(default_factory=dict)
    """Of a mixture what was found in each set; `findings` and `sheets` have theirs, too."""

    def add(self, level: str, about: str, text: str) -> None:
        self.findings.append(Finding(level, about, text))

    def failing(self, about: str) -> contextlib.AbstractContextManager[None]:
        """An error of the block becomes a finding."""
        return reported(lambda error: self.add(FAIL, about, str(error)))

    @property
    def failures(self) -> int:
        """The number of findings that are FAIL."""
        return sum(finding.level == FAIL for finding in self.findings)


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
    sets = {
        name: {"classes": one.classes, "shards": {scan.name: split(scan) for scan in one.shards}}
        for name, one in report.sets.items()
    }
    return ({"sets": sets} if sets else {}) | {
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
    for of, one in (("", report), *((f"{name} ", one) for name, one in report.sets.items())):
        for title, scans in (("source", one.source), (f"{of}shards", one.shards)):
            for scan in scans:
                area = ", ".join(f"{name} {width} x {height}" for name, height, width in scan.sizes())
                lines.append(f"{title} {scan.name}: {scan.samples} samples{'; ' + area if area else ''}")
        lines += _class_table(one)
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
