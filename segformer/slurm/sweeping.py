"""A sweep on a cluster: a rung is an array of jobs, each element a run as any other; then a job goes on.

    runs/<name>/sweep.json            the plan (sweep/plan.py)
    runs/<name>/slurm/0001/           a rung: script.sh of the array, next.sh, job.json, code/, logs/
    runs/<name>/<run>/slurm/0001/     the job of a run, as launch/slurm.py makes it

`next.sh` starts when every element of the array has ended for good: it ranks the runs, submits the next rung
or compares them. Where it is lost the command that has begun the sweep goes on with it: what is done is not
trained again. A run that fails is left where it is, named at the end, and tried again by that command.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError, listed
from segformer.files import read_json, write_atomic
from segformer.slurm.code import INSIDE, ROOT, copy_code
from segformer.slurm.queue import job_state, slurm, submit_script
from segformer.slurm.script import JobFolder, array_script, command_script
from segformer.slurm.settings import SlurmConfig
from segformer.slurm.submission import (
    check_ended,
    make_folder,
    newest,
    plain_path,
    record_of,
    show_script,
    with_batch,
    write_job,
)
from segformer.sweep.plan import FILE, SearchConfig, SweepConfig
from segformer.sweep.queue import begun, concluded
from segformer.sweep.runs import Job, of_rung, plan_of, ranked, summary
from segformer.training.config import RunConfig, compose


def is_sweep(run_dir: Path) -> bool:
    """Whether a directory is that of a sweep."""
    return (run_dir / FILE).is_file()


def submit_sweep(cfg: SlurmConfig, plan: SweepConfig, overrides: list[str], reached: int = -1) -> str:
    """Submit the runs of a sweep that are not trained yet, rung by rung; compare them where all are.

    reached: the rung whose array has ended, of which runs that are not done have failed; -1 tries all again.
    The array's id; "" without one.

    Raises:
        ConfigError: of the plan, of a setting, by Slurm; or the sweep is at work.
        SegformerError: runs have failed, once all others are done.
    """
    if cfg.node_range[0] != cfg.node_range[1]:
        raise ConfigError(f"nodes={cfg.nodes}: the runs of a sweep have one number of nodes; use nodes=1")
    ranks = cfg.node_range[0] * cfg.ranks_per_node
    jobs, stages = plan_of(plan, overrides, "cuda" if cfg.gpus else "cpu", ranks)
    for job in jobs:
        with_batch(cfg, job.config).batch_shape(ranks)
    place = plain_path("name", Path("runs", plan.name))
    if cfg.dry_run:
        text = array_script(
            cfg, JobFolder(place / "slurm/0001"), Path.cwd(), len(jobs), _at_once(plan, len(jobs))
        )
        show_script(text)
        print(f"dry run, nothing was written or submitted: {summary(jobs, stages)}", file=sys.stderr)
        return ""
    if reached < 0:
        check_ended(place)
    with begun(plan, overrides, jobs) as (jobs, folder, _):
        failed: list[str] = []
        rung = jobs
        for number, stage in enumerate(stages):
            rung = of_rung(rung, stage, not number)
            undone = [job for job in rung if not job.done()]
            if number <= reached:
                failed += [job.trial.name for job in undone]
            elif undone:
                for job in undone:
                    check_ended(job.folder)
                print(f"{folder}: {summary(jobs, stages)}")
                return _submit(cfg, plan, overrides, place, undone, (number, len(stages)))
        concluded(plan, folder, jobs, ranked(rung), failed)
    return ""


def _at_once(plan: SweepConfig, tasks: int) -> int:
    return min(plan.sweep.jobs or tasks, tasks)


def _submit(
    cfg: SlurmConfig,
    plan: SweepConfig,
    overrides: list[str],
    place: Path,
    jobs: list[Job],
    rung: tuple[int, int],
) -> str:
    """Submit these jobs as an array, and the job that goes on when they have ended; the array's id."""
    directory = plain_path("the working directory", Path.cwd())
    folder = make_folder(place)
    copy_code(ROOT, folder.code)
    records = {}
    for number, job in enumerate(jobs):
        run_dir = plain_path("run_dir", job.folder)
        own = make_folder(run_dir)
        own = JobFolder(own.path, folder.code)
        run = with_batch(cfg, compose(RunConfig, "config", job.overrides))
        records[own.record] = write_job(own, cfg, run, directory, run_dir)
        (folder.path / f"{number}.sh").symlink_to(own.script)
        write_atomic(own.record, json.dumps(records[own.record], indent=1))
    said: dict[str, Any] = {"settings": asdict(cfg), "plan": asdict(plan), "overrides": overrides}
    said |= {"rung": rung[0], "runs": [job.trial.name for job in jobs]}
    at_once = _at_once(plan, len(jobs))
    folder.script.write_text(array_script(cfg, folder, directory, len(jobs), at_once))
    array = submit_script(folder.script)
    for number, (path, record) in enumerate(records.items()):
        write_atomic(path, json.dumps(record | {"job": f"{array}_{number}"}, indent=1))
    write_atomic(folder.record, json.dumps(said | {"job": array}, indent=1))
    what = f"rung {rung[0] + 1} of {rung[1]}, " if rung[1] > 1 else ""
    print(f"job {array}: {what}{len(jobs)} runs, {at_once} at a time", flush=True)
    _submit_next(cfg, folder)
    return array


