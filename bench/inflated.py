"""A valid set of shards with millions of samples that occupies the disk of a few hundred.

Every tar is a hard link to the one tar of a small set, and the index repeats that tar's records under new
keys. To everything that opens and reads it, it is a set of that size."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.index import INDEX, LABELS, index_header
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig


def inflate(folder: Path, out: Path, samples: int, classes: int) -> ShardSet:
    """Shard the training split of `folder` as one tar, and repeat it until there are `samples` or more."""
    names = [str(k) for k in range(classes)]
    data = DatasetConfig(name="inflated", classes=names, splits=["train"], allow_unseen=["*"])
    small = out.with_name(f"{out.name}-small")
    write_shards(data, folder, small, seed=0, samples_per_shard=10**6, workers=1)
    shards = ShardSet.open(small)
    split = shards.split("train")
    copies = -(-samples // split.num_samples)
    out.mkdir()
    for copy in range(copies):
        os.link(small / split.files[0], out / f"train-{copy:06d}.tar")
    index = _repeated(small / "train.idx", split.num_samples, copies)
    (out / "train.idx").write_bytes(index)
    content = json.loads((small / "dataset.json").read_text())
    entry = content["splits"]["train"]
    shard = entry["shards"][0]
    entry["shards"] = [{**shard, "file": f"train-{copy:06d}.tar"} for copy in range(copies)]
    entry["samples"] *= copies
    entry["ignored_pixels"] *= copies
    for key in ("class_pixels", "class_images"):
        entry[key] = [copies * number for number in entry[key]]
    entry["raw_ids"] = {raw: copies * pixels for raw, pixels in entry["raw_ids"].items()}
    entry["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    content["digest"] = content_digest(content)
    (out / "dataset.json").write_text(json.dumps(content))
    return ShardSet.open(out)


def _repeated(path: Path, samples: int, copies: int) -> bytes:
    """The index with every record and its labels `copies` times, and keys that number the samples."""
    head, _, body = path.read_bytes().partition(b"\n")
    count = json.loads(head)["labels"]
    records = np.tile(np.frombuffer(body[: samples * INDEX.itemsize], INDEX), copies)
    labels = body[samples * INDEX.itemsize :][: count * LABELS.itemsize] * copies
    records["labels_end"] += np.repeat(np.arange(copies) * count, samples)
    width = len(str(len(records)))
    keys = "\n".join(f"{number:0{width}d}" for number in range(len(records))).encode()
    records["key_end"] = np.arange(1, len(records) + 1) * (width + 1) - 1
    return index_header(len(records), count * copies, len(keys)) + records.tobytes() + labels + keys
