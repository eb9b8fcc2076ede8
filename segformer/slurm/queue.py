"""What Slurm knows, by its own commands: lists of arguments, never a shell, one clear error.

Jobs are looked for where they can be: squeue for those that wait or run, scontrol for those that ended in the
last minutes (MinJobAge), sacct for all others, where the site keeps accounts.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from segformer.errors import ConfigError

TIMEOUT_S = 60
_NO_CONTROLLER = re.compile(
    r"is not found|configuration source|contact slurm controller|Zero Bytes|did not answer"
)
# In all other states a job uses the cluster, or will.
ENDED = frozenset(
    {
        *(
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "BOOT_FAIL",
            "DEADLINE",
        ),
        *("PREEMPTED", "REVOKED", "UNKNOWN"),
    }
)
# What the submitter's environment would put above the script's own lines, or hand on to the ranks.
_INHERITED = ("SBATCH_", "SLURM_", "SRUN_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # where and who, not which job
_RANKS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
}


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Slurm sees it now."""

    name: str
    "RUNNING, PENDING, COMPLETED, ...; UNKNOWN where Slurm has forgotten the job and keeps no accounts."
    reason: str = ""
    "Why it waits, or why it ended; empty where Slurm gives no reason."
    nodes: str = ""
    restarts: int = 0
    preempted: bool = False
    elapsed: str = ""
    limit: str = ""

    @property
    def alive(self) -> bool:
        """Whether the job waits, runs or ends at this moment."""
        return self.name not in ENDED


def slurm(
    *command: str | Path, check: bool = True, env: dict[str, str] | None = None, stream: str = "stdout"
) -> str:
    """Run one of Slurm's commands and give what it printed on `stream`.

    Raises:
        ConfigError: it is not there, or it failed (with `check`) or did not answer.
    """
    name = str(command[0])
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
            env=env,
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{name} is not found: run this on a login node of a Slurm cluster") from error
    except OSError as error:
        raise ConfigError(f"{name} can't be started: {error.strerror}; try again") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{name} did not answer within {TIMEOUT_S} s; is slurmctld up?") from error
    said = " ".join(re.sub(rf"^{name}: (?:error: )?", "", line) for line in done.stderr.splitlines())
    if check and done.returncode:
        raise ConfigError(f"{name} refused: {said or f'exit code {done.returncode}'}")
    return said if stream == "stderr" else done.stdout


def submit_script(script: Path) -> str:
    """Hand a batch script over; the job's id."""
    return slurm("sbatch", "--parsable", script, env=own_environment()).strip().split(";")[0]


def would_start(script: Path) -> str:
    """What Slurm says to a script that it is shown but not given, or why it can't be asked.

    Raises:
        ConfigError: it would refuse the script.
    """
    try:
        return slurm("sbatch", "--test-only", script, env=own_environment(), stream="stderr")
    except ConfigError as error:
        if not _NO_CONTROLLER.search(str(error)):
            raise
        return "not asked: no Slurm controller reachable from here"


def own_environment() -> dict[str, str]:
    """The environment without what a job around this process, or a login script, says about jobs."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith(_INHERITED) or name in _RANKS)
    }


def job_state(job: str) -> JobState:
    """The state of a job."""
    found = _fields(slurm("scontrol", "show", "job", "-o", job, check=False))
    if found.get("JobState"):
        reason = found.get("Reason", "")
        return JobState(
            name=found["JobState"],
            reason="" if reason == "None" else reason,
            nodes=found.get("NodeList", "").replace("(null)", ""),
            restarts=int(found.get("Restarts", "0")),
            preempted=found.get("PreemptTime", "None") != "None",
            elapsed=found.get("RunTime", ""),
            limit=found.get("TimeLimit", ""),
        )
    try:
        columns = "State,NodeList,Elapsed,Timelimit"
        rows = slurm("sacct", "-n", "-X", "-P", "-j", job, "-o", columns, check=False)
    except ConfigError:
        rows = ""
    for row in reversed(rows.splitlines()):
        state, nodes, elapsed, limit = row.split("|")
        return JobState(
            state.split()[0], nodes=nodes.replace("None assigned", ""), elapsed=elapsed, limit=limit
        )
    return JobState("UNKNOWN")


def ran_out_of_memory(job: str) -> bool:
    """Whether the kernel killed a task of the job's last attempt for its memory; False without accounts."""
    try:
        rows = slurm("sacct", "-n", "-P", "-j", job, "-o", "State", check=False)
    except ConfigError:
        return False
    return any(row.startswith("OUT_OF_MEMORY") for row in rows.splitlines())


def _fields(line: str) -> dict[str, str]:
    """The words KEY=VALUE of a line of scontrol."""
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, equals, value in pairs if equals}
