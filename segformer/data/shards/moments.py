"""Mean and standard deviation of each channel, over all pixels of all images.

Sums and sums of squares of each image are added in the order of the samples, shard by shard: of whole numbers
exactly, of float32 in double precision. Processes and parts change no bit of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import sqrt

import numpy as np

# Relative to the square of the mean; below it a variance is what rounding leaves of a channel of one value.
_LEAST = 1e-13


@dataclass(slots=True)
class Moments:
    """Sums over pixels; of no image, empty."""

    pixels: int = 0
    sums: list[float] = field(default_factory=list)
    """Of each channel; ints where the pixels are."""
    squares: list[float] = field(default_factory=list)
    """Of the squares of each channel."""

    def add_image(self, image: np.ndarray) -> None:
        """Add the pixels of an image (H, W, C)."""
        found = [_sums(image[..., channel]) for channel in range(image.shape[2])]
        sums, squares = ([pair[place] for pair in found] for place in (0, 1))
        self.add(Moments(image.shape[0] * image.shape[1], sums, squares))

    def add(self, other: "Moments") -> None:
        """Add the sums of further images."""
        self.pixels += other.pixels
        for name in ("sums", "squares"):
            own, more = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(own, more, strict=True)] if own else [*more])

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Of each channel; a std of 1 for a channel that has one value only."""
        means, stds = [], []
        for total, squares in zip(self.sums, self.squares, strict=True):
            mean = Fraction(total) / self.pixels
            variance = float(Fraction(squares) / self.pixels - mean**2)
            means.append(float(mean))
            stds.append(sqrt(variance) if variance > _LEAST * float(mean**2) else 1.0)
        return means, stds


def total(parts: Iterable[Moments]) -> Moments:
    """The sums of several, added in their order."""
    found = Moments()
    for part in parts:
        found.add(part)
    return found


def _sums(channel: np.ndarray) -> tuple[float, float]:
    """The sum of the values of a channel, and of their squares."""
    if channel.dtype == np.float32:
        values = channel.astype(np.float64)
        return float(values.sum()), float((values * values).sum())
    counts = np.bincount(channel.reshape(-1))
    levels = np.arange(len(counts), dtype=np.int64)
    return int(counts @ levels), int(counts @ levels**2)  # below 2**63: at most 2**26 pixels of 2**32
