"""Images of any size in overlapping tiles whose logits are blended, rows by rows.

    tiles      of `tile` pixels a side from the top left, the last ones moved inwards to end at the border
    blended    logits, as sliding windows are, at the quarter of the image's resolution that the network has:
               both sum and enlargement are linear, so that a pixel is enlarged once, not by every tile
    weight     1 inside, falling linearly to the edges over the overlap; that of rows times that of columns,
               each over its sum of all tiles
    read out   bilinearly enlarged by 4, then as for a whole image: argmax, confidence, ...

Sides that are no multiple of 4 are continued with their last row and column. Held, of K classes: the rows in
which two rows of tiles overlap, K x (overlap / 4) x (width / 4) floats, a tile and the rows of a tile of the
image; what no further tile touches is read out at once.

Shapes: K classes, H W image, h w tile, both a quarter of it in logits.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from segformer.data.shards.tiling import Size
from segformer.data.sources.large import Rows
from segformer.errors import ConfigError
from segformer.inference.predicting.pipeline import ahead
from segformer.inference.predictor import Predictor
from segformer.models.variants import LEAST_SIDE

Strip = dict[str, np.ndarray]
"""Rows of what is read out: "mask" (rows, W), and what else is kept of `Predictor.shares`."""


def check_tile(tile: int, overlap: int | None) -> int:
    """The overlap in effect, pixels; ConfigError for sides that the network's steps don't divide."""
    if tile % 32 or not 64 <= tile <= 8192:
        near = min(max(round(tile / 32) * 32, 64), 8192)
        raise ConfigError(f"tile={tile} must be a multiple of 32, 64 to 8192; use tile={near}")
    found = tile // 4 if overlap is None else overlap
    if found % 4 or not 0 <= found < tile:
        raise ConfigError(f"overlap={overlap} must be a multiple of 4 below tile={tile}; use {tile // 4}")
    return found


def lines(side: int, length: int, overlap: int) -> list[tuple[int, np.ndarray]]:
    """(start, weights) of the tiles along a side; the weights of all tiles at a place add up to 1."""
    step = length - overlap
    starts = [*range(0, side - length, step), side - length]
    inside = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    weight = np.minimum(inside / max(overlap, 1), 1.0)
    total = np.zeros(side)
    for start in starts:
        total[start : start + length] += weight
    return [(start, (weight / total[start : start + length]).astype(np.float32)) for start in starts]


class Blending:
    """The tiles of one image, rows by rows."""

    def __init__(
        self,
        predictor: Predictor,
        rows: Rows,
        size: Size,
        tile: int,
        overlap: int,
        keep: Collection[str] = (),
    ) -> None:
        """rows: of the image, as `predictor` takes it. size: its height and width."""
        self.predictor, self.size = predictor, size
        self._rows, self._keep = rows, keep
        self._small = [(max(side, LEAST_SIDE) + 3) // 4 for side in size]
        height, width = (min(tile // 4, side) for side in self._small)
        self._tile = height, width
        self._down = lines(self._small[0], height, min(overlap // 4, height - 1))
        self._across = lines(self._small[1], width, min(overlap // 4, width - 1))
        self.tiles = len(self._down), len(self._across)

    @torch.inference_mode()
    def strips(self, on_band: Callable[[int, np.ndarray], None] = lambda top, band: None) -> Iterator[Strip]:
        """What is read out of the image, from its first row to its last. on_band: gets the rows of the image
        that a row of tiles has been made of, and where they begin."""
        ends = [*(start for start, _ in self._down[1:]), self._small[0]]
        above: Tensor | None = None
        with ThreadPoolExecutor(1) as pool:  # one: rows may have to be asked for in their order
            bands = ahead(pool, self._band, [start for start, _ in self._down], 1)
            for (top, weight), end, band in zip(self._down, ends, bands, strict=True):
                strip, above = self._row(band, top, weight, end, above)
                on_band(4 * top, band)
                yield strip

    def _band(self, top: int) -> np.ndarray:
        """The rows of the image that a row of tiles needs, continued to whole tiles."""
        height, width = self.size
        found = self._rows(4 * top, min(4 * (top + self._tile[0]), height))
        missing = 4 * self._tile[0] - len(found), 4 * self._small[1] - width
        return (
            np.pad(found, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else found
        )

    def _row(
        self, band: np.ndarray, top: int, weight: np.ndarray, end: int, above: Tensor | None
    ) -> tuple[Strip, Tensor]:
        """A row of tiles, of which the rows up to `end` are complete: (what is read out of these, the sums of
        the others below the last complete row). above: the latter of the row of tiles above."""
        before = 0 if above is None else 1  # rows held above `top`, for the enlargement
        strip: Strip = {}
        below = work = torch.empty(0)
        left = seen = 0  # columns: the first of `work`, and those that tiles have reached
        ends = [*(start for start, _ in self._across[1:]), self._small[1]]
        for (start, own), stop in zip(self._across, ends, strict=True):
            logits = self._logits(band, start)
            logits *= torch.from_numpy(np.outer(weight, own)).to(logits.device)
            reach = start + self._tile[1]
            fresh = logits.new_zeros(len(logits), before + self._tile[0], reach - seen)
            if above is not None:
                fresh[:, : above.shape[1]] = above[:, :, seen:reach]
            work = torch.cat([work, fresh], 2) if seen else fresh
            work[:, before:, start - left :] += logits
            seen = reach
            if not below.numel():
                below = logits.new_empty(len(logits), top + self._tile[0] - end + 1, self._small[1])
            complete = work[:, :, : stop - left]
            below[:, :, left:stop] = complete[:, before + end - top - 1 :]
            corner, inner = (top - before, left), (before, int(start > 0))
            self._read_out(complete[:, : before + end - top], corner, inner, strip)
            work, left = work[:, :, stop - left - 1 :], stop - 1
        return strip, below

    def _logits(self, band: np.ndarray, start: int) -> Tensor:
        """(K, h, w) of one tile, in float32 at least."""
        columns = slice(4 * start, 4 * (start + self._tile[1]))
        pixels = torch.from_numpy(band[:, columns].copy()).permute(2, 0, 1)
        out = self.predictor.logits(pixels[None])[0]
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _read_out(self, logits: Tensor, corner: Size, inner: Size, strip: Strip) -> None:
        """Fill in the pixels of logits whose corner has this place. inner: of top and left, 1 where it is no
        border of the image: the outer half of the pixels of an inner edge misses a neighbor."""
        top, left = corner
        rows, columns = (
            slice(2 * before, 4 * count - (0 if first + count == side else 2))
            for first, before, count, side in zip(corner, inner, logits.shape[1:], self._small, strict=True)
        )
        size = 4 * logits.shape[1], 4 * logits.shape[2]
        found = self.predictor.read_out(logits[None], size, self._keep)[0]
        height, width = self.size
        high = min(rows.stop, height - 4 * top) - rows.start
        first = 4 * left + columns.start
        wide = min(columns.stop, width - 4 * left) - columns.start
        for name, values in found.items():
            part = values[..., rows, columns][..., :high, :wide]
            if name not in strip:
                strip[name] = np.empty((*values.shape[:-2], high, width), values.dtype)
            strip[name][..., first : first + wide] = part
