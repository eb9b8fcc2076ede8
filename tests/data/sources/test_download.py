"""Downloads from a real server on loopback that breaks off, forgets and lies as it is told."""

import errno
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import segformer.data.sources.download as downloads
from segformer.data.sources.archives import unpack
from segformer.data.sources.download import Download, fetch, obtain
from segformer.distributed.world import StopFlag
from segformer.errors import ConfigError, DataError
from segformer.training.config import cli, compose

ROOT = Path(__file__).resolve().parents[3]
DATA = bytes(range(256)) * 4000  # 1 MB
QUICK = (0.01, 0.01, 0.01)


@dataclass
class Site:
    """What the server gives, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """One per request, in turn: "" (none), "cut" (half of the body), "cut at <n>", an HTTP status, "ftp:..."
    (redirect), "length <x>" (that header)."""
    etag: str = '"one"'
    ranges: bool = True
    length: bool = True
    asked: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    def url(self, name: str = "set.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        site.asked.append({key.lower(): value for key, value in self.headers.items()})
        fault = site.faults.pop(0) if site.faults else ""
        data = site.files.get(self.path.lstrip("/"))
        if ":" in fault:
            return self.answer(302, b"", {"Location": fault})
        if fault.startswith("length"):
            return self.answer(200, b"", {"Content-Length": fault.split()[1]})
        if fault.isdigit() or data is None:
            return self.answer(int(fault or 404), b"", {"Retry-After": "0"})
        asked = site.asked[-1].get("range", "")
        same = site.asked[-1].get("if-range", site.etag) == site.etag
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and site.ranges and same else 0
        headers = {"ETag": site.etag} if site.etag else {}
        if first >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        end = int(fault.split()[-1]) if fault.startswith("cut at") else (len(data) - first) // 2
        self.answer(206 if first else 200, data[first:], headers, end if fault.startswith("cut") else None)

    def answer(self, code: int, body: bytes, headers: dict[str, str], end: int | None = None) -> None:
        self.send_response(code)
        if self.site.length and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:end])


@pytest.fixture
def site() -> Iterator[Site]:
    given = Site({"set.bin": DATA})
    handler = type("SiteHandler", (Handler,), {"site": given})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    given.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield given
    server.shutdown()
    server.server_close()
    thread.join()


def checksum(data: bytes, kind: str = "sha256") -> str:
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


def ranges(site: Site) -> list[str]:
    return [asked.get("range", "") for asked in site.asked]


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_file_arrives_whole_and_its_checksum_is_compared(kind: str, site: Site, tmp_path: Path) -> None:
    item = Download(url=site.url(), size=len(DATA), checksum=checksum(DATA, kind))
    assert fetch(item, tmp_path / "set.bin") == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "set.bin").read_bytes() == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.bin.json"]


def test_a_broken_connection_goes_on_where_it_was_if_the_file_is_the_same(site: Site, tmp_path: Path) -> None:
    site.faults = ["cut", "cut", "503", ""]
    assert fetch(Download(url=site.url()), tmp_path / "f", pauses=QUICK) == hashlib.sha256(DATA).hexdigest()
    half, rest = len(DATA) // 2, len(DATA) * 3 // 4
    assert ranges(site) == ["", f"bytes={half}-", f"bytes={rest}-", f"bytes={rest}-"]
    assert [asked.get("if-range") for asked in site.asked] == [None, '"one"', '"one"', '"one"']


def test_a_second_run_goes_on_where_the_first_gave_up(site: Site, tmp_path: Path) -> None:
    site.faults = ["cut", *["500"] * 9]
    item = Download(url=site.url(), checksum=checksum(DATA))
    with pytest.raises(DataError, match=r"HTTP 500 .* 3 times in a row; 512000 bytes are kept"):
        fetch(item, tmp_path / "f", pauses=QUICK)
    assert not (tmp_path / "f").exists()
    site.faults = []
    fetch(item, tmp_path / "f", pauses=QUICK)
    assert (tmp_path / "f").read_bytes() == DATA
    assert ranges(site)[-1] == "bytes=512000-"


def test_a_file_that_changed_in_between_is_fetched_from_the_start(site: Site, tmp_path: Path) -> None:
    site.faults = ["cut", *["500"] * 3]
    with pytest.raises(DataError):
        fetch(Download(url=site.url()), tmp_path / "f", pauses=QUICK)
    site.files["set.bin"], site.etag = DATA[::-1], '"two"'
    fetch(Download(url=site.url()), tmp_path / "f", pauses=QUICK)
    assert (tmp_path / "f").read_bytes() == DATA[::-1]


def test_without_etag_only_a_checksum_lets_two_halves_be_joined(site: Site, tmp_path: Path) -> None:
    site.etag, site.faults = "", ["cut", "", "cut", ""]
    fetch(Download(url=site.url()), tmp_path / "unknown", pauses=QUICK)
    fetch(Download(url=site.url(), checksum=checksum(DATA)), tmp_path / "known", pauses=QUICK)
    assert ranges(site) == ["", "", "", f"bytes={len(DATA) // 2}-"]
    assert (tmp_path / "unknown").read_bytes() == (tmp_path / "known").read_bytes() == DATA


def test_a_server_without_ranges_gives_the_file_from_the_start(site: Site, tmp_path: Path) -> None:
    site.ranges, site.faults = False, ["cut", "cut", ""]
    fetch(Download(url=site.url(), checksum=checksum(DATA)), tmp_path / "f", pauses=QUICK)
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_server_that_always_starts_again_does_not_hold_it_for_ever(site: Site, tmp_path: Path) -> None:
    site.etag, site.faults = "", [f"cut at {size}" for size in (1000, 9000, 8000, 8500, 8000, 8500, 8000)]
    with pytest.raises(DataError, match="3 times in a row"):
        fetch(Download(url=site.url()), tmp_path / "f", pauses=QUICK)
    assert len(site.asked) == 5  # the second got further than the first


def test_a_server_that_gives_no_length_is_read_to_the_end(site: Site, tmp_path: Path) -> None:
    site.length = False
    fetch(Download(url=site.url(), size=len(DATA)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_part_that_is_already_whole_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(DATA)
    note = {"url": site.url(), "if_range": '"one"', "total": None}
    (tmp_path / "f.part.json").write_text(json.dumps(note))
    fetch(Download(url=site.url()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert ranges(site) == [f"bytes={len(DATA)}-"]  # answered by 416 and the length


def test_a_part_of_another_address_is_not_continued(site: Site, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"something else")
    (tmp_path / "f.part.json").write_text(json.dumps({"url": "http://localhost/x", "if_range": '"one"'}))
    fetch(Download(url=site.url()), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "sha256 .* expected 0000"),
        ({"checksum": "md5:" + "0" * 32}, "md5 .* expected 0000"),
        ({"size": 7}, "has 1024000 bytes, expected 7"),
    ],
)
def test_another_file_than_expected_is_refused_and_not_kept(
    settings: dict[str, object], message: str, site: Site, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        fetch(Download(url=site.url(), **settings), tmp_path / "f", pauses=QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "HTTP 404 Not Found; see the page"),
        ("403", "HTTP 403"),
        ("ftp://localhost/x", "redirects to 'ftp:"),
        ("file:///etc/passwd", "redirects to 'file:"),
        ("http://[/x.zip", r"redirects to 'http://\[/x.zip'"),
        ("http://127.0.0.1:99999/x.zip", "redirects to 'http://127.0.0.1:99999"),
        (f"http://{'a' * 70}.org/x.zip", "is none: .*label"),
        ("length \N{SUPERSCRIPT TWO}", "is not the file that is expected"),
    ],
)
def test_what_will_not_change_is_asked_once(fault: str, message: str, site: Site, tmp_path: Path) -> None:
    site.faults = [fault] * 9
    with pytest.raises(DataError, match=message) as caught:
        fetch(Download(url=site.url(), size=len(DATA)), tmp_path / "f", pauses=QUICK)
    assert len(site.asked) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "arrived", "tries"),
    [
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), False, 1),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False, 2),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), True, 3),
        (TimeoutError("timed out"), False, 3),
    ],
)
def test_what_hardly_passes_is_not_tried_for_long(
    reason: OSError, arrived: bool, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Nowhere:
        def open(self, request: downloads.Request, timeout: float) -> None:
            asked.append(request.full_url)
            raise urllib.error.URLError(reason)

    monkeypatch.setattr(downloads, "_OPENER", Nowhere())
    if arrived:
        (tmp_path / "f.part").write_bytes(b"x")
    with pytest.raises(DataError, match=str(reason.strerror or reason)):
        fetch(Download(url="https://example.org/x.zip"), tmp_path / "f", pauses=QUICK)
    assert len(asked) == tries


def test_a_redirect_within_http_is_followed(site: Site, tmp_path: Path) -> None:
    site.faults = [site.url(), ""]
    fetch(Download(url=site.url("moved.bin")), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_no_server_is_an_error_after_the_attempts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Connection refused, 3 times in a row; 0 bytes are kept"):
        fetch(Download(url="http://127.0.0.1:1/set.bin"), tmp_path / "f", pauses=QUICK)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://example.org/x.zip"},
        {"url": "file:///etc/x.zip"},
        {"url": "http://example.org/"},
        {"url": "http://[/x.zip"},
        {"url": "http://example.org:99999/x.zip"},
        {"url": "http://example.org:0/x.zip"},
        {"url": "http://example.org/.x"},
        {"url": "http://example.org/a%2F..%2Fb"},
        {"url": "http://example.org/x.zip\n"},
        {"url": "http://example.org/x.zip", "checksum": "sha256:12"},
        {"url": "http://example.org/x.zip", "checksum": "crc32:00000000"},
        {"url": "http://example.org/x.zip", "into": "../x"},
        {"url": "http://example.org/x.zip", "into": "/x"},
    ],
)
def test_a_wrong_entry_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Download(**settings)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILES = {"set/images/a.jpg": b"a" * 3000, "set/list.txt": b"", "top.txt": b"t"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("set.zip", zipped({"set/": b"", **FILES})),
        ("set.tar", tarred({f"./{name}": data for name, data in FILES.items()})),
        ("set.tar.gz", tarred(FILES, "w:gz")),
        ("set.tgz", tarred(FILES, "w:gz")),
    ],
)
def test_an_archive_is_unpacked_once_and_a_second_call_asks_nothing(
    name: str, data: bytes, site: Site, tmp_path: Path
) -> None:
    site.files[name] = data
    item = Download(url=site.url(name), size=len(data), into="there")
    assert obtain(item, tmp_path) == hashlib.sha256(data).hexdigest()
    found = {path.relative_to(tmp_path / "there").as_posix(): path for path in tmp_path.glob("there/**/*")}
    assert {key: path.read_bytes() for key, path in found.items() if path.is_file()} == FILES
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == [".lock", f"{name}.done"]
    assert obtain(item, tmp_path) is None
    assert len(site.asked) == 1


def test_an_archive_that_is_to_be_kept_is_kept_and_a_plain_file_is_put_in_place(
    site: Site, tmp_path: Path
) -> None:
    site.files |= {"set.zip": zipped(FILES), "train.txt": b"key\n"}
    obtain(Download(url=site.url("set.zip")), tmp_path, keep=True)
    obtain(Download(url=site.url("train.txt"), into="lists"), tmp_path)
    assert (tmp_path / "downloads/set.zip").read_bytes() == site.files["set.zip"]
    assert (tmp_path / "lists/train.txt").read_bytes() == b"key\n"


def test_a_new_checksum_fetches_the_file_again(site: Site, tmp_path: Path) -> None:
    site.files["set.zip"] = zipped(FILES)
    obtain(Download(url=site.url("set.zip")), tmp_path)
    site.files["set.zip"] = zipped({**FILES, "top.txt": b"new"})
    item = Download(url=site.url("set.zip"), checksum=checksum(site.files["set.zip"]))
    assert obtain(item, tmp_path) is not None
    assert (tmp_path / "top.txt").read_bytes() == b"new"


def test_the_same_file_into_another_folder_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files["set.zip"] = zipped(FILES)
    for into in ("a", "b"):
        assert obtain(Download(url=site.url("set.zip"), into=into), tmp_path) is not None
        assert (tmp_path / into / "top.txt").is_file()


def test_what_was_unpacked_and_then_removed_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files |= {"set.zip": zipped(FILES)}
    items = [Download(url=site.url("set.zip")), Download(url=site.url(), into="plain")]
    for item in items:
        obtain(item, tmp_path)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "plain/set.bin").unlink()
    for item in items:
        assert obtain(item, tmp_path) is not None
    assert (tmp_path / "set/list.txt").is_file()
    assert (tmp_path / "plain/set.bin").read_bytes() == DATA


def test_a_checksum_that_was_not_compared_is_not_taken_for_done(site: Site, tmp_path: Path) -> None:
    obtain(Download(url=site.url()), tmp_path)
    with pytest.raises(DataError, match=r"md5 .* expected 0000"):
        obtain(Download(url=site.url(), checksum="md5:" + "0" * 32), tmp_path)
    known = Download(url=site.url(), checksum=checksum(DATA))  # the sha256 was computed then
    assert obtain(known, tmp_path) is None


def test_an_archive_of_another_address_is_not_taken_for_this_one(site: Site, tmp_path: Path) -> None:
    site.files |= {"set.zip": zipped(FILES), "new/set.zip": zipped({"top.txt": b"new"})}
    obtain(Download(url=site.url("set.zip")), tmp_path, keep=True)
    obtain(Download(url=site.url("new/set.zip")), tmp_path, keep=True)
    assert (tmp_path / "top.txt").read_bytes() == b"new"
    assert obtain(Download(url=site.url("new/set.zip"), into="x"), tmp_path, keep=True) is not None
    assert len(site.asked) == 2  # the one that was kept is of this address


@pytest.mark.parametrize("known", [False, True])
def test_an_archive_of_unknown_origin_is_taken_only_by_its_checksum(
    known: bool, site: Site, tmp_path: Path
) -> None:
    site.files["set.zip"] = zipped(FILES)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.zip").write_bytes(
        site.files["set.zip"] if known else zipped({"top.txt": b"?"})
    )
    item = Download(url=site.url("set.zip"), checksum=checksum(site.files["set.zip"]) if known else "")
    assert obtain(item, tmp_path) is not None
    assert (tmp_path / "top.txt").read_bytes() == FILES["top.txt"]
    assert len(site.asked) == (0 if known else 1)


def test_the_files_are_on_the_disk_before_the_note_that_says_so(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["set.zip"] = zipped(FILES)
    seen: list[tuple[bool, bool]] = []
    note = tmp_path / "downloads/set.zip.done"
    monkeypatch.setattr(os, "sync", lambda: seen.append(((tmp_path / "top.txt").exists(), note.exists())))
    obtain(Download(url=site.url("set.zip")), tmp_path)
    assert seen == [(True, False)]
    assert note.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_no_obstacle(
    number: int, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert obtain(Download(url=site.url()), tmp_path) is not None


def test_two_downloads_into_one_folder_do_not_run_at_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process downloads"):
            obtain(Download(url=site.url()), tmp_path)


def test_a_download_that_is_killed_goes_on(site: Site, tmp_path: Path) -> None:
    site.files["set.bin"] = os.urandom(1000) * 8000  # more than the buffers of the connection hold
    script = (
        "import os, sys\n"
        "import segformer.data.sources.download as d\n"
        "from pathlib import Path\n"
        "d.tqdm.update = lambda bar, n=1: os.kill(os.getpid(), 9)\n"
        "d.obtain(d.Download(url=sys.argv[1]), Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", script, site.url(), str(tmp_path)]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == -9
    arrived = (tmp_path / "downloads/set.bin.part").stat().st_size
    assert obtain(Download(url=site.url()), tmp_path) is not None
    assert (tmp_path / "set.bin").read_bytes() == site.files["set.bin"]
    assert ranges(site)[-1] == (f"bytes={arrived}-" if arrived else "")


def special(kind: bytes, name: str = "x", target: str = "/etc/passwd") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
        inner = tarfile.TarInfo(f"{name}/y")
        inner.size = 1
        archive.addfile(inner, io.BytesIO(b"y"))
    return buffer.getvalue()


def zip_entry(name: str, change: Callable[[zipfile.ZipInfo], None], data: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("plain")
        info.filename = name
        change(info)
        archive.writestr(info, data)
    return buffer.getvalue()


def as_link(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o120777 << 16


def encrypted() -> bytes:
    data = bytearray(zipped({"x": b"x"}))
    data[6] |= 1  # local header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # central directory
    return bytes(data)


def flipped() -> bytes:
    data = bytearray(zip_entry("x", lambda info: None, b"payload" * 9))
    data[data.index(b"payload") + 3] ^= 1
    return bytes(data)


def twice() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a/x", "a/./x"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def damaged_lzma() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x", random.Random(0).randbytes(5000))
    data = bytearray(buffer.getvalue())
    data[39:43] = b"\xff" * 4  # the filter's properties, behind the local header
    return bytes(data)


SPARE = {f"{n}": b"x" * 600 for n in range(4)}  # a header and two blocks each
HEADER = 3 * tarfile.BLOCKSIZE  # of the second member


def bad_header(mode: str) -> bytes:
    data = bytearray(tarred(SPARE))
    data[HEADER + 150] ^= 1
    return gzip.compress(data) if mode == "w:gz" else bytes(data)


def bad_gzip_crc() -> bytes:
    data = bytearray(tarred(SPARE, "w:gz"))
    data[-8] ^= 1
    return bytes(data)


HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "zip: parent": ("a.zip", zip_entry("a/../../x", lambda info: None), "leads out"),
    "zip: absolute": ("a.zip", zip_entry("/x", lambda info: None), "absolute"),
    "zip: backslash": ("a.zip", zip_entry("..\\x", lambda info: None), "backslash"),
    "zip: link": ("a.zip", zip_entry("x", as_link, b"/etc/passwd"), "link or a special"),
    "zip: encrypted": ("a.zip", encrypted(), "is encrypted"),
    "zip: bit flip": ("a.zip", flipped(), "is damaged: Bad CRC-32"),
    "zip: truncated": ("a.zip", zipped(FILES)[:-30], "is damaged"),
    "zip: bomb": ("a.zip", zipped({f"{n}": bytes(10**7) for n in range(7)}), "above the limit"),
    "tar: parent": ("a.tar", tarred({"../x": b"x"}), "leads out"),
    "tar: absolute": ("a.tar", tarred({"/tmp/x": b"x"}), "absolute"),
    "tar: control": ("a.tar", tarred({"a\nb": b"x"}), "control characters"),
    "tar: symbolic link": ("a.tar", special(tarfile.SYMTYPE), "link or a special"),
    "tar: hard link": ("a.tar", special(tarfile.LNKTYPE), "link or a special"),
    "tar: device": ("a.tar", special(tarfile.CHRTYPE), "link or a special"),
    "tar: pipe": ("a.tar", special(tarfile.FIFOTYPE), "link or a special"),
    "tar: twice": ("a.tar", twice(), "comes twice"),
    "tar: truncated": ("a.tar", tarred({"x": bytes(5000)})[:3000], "is damaged|header says"),
    "tar: header flipped": ("a.tar", bad_header("w"), "no valid header at byte 1536"),
    "tar: header of zeros": (
        "a.tar",
        tarred(SPARE)[:HEADER] + bytes(512) + tarred(SPARE)[HEADER + 512 :],
        "not the end",
    ),
    "tar: cut at a member": ("a.tar", tarred(SPARE)[:HEADER], "breaks off at byte 1536"),
    "tar: one block at the end": ("a.tar", tarred(SPARE)[: 12 * 512 + 512], "breaks off at byte 6144"),
    "tar: only zeros": ("a.tar", bytes(10240), "holds no file"),
    "tar: other compression": ("a.tar", lzma.compress(tarred(SPARE)), "is damaged"),
    "tgz: header flipped": ("a.tgz", bad_header("w:gz"), "no valid header at byte 1536"),
    "tgz: cut at a member": ("a.tgz", gzip.compress(tarred(SPARE)[:HEADER]), "breaks off at byte 1536"),
    "tgz: checksum": ("a.tgz", bad_gzip_crc(), "is damaged: CRC check failed"),
    "zip: damaged lzma": ("a.zip", damaged_lzma(), "is damaged"),
    "zip: no file": ("a.zip", zipped({}), "holds no file"),
    "tar: file as folder": ("a.tar", tarred({"x": b"1", "x/y": b"2"}), "cannot be unpacked"),
    "tgz: truncated": ("a.tgz", tarred({"x": os.urandom(5000)}, "w:gz")[:3000], "is damaged"),
    "tgz: bomb": ("a.tgz", tarred({f"{n}": bytes(10**7) for n in range(7)}, "w:gz"), "above the limit"),
    "no archive": ("a.tar", b"<html>", "is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_archive_writes_nothing(name: str, tmp_path: Path) -> None:
    file, data, message = HOSTILE[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "deep/target").mkdir(parents=True)
    with pytest.raises(DataError, match=message) as caught:
        unpack(tmp_path / file, tmp_path / "deep/target")
    assert "\n" not in str(caught.value)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        *(file, "deep", "deep/target")
    }


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/download.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_shows_the_licence_first_and_ends_with_the_next_command(
    site: Site, tmp_path: Path
) -> None:
    site.files["set.zip"] = zipped({f"ADEChallengeData2016/{name}": data for name, data in FILES.items()})
    files = f"download.files=[{{url:'{site.url('set.zip')}'}}]"
    refused = run("data=ade20k", f"out={tmp_path}", files)
    assert (refused.returncode, site.asked, list(tmp_path.iterdir())) == (2, [], [])
    assert "accept_license=true" in refused.stderr
    assert refused.stdout.splitlines()[1].startswith("licence: non-commercial research and education")
    done = run("data=ade20k", f"out={tmp_path}", files, "accept_license=true")
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(site.files["set.zip"]).hexdigest()
    assert f"set.zip: sha256 {sha256} (nothing to compare it with)" in done.stdout.splitlines()
    root = tmp_path / "ADEChallengeData2016"
    assert done.stdout.splitlines()[-1] == f"next: python data_prep/shard.py data=ade20k root={root}"
    assert (root / "set/images/a.jpg").read_bytes() == FILES["set/images/a.jpg"]


def test_a_set_behind_a_registration_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    done = run("data=cityscapes", f"out={tmp_path}", "accept_license=true")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for part in (
        "gtFine_trainvaltest.zip",
        "https://www.cityscapes-dataset.com/downloads/",
        f"root={tmp_path}",
    ):
        assert part in done.stderr


def test_a_wrong_address_is_one_line(tmp_path: Path) -> None:
    done = run("data=ade20k", f"out={tmp_path}", 'download.files=[{url:"http://[/x.zip"}]')
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Invalid IPv6 URL" in done.stderr


@pytest.fixture(scope="module")
def schema() -> Iterator[type]:
    """DownloadConfig of the script."""
    spec = importlib.util.spec_from_file_location("download_script", ROOT / "data_prep/download.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["download_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module.DownloadConfig
    del sys.modules["download_script"]


@pytest.mark.parametrize("path", sorted((ROOT / "conf/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_set_says_where_it_comes_from(path: Path, schema: type) -> None:
    cfg = compose(schema, "download", [f"data={path.stem}"])
    assert cfg.data.name == path.stem
    assert cfg.download.page
    assert cfg.download.files or cfg.download.missing


def test_two_files_of_one_name_are_refused(schema: type) -> None:
    files = "download.files=[{url:'http://a.org/x.zip'},{url:'http://b.org/x.zip'}]"
    with pytest.raises(ConfigError, match=r"two addresses of the file name 'x\.zip'"):
        compose(schema, "download", ["data=ade20k", files])


def test_ctrl_c_is_one_line_and_130(
    schema: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["download.py", "data=ade20k"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli(schema, "download", lambda cfg: signal.default_int_handler(signal.SIGINT, None))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_in_training_only_sets_the_flag(schema: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(cfg: object) -> None:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(stop.signal)

    seen: list[int | None] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "data=ade20k"])
    cli(schema, "download", train)
    assert seen == [signal.SIGINT]
