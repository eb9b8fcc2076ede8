"""Submitting a run, and looking after it: every function takes the run's directory.

    runs/x/slurm/0001/     a submission (script.JobFolder); resubmitting makes 0002
    runs/x/slurm/attempts.jsonl

The folder is for its owner alone (0700): what is in it runs as the user.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from segformer.checkpoint.checkpointer import list_steps
from segformer.checkpoint.reader import CONFIG
from segformer.errors import CheckpointError, ConfigError, reraise_as
from segformer.files import write_atomic
from segformer.slurm.attempts import attempts, step_of
from segformer.slurm.code import ROOT, copy_code
from segformer.slurm.queue import JobState, job_state, slurm, submit_script, would_start
from segformer.slurm.script import JobFolder, training_script
from segformer.slurm.settings import SlurmConfig
from segformer.telemetry.jsonl import newest_row
from segformer.telemetry.progress import duration
from segformer.training.config import RunConfig, load_config, save_config
from segformer.training.directory import as_begun
from segformer.training.sizing import BATCH, fitting_batch, needs_sizing

WATCH_S = 5.0
PATIENCE = 12  # looks at a job that Slurm doesn't know: its controller may be starting again
_PATH = re.compile(r"[A-Za-z0-9._/+@=-]+(?: [A-Za-z0-9._/+@=-]+)*")


def plain_path(name: str, path: Path | str) -> Path:
    """An absolute path that may stand in a batch script.

    Raises:
        ConfigError: it holds anything but letters, digits and / . _ - + @ = and single spaces, or '..'.
    """
    whole = (Path.cwd() / path).absolute()
    if not _PATH.fullmatch(str(whole)) or ".." in whole.parts:
        raise ConfigError(
            f"{name}={str(path)!r} is refused (it becomes part of a script); use letters, digits, "
            "/ . _ - + @ =, single spaces, and no '..'"
        )
    return whole


def with_batch(cfg: SlurmConfig, run: RunConfig) -> RunConfig:
    """The run with the batch that it began with, else one that all its numbers of ranks can share, where that
    is left to be worked out."""
    run = as_begun(run)
    if "global_batch" not in run.auto:
        return run
    usual = BATCH["gpu" if cfg.gpus else "cpu"]
    batch = fitting_batch(usual, _rank_counts(cfg), run.micro_batch)
    return replace(run, global_batch=batch, auto=[key for key in run.auto if key != "global_batch"])


def _rank_counts(cfg: SlurmConfig) -> list[int]:
    low, high = cfg.node_range
    return [nodes * cfg.ranks_per_node for nodes in range(low, high + 1)]


def describe(cfg: SlurmConfig, run: RunConfig) -> str:
    """Shares of the ranks in the global batch; ConfigError where a number of nodes can't have any."""
    batches = [with_batch(cfg, run).batch_shape(ranks) for ranks in _rank_counts(cfg)]
    return f"{cfg.nodes} nodes x {cfg.ranks_per_node} ranks, global batch {batches[-1]}"


def submit(cfg: SlurmConfig, run: RunConfig, directory: Path | None = None) -> str:
    """Submit a run, new or to be continued; prints the job, its logs and what can be done next. The job's id.

    directory: where relative paths of the run begin; None = here.

    Raises:
        ConfigError: a setting is refused, by us or by Slurm, or a job works on this run already.
    """
    run_dir = plain_path("run_dir", run.run_dir)
    directory = plain_path("the working directory", directory or Path.cwd())
    run = with_batch(cfg, run)
    shape = describe(cfg, run)
    if cfg.dry_run:
        folder = JobFolder(run_dir / "slurm" / "0001")
        show_script(training_script(cfg, run.name, folder, directory, run_dir))
        print(f"dry run, nothing was written or submitted: {shape}", file=sys.stderr)
        return ""
    check_ended(run_dir)
    folder = make_folder(run_dir)
    code = copy_code(ROOT, folder.code)
    record = write_job(folder, cfg, run, directory, run_dir) | {"code": code}
    write_atomic(folder.record, json.dumps(record, indent=1))
    job = submit_script(folder.script)
    write_atomic(folder.record, json.dumps(record | {"job": job}, indent=1))
    commit = (code["commit"] or "without git")[:12] + (" with changes" if code["changed"] else "")
    print(
        f"job {job}: {shape}, code {commit}\n"
        f"logs    {folder.logs}/{job}_0_log.out and .err\n"
        f"status  python launch/slurm.py status {run.run_dir}\n"
        f"end it  python launch/slurm.py cancel {run.run_dir}"
    )
    return job


