import errno
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import serving

from segformer.data.shards.format import ShardSet
from segformer.data.shards.index import pack_index, parse_index
from segformer.data.shards.verify import find_defects
from segformer.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.unlink()
    path.write_bytes(data)


def test_what_was_written_has_no_defect(shard_dir: Path, class_shards: ShardSet) -> None:
    assert find_defects(shard_dir, workers=2) == []
    assert find_defects(class_shards.root) == []


def test_every_defect_is_named_with_file_and_key(copy: Path) -> None:
    split = ShardSet.open(copy).split("train")
    for sample_id, member in ((2, "image"), (5, "target")):
        flip(copy / "train-000000.tar", int(split.records[f"{member}_offset"][sample_id]) + 9)
    (copy / "train-000001.tar").unlink()
    flip(copy / "val.idx", 300)
    flip(copy / "val-000001.tar", 300)
    found = find_defects(copy, workers=1)
    for number, part in enumerate(
        (
            "val.idx' is damaged (size or sha256",
            "train-000000.tar' is damaged (sha256",
            f"train-000000.tar', key {split.key(2)!r}: the image at offset",
            f"train-000000.tar', key {split.key(5)!r}: the target at offset",
            "train-000001.tar': No such file",
            "val-000001.tar' is damaged (sha256",
        )
    ):
        assert part in found[number]
    assert len(found) == 6
    assert find_defects(copy, workers=2) == found


def test_a_shard_that_cannot_be_read_is_named(shard_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.file_digest

    def fail(stream: Any, name: str) -> Any:
        if str(stream.name).endswith(".tar"):
            raise OSError(errno.EIO, "Input/output error")
        return digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    found = find_defects(shard_dir)
    assert len(found) == 5
    assert f"shard {str(shard_dir / 'train-000000.tar')!r}: Input/output error; copy it again" in found[0]


def test_members_that_the_index_does_not_know_are_found(copy: Path, reseal: Callable[..., None]) -> None:
    """The tar's trailing blocks are overwritten with one more member; all sums are made to fit."""
    tar = copy / "val-000001.tar"
    subprocess.run(
        ["tar", "--append", "-f", tar, "-C", ROOT, "README.md"], check=True, stdout=subprocess.DEVNULL
    )
    reseal(copy)
    (defect,) = find_defects(copy)
    assert "holds 'README.md', which the index does not know" in defect


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("label", "val-000000.tar', key '000': its labels are not those of the index"),
        ("size", "key '003': image or mask is (40, 56), the index has (41, 56) (height, width)"),
    ],
)
def test_what_the_index_says_otherwise_is_found(
    wrong: str, message: str, copy: Path, reseal: Callable[..., None]
) -> None:
    records, labels, keys = (part.copy() for part in parse_index(np.fromfile(copy / "val.idx", np.uint8)))
    content = json.loads((copy / "dataset.json").read_text())
    if wrong == "label":
        labels["pixels"][0] -= 1
        content["splits"]["val"]["class_pixels"][labels["label"][0]] -= 1
    else:
        records["height"][3] += 1
    (copy / "val.idx").unlink()
    (copy / "val.idx").write_bytes(pack_index(records, labels, keys.tobytes()))
    reseal(copy, content)
    (defect,) = find_defects(copy)
    assert message in defect


def test_shards_on_a_server_are_read_again_too(copy: Path) -> None:
    with serving(copy) as server:
        assert find_defects(server.url) == []
        split = ShardSet.open(copy).split("train")
        flip(copy / "train-000002.tar", int(split.records["image_offset"][17]) + 5)
        found = find_defects(server.url)
    assert [f"{server.url}/train-000002.tar" in line for line in found] == [True, True]


def test_the_command_says_whole_or_names_the_defects_and_fails(
    copy: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = command("verify", f"shards={copy}", "workers=1")
    assert "31 samples" in line
    assert "no defect" in line
    flip(copy / "train-000000.tar", int(ShardSet.open(copy).split("train").records["image_offset"][0]) + 9)
    with pytest.raises(DataError, match=r"2 defects in .*; copy or write these files again"):
        command("verify", f"shards={copy}", "workers=1")
    assert capsys.readouterr().out.count("is damaged") == 2  # the sum of the tar, and the image
