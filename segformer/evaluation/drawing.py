"""Masks as colours: over a photograph, and beside target and prediction.

    overlay         one mask over its photograph, regions outlined
    side_by_side    image | target | prediction
    Gallery         side_by_side of the first images of an evaluation

Shapes: B batch, H W image, K classes.
"""

from collections.abc import Callable

import cv2
import numpy as np
from torch import Tensor

from segformer.data.loading.loader import Batch
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.models.ops.argmax import upsample_argmax

IGNORE_GREY = 0.35  # share of its brightness that an ignored pixel keeps
PANEL = 512  # longest side of one of the three pictures side by side, pixels


def overlay(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Blend class colours into an image and outline the regions.

    A class whose colour is black, as backgrounds often are, leaves the image as it is; ignored pixels are
    dimmed.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 class ids or IGNORE_INDEX.
        palette: (K, 3) uint8 RGB.
        alpha: share of the colour inside a region; its outline has the full colour.
    """
    colours = np.zeros((256, 3), np.float32)
    colours[: len(palette)] = palette
    share = np.full((256, 1), alpha, np.float32)
    share[colours.max(axis=1) == 0] = 0.0
    share[IGNORE_INDEX] = 1 - IGNORE_GREY
    weight = share[mask]
    width = max(1, round(min(mask.shape) / 250))
    kernel = np.ones((2 * width + 1,) * 2, np.uint8)
    edge = (cv2.dilate(mask, kernel) != cv2.erode(mask, kernel))[..., None] & (weight > 0)
    weight = np.where(edge & (mask != IGNORE_INDEX)[..., None], 1.0, weight)
    return np.rint(image * (1 - weight) + colours[mask] * weight).astype(np.uint8)


def side_by_side(
    image: np.ndarray, target: np.ndarray, prediction: np.ndarray, palette: np.ndarray
) -> np.ndarray:
    """Image, target and prediction in colours as one picture, uint8 (h, 3 w, 3); at most PANEL a side each.

    Args:
        image: (H, W, 3) uint8 RGB.
        target: (H, W) uint8 class ids or IGNORE_INDEX.
        prediction: (H, W) uint8 class ids.
        palette: (K, 3) uint8 RGB.
    """
    scale = min(1.0, PANEL / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    photograph = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in (target, prediction)]
    return np.hstack([photograph, *(overlay(photograph, np.asarray(mask), palette) for mask in masks)])


class Gallery:
    """Pictures of the first `count` images of an evaluation, by the key of the image."""

    def __init__(self, key: Callable[[int], str], palette: np.ndarray, count: int) -> None:
        self._key, self._palette, self._count = key, palette, count
        self.pictures: dict[str, np.ndarray] = {}

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Draw the images of a batch, whose logits are (B, K, h, w), while there are too few pictures."""
        wanted = min(self._count - len(self.pictures), len(batch.images))
        if wanted <= 0:
            return
        height, width = batch.targets.shape[1:]
        predictions = upsample_argmax(logits[:wanted], (height, width)).cpu().numpy().astype(np.uint8)
        images = batch.images[:wanted].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        targets = batch.targets[:wanted].cpu().numpy()
        ids = batch.sample_ids[:wanted].tolist()
        for sample_id, image, target, prediction in zip(ids, images, targets, predictions, strict=True):
            picture = side_by_side(image, target, prediction, self._palette)
            self.pictures[self._key(sample_id)] = picture
