"""Boundary IoU (Cheng et al. 2021): IoU of the pixels of a class that lie near its boundary.

    d           2% of the image's diagonal in pixels, rounded, 1 at least
    boundary    pixels of the mask within d of one that is not in it, or of what is beyond the image's border:
                the mask less its erosion by d times a 3 x 3 kernel, as in the authors' code
    areas       (3, K): pixels in both boundaries, in that of the label, in that of the prediction

Summed over the data set before they are divided, as for IoU. Pixels labeled 255 belong to no class, in the
label and in the prediction: the rim of such a region is a boundary for both.
"""

import cv2
import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX

DISTANCE = 0.02


def boundary_areas(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Areas (3, K) int64 of one image; both (H, W) class ids, in the target also IGNORE_INDEX."""
    width = max(1, round(DISTANCE * float(np.hypot(*target.shape))))
    known, areas = target != IGNORE_INDEX, np.zeros((3, num_classes), np.int64)
    for k in np.union1d(target[known], prediction[known]).tolist():
        label, found = (_boundary((mask == k) & known, width) for mask in (target, prediction))
        areas[:, k] = (label & found).sum(), label.sum(), found.sum()
    return areas


def _boundary(mask: np.ndarray, width: int) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    inside = np.zeros_like(mask)
    if len(rows):  # only where the class is; outside of it there is nothing to erode
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        kernel = np.ones((2 * width + 1,) * 2, np.uint8)
        kept = cv2.erode(mask[box].astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        inside[box] = kept.astype(bool)
    return mask & ~inside
