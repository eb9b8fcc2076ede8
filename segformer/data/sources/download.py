"""Files of the web -> a folder: resumable, verified, unpacked once.

    <output>/downloads/<file>.part    what has arrived; a Range request goes on from there
    <output>/downloads/<file>         all of it, of the right checksum; removed when unpacked
    <output>/downloads/<file>.done    what was unpacked, and where to: while it lies there, no more to do

One request per file: where it fails, the same command goes on from the bytes that arrived. `zipfile` and
`tarfile` (filter "data") keep names inside the folder. Refused: other schemes than http and https, answers
that web.py refuses, slower than BLOCK in TIMEOUT or without end, another size or checksum than expected (what
arrived is then removed), damaged archives.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from segformer import files
from segformer.data.sources.web import MAX_REDIRECTS, check_answer, check_redirect
from segformer.errors import ConfigError, DataError, reraise_as

TIMEOUT = 60.0  # seconds for the answer to begin, and for every BLOCK of it
BLOCK = 2**16
DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}
_URL = re.compile(r"https?://[^/?#\s]+/([^?#\s]*/)?(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)(\?\S*)?")
_FAILURES = (
    *(OSError, http.client.HTTPException),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError),
)


@dataclass(kw_only=True, slots=True)
class Download:
    """One file and what is known of it."""

    url: str
    """Address, http or https."""
    size: int | None = None
    """Length in bytes; null = not known."""
    checksum: str = ""
    """md5, sha1 or sha256, a colon, and its digits; empty = not known (the sha256 is printed)."""
    into: str = ""
    """Folder below output that the archive is unpacked into."""

    def __post_init__(self) -> None:
        if not _URL.fullmatch(self.url):
            raise ConfigError(f"url={self.url!r} is refused; use http(s)://<host>/.../<plain file name>")
        kind, _, digits = self.checksum.partition(":")
        if self.checksum and not re.fullmatch(f"[0-9a-f]{{{DIGITS.get(kind, 0)}}}", digits or "-"):
            raise ConfigError(f"checksum={self.checksum!r} is refused; use sha256:, sha1: or md5: and digits")
        if self.into.startswith("/") or ".." in self.into.split("/"):
            raise ConfigError(f"into={self.into!r} leads out of the folder; give a folder below it")

    @property
    def name(self) -> str:
        """File name."""
        found = _URL.fullmatch(self.url)
        assert found is not None
        return found["name"]


def obtain(item: Download, out: Path, *, keep: bool = False) -> str | None:
    """Download and unpack one file below `out`; its sha256, or None where it was done before.

    keep: leave the archive in downloads/. DataError for whatever ends it; the same call goes on later.
    """
    folder, target = out / "downloads", out / item.into
    archive, done = folder / item.name, folder / f"{item.name}.done"
    remedy = "run this again to go on, or see the page of the set"
    with reraise_as(DataError, f"{item.url} -> {str(out)!r}", remedy, on=_FAILURES):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            if not files.lock(lock.fileno()):
                raise DataError(f"another process downloads to {str(out)!r}; wait for it")
            if _is_done(item, done, target):
                return None
            done.unlink(missing_ok=True)
            if not (archive.exists() and item.checksum and not _mismatch(item, archive)):
                fetch(item, archive)
            sha256 = files.sha256_of(archive)
            names = unpack(archive, target)
            os.sync()  # the files before the note that says that they are there
            files.write_atomic(done, json.dumps({**asdict(item), "sha256": sha256, "names": names}))
            if not keep:
                archive.unlink()
    return sha256


class _Redirects(HTTPRedirectHandler):
    """The redirects that web.py allows; the body of one is not read."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        fp.close()
        check_redirect(req.full_url, newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """TimeoutError where the block takes longer than TIMEOUT; a socket's own begins anew with every byte."""

    def late(*_: object) -> NoReturn:
        raise TimeoutError(f"slower than {BLOCK} bytes in {TIMEOUT:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fetch(item: Download, path: Path) -> None:
    """Download to `path`, going on from what an earlier call left in `<path>.part`."""
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "segformer-download"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with _in_time():
            response = build_opener(_Redirects).open(Request(item.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code != 416:  # nothing is left to send: the last call ended before it could compare
            raise
    else:
        with response:
            _receive(item, response, part, have)
    if mismatch := _mismatch(item, part):
        part.unlink()
        raise DataError(
            f"{item.url} is not the file that is expected: {mismatch}; it was removed: run this again, or "
            "see the page of the set for a new one"
        )
    part.replace(path)


def _receive(item: Download, response: http.client.HTTPResponse, part: Path, have: int) -> None:
    """Write the body of an answer, whose length is known before, after the first `have` bytes of `part`."""
    goes_on, headers = response.status == 206, response.headers
    if item.name.endswith((".gz", ".tgz")):  # some servers call the file itself an encoding; nothing inflates
        del headers["Content-Encoding"]
    start = have if goes_on else 0
    check_answer(headers, start if goes_on else None)
    size = item.size if response.length is None else start + response.length
    if size is None:
        raise OSError("the server doesn't say how long the file is, so that it may have no end")
    if item.size not in (None, size):
        part.unlink(missing_ok=True)
        raise DataError(f"{item.url} is not the file that is expected: {size} bytes, expected {item.size}")
    left = size - start
    bar = tqdm(total=left, desc=item.name, unit="B", unit_scale=True, leave=False, disable=None)
    with bar, part.open("ab" if goes_on else "wb") as sink:
        while left >= 0:
            with _in_time():
                block = response.read(BLOCK)
            if not block:
                break
            left -= len(block)
            sink.write(block)
            bar.update(len(block))
    if left > 0:
        raise OSError(f"the connection ended {left} bytes early")


def unpack(archive: Path, target: Path) -> list[str]:
    """Write the files of a zip or tar archive, or the file itself, below `target`; the names in `target`.

    They appear there file by file, each whole, once all of the archive is unpacked.
    """
    staging = target / f".unpack-{archive.name}"
    files.remove(staging)
    staging.mkdir(parents=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(staging)
        elif archive.name.endswith((".tar", ".tar.gz", ".tgz")):
            with tarfile.open(archive, "r:" if archive.suffix == ".tar" else "r:gz") as tar:
                tar.extractall(staging, filter="data")
        else:
            shutil.copy(archive, staging)
        names = sorted(path.name for path in staging.iterdir())
        if not names:
            raise tarfile.ReadError("the archive holds no file")
        for path in list(staging.rglob("*")):
            if not path.is_dir():
                place = target / path.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        return names
    finally:
        files.remove(staging)


def _is_done(item: Download, done: Path, target: Path) -> bool:
    """True if this very file was unpacked to `target` before, and what it put there is still there."""
    if not done.exists():
        return False
    was = json.loads(done.read_bytes())
    return (
        (was["url"], was["into"]) == (item.url, item.into)
        and item.checksum in ("", was["checksum"], f"sha256:{was['sha256']}")
        and all((target / name).exists() for name in was["names"])
    )


def _mismatch(item: Download, path: Path) -> str:
    """The size or checksum that is not the expected one; empty where all fits."""
    size = path.stat().st_size
    if item.size not in (None, size):
        return f"{size} bytes, expected {item.size}"
    kind, _, digits = item.checksum.partition(":")
    if not kind:
        return ""
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, kind).hexdigest()
    return "" if got == digits else f"{kind} {got}, expected {digits}"
