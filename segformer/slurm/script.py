"""The batch script of a job, made by submitit's own builder.

    # setup      lines of the cluster profile; the job's own code first on Python's path
    # command    srun: every rank is `launch/slurm_job.py rank <folder>` (task.py)
    # teardown   `launch/slurm_job.py after <folder> <exit code>`: done, start again, or give up (after.py)

The shell outlives the signals that its job gets, so that the last line is reached after every rank has ended.
submitit would send a pickled function along; ours is a path: who may write a pickle's folder runs code as the
user.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segformer.slurm.attempts import attempt_line
from segformer.slurm.settings import SlurmConfig, memory, minutes


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The files of one submission: runs/x/slurm/0001."""

    path: Path

    @property
    def config(self) -> Path:
        """The composed configuration of the run."""
        return self.path / "config.yaml"

    @property
    def settings(self) -> Path:
        """The settings of the job, and its id once it has one."""
        return self.path / "job.json"

    @property
    def code(self) -> Path:
        """The copy of the code."""
        return self.path / "code"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "script.sh"

    @property
    def logs(self) -> Path:
        """What the ranks and the batch script print: <job>_<rank>_log.out and .err."""
        return self.path / "logs"

    @property
    def outcomes(self) -> Path:
        """Why ranks ended early: <attempt>-<rank>.json."""
        return self.path / "outcomes"


def sbatch_script(cfg: SlurmConfig, name: str, folder: JobFolder, directory: Path, run_dir: Path) -> str:
    """The script of the training job called `name` whose files are in `folder`, run in `directory`."""
    start = [sys.executable, "-u", str(folder.code / "launch" / "slurm_job.py")]
    after = shlex.join([*start, "after", str(folder.path)])
    command = shlex.join([*start, "rank", str(folder.path)])
    return _script(
        cfg,
        name,
        folder,
        directory,
        command=command,
        signal_delay_s=cfg.signal_delay_s,
        first=["trap : TERM USR2 CONT", attempt_line(run_dir, cfg.ranks_per_node)],
        teardown=[f'{after} "$?"'],
        # One failed rank ends the others, which would otherwise wait for it in a collective until the
        # time-out. A site's WaitTime would end rank zero while it exports and reports.
        **_ranks(cfg, "--kill-on-bad-exit=1", "--wait=0"),
    )


def _ranks(cfg: SlurmConfig, *srun_args: str) -> dict[str, Any]:
    """The options of a job whose srun starts the same number of ranks on each node.

    Slurm remembers the tasks that a job with --ntasks-per-node has once had, and would never start it again
    on fewer nodes. So a range of nodes asks for CPUs, and srun alone knows of tasks.
    """
    tasks = [f"--ntasks-per-node={cfg.ranks_per_node}"]
    # Since Slurm 22.05 srun doesn't take --cpus-per-task from the job.
    args = [*tasks, f"--cpus-per-task={cfg.cpus_per_task}", *srun_args]
    shape: dict[str, Any] = {"nodes": cfg.nodes, "gpus_per_node": cfg.gpus_per_node, "srun_args": args}
    low, high = cfg.node_range
    if low < high:
        return shape | {"more": {"mincpus": cfg.ranks_per_node * cfg.cpus_per_task}}
    return shape | {"ntasks_per_node": cfg.ranks_per_node, "cpus_per_task": cfg.cpus_per_task}


def command_script(
    cfg: SlurmConfig,
    name: str,
    folder: JobFolder,
    directory: Path,
    command: str,
    *,
    ranks: bool,
    tasks: int = 0,
    more: dict[str, Any] | None = None,
) -> str:
    """The script of a job that runs a shell command: as all ranks, once, or in an array of `tasks` jobs."""
    if ranks:
        shape = _ranks(cfg, "--kill-on-bad-exit=1")
    else:
        once = {"nodes": 1, "ntasks_per_node": 1, "cpus_per_task": cfg.cpus_per_task}
        shape = once | {"use_srun": False}
    if tasks:
        shape |= {"map_count": tasks, "array_parallelism": tasks}
    more = shape.pop("more", {}) | (more or {})
    return _script(cfg, name, folder, directory, command=command, more=more, **shape)


def _script(
    cfg: SlurmConfig,
    name: str,
    folder: JobFolder,
    directory: Path,
    *,
    first: Sequence[str] = (),
    more: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    # submitit's executor refuses to exist where there is no srun; the builder it uses needs nothing.
    from submitit.slurm.slurm import _make_sbatch_string

    wanted: dict[str, Any] = {
        "job_name": name,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "constraint": cfg.constraint,
        "mem": memory(cfg.mem),
        **options,
    }
    path = f'export PYTHONPATH={shlex.quote(str(folder.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    text: str = _make_sbatch_string(
        folder=folder.logs,
        time=minutes(cfg.time),
        setup=[*first, *cfg.setup, path],
        additional_parameters={
            "requeue" if cfg.requeue else "no-requeue": True,
            "chdir": str(directory),
            **(more or {}),
            **cfg.sbatch,
        },
        **{
            "wckey": None,
            **{key: value for key, value in wanted.items() if value is False or value not in ("", 0)},
        },
    )
    lines = text.splitlines()
    if "signal_delay_s" not in options:  # submitit's own default would kill ranks that don't know the signal
        lines = [line for line in lines if not line.startswith("#SBATCH --signal=")]
    return "\n".join(lines) + "\n"
