"""After the job's ranks have ended: done, start again, or give up. The last line of the batch script.

    exit code or event                              then
    0                                               done
    75  stopped by a signal, state saved            start again
    76  another rank was lost; a rank was killed    start again
    a rank says 1 or 2: bug, setting, memory, data  end: starting again would not mend it
    any other, and no rank says why                 start again: srun or Python could not start on a node
    out of memory (the kernel's, by accounts)       end
    Slurm itself starts the job again               nothing (preemption, loss of a node)
    3 restarts without a new checkpoint             end, and say so

srun's exit code alone does not tell: where one rank ends with 2, the others are killed, and 137 may be what
is left. So every rank that ends early leaves a line of its own (JobFolder.outcomes).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from segformer.checkpoint.lease import Owner
from segformer.errors import Preempted, RankLost, SegformerError
from segformer.slurm.attempts import FILE as ATTEMPTS
from segformer.slurm.attempts import attempts, give_up
from segformer.slurm.queue import JobState, job_state, ran_out_of_memory, slurm
from segformer.slurm.script import JobFolder

AGAIN = (Preempted.exit_code, RankLost.exit_code)
PATIENCE_S = 300
_T = TypeVar("_T")
REQUEUE_WAIT_S = 60  # Slurm ends the batch script soon after it has taken the requeue


def outcomes(folder: JobFolder, attempt: int) -> list[dict[str, Any]]:
    """Reasons of the ranks of an attempt that ended early, by rank; one that can't be read is left out."""
    found = []
    for path in sorted(folder.outcomes.glob(f"{attempt}-*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def decide(
    code: int,
    ended: list[dict[str, Any]],
    state: JobState,
    *,
    attempt: int,
    requeue: bool,
    out_of_memory: bool,
    stuck: str,
) -> tuple[bool, str]:
    """(Start again, why or why not) of a job whose srun ended with `code`, not 0, in `attempt`: the table."""
    fatal = [one for one in ended if one["code"] not in AGAIN]
    stopped = any(one["code"] == Preempted.exit_code for one in ended)
    if fatal:
        one = next((one for one in fatal if one["message"]), fatal[0])
        why = one["message"] or "no message"
        return False, f"rank {one['rank']} ended with {one['code']}: {why}"
    if out_of_memory and not stopped:
        return False, "the kernel killed a rank for its memory; fewer loader.workers, or more mem"
    if state.restarts > attempt or state.name == "PENDING":
        return False, "Slurm has started the job again already"
    if state.name not in ("RUNNING", "UNKNOWN") and state.reason != "TimeLimit" and not state.preempted:
        return False, f"Slurm is ending the job itself ({state.name})"
    what = "stopped by a signal" if stopped else f"a rank or a node was lost (exit code {code})"
    if not requeue:
        return False, f"{what}; requeue=false"
    if stuck:
        return False, stuck
    return True, what


def after(path: Path, code: int) -> None:
    """The last line of the batch script: end with srun's exit code, or have Slurm start the job again."""
    folder, owner = JobFolder(path), Owner.current()
    if code == 0:
        print(f"job {owner.job}: finished", flush=True)
        return
    record = patiently(lambda: json.loads(folder.record.read_text()))
    if record is None:
        sys.exit(code)
    run_dir = Path(record["run_dir"])
    state = patiently(lambda: job_state(owner.job), lambda state: state.name != "UNKNOWN")
    again, why = decide(
        code,
        outcomes(folder, owner.attempt),
        state or JobState("UNKNOWN"),
        attempt=owner.attempt,
        requeue=record["settings"]["requeue"],
        out_of_memory=ran_out_of_memory(owner.job),
        stuck=_uncounted(run_dir, owner) or give_up(run_dir, owner.job, begun=False),
    )
    print(f"job {owner.job}: {'starting again' if again else 'ended'}: {why}", flush=True)
    if again:
        patiently(lambda: _requeue(owner), bool)
        time.sleep(REQUEUE_WAIT_S)
    sys.exit(code)


def _uncounted(run_dir: Path, owner: Owner) -> str:
    """Reason to end a job whose attempt is not on record: uncounted, it would start again for ever."""
    begun = attempts(run_dir, owner.job)
    if begun and begun[-1]["attempt"] == owner.attempt:
        return ""
    return f"this attempt is not in {run_dir}/slurm/{ATTEMPTS}: is the disk full?"


def _requeue(owner: Owner) -> bool:
    """Ask for another start, unless Slurm has seen to it meanwhile; False where scontrol does not answer."""
    state = job_state(owner.job)
    if state.restarts < owner.attempt:
        return False
    if state.restarts == owner.attempt and state.name != "PENDING":
        slurm("scontrol", "requeue", owner.job)
    return True


def patiently(ask: Callable[[], _T], good: Callable[[_T], bool] = lambda _: True) -> _T | None:
    """Ask until the answer is `good` (the controller may be starting again); None where time is over."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if good(found := ask()):
                return found
            why = f"{found}"
        except (SegformerError, OSError, ValueError) as error:
            why = str(error)
        if time.monotonic() > end:
            print(f"gave up: {why}", file=sys.stderr, flush=True)
            return None
        time.sleep(5)
