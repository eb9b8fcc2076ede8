"""How long a job on this cluster makes no steps: from the command to the first, from a signal to the next.

    python launch/bench.py bench=slurm 'slurm.job=["nodes=2","gpus_per_node=8"]'

On a login node. Each round submits a run by launch/slurm.py, waits for its first step, sends it SIGUSR2 as
a preemption or a time limit does, and waits until the next attempt has made a step; then it cancels the job.
The clock is that of the login node, which looks at the run's files 20 times a second.

    submitted    the command has ended: configuration composed, code copied, sbatch has answered
    begun        the batch script runs on the first node: the queue, mostly
    first step   all ranks have imported, met, built the model and made a step
    saved        all ranks have agreed, and the checkpoint is committed
    begun again  Slurm has taken the requeue, waited (AuthInfo's cred_expire, KillWait) and found nodes
    next step    the checkpoint is verified and read, a step is made
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record import ROOT, conditions, spread, table, write_csv
from segformer.checkpoint.reader import list_steps
from segformer.errors import ConfigError
from segformer.slurm.attempts import attempts
from segformer.slurm.queue import job_state, slurm
from segformer.slurm.submission import newest

LOOK_S, ASK_S = 0.05, 5.0  # between looks at the files, and at the queue


@dataclass(kw_only=True, slots=True)
class RequeueBench:
    """Which job, and how often."""

    job: list[str] = field(default_factory=lambda: ["nodes=2"])
    "Settings of the job, as launch/slurm.py takes them."
    run: list[str] = field(default_factory=lambda: ["experiment=sample"])
    "Settings of the run; it gets 1,000,000 steps and logs every one."
    folder: str = "runs/bench-slurm"
    "Where the runs are; each round makes a new one."
    rounds: int = 3
    "Jobs, one after the other."
    timeout_s: float = 1800.0
    "Longest wait for any one event."

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.timeout_s <= 0:
            raise ConfigError("slurm.rounds and slurm.timeout_s must be 1 or more")


def measure(cfg: RequeueBench, out: Path) -> list[dict[str, Any]]:
    """Print the seconds of each event and write slurm.csv into `out`."""
    rounds = [one_round(cfg, Path(cfg.folder) / time.strftime("%Y%m%d-%H%M%S")) for _ in range(cfg.rounds)]
    rows = [
        {"from": origin, "to": event, **spread([found[origin][event] for found in rounds], 3)}
        for origin in rounds[0]
        for event in rounds[0][origin]
    ]
    write_csv(out / "slurm.csv", rows, conditions(("torch", "deepspeed")))
    print(table(rows))
    return rows


def one_round(cfg: RequeueBench, run_dir: Path) -> dict[str, dict[str, float]]:
    """Seconds from the command, and from the signal, to each event."""
    fixed = [f"run_dir={run_dir}", f"name={run_dir.name}", "steps=1000000", "telemetry.log_every=1"]
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "launch/slurm.py"), *cfg.job, *cfg.run, *fixed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("ConfigError: "))
    found = {"submitted": time.monotonic() - start}
    _, job = newest(run_dir.absolute())
    checkpoints = run_dir.absolute() / "checkpoints"

    def wait(what: Callable[[], object]) -> float:
        end, ask = time.monotonic() + cfg.timeout_s, time.monotonic() + ASK_S
        while not what():
            if time.monotonic() > ask:
                state, ask = job_state(job), time.monotonic() + ASK_S
                if not state.alive or time.monotonic() > end:
                    raise ConfigError(f"job {job} is {state.name}; see {run_dir}/slurm")
            time.sleep(LOOK_S)
        return time.monotonic() - start

    try:
        found["begun"] = wait(lambda: attempts(run_dir))
        found["first step"] = wait(lambda: steps(run_dir))
        slurm("scancel", "--signal=USR2", job)
        start = time.monotonic()
        again = {"saved": wait(lambda: list_steps(checkpoints))}
        last = list_steps(checkpoints)[-1]
        again["begun again"] = wait(lambda: len(attempts(run_dir)) > 1)
        again["next step"] = wait(lambda: max(steps(run_dir)) > last)
    finally:
        slurm("scancel", job, check=False)
    return {"command": found, "signal": again}


def steps(run_dir: Path) -> list[int]:
    """The steps that are logged."""
    try:
        text = (run_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line["step"] for line in lines if line["kind"] == "train"]
