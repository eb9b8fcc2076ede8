"""Hostile servers, for shards over http and for downloads: one line, soon, and without much memory."""

import gzip
import re
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from servers import answering

from segformer.data.shards.storage import Storage, StorageConfig
from segformer.data.sources import download
from segformer.data.sources.download import Download, obtain
from segformer.data.sources.web import AnswerRefusedError, check_redirect
from segformer.errors import DataError

LENGTH = 1000  # bytes that are asked for
Answer = Callable[[str], Iterable[bytes]]


def head(*lines: str, status: str = "206 Partial Content") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def slowly(data: bytes) -> Iterator[bytes]:
    for byte in data:
        yield bytes([byte])
        time.sleep(0.05)


RANGE, SIZE = f"Content-Range: bytes 0-{LENGTH - 1}/{LENGTH}", f"Content-Length: {LENGTH}"
BOMB = gzip.compress(bytes(300_000_000), 1)
ENDLESS = repeat(b"x" * 2**16)
ANSWERS: dict[str, Answer] = {
    "body without end": lambda _: chain([head(RANGE)], ENDLESS),
    "chunks without end": lambda _: chain(
        [head(RANGE, "Transfer-Encoding: chunked")], repeat(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
    ),
    "whole file without end": lambda _: chain([head(status="200 OK")], ENDLESS),
    "head without end": lambda _: chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"X-A: " + b"b" * 5000 + b"\r\n")),
    "line without end": lambda _: chain([b"HTTP/1.1 200 OK\r\nX-A: "], ENDLESS),
    "gzip bomb": lambda _: [head(RANGE, f"Content-Length: {len(BOMB)}", "Content-Encoding: gzip"), BOMB],
    "gzip bomb of a whole file": lambda _: [
        head(f"Content-Length: {len(BOMB)}", "Content-Encoding: gzip", status="200 OK"), BOMB
    ],
    "five bytes a second": lambda _: chain([head(RANGE, SIZE)], slowly(bytes(LENGTH))),
    "head by bytes": lambda _: slowly(head(RANGE, SIZE)),
    "nothing": lambda _: [],
    "other protocol": lambda _: [b"SSH-2.0-OpenSSH_9.9\r\n"],
    "negative length": lambda _: [head(RANGE, "Content-Length: -5")],
    "another range": lambda _: [head(f"Content-Range: bytes 7-{LENGTH + 6}/9999", SIZE), bytes(LENGTH)],
    "no range": lambda _: [head(SIZE), bytes(LENGTH)],
    "redirect in a circle": lambda asked: [head("Location: /a.tar", SIZE, status="302 Found")],
    "redirect for ever": lambda asked: [head(f"Location: {asked.split()[1]}a", SIZE, status="302 Found")],
    "redirect to a cloud's keys": lambda _: [
        head("Location: http://169.254.169.254/latest/meta-data/x.tar", SIZE, status="302 Found")
    ],
    "redirect to a file": lambda _: [head("Location: file:///etc/passwd", SIZE, status="302 Found")],
    "redirect with a body without end": lambda _: chain([head("Location: /b/", status="302 Found")], ENDLESS),
}  # fmt: skip


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test takes no more than 5 seconds and 150 MB."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ANSWERS)
def test_shards_of_a_hostile_server_are_one_line(name: str, tmp_path: Path) -> None:
    config = StorageConfig(timeout=0.3, retry_seconds=0, cache_dir=str(tmp_path))
    with answering(ANSWERS[name]) as url:
        storage = Storage.at(url, config)
        with pytest.raises(DataError) as caught:
            storage.read_range("a.tar", 0, LENGTH)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError):  # asks for the size first
            storage.read("a.tar", limit=LENGTH)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", ANSWERS)
def test_a_download_from_a_hostile_server_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with answering(ANSWERS[name]) as url, pytest.raises(DataError) as caught:
        obtain(Download(url=f"{url}/a.tar", size=LENGTH), tmp_path)
    assert "\n" not in str(caught.value)


PLACES = {"public.org": "93.184.216.34", "other.org": "8.8.8.8"}
PLACES |= {"inside.org": "10.0.0.7", "own.org": "10.0.0.9"}


@pytest.mark.parametrize(
    ("url", "location", "refused"),
    [
        ("https://public.org/a", "https://other.org/b", ""),
        ("http://public.org/a", "https://other.org/b", ""),
        ("http://public.org/a", "http://other.org/b", ""),
        ("http://public.org/a", "/b", ""),
        ("http://own.org/a", "http://inside.org:8080/b", ""),
        ("http://127.0.0.1:80/a", "http://127.0.0.1:81/b", ""),
        ("https://public.org/a", "https://inside.org/b", ""),  # whose certificate says who it is
        ("https://public.org/a", "http://public.org/b", "out of https"),
        ("https://public.org/a", "//other.org/b", ""),
        ("http://public.org/a", "http://inside.org/b", "an internal address"),
        ("http://public.org/a", "http://localhost/b", "an internal address"),
        ("http://public.org/a", "http://127.1/b", "an internal address"),
        ("http://public.org/a", "http://[::1]/b", "an internal address"),
        ("http://public.org/a", "http://[::ffff:10.0.0.1]/b", "an internal address"),
        ("http://own.org/a", "http://169.254.169.254/b", "an internal address"),
        ("http://own.org/a", "http://[fe80::1]/b", "an internal address"),
        ("http://public.org/a", "ftp://other.org/b", "no address of the web"),
    ],
)
def test_where_a_redirect_may_lead(
    url: str, location: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: resolve(PLACES.get(host, host), *a, **k))
    if refused:
        with pytest.raises(AnswerRefusedError, match=re.escape(refused)):
            check_redirect(url, location)
    else:
        check_redirect(url, location)


def test_an_ordinary_redirect_is_followed(tmp_path: Path) -> None:
    def answer(asked: str) -> list[bytes]:
        if asked.split()[1] == "/a.tar":
            moved = "Location: /b/c.tar", "Content-Length: 0", "Connection: close"
            return [head(*moved, status="302 Found")]
        return [head(RANGE, SIZE), b"" if asked.startswith("HEAD") else b"z" * LENGTH]

    with answering(answer) as url:
        storage = Storage.at(url, StorageConfig(timeout=1, retry_seconds=0, cache_dir=str(tmp_path)))
        assert storage.read("a.tar", limit=LENGTH) == b"z" * LENGTH
