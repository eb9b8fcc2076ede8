"""Logits of overlapping tiles -> logits of the whole images, in the memory of one row of tiles.

    tile (rows, columns)   total[:, rows, columns] += logits      count[rows, columns] += 1
    rows that no further tile of the image touches leave as total / count, and make room

These are the sums of sliding windows (inference_mode.py), in their order: what leaves is equal to them, bit
by bit where the network's logits are.

Held: K x height of a tile x width of the image floats, of one image at a time.

Shapes: B tiles, K classes, H W image, h w tile.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from segformer.data.shards.tiling import TiledSplit

Part = tuple[Tensor, Tensor, list[int]]

ROWS = 64  # that leave at a time, no wider than a tile: what counts them takes the square of the width


class Stitching:
    """The images of a tiled split, from their tiles in order. An image must be complete before the next."""

    def __init__(self, split: TiledSplit) -> None:
        self._split = split
        self._image = -1
        self._places: list[tuple[slice, slice]] = []
        self._top = 0  # row of the image that the first row held is
        self._held: list[Tensor] = []  # total (K, h, W), count (h, W), target (h, W)

    def add(self, ids: Iterable[int], logits: Tensor, targets: Tensor) -> Iterator[Part]:
        """Logits (1, K, a, b), target (1, a, b) and image of parts of the rows that tiles complete.

        logits: (B, K, h, w) of the tiles' own size. targets: (B, h, w).
        """
        for sample_id, own, target in zip(ids, logits, targets, strict=True):
            if self._split.image_of(sample_id) != self._image:
                self._begin(sample_id, own, target)
            image = self._split.images[self._image]
            rows, columns = self._places[sample_id - image.first]
            yield from self._complete(rows.start)
            total, count, labels = self._held
            held = slice(rows.start - self._top, rows.stop - self._top)
            total[:, held, columns] += own
            count[held, columns] += 1
            labels[held, columns] = target
            if sample_id + 1 == image.first + len(self._places):
                yield from self._complete(image.height)
                self._held = []

    def _begin(self, sample_id: int, logits: Tensor, target: Tensor) -> None:
        self._image, self._top = self._split.image_of(sample_id), 0
        image = self._split.images[self._image]
        self._places = self._split.tiling.windows((image.height, image.width))
        size = (target.shape[0], image.width)
        self._held = []  # before the next one is made
        self._held = [logits.new_zeros(len(logits), *size), logits.new_zeros(size), target.new_zeros(size)]

    def _complete(self, top: int) -> Iterator[Part]:
        """The rows above `top`, which becomes the first row held."""
        done, (total, count, labels) = top - self._top, self._held
        wide = self._split.tiling.tile[1]
        for first in range(0, done, ROWS):
            rows = slice(first, min(first + ROWS, done))
            for left in range(0, total.shape[2], wide):
                columns = slice(left, left + wide)
                logits = total[None, :, rows, columns].div(count[rows, columns])
                yield logits, labels[None, rows, columns], [self._image]
        for held in self._held if done else ():
            for first in range(0, held.shape[-2], done):  # no part lies over its new place
                part = held[..., first + done : first + 2 * done, :]
                held[..., first : first + part.shape[-2], :] = part
            held[..., max(held.shape[-2] - done, 0) :, :] = 0
        self._top = top
