"""1,000 injected corruptions: each is detected, and none gives a silently short or different epoch.

A case damages one small set of shards, opens it and reads every sample, as training does. What neither
opening nor reading refuses must give exactly the samples that were written, and `find_defects` must name it.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.reader import RawSample, ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.verify import find_defects
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import DataError

BLOCK = 512


class Victim:
    """A set of shards, what was written in it, and a way to break and to mend it.

    other: the same data as shards of another seed: the same names, everything consistent in itself.
    """

    def __init__(self, folder: Path, other: Path, rng: np.random.Generator) -> None:
        self.folder, self.other, self.rng = folder, other, rng
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}
        self.samples = epoch(folder)
        self.splits = ShardSet.open(folder).splits
        self.touched: set[str] = set()

    def write(self, name: str, data: bytes | None) -> None:
        """A new file in the place of an old one, or none."""
        (self.folder / name).unlink(missing_ok=True)
        if data is not None:
            (self.folder / name).write_bytes(data)
        self.touched.add(name)

    def mend(self) -> None:
        for name in self.touched:
            self.write(name, self.files[name])
        self.touched.clear()

    def pick(self, end: str) -> str:
        """A random file whose name has this end."""
        return str(self.rng.choice(sorted(name for name in self.files if name.endswith(end))))

    def flip(self, name: str, start: int = 0, end: int | None = None) -> None:
        """Change one bit of bytes start to end."""
        data = bytearray(self.files[name])
        place = range(len(data))[start:end]
        data[int(self.rng.choice(place))] ^= 1 << int(self.rng.integers(8))
        self.write(name, bytes(data))

    def member(self, kind: str = "") -> tuple[str, int, int]:
        """(tar, begin, end) of a random image or target, of either without a kind."""
        kind = kind or str(self.rng.choice(["image", "target"]))
        split = self.splits[str(self.rng.choice(sorted(self.splits)))]
        sample_id = int(self.rng.integers(split.num_samples))
        record = split.records[sample_id]
        begin = int(record[f"{kind}_offset"])
        return split.files[split.shard_of(sample_id)], begin, begin + int(record[f"{kind}_size"])


def epoch(folder: Path) -> dict[str, list[RawSample]]:
    """Every sample of every split, as training reads them."""
    found = {}
    for name, split in ShardSet.open(folder).splits.items():
        reader = ShardReader(split)
        found[name] = [reader.read(sample_id) for sample_id in range(split.num_samples)]
    return found


def flipped_header(victim: Victim) -> None:
    name, begin, _ = victim.member()
    victim.flip(name, begin - BLOCK, begin)


def cut_between_members(victim: Victim) -> None:
    """Before a header, or behind the padding of a member: what is left is a good tar for most readers."""
    name, begin, _ = victim.member()
    victim.write(name, victim.files[name][: begin - BLOCK])


def cut_and_padded(victim: Victim) -> None:
    """The right length, but zeros from a member on: a file whose blocks never reached the disk."""
    name, begin, _ = victim.member()
    data = victim.files[name]
    victim.write(name, data[: begin - BLOCK] + bytes(len(data) - begin + BLOCK))


def tar_of_another_set(victim: Victim) -> None:
    """A good tar with the same names; its samples are others, or lie elsewhere."""
    name = str(victim.rng.choice(sorted(path.name for path in victim.other.glob("train-*.tar"))))
    victim.write(name, (victim.other / name).read_bytes())


def index_of_another_set(victim: Victim) -> None:
    """Consistent in itself; half of the time dataset.json has its sum: only the crc is left."""
    data = (victim.other / "train.idx").read_bytes()
    victim.write("train.idx", data)
    if victim.rng.random() < 0.5:
        theirs = json.loads((victim.other / "dataset.json").read_text())["splits"]["train"]
        content = json.loads(victim.files["dataset.json"])
        content["splits"]["train"]["index"] = theirs["index"]
        content["digest"] = content_digest(content)
        victim.write("dataset.json", json.dumps(content).encode())


def cut_file(victim: Victim, name: str) -> None:
    data = victim.files[name]
    victim.write(name, data[: int(victim.rng.integers(len(data.rstrip(b"\n"))))])


def edited_description(victim: Victim) -> None:
    """Shards left out, doubled, in another order, or other counts; half of the time with a new digest."""
    content = json.loads(victim.files["dataset.json"])
    shards = content["splits"]["train"]["shards"]
    kind = int(victim.rng.integers(5))
    if kind == 0:
        del shards[int(victim.rng.integers(len(shards)))]
    elif kind == 1:
        shards.append(shards[0])
    elif kind == 2:
        shards[0], shards[1] = shards[1], shards[0]
    elif kind == 3:
        shards[-1]["samples"] -= 1
    else:
        content["splits"]["train"]["class_pixels"][0] += 1
    if victim.rng.random() < 0.5:
        content["digest"] = content_digest(content)
    victim.write("dataset.json", json.dumps(content).encode())


# Corruption -> how many cases, and how one is made.
CASES: dict[str, tuple[int, Callable[[Victim], None]]] = {
    "flipped image": (200, lambda victim: victim.flip(*victim.member("image"))),
    "flipped target": (150, lambda victim: victim.flip(*victim.member("target"))),
    "flipped header": (90, flipped_header),
    "flipped padding": (20, lambda victim: victim.flip(victim.pick(".tar"), -2 * BLOCK)),
    "cut tar": (140, lambda victim: cut_file(victim, victim.pick(".tar"))),
    "cut between members": (50, cut_between_members),
    "cut and padded": (30, cut_and_padded),
    "tar of another set": (150, tar_of_another_set),
    "missing file": (20, lambda victim: victim.write(victim.pick(""), None)),
    "flipped index": (60, lambda victim: victim.flip(victim.pick(".idx"))),
    "cut index": (20, lambda victim: cut_file(victim, victim.pick(".idx"))),
    "index of another set": (20, index_of_another_set),
    "flipped description": (20, lambda victim: victim.flip("dataset.json")),
    "cut description": (10, lambda victim: cut_file(victim, "dataset.json")),
    "edited description": (20, edited_description),
}


@pytest.fixture(scope="module")
def victims(
    make_folder: Callable[..., Path],
    make_classes: Callable[..., Path],
    config: DatasetConfig,
    class_config: DatasetConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Victim]:
    """JPEG images with masks, PNG images with masks, and JPEG images with class ids."""
    base = tmp_path_factory.mktemp("victims")
    counts = {"train": 11, "val": 3}
    sources = [
        (config, make_folder(base / "photos", counts)),
        (replace(config, image_suffix=".png"), make_folder(base / "drawings", counts, suffix=".png")),
        (class_config, make_classes(base / "animals", counts)),
    ]
    found = []
    for number, (cfg, root) in enumerate(sources):
        out, other = base / f"shards-{number}", base / f"other-{number}"
        write_shards(cfg, root, out, seed=1, samples_per_shard=4, workers=1)
        write_shards(cfg, root, other, seed=2, samples_per_shard=4, workers=1)
        found.append(Victim(out, other, np.random.default_rng(number)))
    return found


def detected_by(victim: Victim) -> str:
    """open, read or verify; "nothing" or "a different epoch" where the corruption gets through."""
    try:
        ShardSet.open(victim.folder)
    except DataError:
        return "open"
    try:
        samples = epoch(victim.folder)
    except DataError:
        return "read"
    if samples != victim.samples:
        return "a different epoch"
    return "verify" if find_defects(victim.folder) else "nothing"


def test_a_thousand_corruptions_are_detected_and_none_changes_an_epoch(victims: list[Victim]) -> None:
    assert sum(count for count, _ in CASES.values()) == 1000
    ways: dict[str, Counter[str]] = {name: Counter() for name in CASES}
    for name, (count, damage) in CASES.items():
        for number in range(count):
            victim = victims[number % len(victims)]
            damage(victim)
            ways[name][detected_by(victim)] += 1
            victim.mend()
    assert all(set(way) <= {"open", "read", "verify"} for way in ways.values()), ways
    only_verify = {name for name, way in ways.items() if way["verify"]}
    assert only_verify <= {"flipped header", "flipped padding"}, ways  # bytes that training never reads
    assert all(epoch(victim.folder) == victim.samples for victim in victims)
