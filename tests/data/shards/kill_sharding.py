"""python kill_sharding.py <folder> <larger folder> <scratch>: end write_shards with SIGKILL.

At every step on the file system: k = 1, 2, ...; a forked process is killed by itself just before its k-th
open, rename, removal or new folder below the work folder. And with worker processes, once some shards of the
larger folder are finished. What was left is looked at, another process continues, and the result is
compared with an undisturbed run. Ends with the number of steps, or with an assertion.
"""

import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
CONFIG = DatasetConfig(classes=["sky", "road", "tree"], splits=["train"])


def start(root: Path, out: Path, *, workers: int = 1, deadly_step: int = 0) -> int:
    """write_shards in a process of its own; its id. deadly_step: 0 = let it live."""
    process = os.fork()
    if process:
        return process
    step = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal step
        if event in EVENTS and arguments and str(arguments[0]).startswith(str(out.parent)):
            step += 1
            if step == deadly_step:
                os.kill(os.getpid(), signal.SIGKILL)

    if deadly_step:
        sys.addaudithook(count)
    with open(os.devnull, "w") as sys.stdout:
        write(root, out, workers=workers)
    os._exit(0)


def write(root: Path, out: Path, *, workers: int = 1) -> None:
    write_shards(CONFIG, root, out, seed=1, samples_per_shard=2, workers=workers)


def end_of(process: int) -> int:
    """Its exit status."""
    return os.waitpid(process, 0)[1]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def inodes(folder: Path, pattern: str = "*.tar") -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob(pattern)}


def finished(out: Path) -> dict[str, int]:
    """The tars of the work folder that have their note."""
    work = out.with_name(f".{out.name}.tmp")
    complete = {f"{path.stem}.tar" for path in work.glob("*/parts/*.json")}
    found = {name: inode for name, inode in inodes(work, "*/set/*.tar").items() if name in complete}
    assert set(found) == complete or out.exists()
    return found


def kill_at_every_step(root: Path, scratch: Path) -> int:
    write(root, scratch / "undisturbed")  # imports all that the forked processes use
    expected, out = hashes(scratch / "undisturbed"), scratch / "killed/out"
    step = 0
    while True:
        step += 1
        ended = end_of(start(root, out, deadly_step=step))
        if ended == 0:
            break
        assert os.WTERMSIG(ended) == signal.SIGKILL
        assert not out.exists() or hashes(out) == expected, step
        before = finished(out)
        assert end_of(start(root, out)) == 0, step
        assert hashes(out) == expected, step
        assert before.items() <= inodes(out).items(), step
        assert [path.name for path in out.parent.iterdir()] == ["out"], step
        shutil.rmtree(out.parent)
    assert hashes(out) == expected
    return step - 1


def kill_with_workers(root: Path, scratch: Path) -> None:
    write(root, scratch / "undisturbed")
    out = scratch / "out"
    process = start(root, out, workers=2)
    while len(finished(out)) < 5:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    end_of(process)
    assert not out.exists()
    kept = finished(out)
    assert end_of(start(root, out)) == 0
    assert kept.items() <= inodes(out).items()
    assert hashes(out) == hashes(scratch / "undisturbed")


if __name__ == "__main__":
    os.fsync = lambda _: None  # half of the time; the page cache outlives a killed process
    small, large, place = map(Path, sys.argv[1:])
    print(kill_at_every_step(small, place / "steps"))
    kill_with_workers(large, place / "workers")
