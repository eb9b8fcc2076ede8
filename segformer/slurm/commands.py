"""Jobs that are no training runs: an evaluation on many GPUs, and sharding as an array of jobs.

    runs/slurm/evaluate/0001/   script.sh, code/, logs/
    runs/slurm/shard/0001/      and join.sh

The arguments are those of launch/evaluate.py and data_prep/shard.py; the script itself, with --check, finds
settings that are wrong before anything is submitted. Files are looked at by the job. The array writes every
shard once, on whichever node; a second job, which Slurm starts when all parts are there, joins them, and is
cancelled where one has failed. Both can be submitted again: what is finished is kept.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError
from segformer.slurm.code import snapshot
from segformer.slurm.queue import submit_script
from segformer.slurm.script import JobFolder, command_script
from segformer.slurm.settings import SlurmConfig
from segformer.slurm.submission import ROOT, make_folder, plain_path, show_script

EVALUATE, SHARD = "launch/evaluate.py", "data_prep/shard.py"
MAX_TASKS = 1000  # MaxArraySize is 1001 where a site has not raised it


def check_arguments(script: str, arguments: Sequence[str]) -> None:
    """ConfigError where the script does not take the arguments, or one could not stand in a batch script."""
    for argument in arguments:
        if not argument.isprintable():
            raise ConfigError(f"{argument!r} is refused: it becomes part of a shell script")
    tried = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments, "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        said = (tried.stderr.strip() or f"{script} failed").splitlines()[-1]
        raise ConfigError(said.removeprefix("ConfigError: "))


def evaluate(cfg: SlurmConfig, arguments: Sequence[str]) -> str:
    """Submit launch/evaluate.py on all ranks of a job; the job's id."""
    check_arguments(EVALUATE, arguments)
    folder = _prepare(cfg, "evaluate")
    command = [sys.executable, "-u", str(folder.code / EVALUATE), *arguments]
    job = _submit(cfg, folder, folder.script, "evaluate", command)
    if cfg.dry_run:
        return ""
    print(f"job {job}\nlogs  {folder.logs}/{job}_0_log.out and .err")
    return job


def shard(cfg: SlurmConfig, arguments: Sequence[str], tasks: int) -> tuple[str, str]:
    """Submit data_prep/shard.py as an array of `tasks` jobs, and the job that joins them; their ids."""
    if not 1 <= tasks <= MAX_TASKS:
        raise ConfigError(f"tasks={tasks} must be from 1 to {MAX_TASKS}")
    if cfg.node_range != (1, 1):
        raise ConfigError(
            f"nodes={cfg.nodes}: every task of the array has one node of its own; leave nodes out"
        )
    if any(argument.partition("=")[0].lstrip("+") == "part" for argument in arguments):
        raise ConfigError("part is set by the array; leave it out, and say tasks=<number of jobs>")
    check_arguments(SHARD, arguments)
    folder = _prepare(cfg, "shard")
    command = [sys.executable, "-u", str(folder.code / SHARD), *arguments, f"workers={cfg.cpus_per_task}"]
    job = _submit(cfg, folder, folder.script, "shard", command, tasks=tasks)
    after: dict[str, Any] = {"kill-on-invalid-dep": "yes"}
    if not cfg.dry_run:
        after["dependency"] = f"afterok:{job}"
    join = _submit(cfg, folder, folder.path / "join.sh", "join", command, after=after)
    if cfg.dry_run:
        return "", ""
    print(
        f"job {job}: {tasks} parts; job {join} joins them\n"
        f"logs  {folder.logs}/{job}_*_0_log.out and {join}_0_log.out"
    )
    return job, join


def _prepare(cfg: SlurmConfig, kind: str) -> JobFolder:
    runs = plain_path("runs", Path("runs"))
    if cfg.dry_run:
        return JobFolder(runs / "slurm" / kind / "0001")
    folder = make_folder(runs, f"slurm/{kind}")
    snapshot(ROOT, folder.code)
    return folder


def _submit(
    cfg: SlurmConfig,
    folder: JobFolder,
    script: Path,
    name: str,
    command: Sequence[str],
    *,
    tasks: int = 0,
    after: dict[str, Any] | None = None,
) -> str:
    line = shlex.join(command) + (f' part="$SLURM_ARRAY_TASK_ID/{tasks}"' if tasks else "")
    directory = plain_path("the working directory", ".")
    shape: dict[str, Any] = {"ranks": name == "evaluate", "tasks": tasks, "more": after}
    text = command_script(cfg, name, folder, directory, line, **shape)
    if cfg.dry_run:
        show_script(text)
        return ""
    script.write_text(text)
    return submit_script(script)