def write_job(
    folder: JobFolder, cfg: SlurmConfig, run: RunConfig, directory: Path, run_dir: Path
) -> dict[str, Any]:
    """Write configuration and script of a run's job into its folder; what is to be its record."""
    run.checkpoint.notice_s = float(cfg.signal_delay_s)
    save_config(run, folder.config)
    folder.script.write_text(training_script(cfg, run.name, folder, directory, run_dir))
    return {"settings": asdict(cfg), "run_dir": str(run_dir), "directory": str(directory)}


def check_ended(run_dir: Path) -> None:
    """Refuse a run, or a sweep, one of whose jobs waits, runs or ends at this moment."""
    shown = os.path.relpath(run_dir)
    for earlier in _submissions(run_dir):
        record = record_of(earlier)
        for job in filter(None, (record.get("job", ""), record.get("next", ""))):
            state = job_state(job)
            if state.name == "COMPLETING":
                raise ConfigError(f"{shown}: job {job} is still ending; try again in a moment")
            if state.alive:
                raise ConfigError(
                    f"{shown} has job {job}, which is {state.name}; `python launch/slurm.py cancel {shown}` "
                    "ends it, after saving its state"
                )


def show_script(text: str) -> None:
    """Print a script and, where there is a Slurm, what that says to it; ConfigError where it refuses."""
    print(text, end="")
    if shutil.which("sbatch"):
        print(f"Slurm: {would_start(text)}", file=sys.stderr)


def make_folder(parent: Path, name: str = "slurm") -> JobFolder:
    """A new folder parent/name/0001 for a submission, for its owner alone; `parent` is made, too."""
    top = parent / name
    with reraise_as(ConfigError, f"{top} can't be made", "choose another folder"):
        parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        _check_owner(parent)
        top.mkdir(mode=0o700, exist_ok=True)
        found = top.lstat()
        if top.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{top} is a link, or others may open it, and what is in it runs as you; chmod 700 it"
            )
        number = max((int(path.name) for path in _numbered(top)), default=0) + 1
        folder = JobFolder(top / f"{number:04d}")
        folder.path.mkdir(mode=0o700)
        folder.logs.mkdir()
    return folder


def _check_owner(folder: Path) -> None:
    """Refuse a folder that others may exchange for one with code of theirs, which would run as this user."""
    own, above = folder.stat(), folder.parent.stat()
    if own.st_uid != os.getuid() or own.st_mode & 0o022:
        raise ConfigError(
            f"{folder} is not yours alone to write in, and its job runs as you; chmod go-w {folder}"
        )
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"everybody may exchange {folder}: chmod o-w {folder.parent}, or choose another run_dir"
        )


def _numbered(top: Path) -> list[Path]:
    return sorted(top.glob("[0-9][0-9][0-9][0-9]"))


def _submissions(run_dir: Path) -> list[JobFolder]:
    """The submissions of a run, oldest first."""
    return [JobFolder(path) for path in _numbered(run_dir / "slurm")]


