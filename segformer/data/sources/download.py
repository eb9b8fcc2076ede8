"""Files of the web -> a folder: resumable, verified, unpacked once.

    <out>/downloads/<file>.part        what has arrived; `.part.json` holds its address, ETag and length
    <out>/downloads/<file>             all of it, of the right size and checksum; removed when unpacked
    <out>/downloads/<file>.json        its address and sha256: a file of another one is not taken for it
    <out>/downloads/<file>.done        what was unpacked, and where to: while it lies there, no more to do

A transfer that breaks off goes on by a Range request, made conditional on the ETag or the date (If-Range);
where a server gives neither, only if a checksum will tell whether the halves belong together. What may pass
(timeouts, resets, short bodies, 408, 429, 5xx) is tried again with growing pauses, counted from the last
attempt that got further than all before it; a host that is not known, before the first byte, once.

Refused: other schemes than http and https (redirects included), a redirect from https to http, a certificate
that is not valid, a length other than the one that is expected, a wrong checksum (what arrived is then
removed), more bytes than the disk has room for."""

import email.message
import errno
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit
from urllib.request import Request

from tqdm import tqdm

from segformer.data.sources.archives import CHUNK, unpack
from segformer.errors import ConfigError, DataError

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before a new attempt, half to one and a half times each
TIMEOUT = 60.0  # seconds without a byte
DIGITS = {"md5": 32, "sha1": 40, "sha256": 64}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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
    """Folder below out that the archive is unpacked into."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError as error:  # brackets, or a port above 65535
            raise ConfigError(f"url={self.url!r} is refused: {error}; see to the address") from error
        if not known or not self.url.isprintable():
            raise ConfigError(f"url={self.url!r} is refused; give an address of http or https")
        if not _FILE_NAME.fullmatch(self.name):
            raise ConfigError(f"url={self.url!r} does not end in a plain file name")
        kind, _, digits = self.checksum.partition(":")
        if self.checksum and not re.fullmatch(f"[0-9a-f]{{{DIGITS.get(kind, 0)}}}", digits or "-"):
            raise ConfigError(f"checksum={self.checksum!r} is refused; use sha256:, sha1: or md5: and digits")
        if self.into.startswith("/") or ".." in self.into.split("/"):
            raise ConfigError(f"into={self.into!r} leads out of the folder; give a folder below it")

    @property
    def name(self) -> str:
        """File name."""
        return urlsplit(self.url).path.rpartition("/")[2]


class _InterruptedError(Exception):
    """A transfer broke off for a reason that may pass."""

    def __init__(self, reason: str, wait: float = 0.0, tries: int = 100) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asked for
        self.tries = tries  # more of them are in vain


def obtain(
    item: Download, out: Path, *, keep: bool = False, pauses: tuple[float, ...] = PAUSES
) -> str | None:
    """Download and unpack one file below `out`; returns its sha256, or None where it was done before.

    keep: leave the archive in downloads/. pauses: seconds before each new attempt; as many attempts in a row
    may bring nothing. DataError for whatever ends it; the same call goes on later.
    """
    folder = out / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            done = folder / f"{item.name}.done"
            target = out / item.into
            if _is_done(item, done, target):
                return None
            archive = folder / item.name
            sha256 = fetch(item, archive, pauses=pauses)
            done.unlink(missing_ok=True)
            target.mkdir(parents=True, exist_ok=True)
            names = unpack(archive, target)
            os.sync()  # the files before the note that says that they are there
            _write_json(done, {**asdict(item), "sha256": sha256, "names": names})
            if not keep:
                archive.unlink()
                archive.with_name(f"{item.name}.json").unlink(missing_ok=True)
            return sha256
    except OSError as error:
        raise DataError(f"{str(out)!r} cannot be written: {error.strerror or error}; see to it") from error


def fetch(item: Download, path: Path, *, pauses: tuple[float, ...] = PAUSES) -> str:
    """Download to `path`, which then holds all of it; returns the sha256.

    A file that is there already is taken where its checksum is the one that is known, or, where none is
    known, where the note beside it names this address and its sha256; otherwise it is fetched again.
    """
    part = path.with_name(f"{path.name}.part")
    note = path.with_name(f"{path.name}.part.json")
    origin = path.with_name(f"{path.name}.json")
    if path.exists():
        sha256, wrong = _examine(item, path)
        if not wrong and (item.checksum or _read_json(origin) == {"url": item.url, "sha256": sha256}):
            return sha256
    _transfer(item, part, note, pauses)
    sha256, wrong = _examine(item, part)
    if wrong:
        part.unlink()
        note.unlink(missing_ok=True)
        raise DataError(
            f"{item.url} is not the file that is expected: {wrong}; it was removed: run this again, or see "
            "the page of the set for a new one"
        )
    _write_json(origin, {"url": item.url, "sha256": sha256})
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return sha256


def _examine(item: Download, path: Path) -> tuple[str, str]:
    """(sha256, what is not as expected or "") of a file."""
    kind, _, digits = item.checksum.partition(":")
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(0)
        got = hashlib.file_digest(stream, kind).hexdigest() if kind else ""
    size = path.stat().st_size
    if got != digits:
        return sha256, f"{kind} {got}, expected {digits}"
    return sha256, f"{size} bytes, expected {item.size}" if item.size not in (None, size) else ""


def _transfer(item: Download, part: Path, note: Path, pauses: tuple[float, ...]) -> None:
    """Fill `part`, in as many attempts as it takes."""
    failures, most = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            return _receive(item, part, note)
        except ValueError as error:  # of urllib and of int(), from what a server sent or a host's name
            raise DataError(f"{item.url} leads to an address or an answer that is none: {error}") from error
        except _InterruptedError as error:
            arrived = part.stat().st_size if part.exists() else 0
            failures = 0 if arrived > most else failures + 1
            most = max(most, arrived)  # a server that always starts again brings nothing new
            if failures >= min(len(pauses), error.tries):
                raise DataError(
                    f"{item.url} cannot be downloaded: {error}, {failures} times in a row; "
                    f"{arrived} bytes are kept: the same command goes on from there"
                ) from error
            time.sleep(max(error.wait, pauses[failures] * random.uniform(0.5, 1.5)))


def _receive(item: Download, part: Path, note: Path) -> None:
    """One request; _InterruptedError where it brings less than all."""
    known = _read_json(note) if part.exists() else {}
    if_range = known.get("if_range", "")
    have = part.stat().st_size if known.get("url") == item.url and (if_range or item.checksum) else 0
    if have and have == known.get("total"):
        return
    headers = {"User-Agent": "segformer-download", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": if_range} if if_range else {})
    try:
        response = _OPENER.open(Request(item.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
                return
            _discard_unless_passing(item, part, error)
        raise _InterruptedError(f"HTTP {error.code} {error.reason}", _retry_after(error.headers)) from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError | http.client.InvalidURL):
            raise DataError(f"{item.url} cannot be downloaded: {reason}; see to the address") from error
        tries = 2 if isinstance(reason, socket.gaierror) and not part.exists() else 100
        raise _InterruptedError(str(reason) or type(error).__name__, tries=tries) from error
    with response:
        start, total = _extent(response, part, have, known)
        _check_room(item, part, start, total)
        if start == 0:
            part.unlink(missing_ok=True)
            tag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
            if_range = tag if tag and not tag.startswith("W/") else date
            _write_json(note, {"url": item.url, "if_range": if_range, "total": total})
        _copy(item, response, part, start, total)


def _discard_unless_passing(item: Download, part: Path, error: urllib.error.HTTPError) -> None:
    """DataError for an answer that will not change; a part that the server cannot continue is removed."""
    if error.code == 416:
        part.unlink(missing_ok=True)
    elif error.code not in (408, 425, 429) and error.code < 500:
        raise DataError(
            f"{item.url} cannot be downloaded: HTTP {error.code} {error.reason}; see the page of the set"
        ) from error


def _extent(response: Any, part: Path, have: int, known: dict[str, Any]) -> tuple[int, int | None]:
    """(first byte of the body, length of the whole file or None), from the answer's headers."""
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return 0, int(length) if length and length.isdecimal() else None
    given = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", given)
    if not found or int(found[1]) != have or known.get("total") not in (None, int(found[2])):
        # The file changed, or the server does not understand ranges: from the start.
        part.unlink(missing_ok=True)
        raise _InterruptedError(f"asked for the bytes from {have}, the server sent {given!r}")
    return have, int(found[2])


