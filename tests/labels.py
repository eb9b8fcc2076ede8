"""Made label sets, and what their pixels are by the stated rule, pixel by pixel in whole numbers.

rng = random.Random(seed)
labels = label_set(rng)                   shapes with holes, overlaps, common borders, one pixel, nothing
expected = naive(labels, raw_ids, 0)      uint16 (H, W)
"""

import random
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

NAMES = ("leaf", "Blüte", "叶", "a b", "tree, big", "e\u0301")
Point = tuple[float, float]


@dataclass
class Drawing:
    """Category and rings of one shape, in pixels."""

    category: str
    rings: list[list[Point]] = field(default_factory=list)


@dataclass
class LabelSet:
    """One image and its shapes, in the order of their drawing."""

    height: int
    width: int
    shapes: list[Drawing]
    key: str = "a"


def box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def label_set(rng: random.Random, *, holes: bool = True, digits: int = 12) -> LabelSet:
    """Shapes on a small picture; digits: decimals of a coordinate, at most."""
    height, width = rng.randint(1, 14), rng.randint(1, 14)

    def place(limit: int) -> float:
        kind = rng.randrange(5)
        if kind == 0:
            return float(rng.randint(-2, limit + 2))  # a corner of pixels, or outside
        if kind == 1:
            return rng.randint(-2, limit + 2) + 0.5  # a center
        if kind == 2:
            return rng.randint(-512, 256 * limit + 512) / 256
        if kind == 3:
            return round(rng.uniform(-3, limit + 3), min(2, digits))
        return round(rng.uniform(-1, limit + 1), digits)

    def some_ring() -> list[Point]:
        kind = rng.randrange(8)
        if kind == 0:  # one pixel
            x, y = rng.randrange(width), rng.randrange(height)
            return box(x, y, x + 1, y + 1)
        if kind == 1:  # the whole picture
            return box(0, 0, width, height)
        if kind == 2:  # too few points to have an inside
            return [(place(width), place(height)) for _ in range(rng.choice((1, 2)))]
        ring = [(place(width), place(height)) for _ in range(rng.choice((3, 3, 4, 5, 9)))]
        return ring + ring[:1] * rng.randrange(2)  # closed by hand, too

    shapes = []
    for _ in range(rng.choice((0, 1, 2, 3, 5))):
        rings = [some_ring() for _ in range(rng.choice((1, 1, 2)) if holes else 1)]
        shapes.append(Drawing(rng.choice(NAMES), rings))
    if rng.random() < 0.5:  # two with a common border
        x, lines = place(width), [(place(width), place(height)) for _ in range(3)]
        shapes.append(Drawing(NAMES[0], [[(x - 3, 0.0), *lines, (x - 3, float(height))]]))
        shapes.append(Drawing(NAMES[1], [[(x + 3, 0.0), *lines, (x + 3, float(height))]]))
    return LabelSet(height, width, shapes)


def naive(labels: LabelSet, raw_ids: dict[str, int], uncovered: int) -> np.ndarray:
    """uint16 (H, W): every pixel asks every edge of every shape."""
    mask = np.full((labels.height, labels.width), uncovered, np.uint16)
    for shape in labels.shapes:
        # In 1/512 pixel, so that centers are whole numbers, too.
        rings = [
            [(2 * round(Fraction(x) * 256), 2 * round(Fraction(y) * 256)) for x, y in ring]
            for ring in shape.rings
        ]
        for row in range(labels.height):
            for column in range(labels.width):
                if inside(rings, 512 * column + 256, 512 * row + 256):
                    mask[row, column] = raw_ids[shape.category]
    return mask


def inside(rings: list[list[tuple[int, int]]], cx: int, cy: int) -> bool:
    """An odd number of edges crosses the row at or left of the point."""
    crossings = 0
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            # x0 + (cy - y0) * (x1 - x0) / (y1 - y0) <= cx, without the division
            if y0 <= cy < y1 and (cy - y0) * (x1 - x0) <= (cx - x0) * (y1 - y0):
                crossings += 1
    return crossings % 2 == 1


def counted(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask down its columns, the first of zeros, one pixel after the other."""
    runs, value = [0], 0
    for pixel in mask.T.reshape(-1).tolist():
        if bool(pixel) != bool(value):
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs
