"""A rank of the job: rank and rendezvous from Slurm, then the same as launch/train.py.

A rank that ends early leaves a line in JobFolder.outcomes, which after.py reads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

from segformer.checkpoint.lease import Owner
from segformer.distributed.rendezvous import slurm_environment
from segformer.distributed.watchdog import is_lost_rank
from segformer.errors import (
    SIGNALS,
    ConfigError,
    Preempted,
    RankLost,
    SegformerError,
    ending,
    error_line,
    reported,
)
from segformer.files import write_atomic
from segformer.job import run_job
from segformer.slurm.attempts import give_up
from segformer.slurm.script import JobFolder
from segformer.training.config import load_config

RANK_ZERO_S = 60.0  # longer than Telemetry takes to close


def task(path: Path) -> None:
    """A rank of the job."""
    for number in SIGNALS:  # until the training has handlers of its own
        signal.signal(number, _stop_early)
    folder, rank = JobFolder(path), int(os.environ.get("SLURM_PROCID", "0"))
    try:
        with ending():
            _run(folder, rank)
    except SystemExit:
        _wait_for_rank_zero(folder)
        raise


def _run(folder: JobFolder, rank: int) -> None:
    try:
        os.environ.update(slurm_environment(os.environ))
        cfg = load_config(folder.config)
        if rank == 0 and (why := give_up(Path(cfg.run_dir), Owner.current().job, begun=True)):
            raise ConfigError(f"{cfg.run_dir}: {why}")
        run_job(cfg)
    except BaseException as error:
        _record(folder, rank, error)
        raise


def _stop_early(number: int, frame: FrameType | None) -> None:
    raise Preempted(f"stopped by {signal.Signals(number).name} outside of the training; start again")


def _record(folder: JobFolder, rank: int, error: BaseException) -> None:
    """Leave the reason why this rank ends early, where the disk takes it."""
    code, message = 1, "".join(traceback.format_exception_only(error)).strip()
    if isinstance(error, SegformerError):
        code, message = error.exit_code, error_line(error)
    elif isinstance(error, SystemExit):
        if not error.code:
            return
        code, message = error.code if isinstance(error.code, int) else 1, ""
    elif is_lost_rank(error):  # before the first step, too, a rank that is gone is no bug of this one
        code = RankLost.exit_code
    lost = f"the outcome can't be written to {folder.outcomes}"
    # A full disk must not hide the error itself.
    with reported(lambda failed: print(f"{lost}: {failed}", file=sys.stderr, flush=True), on=OSError):
        folder.outcomes.mkdir(mode=0o700, exist_ok=True)
        write_atomic(_outcome(folder, rank), json.dumps({"rank": rank, "code": code, "message": message}))


def _outcome(folder: JobFolder, rank: int) -> Path:
    return folder.outcomes / f"{Owner.current().attempt}-{rank:05d}.json"


def _wait_for_rank_zero(folder: JobFolder) -> None:
    """The first rank that ends with a code makes srun end all others, and rank zero may still be saving.

    It records its outcome last, so its own call returns at once.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    end = time.monotonic() + RANK_ZERO_S
    while not _outcome(folder, 0).exists() and time.monotonic() < end:
        time.sleep(0.2)
