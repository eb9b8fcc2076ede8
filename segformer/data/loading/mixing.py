"""One training sample out of one or several images: geometry, mosaic, copy-paste of rare classes, blur.

    mosaic      the crop is split at a point drawn from its middle half; each of the four parts is a crop of
                its own, scaled up where it takes that to fill the part. The three partners come from the
                same shard, whose samples were shuffled when it was written, so that reads stay local.
    copy-paste  a class is drawn with weight 1 / (its pixels in the split), then an image that holds it, then
                a crop of that image which holds it. The pixels of this class, and only they, replace image
                and mask at the same place; padding and ignored pixels of the sample stay as they are.

What comes out is a function of the configuration, the split, the sample id and the generator alone: partners
are drawn from the generator, and nothing is kept between calls.

Shapes: H W image, h w crop.
"""

from collections.abc import Callable

import numpy as np

from segformer.data.loading.placement import resample
from segformer.data.loading.transforms import AugmentConfig, TrainGeometry, blur, draw_index, rarity
from segformer.data.shards.format import Split
from segformer.data.sources.dataset import IGNORE_INDEX

Picture = tuple[np.ndarray, np.ndarray]
"""image uint8 (H, W, 3) and mask uint8 (H, W)."""


class TrainSample:
    """Everything that happens to a training sample before it is a crop; the device does the rest."""

    def __init__(self, cfg: AugmentConfig, split: Split) -> None:
        self.cfg = cfg
        self.split = split
        self.geometry = TrainGeometry(cfg, split.class_pixels)
        self.weights = rarity(split.class_pixels)

    def __call__(
        self, sample_id: int, load: Callable[[int], Picture], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """The crop: image uint8 (h, w, 3), mask uint8 (h, w), its valid (height, width).

        load: sample id -> image uint8 (H, W, 3), mask uint8 (H, W); neither is written to.
        """
        if self.cfg.mosaic and rng.random() < self.cfg.mosaic:
            image, mask = self._mosaic(sample_id, load, rng)
            valid = self.geometry.crop
        else:
            image, mask, valid = self.geometry(*load(sample_id), rng)
        if self.cfg.copy_paste and rng.random() < self.cfg.copy_paste and self.weights.any():
            self._paste(image, mask, valid, load, rng)
        blur(image, valid, self.cfg, rng)
        return image, mask, valid

    def _mosaic(self, sample_id: int, load: Callable[[int], Picture], rng: np.random.Generator) -> Picture:
        height, width = self.geometry.crop
        row, column = _split_point(height, rng), _split_point(width, rng)
        parts = [
            np.s_[top:bottom, left:right]
            for top, bottom in ((0, row), (row, height))
            for left, right in ((0, column), (column, width))
        ]
        sources = self._neighbours(sample_id, rng)
        sources.insert(int(rng.integers(4)), sample_id)
        image, mask = np.empty((height, width, 3), np.uint8), np.empty((height, width), np.uint8)
        for part, source in zip(parts, sources, strict=True):
            if not mask[part].size:  # a crop of one row or column has no point inside
                continue
            picture = load(source)
            placement = self.geometry.place(picture[1], rng, mask[part].shape, fill=True)
            image[part], mask[part] = resample(*picture, placement)
        return image, mask

    def _neighbours(self, sample_id: int, rng: np.random.Generator) -> list[int]:
        """Three other samples of the shard, drawn independently; the sample itself where it is alone."""
        shard = self.split.shard_of(sample_id)
        first, size = int(self.split.first_ids[shard]), int(self.split.shard_sizes[shard])
        if size == 1:
            return [sample_id] * 3
        return [first + (sample_id - first + int(step)) % size for step in rng.integers(1, size, 3)]

    def _paste(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        valid: tuple[int, int],
        load: Callable[[int], Picture],
        rng: np.random.Generator,
    ) -> None:
        """Paste one class of another image into the crop, in place."""
        label = draw_index(self.weights, rng)
        holders = self.split.samples_with(label)
        if not len(holders):
            return
        picture = load(int(holders[rng.integers(len(holders))]))
        placement = self.geometry.place(picture[1], rng, valid, label=label)
        pasted, labels = resample(*picture, placement)
        height, width = labels.shape
        under = mask[:height, :width]
        chosen = (labels == label) & (under != IGNORE_INDEX)
        under[chosen] = label
        image[:height, :width][chosen] = pasted[chosen]


def _split_point(length: int, rng: np.random.Generator) -> int:
    """Where the parts of a mosaic meet along one side: in the middle half, pixels."""
    return int(rng.integers(length // 4, length - length // 4 + 1))
