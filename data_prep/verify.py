"""Read shards again, every byte, and name each defect.

    python data_prep/verify.py shards=<dir or URL>

shards defaults to data.shards of conf/data/<name>.yaml. Exit code 0: the shards
are what was written.
"""

import time
from dataclasses import dataclass, field

from segformer.data.shards.format import ShardSet
from segformer.data.shards.verify import find_defects
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import ConfigError, DataError, say
from segformer.training.config import cli

SHOWN = 20  # defects that are printed


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """Which shards are read."""

    data: DatasetConfig = field(default_factory=DatasetConfig)
    """The data set; choose a file of conf/data with data=<name>."""
    shards: str = ""
    """Folder or URL of the shards; empty = data.shards."""
    workers: int = -1
    """Processes; -1 = one per core."""


def verify(cfg: VerifyConfig) -> None:
    """Print the defects, or what was found whole; DataError when there is a defect."""
    shards = cfg.shards or cfg.data.shards
    if not shards:
        raise ConfigError("no shards; give shards=<folder or URL>")
    began = time.monotonic()
    defects = find_defects(shards, workers=cfg.workers)
    if len(defects) == 1:
        raise DataError(defects[0])
    for defect in defects[:SHOWN]:
        say(defect)
    if defects:
        shown = f"the first {SHOWN} are above" if len(defects) > SHOWN else "see above"
        raise DataError(f"{len(defects)} defects in {shards!r} ({shown}); copy or write these files again")
    seconds = time.monotonic() - began
    content = ShardSet.open(shards, verify=False)
    entries = content.content["splits"].values()
    samples = sum(entry["samples"] for entry in entries)
    size = sum(shard["bytes"] for entry in entries for shard in entry["shards"])
    print(f"{shards}: {samples} samples in {size / 1e6:.0f} MB, no defect ({seconds:.0f} s)")


if __name__ == "__main__":
    cli(VerifyConfig, "verify", verify)
