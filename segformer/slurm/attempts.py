"""The attempts of a job: every start is a line, so that a loop without progress is seen and ended.

    runs/x/slurm/attempts.jsonl
    {"job": "17", "attempt": 2, "ranks": 4, "nodes": "n[0-1]", "newest": "step-00000030"}

The batch script writes the line before it starts a rank (`attempt_line`), so that an attempt counts whatever
becomes of it. Slurm starts a job again after a preemption, a time limit or the loss of a node. MAX_IN_VAIN
restarts in a row that made no checkpoint are the last: one more would most likely end as they did.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

MAX_IN_VAIN = 3
FILE = "attempts.jsonl"


def attempt_line(run_dir: Path, ranks_per_node: int) -> str:
    """The shell line that records an attempt; nothing but bash and ls, which work where Python doesn't."""
    steps = shlex.quote(str(run_dir / "checkpoints"))
    newest = f'"$(ls {steps} 2>/dev/null | grep -E "^step-[0-9]+$" | tail -n 1)"'
    form = r'{"job": "%s", "attempt": %d, "ranks": %d, "nodes": "%s", "newest": "%s"}\n'
    ranks = f'"$((SLURM_JOB_NUM_NODES * {ranks_per_node}))"'
    job = '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
    values = f'{job} "${{SLURM_RESTART_COUNT:-0}}" {ranks} "$SLURM_JOB_NODELIST"'
    return f"printf '{form}' {values} {newest} >> {shlex.quote(str(run_dir / 'slurm' / FILE))}"


def attempts(run_dir: Path, job: str = "") -> list[dict[str, Any]]:
    """The attempts so far, of one job or of all, in order. A line that was cut short is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run_dir / "slurm" / FILE).read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [one for one in found if not job or one["job"] == job]


def step_of(attempt: dict[str, Any]) -> int:
    """The step that an attempt began from: that of its newest checkpoint, or 0."""
    return int(attempt["newest"].removeprefix("step-") or 0)


def in_vain(ended: list[dict[str, Any]], newest: str) -> int:
    """Count the last restarts of a job that made no checkpoint; `newest` is the name of the newest now."""
    row = list(itertools.takewhile(lambda one: one["newest"] == newest, reversed(ended)))
    return len(row) - bool(row and row[-1]["attempt"] == 0)  # the first start is no restart


def give_up(run_dir: Path, job: str, *, begun: bool) -> str:
    """Reason not to start the job again, or (`begun`) not to go on; empty where it may."""
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    newest = names[-1] if names else ""
    ended = attempts(run_dir, job)[: -1 if begun else None]
    count = in_vain(ended, newest)
    if count < MAX_IN_VAIN:
        return ""
    where = ", ".join(str(one["nodes"]) for one in ended[-count:])
    return (
        f"{count} restarts in a row (on {where}) made no checkpoint after {newest or 'the start'}; look at "
        "the first error in the logs of the last attempts, then resubmit"
    )
