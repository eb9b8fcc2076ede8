"""The folder beside `out` in which a set of shards grows, so that a run that is killed can be continued.

    .<out>.tmp/lock         held (flock) by the one process that writes, or shared by those that each write a
                            part; the kernel lets go when they die
    .<out>.tmp/busy         held shared by each of its worker processes, which outlive it for a moment
    .<out>.tmp/plan.json    identity: a hash of the arguments and of the sample names
    .<out>.tmp/parts/       <shard>.part, <shard>.json: one shard's index, and the note that it is complete
    .<out>.tmp/set/         what becomes `out`, by one rename

Every file appears by a rename after its bytes are on the disk. What belongs to another identity is removed
before anything is written."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from segformer.data.shards.pool import flock
from segformer.errors import DataError

BEGIN_SECONDS = 300  # the first of many may have to remove the parts of another set
ORPHAN_SECONDS = 10  # the workers of a process that was killed end within this time


class WorkFolder:
    """`.<out>.tmp`. Nothing exists before `hold`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.tmp")
        self.set = self.path / "set"
        self.parts = self.path / "parts"
        self.guard = self.path / "busy"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other process out; DataError when one is at work. An empty folder is left to nobody."""
        lock, _ = self._lock()
        try:
            self._wait_for_orphans()
            yield
        finally:
            if self._holds(lock) and not any(self.parts.glob("*.json")):  # nothing to continue with
                self.remove()
            os.close(lock)

    @contextlib.contextmanager
    def share(self, identity: str) -> Iterator[None]:
        """Write a part beside other processes, on any node, that write parts of the same identity.

        Raises:
            DataError: a process writes the whole set, or parts of another one.
        """
        lock, alone = self._lock(shared=True)
        try:
            if alone:
                self._wait_for_orphans()
                self.begin(identity)
                flock(lock, fcntl.LOCK_SH)
            if not self._began(identity):
                raise DataError(f"parts of another set are being written to {str(self.out)!r}; wait for them")
            yield
        finally:
            os.close(lock)

    def _began(self, identity: str) -> bool:
        try:
            return bool(json.loads((self.path / "plan.json").read_bytes()) == {"identity": identity})
        except (OSError, ValueError):
            return False

    def begin(self, identity: str) -> None:
        """Keep what an earlier run of this identity has finished, remove everything else."""
        plan = self.path / "plan.json"
        if not self._began(identity):
            if any(self.parts.glob("*.json")):
                print(f"{self.path} holds shards of other settings or other files; starting over")
            plan.unlink(missing_ok=True)  # first: half a removal must not look like a beginning
            for folder in (self.parts, self.set):
                old = self.path / f"old-{secrets.token_hex(4)}"
                with contextlib.suppress(FileNotFoundError):  # where nodes don't lock each other out
                    folder.rename(old)
                    shutil.rmtree(old)
        for folder in (self.parts, self.set):
            folder.mkdir(exist_ok=True)
        write_synced(plan, json.dumps({"identity": identity}).encode())

    def publish(self, names: Iterable[str]) -> None:
        """Turn `set` into `out`; it must hold the files of these names, and holds nothing else afterwards."""
        for path in set(self.set.iterdir()) - {self.set / name for name in names}:
            path.unlink()
        sync_folder(self.set)
        self.set.rename(self.out)
        sync_folder(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _lock(self, *, shared: bool = False) -> tuple[int, bool]:
        """A descriptor that holds the lock until it is closed, and whether it keeps everybody out.

        Where `shared` is enough it is that only where others have the lock, too.
        """
        end = time.monotonic() + BEGIN_SECONDS
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has just finished: once more
                lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                alone = flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not alone and not (shared and flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)):
                    os.close(lock)
                    if shared and time.monotonic() < end:  # somebody may be beginning
                        time.sleep(0.05)
                        continue
                    raise DataError(
                        f"another process is writing {str(self.out)!r}; wait until it has finished, or end it"
                    )
                if self._holds(lock):
                    return lock, alone
                os.close(lock)

    def _holds(self, lock: int) -> bool:
        """Whether the locked file is still the one in the folder: another process may have removed that."""
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self.path / "lock"))
        except FileNotFoundError:
            return False

    def _wait_for_orphans(self) -> None:
        busy = os.open(self.guard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = time.monotonic() + ORPHAN_SECONDS
            while not flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if time.monotonic() > end:
                    raise DataError(
                        f"processes of an earlier run still write to {str(self.path)!r}; end them first"
                    )
                time.sleep(0.05)
        finally:
            os.close(busy)


def write_synced(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all, and to the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as stream:
        stream.writelines([data] if isinstance(data, bytes) else data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)


def sync_folder(path: Path) -> None:
    """Bring the names of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