def _check_room(item: Download, part: Path, start: int, total: int | None) -> None:
    if None not in (item.size, total) and item.size != total:
        raise DataError(
            f"{item.url} has {total} bytes, expected {item.size}; it has changed: see the page of the set"
        )
    free = shutil.disk_usage(part.parent).free
    if (total or item.size or 0) - start > free:
        raise DataError(
            f"{item.url} has {total or item.size} bytes and {str(part.parent)!r} room for {free}; make room"
        )


def _copy(item: Download, response: IO[bytes], part: Path, start: int, total: int | None) -> None:
    bar: tqdm[Any] = tqdm(
        total=total, initial=start, unit="B", unit_scale=True, desc=item.name, leave=False, disable=None
    )
    at = start
    with bar, part.open("ab") as sink:
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _InterruptedError(f"the connection broke after {at} bytes ({error})") from error
            if not chunk:
                break
            sink.write(chunk)
            at += len(chunk)
            bar.update(len(chunk))
        sink.flush()
        os.fsync(sink.fileno())
    if total is not None and at < total:
        raise _InterruptedError(f"the connection ended after {at} of {total} bytes")


def _retry_after(headers: email.message.Message) -> float:
    seconds = headers.get("Retry-After", "")
    return min(float(seconds), 120.0) if seconds.isdecimal() else 0.0


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        del headers["URI"]  # urllib would take it in the place of a Location
        given = headers.get("Location", "")
        try:
            to = urlsplit(urljoin(req.full_url, given))
            allowed = to.scheme in ("https", req.type) and to.hostname and to.port != 0
        except ValueError:  # brackets, or a port above 65535
            allowed = False
        if not allowed:
            fp.close()
            raise DataError(f"{req.full_url} redirects to {given!r}: refused; only https and http, up")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


_OPENER = urllib.request.OpenerDirector()  # urllib's own also opens file:, ftp: and data:
for _handler in (
    *(urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()),
    *(urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), _Redirects()),
):
    _OPENER.add_handler(_handler)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process downloads to {str(folder.parent)!r}; wait for it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # without locks the user keeps other processes away
                raise
        yield


def _is_done(item: Download, done: Path, target: Path) -> bool:
    """Whether this very file was unpacked to `target` before, and what it put there is still there."""
    noted = _read_json(done)
    return (
        (noted.get("url"), noted.get("into")) == (item.url, item.into)
        and item.checksum in ("", noted.get("checksum"), f"sha256:{noted.get('sha256')}")
        and all((target / name).exists() for name in noted.get("names", [".missing"]))
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
