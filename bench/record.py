"""Tables of measurements as CSV: what was measured, and under which conditions, in every row."""

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = ("command", "commit", "date", "hardware", "versions")


def conditions(packages: Sequence[str] = ("numpy", "opencv-python-headless", "torch")) -> dict[str, str]:
    """Command, commit, date (UTC), hardware and versions of this process."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{len(os.sched_getaffinity(0))} cores, {_processor()}, {_memory_gib():.0f} GiB",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
        ),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], found: Mapping[str, str]) -> None:
    """Write rows with the conditions as their last columns, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *found], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **found} for row in rows)
    temporary.replace(path)
    print(f"written: {path}")


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """median, least, most and least / most of repeated measurements, rounded to significant digits."""
    low, high = min(values), max(values)
    found = {"median": median(values), "min": low, "max": high, "min/max": low / high if high else 1.0}
    return {name: float(f"{value:.{digits}g}") for name, value in found.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text."""
    head = list(rows[0])
    cells = [head, *([str(row[name]) for name in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells
    )


def _commit() -> str:
    """The short hash of HEAD, with + where files differ from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
