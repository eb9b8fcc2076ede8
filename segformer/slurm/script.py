"""The batch script of a job.

    # SBATCH       the settings
    setup          lines of the cluster profile; the job's own code first on Python's path
    command        srun: every rank is `launch/slurm_job.py rank <folder>` (task.py)
    last           `launch/slurm_job.py after <folder> <exit code>`: done, start again, or give up (after.py)

The shell outlives the signals that its job gets, so that the last line is reached after every rank has ended.
It is written here and not by submitit, whose public interface submits a pickled function and gives no script:
none to look at in a dry run, none without srun on this machine, none for 2-4 nodes.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from segformer.slurm.attempts import attempt_line
from segformer.slurm.code import INSIDE
from segformer.slurm.settings import SlurmConfig, minutes


class JobFolder:
    """The files of one submission: runs/x/slurm/0001."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the composed configuration of the run
        self.record = path / "job.json"  # the settings of the job, and its id once it has one
        self.code = path / "code"
        self.script = path / "script.sh"
        self.logs = path / "logs"  # <job>_<rank>_log.out and .err
        self.outcomes = path / "outcomes"  # why ranks ended early: <attempt>-<rank>.json


def training_script(cfg: SlurmConfig, name: str, folder: JobFolder, directory: Path, run_dir: Path) -> str:
    """The script of the training job called `name` whose files are in `folder`, run in `directory`."""
    start = [sys.executable, "-u", str(folder.code / INSIDE / "launch" / "slurm_job.py")]
    lines = [
        "trap : TERM USR2 CONT",
        attempt_line(run_dir, cfg.ranks_per_node),
        *_setup(cfg, folder),
        # One failed rank ends the others, which would otherwise wait for it in a collective until the
        # time-out. A site's WaitTime would end rank zero while it exports and reports.
        f"{_srun(cfg, folder, '--wait=0')} {shlex.join([*start, 'rank', str(folder.path)])}",
        f'{shlex.join([*start, "after", str(folder.path)])} "$?"',
    ]
    signal = {"signal": f"USR2@{cfg.signal_delay_s}"}
    return _script(_options(cfg, name, folder, directory) | _shape(cfg) | signal, cfg, lines)


def command_script(
    cfg: SlurmConfig,
    folder: JobFolder,
    command: str,
    *,
    ranks: bool = False,
    tasks: int = 0,
    more: dict[str, str] | None = None,
) -> str:
    """The script of a job that runs a shell command here: as all ranks, once, or as an array of `tasks`."""
    options = _options(cfg, folder.path.parent.name, folder, Path.cwd(), "%A_%a" if tasks else "%j")
    if ranks:
        options |= _shape(cfg)
        command = f"{_srun(cfg, folder)} {command}"
    else:
        options |= {"nodes": 1, "ntasks-per-node": 1, "cpus-per-task": cfg.cpus_per_task}
    array = {"array": f"0-{tasks - 1}%{tasks}"} if tasks else {}
    return _script(options | array | (more or {}), cfg, [*_setup(cfg, folder), command])


def _options(
    cfg: SlurmConfig, name: str, folder: JobFolder, directory: Path, job: str = "%j"
) -> dict[str, Any]:
    return {
        "job-name": name,
        "time": minutes(cfg.time),
        **{key: getattr(cfg, key) for key in ("partition", "account", "qos", "constraint", "mem")},
        "chdir": directory,
        "output": folder.logs / f"{job}_0_log.out",
        "error": folder.logs / f"{job}_0_log.err",
        "open-mode": "append",
        "requeue" if cfg.requeue else "no-requeue": True,
    }


def _shape(cfg: SlurmConfig) -> dict[str, Any]:
    """The options of a job of as many ranks on each node.

    Slurm remembers the tasks that a job with --ntasks-per-node has once had, and would never start it again
    on fewer nodes. So a range of nodes asks for CPUs, and srun alone knows of tasks.
    """
    shape = {"nodes": cfg.nodes, "gpus-per-node": cfg.gpus_per_node or ""}
    low, high = cfg.node_range
    if low < high:
        return shape | {"mincpus": cfg.ranks_per_node * cfg.cpus_per_task}
    return shape | {"ntasks-per-node": cfg.ranks_per_node, "cpus-per-task": cfg.cpus_per_task}


def _srun(cfg: SlurmConfig, folder: JobFolder, *more: str) -> str:
    # Since Slurm 22.05 srun doesn't take --cpus-per-task from the job.
    tasks = (f"--ntasks-per-node={cfg.ranks_per_node}", f"--cpus-per-task={cfg.cpus_per_task}")
    logs = (f"--output={folder.logs}/%j_%t_log.out", f"--error={folder.logs}/%j_%t_log.err")
    return shlex.join(["srun", "--unbuffered", *logs, *tasks, "--kill-on-bad-exit=1", *more])


def _setup(cfg: SlurmConfig, folder: JobFolder) -> list[str]:
    return [*cfg.setup, f'export PYTHONPATH={shlex.quote(str(folder.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def _script(options: dict[str, Any], cfg: SlurmConfig, lines: list[str]) -> str:
    given = {key: value for key, value in {**options, **cfg.sbatch}.items() if value != ""}
    header = [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in given.items()
    ]
    return "\n".join(["#!/bin/bash", *header, "", *lines]) + "\n"
