"""Write a data set as shards.

    python data_prep/shard.py data=folder root=photos output=data/mine \\
        'data.classes=[background,leaf]'
    python data_prep/shard.py data=sample root=<dir> output=<dir>

root and output default to data.root and data.shards of conf/data/<name>.yaml.
A run that was ended, in any way, is continued by the same command.
"""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segformer.data.formats.table import resolved
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import find_alike, find_turned, write_shards
from segformer.data.shards.tiling import Tiling
from segformer.data.sources.content import Histogram, Labels, judge_content, no_classes, override, turned_text
from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sources.division import is_training
from segformer.data.sources.folder import left_out_text
from segformer.data.sources.listing import find_samples
from segformer.data.sources.masks import mask_ids
from segformer.errors import ConfigError, DataError, listed, printable, say
from segformer.training.config import cli


@dataclass(kw_only=True, slots=True)
class ShardConfig:
    """Which data set becomes shards, and how."""

    data: DatasetConfig = field(default_factory=DatasetConfig)
    """The data set; choose a file of conf/data with data=<name>."""
    root: str = ""
    """Source folder; empty = data.root."""
    output: str = ""
    """Folder for the shards; empty = data.shards."""
    seed: int = 0
    """Seed of the shuffle of the training split."""
    samples_per_shard: int = 256
    """Samples in one tar."""
    long_side: int = 0
    """Reduce images whose longer side has more pixels than this, and their masks; 0 = none."""
    quality: int = 0
    """Write every image as JPEG of this quality, 1 to 100; 0 = keep the bytes of its file."""
    tile: list[int] = field(default_factory=list)
    """[height,width]: larger images are cut into tiles of this size; empty = none, and they are refused."""
    tile_overlap: int | None = None
    """Pixels that neighboring tiles share; null = a quarter of a side."""
    tile_labeled: float = 0.0
    """Training tiles with a smaller share of labeled (not ignored) pixels are left out; 0 = none."""
    workers: int = -1
    """Processes; -1 = one per core. The shards do not depend on it."""
    part: str = ""
    """3/16 makes every 16th shard, from the fourth on, and nothing else: for many nodes at a time. The same
    command without it joins them, and makes what is missing."""


def shard(cfg: ShardConfig) -> None:
    """Write the shards, print the label map with what was seen of it, and what the shards hold."""
    root, out = cfg.root or cfg.data.root, cfg.output or cfg.data.shards
    if not root:
        raise ConfigError("no source folder; give root=<folder of the data set>")
    if not out:
        raise ConfigError("no output folder; give output=<folder for the shards>")
    part = _part(cfg.part) if cfg.part else None
    tiling = Tiling.of(cfg.tile, cfg.tile_overlap, cfg.tile_labeled)
    if part and tiling:
        raise ConfigError(f"part={cfg.part}: a shard holds tiles of all images, cut before; leave it out")
    data = resolved(cfg.data, Path(root))
    if data.format:
        own = data.classes and not cfg.data.classes
        names = f", with {override('data.classes', data.classes)}" if own else ""
        say(f"labels: {override('data.format', data.format)}{names}")
    if data.task == "segmentation":
        if not data.classes:
            raise ConfigError(no_classes(first_ids(data, Path(root))))
        label_table(data)  # refuses what it cannot map before anything is read
    write_shards(
        data,
        Path(root),
        Path(out),
        seed=cfg.seed,
        samples_per_shard=cfg.samples_per_shard,
        workers=cfg.workers,
        long_side=cfg.long_side,
        quality=cfg.quality,
        tiling=tiling,
        part=part,
    )
    if part is not None:
        print(f"part {cfg.part} of {out} is there")
        return
    shards = ShardSet.open(out)
    if shards.task == "segmentation":
        print(label_map_text(data, raw_pixels(shards)))
    print(split_text(shards))
    splits = {name: Histogram.of(entry) for name, entry in shards.content["splits"].items()}
    for finding in judge_content(Labels.of(shards.content, data), splits, [*filter(is_training, splits)]):
        say(f"WARNING: {finding.text}")
    for text in find_alike(Path(out)):
        say(f"WARNING: {text}")
    if (turned := find_turned(Path(out))) is not None:
        total = sum(split.num_samples for split in shards.splits.values())
        print("WARNING: " + turned_text(shards.task, turned[0], total, *turned[1:]))
    print(f"shards: {out}  (digest {shards.digest[:12]})")


