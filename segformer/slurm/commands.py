"""Jobs that are no training runs: an evaluation on many GPUs, and sharding as an array of jobs.

    runs/slurm/evaluate/0001/   script.sh, code/, logs/
    runs/slurm/shard/0001/      and join.sh

The arguments are those of launch/evaluate.py and data_prep/shard.py; the script itself, with --check, finds
settings that are wrong before anything is submitted. Files are looked at by the job. The array writes every
shard once, on whichever node; a second job, which Slurm starts when all parts are there, joins them, and is
canceled where one has failed. Both can be submitted again: what is finished is kept.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from segformer.errors import ConfigError
from segformer.slurm.code import INSIDE, ROOT, copy_code
from segformer.slurm.queue import submit_script
from segformer.slurm.script import JobFolder, command_script, rank_python
from segformer.slurm.settings import SlurmConfig
from segformer.slurm.submission import follow, make_folder, plain_path, show_script

EVALUATE, SHARD = "launch/evaluate.py", "data_prep/shard.py"
MAX_TASKS = 1000  # MaxArraySize is 1001 where a site has not raised it


def evaluate(cfg: SlurmConfig, arguments: Sequence[str]) -> None:
    """Submit launch/evaluate.py on all ranks of a job."""
    folder, command = _prepare(cfg, EVALUATE, arguments, rank_python(cfg, Path.cwd()))
    job = _submit(cfg, folder.script, command_script(cfg, folder, command, ranks=True))
    if job:
        print(f"job {job}\nlogs  {folder.logs}/{job}_0_log.out and .err")
    if job and cfg.watch:
        follow(job)


def shard(cfg: SlurmConfig, arguments: Sequence[str], tasks: int) -> None:
    """Submit data_prep/shard.py as an array of `tasks` jobs, and the job that joins them."""
    if not 1 <= tasks <= MAX_TASKS:
        raise ConfigError(f"tasks={tasks} must be from 1 to {MAX_TASKS}")
    if cfg.node_range != (1, 1):
        raise ConfigError(
            f"nodes={cfg.nodes}: every task of the array has one node of its own; leave nodes out"
        )
    if any(argument.partition("=")[0].lstrip("+") == "part" for argument in arguments):
        raise ConfigError("part is set by the array; leave it out, and say tasks=<number of jobs>")
    given = [*arguments, f"workers={cfg.cpus_per_task}"]
    folder, command = _prepare(cfg, SHARD, given, [sys.executable])
    part = f'{command} part="$SLURM_ARRAY_TASK_ID/{tasks}"'
    job = _submit(cfg, folder.script, command_script(cfg, folder, part, tasks=tasks))
    after = {"kill-on-invalid-dep": "yes", "dependency": f"afterok:{job}" if job else ""}
    join = _submit(cfg, folder.path / "join.sh", command_script(cfg, folder, command, more=after))
    if job:
        print(
            f"job {job}: {tasks} parts; job {join} joins them\n"
            f"logs  {folder.logs}/{job}_*_0_log.out and {join}_0_log.out"
        )
    if job and cfg.watch:
        follow(join)


def _prepare(
    cfg: SlurmConfig, script: str, arguments: Sequence[str], python: list[str]
) -> tuple[JobFolder, str]:
    """The folder of the job and its command; ConfigError where the script does not take the arguments."""
    for argument in arguments:
        if not argument.isprintable():
            raise ConfigError(f"{argument!r} is refused: it becomes part of a shell script")
    check = [sys.executable, str(ROOT / INSIDE / script), *arguments, "--check"]
    tried = subprocess.run(check, capture_output=True, text=True, check=False)
    if tried.returncode:
        message = (tried.stderr.strip() or f"{script} failed").splitlines()[-1]
        raise ConfigError(message.removeprefix("ConfigError: "))
    top, kind = plain_path("runs", "runs/slurm"), Path(script).stem
    folder = JobFolder(top / kind / "0001") if cfg.dry_run else make_folder(top, kind)
    if not cfg.dry_run:
        copy_code(ROOT, folder.code)
    return folder, shlex.join([*python, "-u", str(folder.code / INSIDE / script), *arguments])


def _submit(cfg: SlurmConfig, script: Path, text: str) -> str:
    """Submit one job; its id, or "" where its script is only shown."""
    if cfg.dry_run:
        show_script(text)
        return ""
    script.write_text(text)
    return submit_script(script)
