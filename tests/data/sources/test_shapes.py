import random
from fractions import Fraction

import numpy as np
import pytest
from labels import NAMES, Drawing, LabelSet, box, counted, label_set, naive

from segformer.data.sources.shapes import MAX_CROSSINGS, Shape, draw, packed, ring

IDS = {name: number + 1 for number, name in enumerate(NAMES)}


def drawn(labels: LabelSet, uncovered: int = 0) -> np.ndarray:
    shapes = [Shape(IDS[one.category], tuple(map(ring, one.rings))) for one in labels.shapes]
    return draw(shapes, (labels.height, labels.width), uncovered)


def test_a_thousand_drawings_have_no_wrong_pixel() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        labels = label_set(rng)
        np.testing.assert_array_equal(drawn(labels, 255), naive(labels, IDS, 255), str(labels))


def test_shapes_with_a_common_border_fill_it_once() -> None:
    """The parts left and right of one line are everything together, without overlap."""
    rng = random.Random(2)
    for _ in range(200):
        line = [(rng.choice((2.5, 3.0, rng.uniform(0, 6))), y) for y in (0.0, rng.choice((2.5, 3.0)), 6.0)]
        left, right = [(-1.0, 0.0), *line, (-1.0, 6.0)], [(9.0, 0.0), *line, (9.0, 6.0)]
        parts = [drawn(LabelSet(6, 6, [Drawing("leaf", [part])])) for part in (left, right)]
        np.testing.assert_array_equal(parts[0] + parts[1], np.ones((6, 6)))


def test_a_pixel_is_a_box_from_its_corner() -> None:
    mask = drawn(LabelSet(4, 4, [Drawing("leaf", [box(1, 2, 2, 3)])]))
    assert np.argwhere(mask).tolist() == [[2, 1]]


def test_what_lies_beyond_the_border_is_cut_not_moved() -> None:
    labels = LabelSet(3, 3, [Drawing("leaf", [[(-2e6, -2.0), (2e6, -2.0), (1.5, 1.6)]])])
    mask = drawn(labels)
    np.testing.assert_array_equal(mask, naive(labels, IDS, 0))
    assert mask[0].all()
    assert not mask[2].any()


def test_runs_go_down_the_columns() -> None:
    mask = (np.random.default_rng(3).random((7, 5)) < 0.5).astype(np.uint16)
    found = draw([Shape(1, rle=np.array(counted(mask), np.uint32))], (7, 5), 0)
    np.testing.assert_array_equal(found, mask)
    with pytest.raises(ValueError, match="runs are of 35 pixels, the picture of 36"):
        draw([Shape(1, rle=np.array(counted(mask), np.uint32))], (6, 6), 0)


@pytest.mark.parametrize(
    "points", [[1, 2, 3], ["a", 1], [1, None], [1, float("inf")], [[1, 2], [3]], [10**400, 1], [3e6, 1]]
)
def test_what_is_no_ring_is_refused(points: list[object]) -> None:
    with pytest.raises(ValueError, match=r"points|finite"):
        ring(points)


def test_points_are_rounded_to_the_grid() -> None:
    values = [0.1, 1 / 512, 3 / 512, -1 / 512, 12345.678, -7.3]
    assert ring(values).reshape(-1).tolist() == [round(Fraction(value) * 256) for value in values]


def test_an_outline_without_end_is_refused_before_it_takes_memory() -> None:
    zigzag = ring([[x % 2, (x % 2) * 100_000] for x in range(MAX_CROSSINGS // 50_000)])
    with pytest.raises(ValueError, match="crosses"):
        draw([Shape(1, (zigzag,))], (100_000, 2), 0)


def test_the_hash_of_shapes_tells_all_that_is_drawn_apart() -> None:
    square, line = ring([0, 0, 1, 0, 1, 1]), np.array([1, 2], np.uint32)
    sets = [
        [],
        [Shape(1, (square,))],
        [Shape(2, (square,))],
        [Shape(1, (square, square))],
        [Shape(1, (square,)), Shape(1, (square,))],
        [Shape(1, rle=line)],
        [Shape(1, (line,))],
    ]
    assert len({b"".join(packed(shapes)) for shapes in sets}) == len(sets)
