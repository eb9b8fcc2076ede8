"""Slurm by its own commands: lists of arguments, never a shell, one clear error.

Jobs are looked for where they can be: scontrol for those that wait, run or ended in the last minutes
(MinJobAge), sacct for all others, where the site keeps accounts.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from segformer.errors import ConfigError

TIMEOUT_S = 60
_NO_CONTROLLER = re.compile(r"configuration source|contact slurm controller|Zero Bytes")
# In all other states a job uses the cluster, or will.
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "PREEMPTED", "REVOKED", "UNKNOWN",
}  # fmt: skip
# What the submitter's environment would put above the script's own lines, or hand on to the ranks.
_INHERITED = ("SBATCH_", "SLURM_", "SRUN_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # where and who, not which job
_RANKS = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


class NoAnswerError(ConfigError):
    """A command of Slurm hangs."""


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as Slurm sees it now."""

    name: str
    "RUNNING, PENDING, COMPLETED, ...; UNKNOWN where Slurm has forgotten the job and keeps no accounts."
    reason: str = ""
    "Why it waits, or why it ended; empty where Slurm gives no reason."
    nodes: str = ""
    restarts: int = -1
    "Starts after the first; -1 where only the accounts know the job."
    preempted: bool = False
    elapsed: str = ""
    limit: str = ""

    @property
    def alive(self) -> bool:
        """True while the job waits, runs or ends."""
        return self.name not in ENDED

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        why = f" ({self.reason})" if self.reason else ""
        times = f", {self.elapsed} of {self.limit}" if self.elapsed else ""
        again = f", restarts: {self.restarts}" if self.restarts else ""
        return f"{self.name}{why}{where}{times}{again}"


def _run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, with `text` as its input; its stderr on one line.

    Raises:
        ConfigError: it is not there, or doesn't answer.
    """
    name, words = str(command[0]), list(map(str, command))
    do = "run this on a login node of a Slurm cluster whose controller is up"
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, errors="replace", env=own_environment(), timeout=TIMEOUT_S
        )
    except OSError as error:
        raise ConfigError(f"{name} can't be started: {error.strerror}; {do}") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswerError(f"{name} did not answer within {TIMEOUT_S} s; {do}") from error
    done.stderr = " ".join(re.sub(rf"^{name}: (?:error: )?", "", line) for line in done.stderr.splitlines())
    return done


def slurm(*command: str | Path, check: bool = True) -> str:
    """Output of one of Slurm's commands; ConfigError where it is absent or (with `check`) failed."""
    done = _run(*command)
    if check and done.returncode:
        raise ConfigError(f"{command[0]} refused: {done.stderr or f'exit code {done.returncode}'}")
    return done.stdout


def submit_script(script: Path) -> str:
    """Hand a batch script over; the job's id."""
    return slurm("sbatch", "--parsable", script).strip().split(";")[0]


def would_start(script: str) -> str:
    """Ask Slurm about a script without submitting it; its answer, or why there is none.

    Raises:
        ConfigError: it would refuse the script.
    """
    nobody = "not asked: no Slurm controller reachable from here"
    try:
        done = _run("sbatch", "--test-only", text=script)
    except NoAnswerError:
        return nobody
    if done.returncode and _NO_CONTROLLER.search(done.stderr):
        return nobody
    if done.returncode:
        raise ConfigError(f"sbatch refused: {done.stderr}")
    return done.stderr


def own_environment() -> dict[str, str]:
    """The environment without what a job around this process, or a login script, says about jobs."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or not (name.startswith(_INHERITED) or name in _RANKS)
    }


def job_state(job: str) -> JobState:
    """The state of a job; of an array that of an element that is alive, where there is one."""
    rows = slurm("scontrol", "show", "job", "-o", job, check=False).splitlines()
    shown = [one for row in rows if (one := _shown(row))]
    if shown:
        return next((one for one in shown if one.alive), shown[0])
    for row in reversed(_accounts("-X", "-j", job, "-o", "State,NodeList,Elapsed,Timelimit")):
        state, nodes, elapsed, limit = row.split("|")
        nodes = nodes.replace("None assigned", "")
        return JobState(state.split()[0], nodes=nodes, elapsed=elapsed, limit=limit)
    return JobState("UNKNOWN")


def _shown(row: str) -> JobState | None:
    """The state in a line of scontrol."""
    found = {key: value for key, _, value in (word.partition("=") for word in row.split())}
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
    return None


def ran_out_of_memory(job: str) -> bool:
    """True where the kernel killed a task of the last attempt for its memory; False without accounts."""
    return any(row.startswith("OUT_OF_MEMORY") for row in _accounts("-j", job, "-o", "State"))


def _accounts(*asked: str) -> list[str]:
    """Rows of sacct; none where the site keeps no accounts."""
    with contextlib.suppress(ConfigError):
        return slurm("sacct", "-n", "-P", *asked, check=False).splitlines()
    return []