def _submit_next(cfg: SlurmConfig, folder: JobFolder) -> None:
    """Submit the job that goes on when the array has ended."""
    said = record_of(folder)
    entry = [sys.executable, "-u", str(folder.code / INSIDE / "launch" / "slurm_job.py")]
    after, script = {"dependency": f"afterany:{said['job']}"}, folder.path / "next.sh"
    command = shlex.join([*entry, "sweep", str(folder.path)])
    script.write_text(command_script(replace(cfg, dependency=""), folder, command, more=after))
    then = submit_script(script)
    write_atomic(folder.record, json.dumps(said | {"next": then}, indent=1))
    shown = f"runs/{said['plan']['name']}"
    print(
        f"job {then} goes on after it\n"
        f"logs    {shown}/<run>/slurm/*/logs, {folder.logs}/{then}_0_log.out\n"
        f"status  python launch/slurm.py status {shown}\n"
        f"end it  python launch/slurm.py cancel {shown}",
        flush=True,
    )


def go_on(path: Path) -> None:
    """The job after an array: the next rung or the comparison; started again, what is left of that."""
    said = read_json(path / "job.json")
    cfg, search = SlurmConfig(**said["settings"]), SearchConfig(**said["plan"].pop("sweep"))
    last, _ = newest(path.parent.parent)
    if last.path == path:
        submit_sweep(cfg, SweepConfig(**said["plan"], sweep=search), said["overrides"], said["rung"])
    elif "next" not in record_of(last):
        _submit_next(cfg, last)


def status(run_dir: Path) -> str:
    """A line for each job of a sweep's newest rung, and for the one that goes on after it."""
    folder, array = newest(run_dir)
    said = record_of(folder)
    lines = [f"{name}: {job_state(f'{array}_{number}')}" for number, name in enumerate(said["runs"])]
    then = said.get("next", "")
    return "\n".join([*lines, f"job {then} goes on: {job_state(then)}" if then else "no job goes on"])


def cancel(run_dir: Path) -> None:
    """End the jobs of a sweep, the one that would go on first; the runs save their states."""
    record: dict[str, Any] = record_of(newest(run_dir)[0])
    alive = [job for job in (record.get("next", ""), record["job"]) if job and job_state(job).alive]
    for job in alive:
        slurm("scancel", job)
    told = f"jobs {listed(alive)} are being ended" if alive else "its jobs have ended"
    print(f"{told}; the command that began the sweep goes on with it")
