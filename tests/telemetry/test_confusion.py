"""Confusion matrices: the shares and mistakes of hand-counted ones, and what the picture shows."""

import numpy as np

from segformer.telemetry.confusion import confusion_picture, mistakes, shares

COUNTS = [[6, 3, 1], [0, 0, 0], [5, 10, 5]]
CLASSES = ["road", "sky", "car\x1b[2J" + "x" * 40]


def test_shares_are_of_the_label_and_unknown_without_one():
    expected = [[0.6, 0.3, 0.1], [np.nan] * 3, [0.25, 0.5, 0.25]]
    assert np.array_equal(shares(COUNTS), expected, equal_nan=True)


def test_mistakes_are_the_largest_shares_off_the_diagonal():
    assert mistakes(COUNTS, 3) == [(2, 1, 0.5, 10), (0, 1, 0.3, 3), (2, 0, 0.25, 5)]
    assert mistakes([[4, 0], [0, 2]], 3) == [], "nothing is taken for something else"


def test_a_cell_is_as_dark_as_its_share_and_a_row_without_pixels_is_gray():
    picture = np.asarray(confusion_picture(COUNTS, CLASSES)).astype(int)
    left, top = picture.shape[1] - 8 - 3 * 56, picture.shape[0] - 8 - 3 * 56
    cells = picture[top + 5 :: 56, left + 5 :: 56][:3, :3]
    for k, share in np.ndenumerate(shares(COUNTS)):
        white, blue = 255.0, np.array([8, 48, 107])
        color = np.full(3, 224) if np.isnan(share) else white - share * (white - blue)
        assert np.abs(cells[k] - color).max() <= 1
    middle = picture[top : top + 56, left : left + 56]
    assert (middle > 240).all(2).sum() > 30, "the number, white on dark"


def test_many_classes_have_colors_and_as_many_names_as_there_is_room_for():
    assert confusion_picture(np.eye(300), [f"class {k}" for k in range(300)]).width < 1100
    assert confusion_picture(np.eye(1000), []).width > 1000
