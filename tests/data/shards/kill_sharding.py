"""python kill_sharding.py <folder> <scratch>: end write_shards with SIGKILL at every step on the file system.

Step k = 1, 2, ...: a forked process is killed by itself just before its k-th open, rename, removal or new
folder below the work folder. What it left is looked at, another process continues, and the result is compared
with an undisturbed run. Ends with the number of steps, or with an assertion.
"""

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import PIL.Image  # noqa: F401  both once, before the forks
import webdataset  # noqa: F401

from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def shard(root: Path, out: Path, *, deadly_step: int = 0) -> int:
    """write_shards in a process of its own; its exit status. deadly_step: 0 = let it live."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    step = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal step
        if event in EVENTS and arguments and str(arguments[0]).startswith(str(out.parent)):
            step += 1
            if step == deadly_step:
                os.kill(os.getpid(), signal.SIGKILL)

    if deadly_step:
        sys.addaudithook(count)
    cfg = DatasetConfig(classes=["sky", "road", "tree"], drop_classes=["tree"], min_share=0.01)
    with open(os.devnull, "w") as sys.stdout:
        write_shards(cfg, root, out, seed=1, samples_per_shard=2, workers=1)
    os._exit(0)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def inodes(folder: Path, pattern: str = "*.tar") -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob(pattern)}


def main(root: Path, scratch: Path) -> None:
    os.fsync = lambda _: None  # half of the time; the page cache outlives a killed process
    assert shard(root, scratch / "undisturbed") == 0
    expected = hashes(scratch / "undisturbed")
    out, work = scratch / "killed/out", scratch / "killed/.out.tmp"
    step = 0
    while True:
        step += 1
        ended = shard(root, out, deadly_step=step)
        if ended == 0:
            break
        assert os.WTERMSIG(ended) == signal.SIGKILL
        assert not out.exists() or hashes(out) == expected, step
        complete = {f"{path.stem}.tar" for path in work.glob("*/parts/*.json")}
        before = {name: inode for name, inode in inodes(work, "*/set/*.tar").items() if name in complete}
        assert set(before) == complete or out.exists(), step
        assert shard(root, out) == 0, step
        assert hashes(out) == expected, step
        assert before.items() <= inodes(out).items(), step
        assert [path.name for path in out.parent.iterdir()] == ["out"], step
        shutil.rmtree(out.parent)
    assert hashes(out) == expected
    print(step - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
