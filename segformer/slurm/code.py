"""A copy of the code beside the run: a job that starts in two days runs what was submitted today.

<target>/segformer launch conf data_prep pyproject.toml     as they were; of a wheel segformer/ has the others
<target>/CODE.json      git commit, whether files differed from it, sha256 over all files
<target>/CODE.diff      the difference to the commit, where there is one
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError, reraise_as
from segformer.files import HOME, PACKAGE, staged
from segformer.telemetry.machine import git

ROOT = PACKAGE.parent
PARTS = ("segformer", "launch", "conf", "data_prep", "pyproject.toml") if HOME == ROOT else ("segformer",)
INSIDE = HOME.relative_to(ROOT)  # where launch/ and data_prep/ are, here and in a copy
LEFT_OUT = "data_prep/sample/"  # data, which shards are made of, not code


def copy_code(root: Path, target: Path) -> dict[str, Any]:
    """Copy the code under `root` to `target`, which appears whole or not at all; what CODE.json says.

    Files that git ignores are left out; without git everything but caches is taken.

    Raises:
        ConfigError: a file can't be read or written.
    """
    difference = git(root, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", *PARTS)
    commit = git(root, "rev-parse", "HEAD")
    new = git(root, "ls-files", "-o", "--exclude-standard", "--", *PARTS)
    digest = hashlib.sha256()
    with reraise_as(ConfigError, f"the code can't be copied to {target}"), staged(target) as folder:
        for name in sorted(_files(root)):
            with reraise_as(ConfigError, f"{root / name} can't be copied to {target}"):
                copy, content = folder / name, (root / name).read_bytes()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        found = {
            "commit": commit.decode().strip() if commit else None,
            "changed": None if difference is None or new is None else bool(difference or new),
            "sha256": digest.hexdigest(),
        }
        (folder / "CODE.json").write_text(json.dumps(found, indent=1) + "\n")
        if difference:
            (folder / "CODE.diff").write_bytes(difference)
    return found


def _files(root: Path) -> list[str]:
    listed = git(root, "ls-files", "-z", "-c", "-o", "--exclude-standard", "--", *PARTS)
    if listed is None:
        paths = [path for part in PARTS for path in [root / part, *(root / part).rglob("*")]]
        names = [str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts]
    else:
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    return [name for name in names if (root / name).is_file() and not name.startswith(LEFT_OUT)]
