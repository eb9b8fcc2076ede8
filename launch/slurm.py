"""Train on a Slurm cluster.

    python launch/slurm.py nodes=4 experiment=ade20k_160k  submits the run
    python launch/slurm.py nodes=2-4 ... watch=true        and follows it; goes
                                                on with 2, 3 or 4 nodes
    python launch/slurm.py nodes=4 ... dry_run=true        prints the script,
                                                submits nothing

    python launch/slurm.py status runs/x        its job, how far it is, its logs
    python launch/slurm.py watch runs/x
    python launch/slurm.py cancel runs/x        saves first, where KillWait
                                                leaves the time
    python launch/slurm.py resubmit runs/x [nodes=2 ...]   goes on, with the
                                                code of now

    python launch/slurm.py evaluate nodes=2 checkpoint=runs/x split=test
                                                launch/evaluate.py on all ranks
    python launch/slurm.py shard tasks=16 data=ade20k root=... output=...
                                                data_prep/shard.py as an array

Takes every override of launch/train.py beside the settings of the job, which
follow here. The configuration is composed once and the code is copied: the job
runs what was submitted.
"""

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from segformer.errors import ending, importing

with importing(__name__):
    from segformer.errors import ConfigError
    from segformer.slurm import commands, submission
    from segformer.slurm.settings import PROFILE_ONLY, SlurmConfig
    from segformer.training.config import CONF, RunConfig, cli, compose
    from segformer.training.overrides import near

COMMANDS = ("status", "watch", "cancel", "resubmit")
OTHERS = ("evaluate", "shard")


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides of the job and overrides of the training run.

    Raises:
        ConfigError: an override of what only a cluster profile may set.
    """
    own = {f.name for f in fields(SlurmConfig)} | {"cluster", "local"}
    runs = {f.name for f in fields(RunConfig)} | {path.name for path in CONF.iterdir()} | {"hydra"}
    job, training = [], []
    for argument in arguments:
        if argument == "--check":
            continue
        key = re.split(r"[.=@\[]", argument.lstrip("+~"), maxsplit=1)[0]
        group = key in ("cluster", "local")
        if key in PROFILE_ONLY or (group and not re.fullmatch(r"(?:cluster|local)=[A-Za-z0-9_-]+", argument)):
            raise ConfigError(
                f"{argument!r} is refused: {', '.join(PROFILE_ONLY)} belong to a cluster profile; "
                "write conf/local/default.yaml, or choose one of conf/cluster with cluster=<name>"
            )
        if key in own or argument in ("--help", "-h"):
            job.append(argument)
            continue
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
        if near and key not in runs:
            raise ConfigError(f"{key} is not a setting; did you mean {near[0]}?")
        training.append(argument)
    return job, training


def _written(key: str, value: object) -> str:
    """An override that gives a setting the value that it had."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={text}"


def look_after(command: str, arguments: list[str]) -> None:
    """One of COMMANDS on a run directory."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"{command} needs a run's directory: python launch/slurm.py {command} runs/<name>")
    run_dir, overrides = submission.plain_path("run_dir", arguments[0]), arguments[1:]
    if command == "resubmit":
        job, training = split_overrides(overrides)
        if training:
            raise ConfigError(
                f"{training[0]!r} is refused: a run keeps its settings; only those of the job can be changed"
            )
        keys = [argument.partition("=")[0] for argument in job]
        if strange := [key for key in keys if key not in {f.name for f in fields(SlurmConfig)}]:
            raise ConfigError(
                f"{strange[0]!r} can't be changed by resubmit; give settings of the job as key=value"
            )
        before = submission.settings_of(run_dir)
        kept = [_written(key, value) for key, value in before.items() if key not in PROFILE_ONLY]
        cfg = compose(SlurmConfig, "slurm", [*kept, "dry_run=false", "watch=false", *job])
        cfg = replace(cfg, **{key: before[key] for key in PROFILE_ONLY})
        if submission.resubmit(run_dir, cfg) and cfg.watch:
            submission.watch(run_dir)
        return
    if overrides:
        raise ConfigError(f"{command} takes the run's directory only, not {overrides[0]!r}")
    functions: dict[str, Callable[[Path], object]] = {
        "status": lambda path: print(submission.status(path)),
        "watch": submission.watch,
        "cancel": submission.cancel,
    }
    functions[command](run_dir)


def submit_other(command: str, arguments: list[str]) -> None:
    """One of OTHERS: the settings of the job are ours, all else is the script's."""
    if {"--help", "-h"} & set(arguments):
        script = commands.EVALUATE if command == "evaluate" else commands.SHARD
        print(f"keys of the job: python launch/slurm.py --help\nall others: python {script} --help")
        return
    own = {f.name for f in fields(SlurmConfig)} | {"cluster", "local"}
    mine, rest, tasks = [], [], ""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if command == "shard" and key == "tasks":
            tasks = value
        elif re.split(r"[.=@\[]", argument.lstrip("+~"), maxsplit=1)[0] in own:
            mine.append(argument)
        else:
            rest.append(argument)
    cfg = compose(SlurmConfig, "slurm", split_overrides(mine)[0])
    if cfg.watch:
        raise ConfigError(f"watch is for training; squeue shows the jobs of {command}")
    if command == "evaluate":
        commands.evaluate(cfg, rest)
    elif not re.fullmatch(r"[0-9]{1,6}", tasks, re.ASCII):
        raise ConfigError(f"tasks={tasks!r}; say how many jobs share the work: tasks=16")
    else:
        commands.shard(cfg, rest, int(tasks))


def main() -> None:
    """The command line; see above."""
    arguments = sys.argv[1:]

    def composed(cfg: SlurmConfig) -> None:
        run = compose(RunConfig, "config", training)
        if "--check" in arguments:
            submission.describe(cfg, run)
        elif submission.submit(cfg, run) and cfg.watch:
            submission.watch(submission.plain_path("run_dir", run.run_dir))

    with ending():
        command = arguments[0] if arguments else ""
        if command in COMMANDS:
            look_after(command, arguments[1:])
            return
        if command in OTHERS:
            submit_other(command, arguments[1:])
            return
        if re.fullmatch(r"[a-z]+", command):
            known = (*COMMANDS, *OTHERS)
            meant = near(command, known)
            instead = f"did you mean {meant}?" if meant else f"use {', '.join(known)} or key=value"
            raise ConfigError(f"{command!r} is not a command; {instead}")
        sys.argv[1:], training = split_overrides(arguments)
        cli(SlurmConfig, "slurm", composed)
        if {"--help", "-h"} & set(arguments):
            print("and every key of launch/train.py")


if __name__ == "__main__":
    main()
