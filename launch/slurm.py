"""Train on a Slurm cluster: the batch script of a run.

    python launch/slurm.py nodes=4 experiment=sample dry_run=true     prints the script and submits nothing

Takes every override of launch/train.py beside the settings of the job (SlurmConfig, conf/slurm.yaml). The
training configuration is composed once, here; every task of the job runs

    python launch/slurm.py --task <run directory>/slurm/config.yaml

which takes its rank from Slurm and trains. Not a pickled function, as submitit would send: who may write the
folder of a pickle can run code as the user.

A batch script is shell, so every field that gets into it has a strict form: a line break in a job name would
be a command. `setup` and `sbatch` can only be set in a cluster profile (conf/cluster, conf/local), not on the
command line. Submission itself is not built yet: without dry_run=true this ends with a ConfigError.
"""

import difflib
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from segformer.config import CONF, RunConfig, cli, compose, load_config
from segformer.errors import ConfigError, SegformerError

ROOT = Path(__file__).resolve().parents[1]
PROFILE_ONLY = ("setup", "sbatch")
_TEXTS = ("mem", "time", "partition", "account", "qos", "constraint")
MIN_SIGNAL_DELAY_S = 180

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
_PATH = re.compile(r"[A-Za-z0-9._/+@=-]+(?: [A-Za-z0-9._/+@=-]+)*")
_SBATCH_KEY = re.compile(r"[a-z][a-z0-9-]{0,39}")
_SBATCH_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._,:=%+@/*\[\]-]{0,255}")
# What the script sets from elsewhere, or what would run something else than the training.
_TAKEN = {
    "account", "array", "batch", "chdir", "constraint", "cpus-per-task", "error", "export", "export-file",
    "get-user-env", "gid", "gpus-per-node", "input", "job-name", "mem", "no-requeue", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time", "uid", "wrap",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class SlurmConfig:
    """The job around a run. Empty texts and nulls leave the choice to the cluster."""

    nodes: int = 1
    "Nodes of the job."
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
    "Seconds before the limit at which the job is told to save and requeue; at least 180."
    setup: list[str] = field(default_factory=list)
    "Shell lines before the training, such as `module load cuda`; cluster profile only."
    sbatch: dict[str, Any] = field(default_factory=dict)
    "Further sbatch options, such as {exclusive: true}; cluster profile only."
    dry_run: bool = False
    "Print the script instead of submitting it."

    def __post_init__(self) -> None:
        _check_range("nodes", self.nodes, 1, 10_000)
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


def sbatch_script(cfg: SlurmConfig, run: RunConfig) -> str:
    """The batch script of a run, made by submitit's own builder.

    Raises:
        ConfigError: the run's directory is no plain path, or its global batch can't be shared by the ranks.
    """
    # submitit's executor refuses to exist where there is no srun; the builder it uses needs nothing.
    from submitit.slurm.slurm import _make_sbatch_string

    folder = run_folder(run) / "slurm"
    run.micro_batch_for(cfg.nodes * cfg.ranks_per_node)
    command = [sys.executable, "-u", str(ROOT / "launch" / "slurm.py"), "--task", str(folder / "config.yaml")]
    wanted: dict[str, Any] = {
        "job_name": run.name,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "constraint": cfg.constraint,
        "mem": memory(cfg.mem),
        "gpus_per_node": cfg.gpus_per_node,
    }
    text: str = _make_sbatch_string(
        command=shlex.join(command),
        folder=folder / "%j",
        nodes=cfg.nodes,
        ntasks_per_node=cfg.ranks_per_node,
        cpus_per_task=cfg.cpus_per_task,
        time=minutes(cfg.time),
        signal_delay_s=cfg.signal_delay_s,
        setup=list(cfg.setup) or None,
        additional_parameters={"requeue": True, "chdir": str(ROOT), **cfg.sbatch},
        # Since Slurm 22.05 srun doesn't take --cpus-per-task from the job. One failed rank ends the others,
        # which would otherwise wait for it in a collective until the time-out.
        srun_args=[f"--cpus-per-task={cfg.cpus_per_task}", "--kill-on-bad-exit=1"],
        **{"wckey": None, **{key: value for key, value in wanted.items() if value not in ("", 0)}},
    )
    return text


def run_folder(run: RunConfig) -> Path:
    """The run's directory as an absolute path; ConfigError unless it is a plain path without '..'."""
    if not _PATH.fullmatch(run.run_dir) or ".." in Path(run.run_dir).parts:
        raise ConfigError(
            f"run_dir={run.run_dir!r} is refused: it becomes part of a shell script; "
            "use letters, digits, '/', '.', '_', '-', '+', '@', '=', single spaces, and no '..'"
        )
    return (ROOT / run.run_dir).absolute()


def submit(cfg: SlurmConfig, run: RunConfig) -> None:
    """Print the script of a run where `dry_run` is set; submission comes with the Slurm work."""
    script = sbatch_script(cfg, run)
    if not cfg.dry_run:
        raise ConfigError("submission is not built yet; use dry_run=true to see the script")
    world = cfg.nodes * cfg.ranks_per_node
    micro_batch = run.micro_batch_for(world)
    print(script, end="")
    accumulation = run.global_batch // (micro_batch * world)
    print(
        f"dry run, nothing was written or submitted: {cfg.nodes} nodes x {cfg.ranks_per_node} ranks, global "
        f"batch {run.global_batch} = {micro_batch} a forward x {accumulation} accumulated x {world} ranks",
        file=sys.stderr,
    )


def task(path: Path) -> None:
    """What each task of the job does: rank and rendezvous from Slurm, then the same as launch/train.py."""
    from submitit.helpers import TorchDistributedEnvironment

    from segformer.job import run_job  # deepspeed and the data path, which a login node may lack

    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    try:
        run_job(load_config(path, RunConfig))
    except SegformerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides of the job and overrides of the training run.

    Raises:
        ConfigError: an override of what only a cluster profile may set.
    """
    own = {f.name for f in fields(SlurmConfig)} | {"cluster", "local"}
    runs = {f.name for f in fields(RunConfig)} | {path.name for path in CONF.iterdir()} | {"hydra"}
    job, training = [], []
    for argument in arguments:
        key = re.split(r"[.=@\[]", argument.lstrip("+~"), maxsplit=1)[0]
        group = key in ("cluster", "local")
        if key in PROFILE_ONLY or (group and not re.fullmatch(r"(?:cluster|local)=[A-Za-z0-9_-]+", argument)):
            raise ConfigError(
                f"{argument!r} is refused: {', '.join(PROFILE_ONLY)} belong to a cluster profile; "
                "write conf/local/default.yaml, or choose one of conf/cluster with cluster=<name>"
            )
        if key in own or argument in ("--help", "-h"):
            job.append(_quoted(argument))
            continue
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
        if near and key not in runs:
            raise ConfigError(f"{key} is not a setting; did you mean {near[0]}?")
        training.append(argument)
    return job, training


def _quoted(argument: str) -> str:
    """An override whose value stays text: hydra's grammar has its own meaning for , & | and blanks."""
    key, _, value = argument.partition("=")
    if key not in _TEXTS or re.fullmatch(r"'.*'|\".*\"|", value):
        return argument
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)
    return f"{key}='{escaped}'"


def main() -> None:
    """The command line: the job's settings and the run's settings, each composed against its own schema."""
    if sys.argv[1:2] == ["--task"] and len(sys.argv) == 3:
        task(Path(sys.argv[2]))
        return
    arguments = sys.argv[1:]

    def composed(cfg: SlurmConfig) -> None:
        submit(cfg, compose(RunConfig, "config", training))

    try:
        sys.argv[1:], training = split_overrides(arguments)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    cli(SlurmConfig, "slurm", composed)
    if {"--help", "-h"} & set(arguments):
        print("and every key of launch/train.py")


if __name__ == "__main__":
    main()
