"""Lease of a run directory: one job at a time writes into it, and never one that has been replaced.

    runs/x/lease.json      generation, token, and who holds it: Slurm job and attempt, or host and process
    runs/x/.lock           held (flock) by the holder's rank zero; the kernel lets go when it dies

`Lease.take` refuses where another job is at work. A job that Slurm has started again takes the directory over
from its own earlier attempt even where a rank of that still runs on a node that Slurm has lost: the
generation grows, and `check`, which stands before every commit, ends the old rank before it writes.

flock reaches as far as the file system lets it: all nodes on Lustre (mounted with flock), BeeGFS, GPFS and
NFS 4, one node elsewhere. There a Slurm job is found alive by squeue; two processes started by hand on two
nodes are not noticed before the first commit of the earlier one, which then ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from segformer.errors import CheckpointError, ConfigError, RunTaken, SegformerError, reraise_as
from segformer.files import lock, read_json, write_atomic

FILE, LOCK = "lease.json", ".lock"
RELEASE_S = 150  # how long a file server may keep the lock of a node that it has lost


@dataclass(frozen=True, slots=True)
class Owner:
    """Holder of a run directory."""

    job: str
    "Slurm's job id, 12_3 of an element of an array; empty outside of Slurm."
    attempt: int
    "How often Slurm has started the job again."
    host: str
    pid: int

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        array, index = (os.environ.get(f"SLURM_ARRAY_{part}_ID", "") for part in ("JOB", "TASK"))
        # An element's own number may be that of the whole array, which Slurm would start again with it.
        job = f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")
        attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(job, int(attempt) if attempt.isdigit() else 0, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}"
        return f"Slurm job {self.job} ({where})" if self.job else where


class Lease:
    """The right to write into a run directory, held by rank zero until `release` or the process's end."""

    def __init__(self, path: Path, token: str, generation: int, descriptor: int) -> None:
        self.generation = generation
        self._path, self._token, self._lock = path, token, descriptor

    @classmethod
    def take(cls, run_dir: Path) -> Lease:
        """Take the directory, which exists.

        Raises:
            ConfigError: another job or process works in it.
        """
        owner, path = Owner.current(), run_dir / FILE
        with contextlib.ExitStack() as undo:
            descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            undo.callback(os.close, descriptor)
            free = lock(descriptor)
            generation, _, holder = _read(path, "remove it if no job uses the directory")
            user = holder or "another process"
            taken = ConfigError(f"{run_dir} is in use by {user}; wait, stop it, or choose another name=...")
            if holder is not None and owner.job and owner.job == holder.job:
                if owner.attempt < holder.attempt:
                    raise RunTaken(f"{run_dir} has been taken over by attempt {holder.attempt} of this job")
                free = free or owner.attempt > holder.attempt
            elif holder is not None and holder.job:
                if _queued(holder.job):
                    raise taken
                free = free or _wait_for(descriptor, holder)
            if not free:
                raise taken
            token = secrets.token_hex(8)
            _write(path, generation + 1, token, owner)
            undo.pop_all()
        return cls(path, token, generation + 1, descriptor)

    def check(self) -> None:
        """Raise RunTaken where another process has taken the directory over, or it has been removed.

        Raises:
            CheckpointError: the file can't be read at the moment.
        """
        _, token, holder = _read(self._path)
        if token != self._token:
            run_dir, by = self._path.parent, f"by {holder}" if holder else "or given back"
            what = f"taken over {by}" if self._path.exists() else f"removed, or its {FILE}"
            raise RunTaken(f"{run_dir} has been {what}; this process ends without writing")

    def release(self) -> None:
        """Give the directory back, where it is still ours; the generation stays."""
        with contextlib.suppress(SegformerError, OSError):
            self.check()
            _write(self._path, self.generation, "", None)
        os.close(self._lock)


def _write(path: Path, generation: int, token: str, owner: Owner | None) -> None:
    holder = None if owner is None else asdict(owner)
    write_atomic(path, json.dumps({"generation": generation, "token": token, "owner": holder}, indent=1))


def _wait_for(descriptor: int, holder: Owner) -> bool:
    """Wait for the lock of a job that is gone, which its file server may still hold; True: it is ours."""
    print(f"waiting for the lock of {holder}, whose job has ended", flush=True)
    end = time.monotonic() + RELEASE_S
    while not (free := lock(descriptor)) and time.monotonic() < end:
        time.sleep(1)
    return free


def _read(path: Path, do: str = "") -> tuple[int, str, Owner | None]:
    """(Generation, token, holder) as the file says; (0, "", None) where there is none.

    Raises:
        CheckpointError: it can't be read, or is none.
    """
    what, none = f"{path} can't be read", (OSError, ValueError, KeyError, TypeError)
    with reraise_as(CheckpointError, what, do, on=none):
        if not path.exists():
            return 0, "", None
        found = read_json(path)
        owner = None if found["owner"] is None else Owner(**found["owner"])
        return int(found["generation"]), found["token"], owner


def _queued(job: str) -> bool:
    """True while Slurm has the job: running, ending or waiting for its next attempt.

    Raises:
        ConfigError: Slurm does not answer for minutes.
    """
    if shutil.which("squeue") is None:
        return False  # no Slurm here: the lock has decided
    command, end = ["squeue", "-h", "-j", job, "-o", "%T"], time.monotonic() + RELEASE_S
    while True:
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            answer = "no answer within 60 s"
        else:
            if asked.returncode == 0 or "Invalid job id" in asked.stderr:
                return bool(asked.stdout.strip())
            answer = asked.stderr.strip()
        if time.monotonic() > end:
            raise ConfigError(f"squeue can't say whether job {job} has ended ({answer}); try again later")
        time.sleep(5)
