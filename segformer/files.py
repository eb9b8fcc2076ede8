"""Files and folders written whole or not at all; locks and sums.

    with staged(Path("out/model")) as place:   out/.tmp-model-<hex>, a file or a folder that the block makes;
        place.mkdir(); ...                     synced and renamed to out/model where the block ends well,
                                               removed where it raises

A crash leaves what was there before, and perhaps a hidden `.tmp-*` beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def staged(path: Path, fence: Callable[[], None] = lambda: None, *, durable: bool = True) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder at, which becomes `path` where the block ends well.

    A file replaces what stands at `path`; a folder needs the name to be free. The files of a folder are not
    synced one by one, and nothing is where `durable` is off (a cache). `fence` is called last, before the
    rename; what it raises leaves all as it was.
    """
    place = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        yield place
        if durable:
            sync(place)
        fence()
        place.replace(path)
        if durable:
            sync(path.parent)
    finally:
        remove(place)


def write_atomic(
    path: Path, data: str | bytes | Iterable[bytes], *, mode: int = 0o666, durable: bool = True
) -> None:
    """Write a file whole or not at all; `mode` as in os.open, `durable` as in `staged`."""
    if isinstance(data, str):
        data = data.encode()

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with staged(path, durable=durable) as place, open(place, "xb", opener=opener) as file:
        file.writelines([data] if isinstance(data, bytes) else data)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that is possible; a link is not followed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 sum of a file, read in a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(descriptor: int, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Take the flock; False where another has it. True on file systems without locks: there the user keeps
    others away."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, *_NO_LOCKS):
            raise
        return error.errno in _NO_LOCKS
    return True
