"""Files read within bounds; files and folders written whole or not at all; locks and sums.

    regular(path)                        of a user's folder: no pipe or device, which may never end
    read_bytes, read_text, read_json     such a file, of at most so many bytes

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
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from segformer.errors import reraise_as

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
"Where conf/, launch/ and data_prep/ lie: beside the package in the repository, in it as a wheel installs it."
MOST = 2**28  # bytes of a file that is read whole, where the caller knows nothing smaller
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class NotAFileError(OSError):
    """A pipe, socket or device where a file is expected."""


def regular(path: Path) -> Path:
    """The path of a file, or of a link to one, to be opened by whoever opens it.

    Raises:
        OSError: there is none, or it is a folder, pipe, socket or device (NotAFileError).
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise NotAFileError(errno.EINVAL, "it is a pipe, socket or device, not a file", str(path))
    return path


def read_bytes(path: Path, *, most: int = MOST) -> bytes:
    """A regular file of at most `most` bytes; OSError for a larger one, too."""
    with regular(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return data


def read_text(path: Path, *, most: int = MOST) -> str:
    """A file of UTF-8 text, without the mark (BOM) that some editors put before it.

    Raises:
        OSError: as in `read_bytes`.
        ValueError: it is other text; the number of the line.
    """
    data = read_bytes(path, most=most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        text = f"line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        raise ValueError(text) from error


def parse_json(data: bytes) -> Any:
    """The content of JSON; ValueError for everything that is none, or is nested without end."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """The plain data of YAML.

    Raises:
        ValueError: it is none; or it repeats itself by aliases, ten lines of which stand for gigabytes.
    """
    import yaml  # not every command reads it

    damaged = (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError, ArithmeticError)
    with reraise_as(ValueError, "it is no plain YAML", on=damaged):  # all of them come from its constructors
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases (*), which are not read")
        return yaml.safe_load(text)


def read_json(path: Path, *, most: int = MOST) -> Any:
    """The content of a JSON file; OSError as in `read_bytes`, ValueError as in `parse_json`."""
    return parse_json(read_bytes(path, most=most))


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
    with regular(path).open("rb") as file:
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
