"""Train on a Slurm cluster.

    python launch/slurm.py nodes=4 experiment=ade20k_160k

Takes every override of launch/train.py beside the settings of the job. The
configuration is composed once and the code is copied: the job runs what was
submitted. nodes=2-4 goes on with 2, 3 or 4 nodes, watch=true follows the job,
dry_run=true prints its script and submits nothing.

    python launch/slurm.py status runs/x    its job, how far it is, its logs
    python launch/slurm.py watch runs/x     follows it
    python launch/slurm.py cancel runs/x    ends it, after a save
    python launch/slurm.py resubmit runs/x [nodes=2 ...]    with the code of now

    python launch/slurm.py evaluate nodes=2 checkpoint=runs/x split=test
    python launch/slurm.py shard tasks=16 data=ade20k root=... output=...
    python launch/slurm.py sweep sweep.jobs=4 name=lr optim.lr=1e-4,3e-4 ...

The last three: launch/evaluate.py on all ranks, data_prep/shard.py and the runs
of launch/sweep.py as arrays.
"""

import re
import sys
from dataclasses import fields, replace
from typing import Any

from segformer.errors import ending, importing

with importing(__name__):
    from segformer.errors import ConfigError
    from segformer.slurm import commands, submission, sweeping
    from segformer.slurm.settings import PROFILE_ONLY, SlurmConfig
    from segformer.sweep.plan import SweepConfig
    from segformer.training.choices import CONF, take_conf
    from segformer.training.config import RunConfig, cli, compose
    from segformer.training.directory import check_start
    from segformer.training.overrides import near

LOOK_AFTER = {
    "status": lambda run_dir: print(submission.status(run_dir)),
    "watch": submission.watch,
    "cancel": submission.cancel,
}
OF_SWEEPS = {"status": lambda run_dir: print(sweeping.status(run_dir)), "cancel": sweeping.cancel}
COMMANDS = (*LOOK_AFTER, "resubmit", "evaluate", "shard", "sweep")
SETTINGS = {f.name for f in fields(SlurmConfig)}


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides of the job and all others.

    Raises:
        ConfigError: an override of what only a cluster profile may set.
    """
    job: list[str] = []
    others: list[str] = []
    for argument in arguments:
        key = re.split(r"[.=@\[]", argument.lstrip("+~"), maxsplit=1)[0]
        group = key in ("cluster", "local")
        if key in PROFILE_ONLY or (group and not re.fullmatch(r"(?:cluster|local)=[A-Za-z0-9_-]+", argument)):
            raise ConfigError(
                f"{argument!r} is refused: {', '.join(PROFILE_ONLY)} belong to a cluster profile; "
                "write conf/local/default.yaml, or choose one of conf/cluster with cluster=<name>"
            )
        (job if group or key in SETTINGS else others).append(argument)
    return job, others


def train(arguments: list[str]) -> None:
    """Submit a training run: the settings of the job are ours, all else is that of launch/train.py."""
    conf, arguments = take_conf(arguments)
    options = [argument for argument in arguments if argument in ("--help", "-h", "--check")]
    job, training = split_overrides([argument for argument in arguments if argument not in options])
    known = {f.name for f in fields(RunConfig)} | {path.name for path in CONF.iterdir()} | {"hydra"}
    for key in [re.split(r"[.=@]", argument.lstrip("+~"), maxsplit=1)[0] for argument in training]:
        if key not in known and (close := near(key, SETTINGS)):
            raise ConfigError(f"{key} is not a setting; did you mean {close}?")

    def composed(cfg: SlurmConfig) -> None:
        run = compose(RunConfig, "config", [*conf, *training])
        check_start(run)
        if "--check" in arguments:
            submission.describe(cfg, run)
        elif submission.submit(cfg, run) and cfg.watch:
            submission.watch(submission.plain_path("run_dir", run.run_dir))

    sys.argv[1:] = [*conf, *job, *(option for option in options if option != "--check")]
    cli(SlurmConfig, "slurm", composed)
    if {"--help", "-h"} & set(options):
        print("\nAnd every key of launch/train.py.")


def look_after(command: str, arguments: list[str]) -> None:
    """status, watch, cancel or resubmit a run by its directory."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"{command} needs a run's directory: python launch/slurm.py {command} runs/<name>")
    run_dir, overrides = submission.plain_path("run_dir", arguments[0]), arguments[1:]
    sweep = sweeping.is_sweep(run_dir)
    if sweep and command not in OF_SWEEPS:
        raise ConfigError(
            f"{arguments[0]} is a sweep; use {' or '.join(OF_SWEEPS)}, or {command} one of its runs"
        )
    if command == "resubmit":
        cfg = changed(submission.settings_of(run_dir), overrides)
        if submission.resubmit(run_dir, cfg) and cfg.watch:
            submission.watch(run_dir)
        return
    if overrides:
        raise ConfigError(f"{command} takes the run's directory only, not {overrides[0]!r}")
    (OF_SWEEPS if sweep else LOOK_AFTER)[command](run_dir)


