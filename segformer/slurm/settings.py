"""The settings of a job (conf/slurm.yaml), every one of them checked before it gets near a shell.

A batch script is shell, so every field that gets into it has a strict form: a line break in a job name would
be a command. `setup` and `sbatch` can only be set in a cluster profile (conf/cluster, conf/local), not on the
command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from segformer.errors import ConfigError

PROFILE_ONLY = ("setup", "sbatch")
MIN_SIGNAL_DELAY_S = 60  # sbatch may send the signal up to 60 s early, and never later

_NODES = re.compile(r"[0-9]{1,5}(?:-[0-9]{1,5})?", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORDS = re.compile(rf"{_WORD.pattern}(?:,{_WORD.pattern}){{0,15}}")
_CONSTRAINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._&|*\[\]()-]{0,127}")
_MEMORY = re.compile(r"([0-9]{1,9}) ?([KMGT])?i?B?", re.IGNORECASE | re.ASCII)
# sbatch reads 12:00 as minutes and seconds where people mean hours, so two numbers alone are refused.
_CLOCK = re.compile(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)")
_DAYS = re.compile(r"(\d{1,3})-(\d{1,2})(?::([0-5]\d))?")
_SPAN = re.compile(
    r"(?:(\d{1,3}) ?d(?:ays?)?)? ?(?:(\d{1,4}) ?h(?:ours?)?)? ?(?:(\d{1,6}) ?m(?:in(?:ute)?s?)?)?", re.ASCII
)
_SBATCH_KEY = re.compile(r"[a-z][a-z0-9-]{0,39}")
_SBATCH_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._,:=%+@/*\[\]-]{0,255}")
# What the script sets from elsewhere, or what would run something else than the training.
_TAKEN = {
    "account", "array", "batch", "chdir", "constraint", "cpus-per-task", "error", "export", "export-file",
    "get-user-env", "gid", "gpus-per-node", "input", "job-name", "mem", "mincpus", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time",
    "uid", "wrap",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """The job around a run. Empty texts and nulls leave the choice to the cluster."""

    nodes: str = "1"
    "Nodes of the job: 4, or 2-4 to start and go on with as many of them as there are."
    gpus_per_node: int = 1
    "GPUs, and so ranks, per node; 0 trains on CPUs."
    tasks_per_node: int | None = None
    "Ranks per node where gpus_per_node is 0; null means 1."
    cpus_per_task: int = 8
    "CPU cores per rank, for the loader's workers."
    mem: str = ""
    "Memory per node, such as 480G or 900M; 0 asks for all of it."
    time: str = "24h"
    "Limit of one attempt: 24h, 90 minutes, 1d12h, 12:00:00, 1-12:00:00, or a number of minutes."
    partition: str = ""
    "Partition, or several with commas."
    account: str = ""
    "Account to charge."
    qos: str = ""
    "Quality of service."
    constraint: str = ""
    "Features that the nodes must have, such as h100&nvlink."
    signal_delay_s: int = 180
    "Seconds before the limit at which the job is told to save and requeue; at least 60."
    setup: list[str] = field(default_factory=list)
    "Shell lines before the training, such as `module load cuda`; cluster profile only."
    sbatch: dict[str, Any] = field(default_factory=dict)
    "Further sbatch options, such as {exclusive: true}; cluster profile only."
    requeue: bool = True
    "Start the job again after a preemption, a time limit or the loss of a node."
    dry_run: bool = False
    "Print the script instead of submitting it; where there is a Slurm, it says whether it would take it."
    watch: bool = False
    "Follow the job after submitting it; Ctrl-C leaves it alone."

    def __post_init__(self) -> None:
        if not _NODES.fullmatch(self.nodes) or not 1 <= self.node_range[0] <= self.node_range[1] <= 10_000:
            raise ConfigError(f"nodes={self.nodes} must be a number from 1 to 10000, or a range such as 2-4")
        _check_range("gpus_per_node", self.gpus_per_node, 0, 64)
        _check_range("cpus_per_task", self.cpus_per_task, 1, 1024)
        _check_range("signal_delay_s", self.signal_delay_s, MIN_SIGNAL_DELAY_S, 3600)
        if self.tasks_per_node is not None:
            _check_range("tasks_per_node", self.tasks_per_node, 1, 1024)
            if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
                raise ConfigError(
                    f"tasks_per_node={self.tasks_per_node} differs from gpus_per_node={self.gpus_per_node}; "
                    "there is one rank a GPU: leave tasks_per_node out"
                )
        for name in ("account", "qos"):
            _check_form(name, getattr(self, name), _WORD, "up to 64 letters, digits, '.', '_' and '-'")
        _check_form(
            "partition", self.partition, _WORDS, "letters, digits, '.', '_' and '-', several with commas"
        )
        _check_form("constraint", self.constraint, _CONSTRAINT, "feature names with & | * ( ) [ ]")
        memory(self.mem)
        if minutes(self.time) * 60 <= self.signal_delay_s:
            raise ConfigError(f"time={self.time} must be longer than signal_delay_s={self.signal_delay_s}")
        _check_profile(self.setup, self.sbatch)

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)

    @property
    def ranks_per_node(self) -> int:
        """Tasks that Slurm starts on each node."""
        return self.gpus_per_node or self.tasks_per_node or 1


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value} must be from {low} to {high}")


def _check_form(name: str, value: str, form: re.Pattern[str], allowed: str) -> None:
    if value != "" and not form.fullmatch(value):
        raise ConfigError(f"{name}={value!r} is refused: it becomes part of a shell script; use {allowed}")


def _check_profile(setup: list[str], sbatch: dict[str, Any]) -> None:
    for line in setup:
        if not line.isprintable() or not line.strip():
            raise ConfigError(f"setup holds {line!r}; give one shell command a line, no control characters")
    for key, value in sbatch.items():
        if not _SBATCH_KEY.fullmatch(str(key)) or key in _TAKEN:
            why = "is set by other fields" if key in _TAKEN else "is no sbatch option"
            raise ConfigError(f"sbatch: {key!r} {why}; remove it from the cluster profile")
        plain = isinstance(value, str | int) and value is not False
        if value is not True and not (plain and _SBATCH_VALUE.fullmatch(str(value))):
            raise ConfigError(f"sbatch.{key}={value!r} is refused: give true, a number or plain words")


def minutes(text: str) -> int:
    """A time limit in minutes, seconds rounded up.

    Forms: 24h, 90 minutes, 1d12h, and those of sbatch that have one meaning only: minutes,
    [days-]hours:minutes:seconds, days-hours[:minutes].
    """
    found = _CLOCK.fullmatch(text) or _DAYS.fullmatch(text) or (_SPAN.fullmatch(text) if text else None)
    if found:
        days, hours, mins, seconds = ([int(group or 0) for group in found.groups()] + [0])[:4]
        total = days * 1440 + hours * 60 + mins + (seconds > 0)
    elif re.fullmatch(r"[0-9]{1,6}", text):
        total = int(text)
    else:
        raise ConfigError(f"time={text!r} is no duration; use a form such as 24h, 90 minutes or 1-12:00:00")
    if not 1 <= total <= 366 * 1440:
        raise ConfigError(f"time={text} is {total} minutes; use 1 minute to 366 days")
    return total


def memory(text: str) -> str:
    """Memory per node as sbatch writes it: "480 GB" -> "480G"; a bare number is MiB, "0" all, "" no wish."""
    found = _MEMORY.fullmatch(text)
    if text and not found:
        raise ConfigError(f"mem={text!r} is no amount of memory; use a form such as 480G, or 0 for all")
    return f"{int(found.group(1))}{(found.group(2) or '').upper()}" if found else ""
