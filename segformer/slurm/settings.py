"""The settings of a job (conf/slurm.yaml), every one of them checked before it gets near a shell.

A batch script is shell, so every field that gets into it has a strict form: a line break in a job name would
be a command. `setup` and `sbatch` can only be set in a cluster profile (conf/cluster, conf/local), not on the
command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from segformer.errors import ConfigError, within

PROFILE_ONLY = ("setup", "sbatch")

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_FORMS = {
    "nodes": (r"[0-9]{1,5}(-[0-9]{1,5})?", "a number from 1 to 10000, or a range such as 2-4"),
    "mem": (r"([0-9]{1,9} ?([KMGTkmgt](i?[Bb])?)?)?", "480G or 900M, or 0 for all"),
    "partition": (rf"({_WORD}(,{_WORD}){{0,15}})?", "letters, digits, '.', '_' and '-', several with commas"),
    "account": (rf"({_WORD})?", "up to 64 letters, digits, '.', '_' and '-'"),
    "qos": (rf"({_WORD})?", "up to 64 letters, digits, '.', '_' and '-'"),
    "constraint": (r"([A-Za-z0-9][A-Za-z0-9._&|*\[\]()-]{0,127})?", "feature names with & | * ( ) [ ]"),
}
# Days, hours, minutes, seconds. sbatch reads 12:00 as minutes and seconds where people mean hours, so two
# numbers alone are refused.
_TIMES = (
    r"(?:([0-9]{1,3}) ?d(?:ays?)?)? ?(?:([0-9]{1,4}) ?h(?:ours?)?)? ?(?:([0-9]{1,6}) ?m(?:in(?:ute)?s?)?)?()",
    r"()()([0-9]{1,6})()",
    r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])",
    r"([0-9]{1,3})-([0-9]{1,2})(?::([0-5][0-9]))?()",
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
    "Limit of one attempt: 24h, 90m, 1d12h, a number of minutes, or 12:00:00 and 1-12:00:00 as in Slurm."
    partition: str = ""
    "Partition, or several with commas."
    account: str = ""
    "Account that the job is charged to."
    qos: str = ""
    "Quality of service that the job asks for."
    constraint: str = ""
    "Features that the nodes must have, such as h100&nvlink."
    signal_delay_s: int = 180
    "Seconds before the limit at which the job is signaled to save and requeue; at least 60."
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
        for name, (form, use) in _FORMS.items():
            if not re.fullmatch(form, value := getattr(self, name)):
                raise ConfigError(f"{name}={value!r} is refused (it becomes part of a script); use {use}")
        self.mem = re.sub(r" |i?[Bb]$", "", self.mem).upper()
        if not 1 <= self.node_range[0] <= self.node_range[1] <= 10_000:
            raise ConfigError(f"nodes={self.nodes} is refused; use {_FORMS['nodes'][1]}")
        within(self, "", gpus_per_node=(0, 64), tasks_per_node=(1, 1024), cpus_per_task=(1, 1024))
        within(self, "", signal_delay_s=(60, 3600))  # it may come up to 60 s early, and never later
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"tasks_per_node={self.tasks_per_node} differs from gpus_per_node={self.gpus_per_node}; "
                "there is one rank a GPU: leave tasks_per_node out"
            )
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


def _check_profile(setup: list[str], sbatch: dict[str, Any]) -> None:
    for line in setup:
        if not line.isprintable() or not line.strip():
            raise ConfigError(f"setup holds {line!r}; give one shell command a line, no control characters")
    for key, value in sbatch.items():
        if not _SBATCH_KEY.fullmatch(str(key)) or key in _TAKEN:
            why = "is set by other fields" if key in _TAKEN else "is no sbatch option"
            raise ConfigError(f"sbatch: {key!r} {why}; remove it from the cluster profile")
        plain = isinstance(value, str | int) and value is not False and _SBATCH_VALUE.fullmatch(str(value))
        if value is not True and not plain:
            raise ConfigError(f"sbatch.{key}={value!r} is refused: give true, a number or plain words")


def minutes(text: str) -> int:
    """A time limit in minutes, seconds rounded up."""
    found = next(filter(None, (re.fullmatch(form, text) for form in _TIMES)), None)
    days, hours, mins, seconds = (int(group or 0) for group in found.groups()) if found else (0, 0, 0, 0)
    total = days * 1440 + hours * 60 + mins + (seconds > 0)
    if not 1 <= total <= 366 * 1440:
        raise ConfigError(
            f"time={text!r} is no duration from 1 minute to 366 days; use 24h, 90m or 1-12:00:00"
        )
    return total
