"""The folder beside `out` in which a set of shards grows, so that a run that is killed can be continued.

    .<out>.tmp/lock                held (flock) by the one process that writes, or shared by those that each
                                   write a part; the kernel lets go when they die
    .<out>.tmp/<identity>/parts/   <shard>.part, <shard>.json: one shard's index, and the note that it is
                                   complete
    .<out>.tmp/<identity>/set/     what becomes `out`, by one rename
    .<out>.tmp/<identity>/tiles/   what large images were cut into (cutting.py): <image>/note.json says that
                                   all of one is there

identity: a hash of the arguments and of the sample names. Every file appears by a rename after its bytes are
on the disk. Workers that outlive a killed process for a moment write the bytes that the next one expects, or
into the folder of another identity, which is removed."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from segformer import files
from segformer.errors import DataError


def _finished(own: Path) -> bool:
    """Something there need not be made again."""
    return any(any(own.glob(notes)) for notes in ("parts/*.json", "tiles/*/note.json"))


class WorkFolder:
    """`.<out>.tmp`, and in it the place of one identity. Nothing exists before `hold`."""

    def __init__(self, out: Path, identity: str) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.tmp")
        self.own = self.path / identity[:16]
        self.set, self.parts, self.tiles = (self.own / name for name in ("set", "parts", "tiles"))

    def tar(self, name: str) -> Path:
        """The tar of a shard."""
        return self.set / f"{name}.tar"

    def part(self, name: str) -> Path:
        """The part of the index that is about a shard."""
        return self.parts / f"{name}.part"

    def note(self, name: str) -> Path:
        """The note that a shard is complete."""
        return self.parts / f"{name}.json"

    @contextlib.contextmanager
    def hold(self, *, shared: bool = False) -> Iterator[None]:
        """Keep others out, or with `shared` those that write the whole set; DataError when one is at work.

        What an earlier run of this identity has finished is kept; unless shared, the rest is removed, and at
        the end a folder with nothing to continue.
        """
        lock = self._lock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            if not shared:
                self._remove_others()
            for folder in (self.parts, self.set):
                folder.mkdir(parents=True, exist_ok=True)
            yield
        finally:
            if not shared and not _finished(self.own):
                files.remove(self.path)
            os.close(lock)

    def publish(self, names: Iterable[str]) -> None:
        """Turn `set` into `out`; it must hold the files of these names, and holds nothing else afterwards."""
        for path in set(self.set.iterdir()) - {self.set / name for name in names}:
            path.unlink()
        files.sync(self.set)
        self.set.rename(self.out)
        files.sync(self.out.parent)
        self._forget()

    def clear(self) -> None:
        """Remove what a run left that was killed after its last rename; nothing where another is at work."""
        if self.path.exists():
            with contextlib.suppress(DataError, OSError), self.hold():
                self._forget()

    def _forget(self) -> None:
        for folder in (self.parts, self.tiles):
            files.remove(folder)

    def _remove_others(self) -> None:
        others = [path for path in self.path.iterdir() if path.is_dir() and path != self.own]
        if any(map(_finished, others)):
            print(f"what an earlier try with other settings or files left in {self.path} is removed")
        for other in others:
            files.remove(other)

    def _lock(self, kind: int) -> int:
        """A descriptor that holds the lock until it is closed."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has just finished: once more
                lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                if not files.lock(lock, kind | fcntl.LOCK_NB):
                    os.close(lock)
                    raise DataError(
                        f"another process is writing {str(self.out)!r}; wait until it has finished, or end it"
                    )
                if os.path.samestat(os.fstat(lock), os.stat(self.path / "lock")):
                    return lock
                os.close(lock)
