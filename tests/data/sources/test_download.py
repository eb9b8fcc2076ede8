"""Downloads from a real server on loopback that breaks off and changes its files as it is told."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import FileServer, answering, serving

from segformer import files
from segformer.data.sources.download import Download, obtain, unpack
from segformer.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
DATA = bytes(range(256)) * 4000  # 1 MB
FILES = {"set/images/a.jpg": b"a" * 3000, "set/list.txt": b"", "top.txt": b"t"}


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "set.bin").write_bytes(DATA)
    (folder / "set.zip").write_bytes(ZIP)
    with serving(folder) as server:
        yield server


def at(site: FileServer, name: str = "set.bin", **settings: Any) -> Download:
    """A file of the server."""
    return Download(url=f"{site.url}/{name}", **settings)


def ranges_of(site: FileServer) -> list[str]:
    """The Range header of every request."""
    return [asked for _, _, asked in site.requests]


def zipped(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


ZIP = zipped(FILES)


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
def test_a_plain_file_arrives_whole(kind: str, site: FileServer, tmp_path: Path) -> None:
    item = at(site, size=len(DATA), checksum=checksum(DATA, kind), into="there")
    assert obtain(item, tmp_path) == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "there/set.bin").read_bytes() == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_was(ranges: bool, site: FileServer, tmp_path: Path) -> None:
    item, site.ranges, site.cut = at(site), ranges, 1000
    with pytest.raises(DataError, match="ended 1023000 bytes early; run this again"):
        obtain(item, tmp_path)
    site.cut = None
    assert obtain(item, tmp_path) is not None
    assert (tmp_path / "set.bin").read_bytes() == DATA
    assert ranges_of(site) == ["", "bytes=1000-"]


@pytest.mark.parametrize("more", ["", "7\r\nof more\r\n"])
def test_headers_of_small_letters_chunks_and_an_archive_that_is_called_encoded(
    more: str, tmp_path: Path
) -> None:
    data = tarred({"a.txt": b"a" * 3000}, "w:gz")

    def answer(asked: str) -> list[bytes]:
        part = data[10:]
        head = f"content-range: bytes 10-{len(data) - 1}/{len(data)}\r\ncontent-encoding: x-gzip"
        chunks = b"%x\r\n%b\r\n%b0\r\n\r\n" % (len(part), part, more.encode())
        return [f"HTTP/1.1 206 OK\r\n{head}\r\ntransfer-encoding: chunked\r\n\r\n".encode(), chunks]

    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads/set.tgz.part").write_bytes(data[:10])
    with answering(answer) as url, contextlib.ExitStack() as stack:
        if more:
            stack.enter_context(
                pytest.raises(DataError, match=f"{len(data) + 7} bytes, expected {len(data)}")
            )
        obtain(Download(url=f"{url}/set.tgz", size=len(data)), tmp_path)
        assert (tmp_path / "a.txt").read_bytes() == b"a" * 3000


@pytest.mark.parametrize(("end", "asked"), [(".part", [f"bytes={len(DATA)}-"]), ("", [])])
def test_a_file_that_lies_there_whole_is_taken(
    end: str, asked: list[str], site: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / f"downloads/set.bin{end}").write_bytes(DATA)
    assert obtain(at(site, checksum=checksum(DATA)), tmp_path) is not None
    assert ranges_of(site) == asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checksum": "sha256:" + "0" * 64}, "sha256 .* expected 0000"),
        ({"size": 7}, "1024000 bytes, expected 7"),
    ],
)
def test_another_file_than_expected_is_refused_and_not_kept(
    settings: dict[str, object], message: str, site: FileServer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        obtain(at(site, **settings), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", ".lock"]


def test_no_file_and_no_server_are_one_line(site: FileServer, tmp_path: Path) -> None:
    nobody = Download(url="http://127.0.0.1:1/x.zip")
    for item, message in ((at(site, "none.zip"), "404"), (nobody, "Connection refused")):
        with pytest.raises(DataError, match=message) as caught:
            obtain(item, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "file:///etc/x.zip"},
        {"url": "http://example.org/"},
        {"url": "http://example.org/a%2F..%2Fb"},
        {"url": "http://example.org/x.zip\n"},
        {"url": "http://example.org/x.zip", "checksum": "sha256:12"},
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
    name: str, data: bytes, site: FileServer, tmp_path: Path
) -> None:
    (site.folder / name).write_bytes(data)
    item = at(site, name, size=len(data), into="there")
    assert obtain(item, tmp_path) == hashlib.sha256(data).hexdigest()
    found = {path.relative_to(tmp_path / "there").as_posix(): path for path in tmp_path.glob("there/**/*")}
    assert {key: path.read_bytes() for key, path in found.items() if path.is_file()} == FILES
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == [".lock", f"{name}.done"]
    assert obtain(item, tmp_path) is None
    assert len(ranges_of(site)) == 1


def test_a_new_checksum_another_folder_and_removed_files_fetch_again(
    site: FileServer, tmp_path: Path
) -> None:
    item = at(site, "set.zip")
    assert obtain(item, tmp_path, keep=True) is not None
    assert (tmp_path / "downloads/set.zip").read_bytes() == ZIP
    assert obtain(Download(url=item.url, into="b"), tmp_path) is not None
    shutil.rmtree(tmp_path / "b/set")
    assert obtain(Download(url=item.url, into="b"), tmp_path) is not None
    new = zipped({**FILES, "top.txt": b"new"})
    (site.folder / "set.zip").write_bytes(new)
    assert obtain(Download(url=item.url, checksum=checksum(new)), tmp_path) is not None
    assert (tmp_path / "top.txt").read_bytes() == b"new"
    assert len(ranges_of(site)) == 4


def test_two_downloads_into_one_folder_do_not_run_at_once(site: FileServer, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads/.lock").open("w") as lock:
        assert files.lock(lock.fileno())
        with pytest.raises(DataError, match="another process downloads"):
            obtain(at(site), tmp_path)


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
    name: str, site: FileServer, tmp_path: Path
) -> None:
    file, data = BAD[name]
    (site.folder / file).write_bytes(data)
    with pytest.raises(DataError) as caught:
        obtain(at(site, file), tmp_path / "deep/out")
    assert "\n" not in str(caught.value)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found <= {"deep", "deep/out", *(f"deep/out/downloads{end}" for end in ("", "/.lock", f"/{file}"))}


def test_a_zip_with_names_that_lead_out_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"../../x": b"1", "/y": b"2"}))
    unpack(tmp_path / "a.zip", tmp_path / "deep/out")
    assert {path.name for path in (tmp_path / "deep/out").iterdir()} == {"x", "y"}


def test_the_command_shows_the_license_first_and_ends_with_the_next_command(
    site: FileServer, tmp_path: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    data = zipped({f"ADEChallengeData2016/{name}": data for name, data in FILES.items()})
    (site.folder / "set.zip").write_bytes(data)
    given = ("data=ade20k", f"output={tmp_path}", f"download.files=[{{url:'{site.url}/set.zip'}}]")
    with pytest.raises(ConfigError, match="accept_license=true"):
        command("download", *given)
    assert (site.requests, list(tmp_path.iterdir())) == ([], [])
    assert "\nlicense: non-commercial research and education" in capsys.readouterr().out
    printed = command("download", *given, "accept_license=true")
    assert f"set.zip: sha256 {hashlib.sha256(data).hexdigest()} (nothing to compare it with)" in printed
    root = tmp_path / "ADEChallengeData2016"
    assert printed[-1] == f"next: python data_prep/shard.py data=ade20k root={root}"
    assert (root / "set/images/a.jpg").read_bytes() == FILES["set/images/a.jpg"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "conf/data").glob("*.yaml"))])
def test_every_data_set_says_where_it_comes_from(
    name: str, tmp_path: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one with files the license stands before; of one behind a registration, where to get it."""
    with pytest.raises((ConfigError, DataError)) as caught:
        command("download", f"data={name}", f"output={tmp_path}")
    found = re.search(r"^source: (\S.*)$", capsys.readouterr().out, re.MULTILINE)
    assert found
    if isinstance(caught.value, DataError):
        assert re.search(rf"needed: \S.*{re.escape(found[1])}.*; then python .* root=", str(caught.value))
