"""The composer of pictures: colors of overlays, places of panels, size of the legend."""

import numpy as np
import pytest

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.evaluation.drawing import LINE, PANEL, beside, grid, legend, overlay, panels

PALETTE = np.array([[0, 0, 0], [0, 200, 80], [250, 120, 10]], np.uint8)


def test_overlay_blends_colors_keeps_black_classes_and_outlines_regions():
    image = np.full((60, 60, 3), 100, np.uint8)
    mask = np.zeros((60, 60), np.uint8)
    mask[20:40, 20:40] = 1
    drawn = overlay(image, mask, PALETTE, alpha=0.5)
    assert (drawn[5, 5] == 100).all()
    assert drawn[30, 30].tolist() == [50, 150, 90]
    assert drawn[20, 30].tolist() == [0, 200, 80]


def test_overlay_dims_ignored_pixels():
    image = np.full((9, 9, 3), 100, np.uint8)
    assert (overlay(image, np.full((9, 9), IGNORE_INDEX, np.uint8), PALETTE) == 35).all()


@pytest.mark.parametrize("shape", [(64, 64), (30, 200), (200, 30), (1000, 700)])
def test_panels_have_one_size_and_masks_keep_their_classes(shape):
    image, mask = np.full((*shape, 3), 255, np.uint8), np.ones(shape, np.uint8)
    mask[: shape[0] // 2] = 2
    drawn = panels(image, [mask], PALETTE, alpha=1.0)
    assert [picture.shape for picture in drawn] == [drawn[0].shape] * 2
    assert max(drawn[0].shape) == PANEL
    assert {tuple(color) for color in drawn[1].reshape(-1, 3).tolist()} == {(0, 200, 80), (250, 120, 10)}
    assert beside(drawn).shape[1] == 2 * drawn[0].shape[1] + LINE


def test_the_legend_has_the_classes_that_occur_and_white_for_black():
    mask = np.array([[0, 2, IGNORE_INDEX]], np.uint8)
    entries = legend([mask, mask], ["void", "cell", "debris"], PALETTE)
    assert entries == [("void", (255, 255, 255)), ("debris", (250, 120, 10)), ("ignored", (90, 90, 90))]


def test_a_grid_has_rows_of_pictures_and_lines_of_a_legend():
    cells = [("a name that is far too long " * 9, np.full((30, 40, 3), k, np.uint8)) for k in (7, 8, 9)]
    entries = [(f"class {k}", (0, 0, k)) for k in range(40)]
    drawn = np.array(grid(cells, entries, columns=2, font_size=18))
    assert drawn.shape[1] < 2 * (PANEL + 20)
    tops = [np.argwhere((drawn == k).all(2)).min(0) for k in (7, 8, 9)]
    assert tops[0][0] == tops[1][0] < tops[2][0]
    assert tops[0][1] == tops[2][1] < tops[1][1]
    assert all(((drawn == color).all(2)).sum() > 50 for _, color in entries)
    assert grid(cells, entries[:1], columns=2, font_size=18).size < grid(cells, entries, columns=2).size


def test_a_name_of_several_lines_is_drawn_on_one():
    cells = [("a\nb", np.zeros((20, 20, 3), np.uint8))]
    drawn = grid(cells, [("leaf\n\x1b[2J", (0, 200, 80))], columns=1)
    assert drawn.size == grid([("a\\nb", cells[0][1])], [("leaf\\n\\x1b[2J", (0, 200, 80))], columns=1).size
