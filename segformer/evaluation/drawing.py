"""Pictures of masks: over a photograph, beside target and prediction, in a grid with a legend.

    displayed  an image of any channels and dtype as RGB
    overlay    a mask in its colors over its photograph, regions outlined
    panels     a photograph and its masks, at one size
    beside     panels as one picture: image | target | prediction
    legend     names and colors of the classes that occur
    grid       captioned pictures in rows, the legend below
    batch_picture   the first images of a training batch with their targets
    Gallery    the panels of the first images of an evaluation, as validation pictures

OpenCV finds the outlines, PIL resizes and writes; a file appears whole or not at all.

Shapes: B batch, H W image, K classes.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from torch import Tensor

from segformer.data.loading.samples import Batch
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import printable
from segformer.files import write_atomic
from segformer.models.ops.argmax import upsample_argmax

if TYPE_CHECKING:
    from PIL import Image

IGNORED = 0.35  # share of its brightness that an ignored pixel keeps
PANEL = 512  # longest side of a picture, pixels
LINE = 6  # width of what is between panels, pixels
BATCH, BATCH_PANEL = 8, 384  # images of a training batch that are drawn, and the longest side of each
FONT = 36  # readable on a phone: 1/45 of the width of three panels
INK, FRAME = "#1F2933", "#7B8794"

Legend = list[tuple[str, tuple[int, int, int]]]


def displayed(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, C) of any dtype as uint8 (H, W, 3); 3 x uint8 is shown as it is.

    Others by their first three channels, or one as gray, each from its 2nd to its 98th percentile.
    """
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return pixels
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    shown = shown.astype(np.float32)
    low, high = np.percentile(shown, (2, 98), axis=(0, 1))
    shown = (shown - low) / np.maximum(high - low, 1e-12) * 255
    return np.repeat(shown.round().clip(0, 255).astype(np.uint8), 3 // shown.shape[2], axis=2)


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend class colors into an image and outline the regions.

    A class whose color is black, as backgrounds often are, leaves the image as it is; ignored pixels are
    dimmed.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 class ids or IGNORE_INDEX.
        palette: (K, 3) uint8 RGB.
        alpha: share of the color inside a region; its outline has the full color.
    """
    colors = np.zeros((256, 3), np.float32)
    colors[: len(palette)] = palette
    share = np.full((256, 1), alpha, np.float32)
    share[colors.max(axis=1) == 0] = 0.0
    share[IGNORE_INDEX] = 1 - IGNORED
    weight = share[mask]
    width = max(1, round(min(mask.shape) / 250))
    kernel = np.ones((2 * width + 1,) * 2, np.uint8)
    edge = (cv2.dilate(mask, kernel) != cv2.erode(mask, kernel))[..., None] & (weight > 0)
    weight = np.where(edge & (mask != IGNORE_INDEX)[..., None], 1.0, weight)
    return np.rint(image * (1 - weight) + colors[mask] * weight).astype(np.uint8)


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """A photograph (H, W, 3), or a mask (H, W) without new values, with `side` pixels along its long side."""
    from PIL import Image

    how = Image.Resampling.NEAREST if pixels.ndim == 2 else Image.Resampling.LANCZOS
    height, width = (max(1, round(length * side / max(pixels.shape[:2]))) for length in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


def panels(
    image: np.ndarray, masks: Sequence[np.ndarray], palette: np.ndarray, side: int = PANEL, alpha: float = 0.5
) -> list[np.ndarray]:
    """The photograph, and its overlay with each mask, `side` pixels along the long side; as in `overlay`."""
    photograph = resized(image, side)
    return [photograph, *(overlay(photograph, resized(mask, side), palette, alpha) for mask in masks)]


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height as one, white lines between them."""
    line = np.full((len(pictures[0]), LINE, 3), 255, np.uint8)
    return np.hstack([part for picture in pictures for part in (line, picture)][1:])


def legend(masks: Iterable[np.ndarray], classes: Sequence[str], palette: np.ndarray) -> Legend:
    """Name and color of every class in the masks; white where `overlay` leaves the image as it is."""
    found = sorted({int(k) for mask in masks for k in np.unique(mask)})
    entries: Legend = []
    for k in found:
        if k < len(classes):
            red, green, blue = palette[k].tolist() if palette[k].any() else (255, 255, 255)
            entries.append((classes[k], (red, green, blue)))
    return [*entries, ("ignored", (90, 90, 90))] if IGNORE_INDEX in found else entries


def grid(
    cells: Sequence[tuple[str, np.ndarray]], entries: Legend, *, columns: int, font_size: int = FONT
) -> "Image.Image":
    """Pictures uint8 (h, w, 3), each below its caption, in rows of `columns`, and below them the legend.

    A caption that is wider than PANEL and than the pictures loses its beginning.
    """
    from PIL import Image, ImageDraw, ImageFont

    cells = [(printable(caption), picture) for caption, picture in cells]
    entries = [(printable(name), color) for name, color in entries]
    font, gap = ImageFont.load_default(font_size), font_size // 2
    captions = max((math.ceil(font.getlength(caption)) for caption, _ in cells), default=0)
    column = max(min(captions, PANEL), *(picture.shape[1] for _, picture in cells), 1)
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [font_size + 2 * gap + max(picture.shape[0] for _, picture in row) for row in rows]
    width = columns * (column + gap) + gap
    entry = math.ceil(max((font.getlength(name) for name, _ in entries), default=0)) + font_size + 2 * gap
    across, line = max(1, (width - gap) // entry), font_size + gap
    canvas = Image.new("RGB", (width, sum(heights) + 2 * gap + -(-len(entries) // across) * line), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for index, (caption, picture) in enumerate(row):
            middle = gap + index * (column + gap) + column // 2
            draw.text((middle, top), _shortened(caption, font.getlength, column), INK, font, anchor="ma")
            canvas.paste(Image.fromarray(picture), (middle - picture.shape[1] // 2, top + font_size + gap))
        top += height
    for index, (name, color) in enumerate(entries):
        left, y = gap + index % across * entry, top + index // across * line
        box = (left, y + 2, left + font_size - 4, y + font_size - 2)
        draw.rounded_rectangle(box, radius=font_size // 6, fill=color, outline=FRAME, width=2)
        draw.text((left + font_size + gap / 2, y + font_size / 2), name, INK, font, anchor="lm")
    return canvas


def batch_picture(
    images: np.ndarray, targets: np.ndarray, keys: Sequence[str], classes: Sequence[str], palette: np.ndarray
) -> "Image.Image":
    """The first images of a training batch, each with its target: a mask over it, or shares of classes.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        targets: (B, H, W) uint8, class ids and IGNORE_INDEX, or (B, K) float, a classifier's shares.
        keys: captions of the images with masks.
    """
    shown, entries = images[:BATCH], []
    pictures = [resized(image, BATCH_PANEL) for image in shown]
    if targets.ndim == 2:
        names = [_shares(row, classes) for row in targets]
    else:
        masks = [resized(mask, BATCH_PANEL) for mask in targets[:BATCH]]
        pictures = [overlay(*pair, palette) for pair in zip(pictures, masks, strict=True)]
        names, entries = list(keys), legend(targets[:BATCH], classes, palette)
    return grid(list(zip(names, pictures, strict=False)), entries, columns=4, font_size=FONT * 2 // 3)


def _shares(row: np.ndarray, classes: Sequence[str]) -> str:
    """A classifier's target: "cat", or of one that is mixed or smoothed "cat 70%, dog 28%"."""
    kept = [k for k in np.argsort(-row)[:2].tolist() if row[k] > 0.05]
    return ", ".join(classes[k] if row[k] == 1 else f"{classes[k]} {100 * row[k]:.0f}%" for k in kept)


def _shortened(text: str, length: Callable[[str], float], width: float) -> str:
    while len(text) > 4 and length(text) > width:
        text = "..." + text[4:]
    return text


def write_picture(path: Path, picture: "Image.Image", **options: Any) -> None:
    """Write a picture as PNG or, to a .jpg, JPEG; OSError where the disk doesn't take it.

    PIL itself leaves a part of a JPEG on a full disk, and may not say so.
    """
    data = io.BytesIO()
    picture.save(data, "JPEG" if path.suffix == ".jpg" else "PNG", **options)
    write_atomic(path, data.getvalue(), durable=False)


def drawn_sample(
    batch: Batch, logits: Tensor, index: int, palette: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(Image | target | prediction of one image of a batch, the classes in them); logits (B, K, h, w)."""
    target = batch.targets[index].cpu().numpy()
    found = upsample_argmax(logits[index : index + 1], target.shape)[0].cpu().numpy().astype(np.uint8)
    image = batch.images[index].permute(1, 2, 0).contiguous().cpu().numpy()
    drawn = panels(displayed(image), [target, found], palette, min(PANEL, max(target.shape)))
    return beside(drawn), np.union1d(target, found)


class Gallery:
    """Validation pictures: the panels of the first `count` images of an evaluation, by the image's key."""

    def __init__(self, key: Callable[[int], str], palette: np.ndarray, count: int) -> None:
        self._key, self._palette, self._count = key, palette, count
        self.pictures: dict[str, np.ndarray] = {}

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Draw the images of a batch, whose logits are (B, K, h, w), while there are too few pictures."""
        wanted = min(self._count - len(self.pictures), len(batch.images))
        for index, sample_id in enumerate(batch.sample_ids[: max(0, wanted)].tolist()):
            self.pictures[self._key(sample_id)], _ = drawn_sample(batch, logits, index, self._palette)
