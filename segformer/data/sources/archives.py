"""Unpacking what a stranger packed: zip and tar (plain or gzip) -> files below a folder.

A file of another suffix is copied there. Only regular files and folders are written, with the permissions of
a new file. Refused before anything is written: links, devices and other special members, absolute names,
names with `..`, backslashes or control characters, a name that comes twice, encrypted members, archives
without a file, archives that would unpack to more than MAX_RATIO times their size (and SMALL bytes) or than
the disk has room for, and a tar whose gzip checksum is wrong or that does not end in two blocks of zeros with
nothing but zeros behind them. A member that is shorter than its header says, or whose checksum is wrong, ends
it. Everything goes to a folder of its own first and is then renamed into place, file by file: a process that
is killed leaves no half-written file under a final name. Bringing the files to the disk (os.sync) is left to
the caller."""

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from segformer.errors import DataError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_RATIO = 20  # photographs and PNG masks hardly shrink; a bomb of zeros has a ratio of 1,000
SMALL = 64 * 2**20  # bytes that any archive may unpack to
MAX_MEMBERS = 5_000_000
CHUNK = 2**20
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, ValueError),  # ValueError: numbers and names that don't decode
)


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file of an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, target: Path) -> list[str]:
    """Write the files of an archive, or the file itself, below the folder `target`, over what lies there.

    Returns the names that this put into `target` itself, sorted. DataError names the archive, the member and
    what is wrong with it; `target` is then as it was, unless the renaming met a folder in a file's place.
    """
    staging = target / f".unpack-{archive.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with _members(archive) as members:
            files = _checked(archive, target, members)
            for member in files:
                _write(archive, staging / member.name, member)
        if not files:
            raise tarfile.ReadError("it holds no file")
        for member in files:
            (target / member.name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / member.name, target / member.name)
        return sorted({member.name.partition("/")[0] for member in files})
    except _DAMAGED as error:
        raise DataError(
            f"archive {str(archive)!r} is damaged: {error}; remove it and run this again"
        ) from error
    except OSError as error:
        raise DataError(
            f"archive {str(archive)!r} cannot be unpacked into {str(target)!r}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as opened:
            yield _zip_members(archive, opened)
    elif not archive.name.endswith(SUFFIXES):
        yield iter([_Member(archive.name, archive.stat().st_size, lambda: archive.open("rb"))])
    else:
        mode: Literal["r:", "r:gz"] = "r:" if archive.name.endswith(".tar") else "r:gz"
        with tarfile.open(archive, mode) as tar:
            yield _tar_members(archive, tar)


def _zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(archive, info.filename, "is a link or a special file")
        if info.flag_bits & 1:
            raise _refused(archive, info.filename, "is encrypted")
        if not info.is_dir():
            yield _Member(info.filename, info.file_size, lambda info=info: opened.open(info))  # type: ignore[misc]


def _tar_members(archive: Path, tar: tarfile.TarFile) -> Iterator[_Member]:
    def opened(info: tarfile.TarInfo) -> IO[bytes]:
        stream = tar.extractfile(info)
        assert stream is not None  # only links and folders have none
        return stream

    for info in tar:
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise _refused(archive, info.name, "is a link or a special file")
        yield _Member(info.name, info.size, lambda info=info: opened(info))  # type: ignore[misc]
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Whether the archive ends where tarfile stopped: it takes a damaged header, or none, for the end.

    Reads to the end of the stream, which is where gzip compares its checksum.
    """
    stream = tar.fileobj
    assert stream is not None
    stream.seek(tar.offset)
    length = 0
    while chunk := stream.read(CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset}, and not the end")
        length += len(chunk)
    if length < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}, without the two blocks that end a tar")


def _checked(archive: Path, target: Path, members: Iterator[_Member]) -> list[_Member]:
    """All members, once every name and the sum of the sizes is known to be harmless."""
    limit = max(SMALL, MAX_RATIO * archive.stat().st_size)
    free = shutil.disk_usage(target).free
    found: list[_Member] = []
    seen: set[str] = set()
    total = 0
    for member in members:
        parts = member.name.split("/")
        if parts[0] == "":
            raise _refused(archive, member.name, "has an absolute name")
        if ".." in parts:
            raise _refused(archive, member.name, "leads out of its folder")
        if "\\" in member.name or not member.name.isprintable():
            raise _refused(archive, member.name, "has a name with a backslash or control characters")
        plain = os.path.normpath(member.name)
        if plain in seen:
            raise _refused(archive, member.name, "comes twice")
        seen.add(plain)
        found.append(_Member(plain, member.size, member.open))
        total += member.size
        if total > limit or len(found) > MAX_MEMBERS:
            raise _refused(archive, member.name, f"takes it above the limit of {limit} bytes in all")
    if total > free:
        raise DataError(
            f"archive {str(archive)!r} unpacks to {total} bytes and {str(target)!r} has room for {free}"
        )
    return found


def _write(archive: Path, path: Path, member: _Member) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with member.open() as source, path.open("xb") as sink:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > member.size:
                break
            sink.write(chunk)
    if written != member.size:
        raise _refused(archive, member.name, f"does not have the {member.size} bytes that its header says")


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(f"archive {str(archive)!r} is not unpacked: its member {name[:200]!r} {why}")