def record_of(folder: JobFolder) -> dict[str, Any]:
    """What was submitted; {} where it was never written whole."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(folder.record.read_text()))
    return {}


def newest(run_dir: Path) -> tuple[JobFolder, str]:
    """The newest submission of a run and its job; ConfigError without one."""
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} does not exist; give the run_dir of a run that was submitted")
    for folder in reversed(_submissions(run_dir)):
        if job := record_of(folder).get("job"):
            return folder, job
    raise ConfigError(
        f"{run_dir} has not been submitted; python launch/slurm.py run_dir={run_dir} ... does it"
    )


def cancel(run_dir: Path) -> None:
    """End the job of a run; it saves its state first, where the cluster's KillWait leaves it the time."""
    _, job = newest(run_dir)
    state = job_state(job)
    if not state.alive:
        print(f"job {job} has ended already ({state.name})")
        return
    slurm("scancel", job)
    print(f"job {job} is being ended; `python launch/slurm.py resubmit {run_dir}` goes on with the run")


def settings_of(run_dir: Path) -> dict[str, Any]:
    """The settings of a run's newest job, by the names of SlurmConfig."""
    return dict(record_of(newest(run_dir)[0])["settings"])


def resubmit(run_dir: Path, cfg: SlurmConfig) -> str:
    """Submit a run once more, with the code of now and these settings of the job; the job's id."""
    folder, _ = newest(run_dir)
    run = load_config(folder.config)
    run.run_dir = str(run_dir)
    return submit(cfg, run, Path(record_of(folder)["directory"]))


def status(run_dir: Path) -> str:
    """A few lines about a run: its job, how far it is, its newest checkpoint, its attempts and its logs."""
    folder, job = newest(run_dir)
    steps = list_steps(run_dir / "checkpoints")
    lines = [
        f"job         {job}: {job_state(job)}",
        f"step        {progress(run_dir, folder)}",
        f"checkpoint  step {steps[-1]}" if steps else "checkpoint  none yet",
    ]
    lines += [
        f"attempt {one['attempt']:<3} {one['ranks']} ranks on {one['nodes']} from step {step_of(one)}"
        for one in attempts(run_dir, job)
    ]
    return "\n".join([*lines, f"logs        {folder.logs}/{job}_0_log.out and .err"])


def progress(run_dir: Path, folder: JobFolder) -> str:
    """Progress of a run by its newest line of metrics: step, loss, speed, time to go."""
    cfg = load_config(folder.config)
    with contextlib.suppress(ConfigError, CheckpointError):  # which has the numbers that were worked out
        cfg = load_config(run_dir / CONFIG)
    total, last = cfg.steps, newest_row(run_dir, "train")
    if not last:
        return f"0 of {'?' if needs_sizing(cfg) else total}"
    step = last["step"]
    parts = [f"{step} of {total} ({100 * step / total:.0f} %)"]
    parts.append(f"loss {last['loss']:.4f}" if isinstance(last["loss"], float) else "loss not finite")
    if isinstance(last["images_per_s"], float) and isinstance(last["step_s"], float):
        parts.append(
            f"{last['images_per_s']:.1f} images/s, {duration((total - step) * last['step_s'])} to go"
        )
    return ", ".join(parts)


def watch(run_dir: Path) -> None:
    """Follow the job of a run and its progress; see `follow`."""
    folder, job = newest(run_dir)
    follow(job, lambda: f" | step {progress(run_dir, folder)}")


def follow(job: str, progress: Callable[[], str] = str) -> None:
    """Follow a job on one line until it has ended; Ctrl-C ends the watching only."""
    live, shown, unknown = sys.stdout.isatty(), "", 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            state = JobState("UNKNOWN")
            with contextlib.suppress(ConfigError):  # slurmctld may be busy, or starting again
                state = job_state(job)
            line = f"job {job} {state}{progress()}"
            if live:
                print(f"\r\x1b[K{line}", end="", flush=True)
            elif line != shown:
                print(line, flush=True)
            shown = line
            unknown = unknown + 1 if state.name == "UNKNOWN" else 0
            if not state.alive and unknown in (0, PATIENCE):
                break
            time.sleep(WATCH_S)
    if live:
        print()
