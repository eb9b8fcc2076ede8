"""A copy of the code beside the run: a job that starts in two days runs what was submitted today.

<target>/segformer launch conf data_prep pyproject.toml     as they were
<target>/CODE.json      git commit, whether files differed from it, sha256 over all files
<target>/CODE.diff      the difference to the commit, where there is one
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError

PARTS = ("segformer", "launch", "conf", "data_prep", "pyproject.toml")
LEFT_OUT = ("data_prep/sample",)  # data, which shards are made of, not code


def snapshot(root: Path, target: Path) -> dict[str, Any]:
    """Copy the code under `root` to `target`, which appears whole or not at all; what CODE.json says.

    Files that git ignores are left out; without git everything but caches is taken.

    Raises:
        ConfigError: a file can't be read or written.
    """
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        digest = hashlib.sha256()
        for name in sorted(_files(root)):
            source, copy = root / name, temporary / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            copy.write_bytes(content)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        difference = _git(root, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", *PARTS)
        commit = _git(root, "rev-parse", "HEAD")
        new = _git(root, "ls-files", "-o", "--exclude-standard", "--", *PARTS)
        found = {
            "commit": commit.decode().strip() if commit else None,
            "changed": bool(difference or new) if difference is not None and new is not None else None,
            "sha256": digest.hexdigest(),
        }
        (temporary / "CODE.json").write_text(json.dumps(found, indent=1) + "\n")
        if difference:
            (temporary / "CODE.diff").write_bytes(difference)
        temporary.rename(target)
    except OSError as error:
        raise ConfigError(
            f"the code can't be copied to {target}: {error.strerror}: {error.filename}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _files(root: Path) -> list[str]:
    listed = _git(root, "ls-files", "-z", "-c", "-o", "--exclude-standard", "--", *PARTS)
    if listed is not None:
        names = [name for name in map(os.fsdecode, listed.split(b"\0")) if name and (root / name).is_file()]
    else:
        names = [
            str(path.relative_to(root))
            for part in PARTS
            for path in ([root / part] if (root / part).is_file() else sorted((root / part).rglob("*")))
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return [name for name in names if not name.startswith(tuple(f"{left}/" for left in LEFT_OUT))]


def _git(root: Path, *command: str) -> bytes | None:
    """What git prints; None where it, or the repository, is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
