"""Files and folders that are there whole or not at all."""

import errno
import fcntl
import os
import re
import subprocess
import sys

import pytest

from segformer.files import lock, read_bytes, read_json, read_text, sha256_of, staged, write_atomic


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    write_atomic(path, [b"n", b"ew"])
    assert path.read_text() == "new"
    assert sha256_of(path) == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def pieces():
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, pieces())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_after_the_fence(tmp_path):
    path, seen = tmp_path / "a", []
    with staged(path, fence=lambda: seen.append(path.exists())) as place:
        place.mkdir()
        (place / "b").write_text("c")
        assert not path.exists()
    assert seen == [False]
    assert (path / "b").read_text() == "c"


def test_a_secret_is_its_owners(tmp_path):
    write_atomic(tmp_path / "a", "x", mode=0o600)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_a_lock_keeps_another_process_out(tmp_path):
    path = tmp_path / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert lock(descriptor)
        ask = "import os, sys; from segformer.files import lock; print(lock(os.open(sys.argv[1], os.O_RDWR)))"
        assert subprocess.check_output([sys.executable, "-c", ask, path], text=True) == "False\n"
    finally:
        os.close(descriptor)


def test_where_a_file_system_has_no_locks_the_user_keeps_others_away(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock(0)


def test_what_is_no_file_is_refused_at_once_and_a_link_to_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to a pipe").symlink_to("pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "to a pipe", "zero", "folder", "absent"):
        for read in (read_bytes, read_text, read_json, sha256_of):
            with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
                read(tmp_path / name)
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "to a").symlink_to("a")
    assert read_json(tmp_path / "to a") == [1]


def test_a_file_is_read_up_to_a_bound(tmp_path):
    (tmp_path / "a").write_bytes(b"abcd")
    assert read_bytes(tmp_path / "a", most=4) == b"abcd"
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_bytes(tmp_path / "a", most=3)


def test_text_has_no_mark_and_what_is_not_utf_8_is_named_by_its_line(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffä\r\nb".encode())
    assert read_text(tmp_path / "a") == "ä\r\nb"
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\nb\nc\xe4\n")
    with pytest.raises(ValueError, match="line 3 is not UTF-8"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 5000])
def test_what_is_no_json_is_a_value_error(text, tmp_path):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ValueError):  # noqa: PT011  any reason, one type
        read_json(tmp_path / "a")
