"""A contact sheet: samples beside their coloured masks, with the classes that occur below, as one PNG.

    | image | mask |  image | mask |  image | mask |
    ...
    legend: colour and name of every class on the sheet, `ignored` white

The samples are chosen so that rare classes are seen first."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 3  # pairs beside each other
CELL = 240  # long side of a picture, pixels
GAP, TEXT = 8, 18
IGNORED = (255, 255, 255)
Picture = tuple[str, np.ndarray, np.ndarray | None]
"""(caption, image uint8 (H, W, 3), mask uint8 (H, W) of train ids and 255, or None)"""


def choose(holders: dict[int, list[Any]], class_images: np.ndarray, count: int) -> list[Any]:
    """Up to `count` samples: one of each class, rarest class first, then any; holders as in SplitScan."""
    chosen: list[Any] = []
    present = np.flatnonzero(class_images)
    for label in present[np.argsort(class_images[present], kind="stable")].tolist():
        fresh = [sample for sample in holders.get(label, []) if sample not in chosen]
        chosen += fresh[len(fresh) // 2 :][:1]  # neighbours in a folder look alike
    others = [sample for sample in holders.get(-1, []) if sample not in chosen]
    missing = max(0, count - len(chosen))
    places = np.linspace(0, len(others) - 1, min(missing, len(others))).round().astype(int)
    return (chosen + [others[place] for place in places])[:count]


def write_sheet(
    path: Path, pictures: Sequence[Picture], *, classes: Sequence[str], palette: np.ndarray
) -> None:
    """Draw the sheet; palette uint8 (K, 3). ConfigError where the file can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, classes=classes, palette=palette).save(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}; choose another output=...") from error


def sheet(pictures: Sequence[Picture], *, classes: Sequence[str], palette: np.ndarray) -> "Image.Image":
    """The sheet as a picture."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    rows = -(-len(pictures) // COLUMNS)
    width = COLUMNS * 2 * (CELL + GAP) + GAP
    shapes = [image.shape[:2] for _, image, _ in pictures]
    tallest = max((round(CELL * min(1, height / wide)) for height, wide in shapes), default=0)
    line = tallest + TEXT + 2 * GAP
    found = sorted({int(k) for _, _, mask in pictures if mask is not None for k in np.unique(mask)})
    entries = [(classes[k], tuple(int(v) for v in palette[k])) for k in found if k < len(classes)]
    if any(k >= len(classes) for k in found):
        entries.append(("ignored", IGNORED))
    places, below = _legend(entries, font, width)
    canvas = Image.new("RGB", (width, rows * line + below + 2 * GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (caption, image, mask) in enumerate(pictures):
        top, left = GAP + number // COLUMNS * line, GAP + number % COLUMNS * 2 * (CELL + GAP)
        small = _resized(image, Image.Resampling.LANCZOS)
        canvas.paste(Image.fromarray(small), (left, top))
        if mask is not None:
            labels = _resized(mask, Image.Resampling.NEAREST)
            canvas.paste(Image.fromarray(coloured(small, labels, palette)), (left + CELL + GAP, top))
        else:
            draw.text((left + CELL + GAP, top), "mask not understood", "#B00020", font)
        draw.text((left, top + tallest + 2), _shortened(caption, font, 2 * CELL), "#1F2933", font)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        top = GAP + rows * line + y
        draw.rectangle((x, top, x + TEXT, top + TEXT), fill=colour, outline="#7B8794")
        draw.text((x + TEXT + GAP, top + TEXT / 2), name, "#1F2933", font, anchor="lm")
    return canvas


def coloured(image: np.ndarray, mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The mask in its colours over the faded image; uint8 (H, W, 3)."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(palette)] = palette
    painted: np.ndarray = (0.3 * image + 0.7 * table[mask]).astype(np.uint8)
    return painted


def _resized(pixels: np.ndarray, how: Any) -> np.ndarray:
    from PIL import Image

    scale = CELL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, how))


def _shortened(text: str, font: Any, width: float) -> str:
    while len(text) > 4 and font.getlength(text) > width:
        text = "..." + text[4:]
    return text


def _legend(
    entries: list[tuple[str, tuple[int, ...]]], font: Any, width: int
) -> tuple[list[tuple[int, int]], int]:
    """(left, top) of each entry, and the height of all lines."""
    places, x, y = [], GAP, 0
    for name, _ in entries:
        needed = TEXT + 3 * GAP + int(font.getlength(name))
        if x > GAP and x + needed > width:
            x, y = GAP, y + TEXT + GAP
        places.append((x, y))
        x += needed
    return places, y + TEXT + GAP