def first_ids(cfg: DatasetConfig, root: Path, count: int = 16) -> set[int]:
    """The raw ids in a few masks of the first split, as far as they can be read."""
    found: set[int] = set()
    samples, defects, _ = find_samples(cfg, root, cfg.splits[0])
    if not samples and defects:
        raise defects[0]
    for sample in samples[:: -(-len(samples) // count) or 1]:
        with suppress(DataError):
            found.update(np.unique(mask_ids(cfg, Path(sample.mask_file or ""))).tolist())
    return found


def _part(text: str) -> tuple[int, int]:
    """3/16 -> (3, 16)."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if index >= count:
        raise ConfigError(f"part={text!r}; use <index>/<count> with 0 <= index < count, such as 3/16")
    return index, count


def raw_pixels(shards: ShardSet) -> Counter[int]:
    """Raw id -> pixels over all splits, before the label map."""
    seen: Counter[int] = Counter()
    for split in shards.content["splits"].values():
        seen.update({int(raw): pixels for raw, pixels in split["raw_ids"].items()})
    return seen


def label_map_text(data: DatasetConfig, seen: Counter[int]) -> str:
    """Raw id -> train id, class and share of the pixels, one line each; ignored ids on one line."""
    table = label_table(data)
    total = max(1, seen.total())

    def share(raw: int) -> str:
        return f"{100 * seen[raw] / total:.2f} %" if seen[raw] else "never seen"

    raw_ids = [int(raw) for raw in np.flatnonzero((table >= 0) & (table != IGNORE_INDEX))]
    width = max(len(name) for name in data.classes)
    lines = ["label map (id in the masks -> train id, share of all pixels):"]
    for raw in raw_ids:
        lines.append(f"{raw:>6} -> {table[raw]:>3} {data.classes[table[raw]]:<{width}}  {share(raw):>10}")
    ignored = [int(raw) for raw in np.flatnonzero(table == IGNORE_INDEX)]
    if ignored := [raw for raw in ignored if seen[raw] or raw in data.label_map]:
        lines.append("ignored (-> 255): " + ", ".join(f"{raw} ({share(raw)})" for raw in ignored))
    return "\n".join(map(printable, lines))


def split_text(shards: ShardSet) -> str:
    """Images and shards per split, and what each class has of the labelled pixels (or of the images)."""
    lines = []
    for name, split in shards.splits.items():
        entry = shards.content["splits"][name]
        left_out = f" ({entry['dropped']} left out)" if entry["dropped"] else ""
        lines.append(f"{name}: {split.extent} in {len(split.files)} shards{left_out}")
        for folder, kinds in entry.get("left_out", {}).items():
            lines.append(f"  not used of {folder}: {left_out_text(kinds)}")
        lines += class_images(shards, name) if shards.task == "classification" else class_shares(shards, name)
    return "\n".join(map(printable, lines))


def class_shares(shards: ShardSet, split: str) -> list[str]:
    """Share of the labelled pixels and number of images, a line per class."""
    width = max(len(name) for name in shards.classes)
    entry = shards.content["splits"][split]
    pixels, images = np.array(entry["class_pixels"], np.float64), entry["class_images"]
    return [
        f"  {label:<{width}}  {100 * count / pixels.sum():6.2f} %  in {number} images"
        if count
        else f"  {label:<{width}}  never seen"
        for label, count, number in zip(shards.classes, pixels, images, strict=True)
    ]


def class_images(shards: ShardSet, split: str) -> list[str]:
    """Fewest and most images of a class, and the classes without any."""
    images = shards.content["splits"][split]["class_images"]
    lines = [f"  {min(images)} to {max(images)} images in each of {len(images)} classes"]
    missing = [name for name, count in zip(shards.classes, images, strict=True) if not count]
    if missing:
        lines.append(f"  never seen: {listed(missing, 20)}")
    return lines


if __name__ == "__main__":
    cli(ShardConfig, "shard", shard)
