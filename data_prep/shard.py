"""Write a data set as shards: python data_prep/shard.py data=<name> root=<dir> out=<dir>

root and out default to data.root and data.shards of conf/data/<name>.yaml.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segformer.config import cli
from segformer.data.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.data.sharding import write_shards
from segformer.data.shards import ShardSet
from segformer.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ShardConfig:
    """Which data set becomes shards, and how."""

    data: DatasetConfig = field(default_factory=DatasetConfig)
    """The data set; choose a file of conf/data with data=<name>."""
    root: str = ""
    """Source folder; empty = data.root."""
    out: str = ""
    """Folder for the shards; empty = data.shards."""
    seed: int = 0
    """Seed of the shuffle of the training split."""
    samples_per_shard: int = 256
    """Samples in one tar."""
    workers: int = -1
    """Processes; -1 = one per core. The shards do not depend on it."""


def shard(cfg: ShardConfig) -> None:
    """Print the label map, write the shards, print what they hold."""
    root, out = cfg.root or cfg.data.root, cfg.out or cfg.data.shards
    if not root:
        raise ConfigError("no source folder; give root=<folder of the data set>")
    if not out:
        raise ConfigError("no output folder; give out=<folder for the shards>")
    print(label_map_text(cfg.data))
    write_shards(
        cfg.data,
        Path(root),
        Path(out),
        seed=cfg.seed,
        samples_per_shard=cfg.samples_per_shard,
        workers=cfg.workers,
    )
    shards = ShardSet.open(out)
    print(split_text(shards))
    print(f"shards: {out}  (digest {shards.digest[:12]})")


def label_map_text(data: DatasetConfig) -> str:
    """Raw id -> train id and class, one line each; neighbouring ignored ids on one line."""
    table = label_table(data)
    raw = [int(value) for value in np.flatnonzero((table >= 0) & (table != IGNORE_INDEX))]
    lines = [f"{value:>6} -> {table[value]:>3} {data.classes[table[value]]}" for value in raw]
    ignored = ", ".join(str(value) for value in np.flatnonzero(table == IGNORE_INDEX))
    return "\n".join(["label map (id in the masks -> train id):", *lines, f"ignored (-> 255): {ignored}"])


def split_text(shards: ShardSet) -> str:
    """Images and shards per split, and each class's share of the labelled pixels."""
    lines = []
    width = max(len(name) for name in shards.classes)
    for name, split in shards.splits.items():
        lines.append(f"{name}: {split.num_samples} images in {len(split.files)} shards")
        pixels = np.array(shards.stats[name], np.float64)
        for label, count in zip(shards.classes, pixels, strict=True):
            share = f"{100 * count / pixels.sum():6.2f} %" if count else "never seen"
            lines.append(f"  {label:<{width}}  {share}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(ShardConfig, "shard", shard)
