"""What a run ran on and by which command: the row "start" that each of its starts has in metrics.jsonl.

    {"kind": "start", "step", "time" (UTC), "command", "devices", "python", "segformer", "torch", "deepspeed",
     "commit"}

Host, user and environment are left out, and so are arguments whose name or value is that of a secret.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from segformer.distributed.world import World
from segformer.telemetry.trackers import without_secrets

ROOT = Path(__file__).resolve().parents[2]


def start_row(world: World) -> dict[str, str | None]:
    """The fields of the row, beside its kind and step."""
    return {
        "time": now(),
        "command": command_line(sys.argv),
        "devices": f"{world.size} x {device_name(world.device)}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("segformer", "torch", "deepspeed")},
        "commit": commit(ROOT),
    }


def now() -> str:
    """Date and time in UTC: 2026-03-01T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line(argv: Sequence[str]) -> str:
    """A command as a shell takes it, without the overrides that hold a secret and the passwords of URLs."""
    pairs = ((argument, *argument.partition("=")[::2]) for argument in argv)
    kept = (argument for argument, key, value in pairs if without_secrets({key: value or key}))
    return shlex.join(re.sub(r"(?<=://)[^/@\s]+@", "", argument) for argument in kept)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())} ({len(os.sched_getaffinity(0))} cores)"


def commit(root: Path) -> str | None:
    """The git commit of the code under `root`, with " and changes" where files differ from it.

    A copy that a Slurm run made (slurm/code.py) says it in CODE.json. None for an installed package, also one
    that lies below a repository of somebody else.
    """
    if (copied := root / "CODE.json").is_file():
        found = json.loads(copied.read_text())
        return found["commit"] and found["commit"] + (" and changes" if found["changed"] else "")
    if git(root, "ls-files", "--error-unmatch", "segformer/__init__.py") is None:
        return None
    head, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", "-uno")
    return head.decode().strip() + (" and changes" if changes else "") if head else None


def _version(package: str) -> str | None:
    """The version of a package; None where it is not installed, as our own need not be in a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(root: Path, *command: str) -> bytes | None:
    """Output of git; None where it, or the repository, is not there."""
    # A wheel may lie below the repository of something else.
    if not shutil.which("git") or not (root / ".git").exists():
        return None
    line = ["git", "--no-optional-locks", "-C", str(root), *command]
    done = subprocess.run(line, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None
