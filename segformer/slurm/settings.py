"""The settings of a job (conf/slurm.yaml), every one of them checked before it gets near a shell.

A batch script is shell, so every field that gets into it has a strict form: a line break in a job name would
be a command. `setup`, `sbatch` and `srun` can be set in a cluster profile (conf/cluster, conf/local) alone,
not on the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from segformer.errors import ConfigError, within

PROFILE_ONLY = ("setup", "sbatch", "srun")

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_HOSTS = r"([A-Za-z0-9][A-Za-z0-9._,\[\]-]{0,255})?"
_PATH = r"/[A-Za-z0-9._/@+-]{1,255}"
_FORMS = {
    "nodes": (r"[0-9]{1,5}(-[0-9]{1,5})?", "a number from 1 to 10000, or a range such as 2-4"),
    "mem": (r"([0-9]{1,9} ?([KMGTkmgt](i?[Bb])?)?)?", "480G or 900M, or 0 for all"),
    "partition": (rf"({_WORD}(,{_WORD}){{0,15}})?", "letters, digits, '.', '_' and '-', several with commas"),
    "account": (rf"({_WORD})?", "up to 64 letters, digits, '.', '_' and '-'"),
    "qos": (rf"({_WORD})?", "up to 64 letters, digits, '.', '_' and '-'"),
    "constraint": (r"([A-Za-z0-9][A-Za-z0-9._&|*\[\]()-]{0,127})?", "feature names with & | * ( ) [ ]"),
    "gpus_per_node": (rf"({_WORD}:)?[0-9]{{1,2}}", "a number from 0 to 64, or a type and one, as a100:4"),
    "gpu_request": ("gpus-per-node|gres", "gpus-per-node or gres"),
    "dependency": (
        r"([a-z]{5,12}(:[0-9_]{1,16}(\+[0-9]{1,6})?)*([,?][a-z]{5,12}(:[0-9_]{1,16}(\+[0-9]{1,6})?)*){0,15})?",
        "afterok:12, as sbatch takes it",
    ),
    "nodelist": (_HOSTS, "names of nodes, such as n[0-3],n7"),
    "exclude": (_HOSTS, "names of nodes, such as n[0-3],n7"),
    "reservation": (rf"({_WORD})?", "up to 64 letters, digits, '.', '_' and '-'"),
    "container_runtime": ("pyxis|apptainer", "pyxis or apptainer"),
    "container_image": (
        r"([A-Za-z0-9/][A-Za-z0-9._/#:@+-]{0,255})?",
        "the path of an image, or its name in a registry such as nvcr.io#nvidia/pytorch:25.10-py3",
    ),
    "container_python": (rf"{_WORD}|{_PATH}", "the name or the path of Python inside of the image"),
}
# Days, hours, minutes, seconds. sbatch reads 12:00 as minutes and seconds where people mean hours, so two
# numbers alone are refused.
_TIMES = (
    r"(?:([0-9]{1,3}) ?d(?:ays?)?)? ?(?:([0-9]{1,4}) ?h(?:ours?)?)? ?(?:([0-9]{1,6}) ?m(?:in(?:ute)?s?)?)?()",
    r"()()([0-9]{1,6})()",
    r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])",
    r"([0-9]{1,3})-([0-9]{1,2})(?::([0-5][0-9]))?()",
)
_KEY = re.compile(r"[a-z][a-z0-9-]{0,39}")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._,:=%+@/*\[\]-]{0,255}")
# What the script sets from elsewhere, or what would run something else than the training.
_TAKEN = {
    "account", "array", "batch", "chdir", "constraint", "cpus-per-task", "error", "export", "export-file",
    "get-user-env", "gid", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task", "input", "job-name",
    "mem", "mincpus", "no-requeue", "nodes", "ntasks", "ntasks-per-gpu", "ntasks-per-node", "open-mode",
    "output", "partition", "qos", "requeue", "signal", "time", "uid", "wrap",
}  # fmt: skip
_TAKEN_OF_SRUN = _TAKEN | {
    "container-image", "container-mounts", "container-workdir", "gpu-bind", "gres", "jobid",
    "kill-on-bad-exit", "label", "multi-prog", "overlap", "pty", "unbuffered", "wait",
}  # fmt: skip
_TWICE = ("dependency", "nodelist", "exclude", "reservation")  # fields that are options of sbatch, too


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """The job around a run. Empty texts and nulls leave the choice to the cluster."""

    nodes: str = "1"
    "Nodes of the job: 4, or 2-4 to start and go on with as many of them as there are."
    gpus_per_node: str = "1"
    "GPUs, and so ranks, per node, with their type where a site asks for it: 4, a100:4; 0 trains on CPUs."
    gpu_request: str = "gpus-per-node"
    "The option that asks for GPUs: gpus-per-node, or gres where a site takes that alone."
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
    nodelist: str = ""
    "Nodes that the job must have, such as n[0-3]."
    exclude: str = ""
    "Nodes that the job must not have."
    reservation: str = ""
    "Reservation that the job runs in."
    dependency: str = ""
    "Jobs that this one waits for, as sbatch takes them: afterok:12."
    container_image: str = ""
    "Image that the ranks run in: a path, or a name in a registry; empty = none."
    container_mounts: list[str] = field(default_factory=list)
    "Folders in the container, each /path or /outside:/inside; the run and its data must be among them."
    container_runtime: str = "pyxis"
    "What starts containers here: pyxis (options of srun) or apptainer (`apptainer exec`)."
    container_python: str = "python"
    "Python inside of the image, which has the packages of this project."
    signal_delay_s: int = 180
    "Seconds before the limit at which the job is signaled to save and requeue; at least 60."
    setup: list[str] = field(default_factory=list)
    "Shell lines before the training, such as `module load cuda`; cluster profile only."
    sbatch: dict[str, Any] = field(default_factory=dict)
    "Further sbatch options, such as {exclusive: true}; cluster profile only."
    srun: dict[str, Any] = field(default_factory=dict)
    "Further options of srun, such as {mpi: pmix}; cluster profile only."
    requeue: bool = True
    "Start the job again after a preemption, a time limit or the loss of a node."
    dry_run: bool = False
    "Print the script instead of submitting it; where there is a Slurm, it says whether it would take it."
    watch: bool = False
    "Follow the job after submitting it; Ctrl-C leaves it alone."

    def __post_init__(self) -> None:
        self.gpus_per_node = str(self.gpus_per_node)  # a number in records of older versions
        for name, (form, use) in _FORMS.items():
            if not re.fullmatch(form, value := getattr(self, name)):
                raise ConfigError(f"{name}={value!r} is refused (it becomes part of a script); use {use}")
        self.mem = re.sub(r" |i?[Bb]$", "", self.mem).upper()
        if not 1 <= self.node_range[0] <= self.node_range[1] <= 10_000:
            raise ConfigError(f"nodes={self.nodes} is refused; use {_FORMS['nodes'][1]}")
        within(self, "", tasks_per_node=(1, 1024), cpus_per_task=(1, 1024))
        within(self, "", signal_delay_s=(60, 3600))  # it may come up to 60 s early, and never later
        if self.gpus > 64:
            raise ConfigError(f"gpus_per_node={self.gpus_per_node} is refused; use at most 64")
        if self.gpus and self.tasks_per_node not in (None, self.gpus):
            raise ConfigError(
                f"tasks_per_node={self.tasks_per_node} differs from gpus_per_node={self.gpus_per_node}; "
                "there is one rank a GPU: leave tasks_per_node out"
            )
        if minutes(self.time) * 60 <= self.signal_delay_s:
            raise ConfigError(f"time={self.time} must be longer than signal_delay_s={self.signal_delay_s}")
        for mount in self.container_mounts:
            if not re.fullmatch(f"{_PATH}(:{_PATH})?", mount) or ".." in re.split("[:/]", mount):
                raise ConfigError(
                    f"container_mounts holds {mount!r}, which is refused (it becomes part of a script); use "
                    "/path or /outside:/inside, of letters, digits and . _ / @ + -"
                )
        _check_profile(self)

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)

    @property
    def gpus(self) -> int:
        """GPUs of a node, of whatever type."""
        return int(self.gpus_per_node.rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        """Tasks that Slurm starts on each node."""
        return self.gpus or self.tasks_per_node or 1


def _check_profile(cfg: SlurmConfig) -> None:
    for line in cfg.setup:
        if not line.isprintable() or not line.strip():
            raise ConfigError(f"setup holds {line!r}; give one shell command a line, no control characters")
    given = {name for name in _TWICE if getattr(cfg, name)}
    for name, options, taken in (("sbatch", cfg.sbatch, _TAKEN | given), ("srun", cfg.srun, _TAKEN_OF_SRUN)):
        for key, value in options.items():
            if not _KEY.fullmatch(str(key)) or key in taken:
                why = "is set by other fields" if key in taken else f"is no option of {name}"
                raise ConfigError(f"{name}: {key!r} {why}; remove it from the cluster profile")
            plain = isinstance(value, str | int) and value is not False and _VALUE.fullmatch(str(value))
            if value is not True and not plain:
                raise ConfigError(f"{name}.{key}={value!r} is refused: give true, a number or plain words")
    if re.search(r"(^|[,/ ])gpu([:=,]|$)", gres := str(cfg.sbatch.get("gres", ""))):
        raise ConfigError(
            f"sbatch.gres={gres!r} asks for GPUs a second time; leave it out, and give gpus_per_node="
            "<type>:<number>, with gpu_request=gres where the site takes that alone"
        )


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
