import hashlib
from pathlib import Path
from typing import Any

import pytest
from servers import FAULTS, serving

from segformer.data.shards import storage
from segformer.data.shards.storage import Storage, StorageConfig
from segformer.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    return folder


def quick(tmp_path: Path, **options: Any) -> StorageConfig:
    return StorageConfig(
        **{"timeout": 0.5, "retry_seconds": 20, "cache_dir": str(tmp_path / "cache")} | options
    )


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.05)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (17, 1000), (len(CONTENT) - 5, 5), (0, len(CONTENT))])
def test_a_range_is_the_same_from_a_folder_and_over_http(
    folder: Path, tmp_path: Path, start: int, length: int
) -> None:
    with serving(folder) as server:
        for root in (str(folder), server.url, server.url + "/"):
            source = Storage.at(root, quick(tmp_path))
            assert source.read_range("a.tar", start, length) == CONTENT[start : start + length]
            assert source.size("a.tar") == len(CONTENT)
            assert source.read("a.tar") == CONTENT
        assert all(kind == "HEAD" or asked for kind, _, asked in server.requests), "only ranges are asked for"


def test_a_large_file_is_fetched_in_pieces(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE", 1000)
    with serving(folder) as server:
        assert Storage.at(server.url, quick(tmp_path)).read("a.tar") == CONTENT
        assert len([kind for kind, _, _ in server.requests if kind == "GET"]) == 11


@pytest.mark.usefixtures("no_waiting")
def test_every_read_succeeds_where_half_of_the_requests_fail_in_four_ways(
    folder: Path, tmp_path: Path
) -> None:
    with serving(folder, fail=0.5) as server:
        source = Storage.at(server.url, quick(tmp_path))
        for start in range(0, 2400, 100):
            assert source.read_range("a.tar", start, 100) == CONTENT[start : start + 100]
            assert source.size("a.tar") == len(CONTENT)
        assert all(server.done[fault] for fault in FAULTS)


@pytest.mark.usefixtures("no_waiting")
def test_a_server_that_never_answers_well_is_one_error(folder: Path, tmp_path: Path) -> None:
    with serving(folder, fail=1.0) as server:
        source = Storage.at(server.url, quick(tmp_path, retry_seconds=1))
        with pytest.raises(DataError, match=r"a.tar' cannot be read: .*tries in \d s\); check the address"):
            source.read_range("a.tar", 0, 100)
        assert len(server.requests) > 1
    with pytest.raises(DataError, match=r"a.tar' cannot be read: ClientConnectorError .* tries"):
        source.size("a.tar")  # nobody serves the port any more


def test_a_missing_file_is_an_error_at_once(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        for root in (str(folder), server.url):
            source = Storage.at(root, quick(tmp_path))
            with pytest.raises(DataError, match=r"b.tar' cannot be read: FileNotFoundError"):
                source.read_range("b.tar", 0, 1)
            with pytest.raises(DataError, match=r"b.tar' cannot be read"):
                source.size("b.tar")
        assert len([kind for kind, _, _ in server.requests if kind == "GET"]) <= 2  # size falls back to GET


def test_a_range_behind_the_end_is_an_error_and_never_short(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        for root in (str(folder), server.url):
            source = Storage.at(root, quick(tmp_path, retry_seconds=0))
            for start in (len(CONTENT) - 10, len(CONTENT) + 10):
                with pytest.raises(DataError, match=r"a.tar' (ends 90|ends 100|cannot be read)"):
                    source.read_range("a.tar", start, 100)


def test_a_server_without_ranges_is_refused(folder: Path, tmp_path: Path) -> None:
    with (
        serving(folder, ranges=False) as server,
        pytest.raises(DataError, match="ignored the Range header; serve the shards"),
    ):
        Storage.at(server.url, quick(tmp_path)).read_range("a.tar", 0, 10)


@pytest.mark.parametrize(
    "root",
    [
        *("pipe:cat /etc/passwd", "file:///etc", "data:text/plain,x", "memory://x", "simplecache::s3://x"),
        *("http://a.org/a?key=1", "http://a.org/a#b", "http:///a", "a\nb", "https://a.org/../a"),
    ],
)
def test_any_other_address_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="the address"):
        Storage.at(root)


@pytest.mark.parametrize(
    "root", ["data/x", "/data/x", "../x", "C:\\data", "a:b/c", "s3://bucket/a", "gs://b/c"]
)
def test_folders_and_buckets_are_allowed(root: str) -> None:
    assert Storage.at(root).is_local == ("://" not in root)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"example\.org holds a user name") as caught:
        Storage.at("https://" + "user:secret@example.org/x")
    assert "secret" not in str(caught.value)


def test_a_remote_file_is_kept_and_verified(folder: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    with serving(folder) as server:
        source = Storage.at(server.url, quick(tmp_path))
        assert source.whole("a.tar", size=len(CONTENT), sha256=sha256) == CONTENT
        before, path = len(server.requests), tmp_path / "cache/files" / sha256
        assert path.read_bytes() == CONTENT
        assert source.whole("a.tar", size=len(CONTENT), sha256=sha256) == CONTENT
        assert len(server.requests) == before, "the second time it comes from the cache"
        path.write_bytes(bytes(len(CONTENT)))
        assert source.whole("a.tar", size=len(CONTENT), sha256=sha256) == CONTENT, "it heals"
        with pytest.raises(DataError, match="has no sha256"):
            source.whole("a.tar", size=len(CONTENT), sha256="../" + "0" * 61)
        with pytest.raises(DataError, match="sha256 differs"):
            source.whole("a.tar", size=len(CONTENT), sha256="0" * 64)
    assert path.stat().st_mode & 0o077 == 0
    assert list(path.parent.iterdir()) == [path]


def test_more_shards_than_descriptors_can_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 3)
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * 10)
    source = Storage.at(folder)
    for number in (0, 1, 2, 3, 4, 5, 6, 7, 0, 3, 7):
        assert source.read_range(f"{number}.tar", 2, 4) == bytes([number]) * 4
    assert len(source._files) == 3
