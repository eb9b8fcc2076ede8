"""Downloads from a real server on loopback that breaks off and changes its files as it is told."""

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segformer import files
from segformer.data.sources.download import Download, obtain, unpack
from segformer.errors import ConfigError, DataError
from segformer.training.config import compose

ROOT = Path(__file__).resolve().parents[3]
DATA = bytes(range(256)) * 4000  # 1 MB
FILES = {"set/images/a.jpg": b"a" * 3000, "set/list.txt": b"", "top.txt": b"t"}


@dataclass
class Site:
    """What the server gives, and the Range header of every request."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut: int | None = None
    """Bytes of the body after which the connection ends."""
    ranges: bool = True
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, name: str = "set.bin") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site, asked = self.site, self.headers.get("Range", "")
        site.asked.append(asked)
        data = site.files.get(self.path.lstrip("/"))
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and site.ranges else 0
        code = 404 if data is None else 416 if first >= len(data) else 206 if first else 200
        body = data[first:] if data is not None and code < 400 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: site.cut])


@pytest.fixture
def site() -> Iterator[Site]:
    given = Site({"set.bin": DATA, "set.zip": zipped(FILES)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": given}))
    given.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield given
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(content: dict[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "/etc/passwd"
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def checksum(data: bytes, kind: str = "sha256") -> str:
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_plain_file_arrives_whole(kind: str, site: Site, tmp_path: Path) -> None:
    item = Download(url=site.url(), size=len(DATA), checksum=checksum(DATA, kind), into="there")
    assert obtain(item, tmp_path) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "there/set.bin").read_bytes() == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_was(ranges: bool, site: Site, tmp_path: Path) -> None:
    item, site.ranges, site.cut = Download(url=site.url()), ranges, 1000
    with pytest.raises(DataError, match="ended 1023000 bytes early; run this again"):
        obtain(item, tmp_path)
    site.cut = None
    assert obtain(item, tmp_path) is not None
    assert (tmp_path / "set.bin").read_bytes() == DATA
    assert site.asked == ["", "bytes=1000-"]


def test_a_part_that_is_whole_is_taken(site: Site, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.bin.part").write_bytes(DATA)
    assert obtain(Download(url=site.url(), checksum=checksum(DATA)), tmp_path) is not None
    assert site.asked == [f"bytes={len(DATA)}-"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "sha256 .* expected 0000"),
        ({"checksum": "md5:" + "0" * 32}, "md5 .* expected 0000"),
        ({"size": 7}, "1024000 bytes, expected 7"),
    ],
)
def test_another_file_than_expected_is_refused_and_not_kept(
    settings: dict[str, object], message: str, site: Site, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        obtain(Download(url=site.url(), **settings), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", ".lock"]


def test_no_file_and_no_server_are_one_line(site: Site, tmp_path: Path) -> None:
    for url, message in ((site.url("none.zip"), "404"), ("http://127.0.0.1:1/x.zip", "Connection refused")):
        with pytest.raises(DataError, match=message) as caught:
            obtain(Download(url=url), tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://example.org/x.zip"},
        {"url": "file:///etc/x.zip"},
        {"url": "http://example.org/"},
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


def test_a_new_checksum_another_folder_and_removed_files_fetch_again(site: Site, tmp_path: Path) -> None:
    item = Download(url=site.url("set.zip"))
    assert obtain(item, tmp_path, keep=True) is not None
    assert (tmp_path / "downloads/set.zip").read_bytes() == site.files["set.zip"]
    assert obtain(Download(url=item.url, into="b"), tmp_path) is not None
    shutil.rmtree(tmp_path / "b/set")
    assert obtain(Download(url=item.url, into="b"), tmp_path) is not None
    site.files["set.zip"] = zipped({**FILES, "top.txt": b"new"})
    assert obtain(Download(url=item.url, checksum=checksum(site.files["set.zip"])), tmp_path) is not None
    assert (tmp_path / "top.txt").read_bytes() == b"new"
    assert len(site.asked) == 4


def test_an_archive_that_lies_there_is_taken_by_its_checksum(site: Site, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.zip").write_bytes(site.files["set.zip"])
    assert obtain(Download(url=site.url("set.zip"), checksum=checksum(site.files["set.zip"])), tmp_path)
    assert site.asked == []


def test_two_downloads_into_one_folder_do_not_run_at_once(site: Site, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads/.lock").open("w") as lock:
        assert files.lock(lock.fileno())
        with pytest.raises(DataError, match="another process downloads"):
            obtain(Download(url=site.url()), tmp_path)


BAD: dict[str, tuple[str, bytes]] = {
    "tar with a name that leads out": ("a.tar", tarred({"../x": b"x"})),
    "tar with a link that leads out": ("a.tar", tarred({"x": b""}, kind=tarfile.SYMTYPE)),
    "tar with a device": ("a.tar", tarred({"x": b""}, kind=tarfile.CHRTYPE)),
    "truncated tar": ("a.tar", tarred({"x": bytes(5000)})[:3000]),
    "truncated tgz": ("a.tgz", tarred({"x": os.urandom(5000)}, "w:gz")[:3000]),
    "truncated zip": ("a.zip", zipped(FILES)[:-30]),
    "flipped zip": ("a.zip", zipped({"x": b"payload"}).replace(b"payload", b"paYload")),
    "empty zip": ("a.zip", zipped({})),
    "web page": ("a.tar", b"<html>"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_or_damaged_archive_is_one_line_and_leaves_nothing(
    name: str, site: Site, tmp_path: Path
) -> None:
    file, site.files[file] = BAD[name][0], BAD[name][1]
    with pytest.raises(DataError) as caught:
        obtain(Download(url=site.url(file)), tmp_path / "deep/out")
    assert "\n" not in str(caught.value)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found <= {"deep", "deep/out", *(f"deep/out/downloads{end}" for end in ("", "/.lock", f"/{file}"))}


def test_a_zip_with_names_that_lead_out_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"../../x": b"1", "/y": b"2"}))
    unpack(tmp_path / "a.zip", tmp_path / "deep/out")
    assert {path.name for path in (tmp_path / "deep/out").iterdir()} == {"x", "y"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/download.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_shows_the_license_first_and_ends_with_the_next_command(
    site: Site, tmp_path: Path
) -> None:
    site.files["set.zip"] = zipped({f"ADEChallengeData2016/{name}": data for name, data in FILES.items()})
    given = f"download.files=[{{url:'{site.url('set.zip')}'}}]"
    refused = run("data=ade20k", f"output={tmp_path}", given)
    assert (refused.returncode, site.asked, list(tmp_path.iterdir())) == (2, [], [])
    assert "accept_license=true" in refused.stderr
    assert refused.stdout.splitlines()[1].startswith("license: non-commercial research and education")
    done = run("data=ade20k", f"output={tmp_path}", given, "accept_license=true")
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(site.files["set.zip"]).hexdigest()
    assert f"set.zip: sha256 {sha256} (nothing to compare it with)" in done.stdout.splitlines()
    root = tmp_path / "ADEChallengeData2016"
    assert done.stdout.splitlines()[-1] == f"next: python data_prep/shard.py data=ade20k root={root}"
    assert (root / "set/images/a.jpg").read_bytes() == FILES["set/images/a.jpg"]


def test_a_set_behind_a_registration_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    done = run("data=cityscapes", f"output={tmp_path}", "accept_license=true")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for part in ("gtFine_trainvaltest.zip", "https://www.cityscapes-dataset.com/downloads/", "root="):
        assert part in done.stderr


def test_every_data_set_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("download_script", ROOT / "data_prep/download.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "download_script", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for path in sorted((ROOT / "conf/data").glob("*.yaml")):
        cfg = compose(module.DownloadConfig, "download", [f"data={path.stem}"])
        assert cfg.data.name == path.stem
        assert cfg.download.page
        assert cfg.download.files or cfg.download.missing
