"""A training sample out of several images: mosaic, and copy-paste of rare classes.

    mosaic      the crop is split at a point drawn from its middle half; each of the four parts is a crop of
                its own, scaled up where it takes that to fill the part. The three partners come from the
                same shard, whose samples were shuffled when it was written, so that reads stay local.
    copy-paste  a class is drawn with weight 1 / (its pixels in the split), then an image that holds it, then
                a crop of that image which holds it. The pixels of this class, and only they, replace image
                and mask at the same place; padding and ignored pixels of the sample stay as they are.

Each draws which samples it takes; the caller (samples.py) reads them. Shapes: H W image, h w crop.
"""

from dataclasses import dataclass

import numpy as np

from segformer.data.loading.crop import RandomCrop, cut, draw_index
from segformer.data.shards.format import Split
from segformer.data.sources.dataset import IGNORE_INDEX

Picture = tuple[np.ndarray, np.ndarray]
"""image (H, W, C) and mask uint8 (H, W)."""


@dataclass(frozen=True, slots=True)
class Mosaic:
    """The point where the four parts meet, pixels of the crop, and the samples that fill them row by row."""

    row: int
    column: int
    sample_ids: list[int]

    def compose(self, pictures: list[Picture], crop: RandomCrop, rng: np.random.Generator) -> Picture:
        """The mosaic of the decoded samples, of the size of the crop; nothing of it is padding."""
        height, width = crop.size
        first, mask = pictures[0][0], np.empty((height, width), np.uint8)
        image = np.empty((height, width, first.shape[2]), first.dtype)
        parts = [
            np.s_[top:bottom, left:right]
            for top, bottom in ((0, self.row), (self.row, height))
            for left, right in ((0, self.column), (self.column, width))
        ]
        for part, picture in zip(parts, pictures, strict=True):
            if mask[part].size:  # a crop of one row or column has no point inside
                placement = crop.place(picture[1], rng, mask[part].shape, fill=True)
                image[part], mask[part] = cut(*picture, placement)
        return image, mask


def draw_mosaic(split: Split, sample_id: int, crop: RandomCrop, rng: np.random.Generator) -> Mosaic:
    """A mosaic of a sample and three others of its shard, drawn independently; itself where it is alone."""
    row, column = (int(rng.integers(side // 4, side - side // 4 + 1)) for side in crop.size)
    shard = split.shard_of(sample_id)
    first, size = int(split.first_ids[shard]), split.shard_sizes[shard]
    steps = rng.integers(1, size, 3) if size > 1 else np.zeros(3, np.int64)
    sources = [first + (sample_id - first + int(step)) % size for step in steps]
    sources.insert(int(rng.integers(4)), sample_id)
    return Mosaic(row, column, sources)


def draw_donor(split: Split, crop: RandomCrop, rng: np.random.Generator) -> tuple[int, int] | None:
    """(class, a sample that holds it) to paste from; None where the class is in no sample."""
    label = draw_index(crop.weights, rng)
    holders = split.samples_with(label)
    return (label, int(holders[rng.integers(len(holders))])) if len(holders) else None


def paste(
    label: int,
    donor: Picture,
    onto: Picture,
    valid: tuple[int, int],
    crop: RandomCrop,
    rng: np.random.Generator,
) -> None:
    """Paste the pixels of one class of `donor` into the valid part of a crop, in place."""
    pasted, labels = cut(*donor, crop.place(donor[1], rng, valid, label=label))
    image, mask = (pixels[: labels.shape[0], : labels.shape[1]] for pixels in onto)
    chosen = (labels == label) & (mask != IGNORE_INDEX)
    mask[chosen] = label
    image[chosen] = pasted[chosen]
