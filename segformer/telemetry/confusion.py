"""A confusion matrix as a picture, and its largest mistakes.

Rows are labels, columns predictions; a cell has the share of its label's pixels in per cent, from white to
dark blue. A row is gray where no pixel has its label. With more than MOST_NUMBERS classes there are colors
without numbers, and only as many names as there is room for.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from segformer.errors import printable

if TYPE_CHECKING:
    from PIL import Image

MOST_NUMBERS = 25
_DARK, _EMPTY, _LINE, _INK = (8, 48, 107), (224, 224, 224), (228, 231, 235), (31, 41, 51)
_FONT, _NAME = 18, 20  # pixels; letters of a name
_SIDE = 1000  # of a matrix without numbers, pixels


class Mistake(NamedTuple):
    """Pixels of one class that were predicted as another one."""

    label: int
    prediction: int
    share: float
    "Of the label's pixels."
    pixels: int


def shares(counts: Any) -> np.ndarray:
    """Counts (K, K) -> shares of each row's sum, float64; NaN in rows without any."""
    counts = np.asarray(counts, np.float64)
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def mistakes(counts: Any, most: int) -> list[Mistake]:
    """The pairs of classes that take the largest shares of their label's pixels, the largest first."""
    counts = np.asarray(counts)
    wrong = np.nan_to_num(shares(counts))
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most].tolist()
    pairs = (divmod(place, len(counts)) for place in order)
    return [Mistake(t, p, float(wrong[t, p]), int(counts[t, p])) for t, p in pairs if wrong[t, p]]


def confusion_picture(counts: Any, classes: Sequence[str]) -> Image.Image:
    """The matrix of counts (K, K) with its names and numbers."""
    from PIL import Image, ImageDraw, ImageFont

    share, font = shares(counts), ImageFont.load_default(_FONT)
    numbered = len(share) <= MOST_NUMBERS
    cell = 56 if numbered else max(1, _SIDE // len(share))
    names = list(classes) if len(classes) == len(share) else [str(k) for k in range(len(share))]
    names = [_shortened(name) if k % -(-(_FONT + 6) // cell) == 0 else "" for k, name in enumerate(names)]
    margin = int(max(map(font.getlength, names))) + 12
    top = margin + 3 * _FONT
    colors = 255 - share[..., None] * (255 - np.array(_DARK))
    colors[np.isnan(share[:, 0])] = _EMPTY
    matrix = colors.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    side = len(matrix)
    canvas = Image.new("RGB", (max(margin + side + 8, 320), top + side + 8), "white")
    canvas.paste(Image.fromarray(matrix), (margin, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), "rows: labels, columns: predictions\n% of the label's pixels", _INK, font)
    for k, name in enumerate(names):
        middle = (k + 0.5) * cell
        draw.text((margin - 6, top + middle), name, _INK, font, anchor="rm")
        if name:
            upright = Image.new("RGB", (margin, _FONT + 6), "white")
            ImageDraw.Draw(upright).text((6, (_FONT + 6) / 2), name, _INK, font, anchor="lm")
            canvas.paste(
                upright.rotate(90, expand=True), (round(margin + middle - _FONT / 2 - 3), top - margin)
            )
    if numbered:
        for line in range(len(share) + 1):
            at = line * cell
            draw.line([(margin, top + at), (margin + side, top + at)], _LINE)
            draw.line([(margin + at, top), (margin + at, top + side)], _LINE)
        for (row, column), value in np.ndenumerate(share):
            place = (margin + (column + 0.5) * cell, top + (row + 0.5) * cell)
            text = "" if np.isnan(value) else f"{100 * value:.1f}"
            draw.text(place, text, "white" if value > 0.5 else _INK, font, anchor="mm")
    return canvas


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME else name[: _NAME - 2] + ".."