def changed(before: dict[str, Any], overrides: list[str]) -> SlurmConfig:
    """The settings of a job of before with overrides; its profile stays."""
    job, training = split_overrides(overrides)
    if strange := [*training, *(one for one in job if one.partition("=")[0] not in SETTINGS)]:
        raise ConfigError(
            f"{strange[0]!r} is refused: a run keeps its settings; give those of the job as key=value"
        )
    words = {"None": "null", "True": "true", "False": "false"}
    kept = [
        f"{key}={words.get(str(value), value)}" for key, value in before.items() if key not in PROFILE_ONLY
    ]
    cfg = compose(SlurmConfig, "slurm", [*kept, "dry_run=false", "watch=false", *job])
    return replace(cfg, **{key: before[key] for key in PROFILE_ONLY if key in before})


def submit_other(command: str, arguments: list[str]) -> None:
    """evaluate or shard: the settings of the job are ours, all else is the script's."""
    if {"--help", "-h"} & set(arguments):
        script = commands.EVALUATE if command == "evaluate" else commands.SHARD
        print(f"keys of the job: python launch/slurm.py --help\nall others: python {script} --help")
        return
    conf, arguments = take_conf(arguments)
    job, rest = split_overrides(arguments)
    cfg, rest = compose(SlurmConfig, "slurm", [*conf, *job]), [*conf, *rest]
    if command == "evaluate":
        commands.evaluate(cfg, rest)
        return
    tasks = next((one.partition("=")[2] for one in rest if one.startswith("tasks=")), "")
    if not re.fullmatch(r"[0-9]{1,6}", tasks):
        raise ConfigError(f"tasks={tasks!r}; say how many jobs share the work: tasks=16")
    commands.shard(cfg, [one for one in rest if not one.startswith("tasks=")], int(tasks))


def submit_sweep(arguments: list[str]) -> None:
    """sweep: the settings of the job and of the sweep are ours, all else is that of launch/train.py."""
    if {"--help", "-h"} & set(arguments):
        print("keys of the job: python launch/slurm.py --help\nall others: python launch/sweep.py --help")
        return
    conf, arguments = take_conf(arguments)
    job, rest = split_overrides(arguments)
    ours = {field.name for field in fields(SweepConfig)} - SETTINGS
    own = [one for one in rest if re.split(r"[.=]", one, maxsplit=1)[0] in ours]
    cfg, plan = compose(SlurmConfig, "slurm", [*conf, *job]), compose(SweepConfig, "sweep", own)
    if plan.name == "???":
        raise ConfigError("a sweep needs a name: name=lr makes runs/lr")
    training = [*conf, *(one for one in rest if one not in own)]
    if (array := sweeping.submit_sweep(cfg, plan, training)) and cfg.watch:
        submission.follow(array)


def main() -> None:
    """The command line; see above."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else ""
    with ending():
        if command in ("evaluate", "shard"):
            submit_other(command, arguments[1:])
        elif command == "sweep":
            submit_sweep(arguments[1:])
        elif command in COMMANDS:
            look_after(command, arguments[1:])
        elif re.fullmatch(r"[a-z]+", command):
            meant = near(command, COMMANDS)
            instead = f"did you mean {meant}?" if meant else f"use {', '.join(COMMANDS)} or key=value"
            raise ConfigError(f"{command!r} is not a command; {instead}")
        else:
            train(arguments)


if __name__ == "__main__":
    main()
