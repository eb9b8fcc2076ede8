"""How far a mean IoU could be off: the bootstrap over images.

    areas[i] = (3, K) of image i: pixels of class k that are right, labeled k, predicted as k
    mIoU     = mean over k of right / (labeled + predicted - right), each summed over the images

The images of a split are drawn anew with replacement, as often as there are images, REPLICATES times; what
the middle 95% of these mIoU span is the interval (Efron 1979, percentile method). Models that are scored on
the same draws are compared in pairs: what makes an image hard for both does not widen the interval of their
difference. It says what other images would have given, and nothing about another seed of the training.

Shapes: N images, K classes, R replicates.
"""

import warnings
from collections.abc import Callable

import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX

REPLICATES = 2000
_ROWS = 64  # replicates at a time, which bounds the memory


def image_areas(target: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """Areas (3, K) int64 of one image: right, labeled, predicted; both (H, W) class ids, in the target also
    IGNORE_INDEX, which is left out."""
    valid = target != IGNORE_INDEX
    pairs = target[valid].astype(np.int64) * num_classes + prediction[valid]
    return areas_of(np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes))


def areas_of(confusion: np.ndarray) -> np.ndarray:
    """Areas (3, K) of a confusion matrix (K, K)."""
    return np.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])


def class_iou(areas: np.ndarray) -> np.ndarray:
    """Areas (..., 3, K) -> IoU (..., K); NaN for a class that is neither labeled nor predicted."""
    right, labeled, predicted = np.moveaxis(np.asarray(areas, np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(right / (labeled + predicted - right))


def mean_iou(areas: np.ndarray) -> np.ndarray:
    """Areas (..., 3, K) -> mIoU (...) over the classes that occur; NaN without any."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.asarray(np.nanmean(class_iou(areas), axis=-1))


def replicates(
    areas: np.ndarray, seed: int = 0, score: Callable[[np.ndarray], np.ndarray] = mean_iou
) -> np.ndarray:
    """mIoU (R,) of draws of images, from areas (N, 3, K), or another `score`, as `class_iou` (R, K); a seed
    draws the same images for every model."""
    count, _, classes = areas.shape
    generator, flat = np.random.default_rng(seed), areas.reshape(count, -1).astype(np.float64)
    scores = []
    for first in range(0, REPLICATES, _ROWS):
        rows = min(_ROWS, REPLICATES - first)
        times = generator.multinomial(count, np.full(count, 1 / count), size=rows)  # (rows, N)
        scores.append(score((times @ flat).reshape(rows, 3, classes)))
    return np.concatenate(scores)


def interval(values: np.ndarray) -> tuple[float, float]:
    """What the middle 95% of the values span; NaN where none is a number."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
