"""Re-read shards completely: sha256 of every tar, its members against the index, every crc32 and image size.

Opening a ShardSet looks at the indices only and reading at the samples used; this is the check after copying
or downloading shards. Tars are listed, never extracted, and hold regular files only.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from segformer.data.dataset import image_header
from segformer.data.shards import ShardReader, ShardSet, Split
from segformer.errors import DataError


def member_pairs(tar: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """(image, mask) members of a tar, in order; only headers are read."""
    with tarfile.open(tar, "r:") as archive:
        members = iter(archive)
        for image in members:
            mask = next(members, None)
            if mask is None or not (image.isreg() and mask.isreg()):
                raise DataError(
                    f"{str(tar)!r} holds an unpaired or special member at {image.name!r}; write it again"
                )
            yield image, mask


def verify(path: str | Path) -> None:
    """DataError unless every byte of the shards below `path` is what was written."""
    for split in ShardSet.open(path).splits.values():
        reader = ShardReader(split)
        keys = split.keys
        for number in range(len(split.files)):
            _verify_tar(split, number, keys)
            for sample_id in range(int(split.first_ids[number]), int(split.first_ids[number + 1])):
                try:
                    size = image_header(reader.read(sample_id).image)[1:]
                except ValueError as error:
                    raise DataError(
                        f"shard {split.describe(sample_id)}: {error}; shard the data again"
                    ) from error
                if size != (split.heights[sample_id], split.widths[sample_id]):
                    raise DataError(f"shard {split.describe(sample_id)}: the index has another image size")
        reader.close()


def _verify_tar(split: Split, number: int, keys: list[str]) -> None:
    path = split.root / split.files[number]
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != split.sha256[number]:
            raise DataError(
                f"shard {str(path)!r} is damaged (sha256 differs from dataset.json); copy it again"
            )
    sample_id, end = int(split.first_ids[number]), int(split.first_ids[number + 1])
    for image, mask in member_pairs(path):
        found = (image.offset_data, image.size, mask.offset_data, mask.size)
        if (
            sample_id == end
            or tuple(split.records[sample_id])[:4] != found
            or mask.name != f"{keys[sample_id]}.png"
        ):
            raise DataError(
                f"shard {str(path)!r}: member {mask.name!r} is not where the index says; shard the data again"
            )
        sample_id += 1
    if sample_id != end:
        raise DataError(f"shard {str(path)!r} ends after sample {sample_id} of {end}; shard the data again")
