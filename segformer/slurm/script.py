"""The batch script of a job.

    # SBATCH       the settings
    setup          lines of the cluster profile; the job's own code first on Python's path
    command        srun: every rank is `launch/slurm_job.py rank <folder>` (task.py), perhaps in a container
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

    def __init__(self, path: Path, code: Path | None = None) -> None:
        """code: where the copy of the code is, if not in the folder itself."""
        self.path = path
        self.config = path / "config.yaml"  # the composed configuration of the run
        self.record = path / "job.json"  # the settings of the job, and its id once it has one
        self.code = code or path / "code"
        self.script = path / "script.sh"
        self.logs = path / "logs"  # <job>_<rank>_log.out and .err
        self.outcomes = path / "outcomes"  # why ranks ended early: <attempt>-<rank>.json


def training_script(cfg: SlurmConfig, name: str, folder: JobFolder, directory: Path, run_dir: Path) -> str:
    """The script of the training job called `name` whose files are in `folder`, run in `directory`."""
    entry = ["-u", str(folder.code / INSIDE / "launch" / "slurm_job.py")]
    rank = [*rank_python(cfg, directory, run_dir), *entry, "rank", str(folder.path)]
    lines = [
        "trap : TERM USR2 CONT",
        attempt_line(run_dir, cfg.ranks_per_node),
        *_setup(cfg, folder),
        # One failed rank ends the others, which would otherwise wait for it in a collective until the
        # time-out. A site's WaitTime would end rank zero while it exports and reports.
        f"{_srun(cfg, folder, '--wait=0', *_container(cfg, directory, run_dir))} {shlex.join(rank)}",
        f'{shlex.join([sys.executable, *entry, "after", str(folder.path)])} "$?"',
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
        command = f"{_srun(cfg, folder, *_container(cfg, Path.cwd()))} {command}"
    else:
        options |= {"nodes": 1, "ntasks-per-node": 1, "cpus-per-task": cfg.cpus_per_task}
    array = {"array": f"0-{tasks - 1}%{tasks}"} if tasks else {}
    return _script(options | array | (more or {}), cfg, [*_setup(cfg, folder), command])


def array_script(cfg: SlurmConfig, folder: JobFolder, directory: Path, tasks: int, at_once: int) -> str:
    """The script of an array of training jobs: an element runs the script <its number>.sh of the folder."""
    options = _options(cfg, folder.path.parent.parent.name, folder, directory, "%A_%a") | _shape(cfg)
    options |= {"signal": f"USR2@{cfg.signal_delay_s}", "array": f"0-{tasks - 1}%{at_once}"}
    return _script(options, cfg, [f'exec bash {shlex.quote(str(folder.path))}/"$SLURM_ARRAY_TASK_ID".sh'])


def _options(
    cfg: SlurmConfig, name: str, folder: JobFolder, directory: Path, job: str = "%j"
) -> dict[str, Any]:
    return {
        "job-name": name,
        "time": minutes(cfg.time),
        **{key: getattr(cfg, key) for key in ("partition", "account", "qos", "constraint", "mem")},
        **{key: getattr(cfg, key) for key in ("nodelist", "exclude", "reservation", "dependency")},
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
    shape = {"nodes": cfg.nodes}
    if cfg.gpus and cfg.gpu_request == "gres":
        others = cfg.sbatch.get("gres", "")
        shape["gres"] = f"gpu:{cfg.gpus_per_node}" + (f",{others}" if others else "")
    elif cfg.gpus:
        shape["gpus-per-node"] = cfg.gpus_per_node
    low, high = cfg.node_range
    if low < high:
        return shape | {"mincpus": cfg.ranks_per_node * cfg.cpus_per_task}
    return shape | {"ntasks-per-node": cfg.ranks_per_node, "cpus-per-task": cfg.cpus_per_task}


def _srun(cfg: SlurmConfig, folder: JobFolder, *more: str) -> str:
    # Since Slurm 22.05 srun doesn't take --cpus-per-task from the job.
    tasks = (f"--ntasks-per-node={cfg.ranks_per_node}", f"--cpus-per-task={cfg.cpus_per_task}")
    logs = (f"--output={folder.logs}/%j_%t_log.out", f"--error={folder.logs}/%j_%t_log.err")
    own = [f"--{key}" + ("" if value is True else f"={value}") for key, value in cfg.srun.items()]
    return shlex.join(["srun", "--unbuffered", *logs, *tasks, "--kill-on-bad-exit=1", *own, *more])


def _container(cfg: SlurmConfig, directory: Path, *needed: Path) -> list[str]:
    """The options of srun for a container that pyxis starts."""
    if not cfg.container_image or cfg.container_runtime != "pyxis":
        return []
    mounts = ",".join(_mounts(cfg, directory, *needed))
    options = {"image": cfg.container_image, "mounts": mounts, "workdir": directory}
    return [f"--container-{key}={value}" for key, value in options.items()]


def rank_python(cfg: SlurmConfig, directory: Path, *needed: Path) -> list[str]:
    """Python as a rank starts it, in its container where there is one, with the folders that it needs."""
    if not cfg.container_image:
        return [sys.executable]
    if cfg.container_runtime == "pyxis":
        return [cfg.container_python]
    start = ["apptainer", "exec", *(["--nv"] if cfg.gpus else []), f"--pwd={directory}"]
    start += [f"--bind={mount}" for mount in _mounts(cfg, directory, *needed)]
    return [*start, cfg.container_image, cfg.container_python]


def _mounts(cfg: SlurmConfig, *needed: Path) -> list[str]:
    """`outside:inside` of every folder: those that are needed lie where they do outside."""
    apart = [path for path in needed if not set(needed) & set(path.parents)]
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in cfg.container_mounts]
    return list(dict.fromkeys([*(f"{path}:{path}" for path in apart), *given]))


def _setup(cfg: SlurmConfig, folder: JobFolder) -> list[str]:
    return [*cfg.setup, f'export PYTHONPATH={shlex.quote(str(folder.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"']


def _script(options: dict[str, Any], cfg: SlurmConfig, lines: list[str]) -> str:
    given = {key: value for key, value in options.items() if value != ""}
    given |= {key: value for key, value in cfg.sbatch.items() if key not in given}
    header = [
        f"#SBATCH --{key}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in given.items()
    ]
    return "\n".join(["#!/bin/bash", *header, "", *lines]) + "\n"
