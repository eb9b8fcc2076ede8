"""Boundary IoU, calibration and the counts of each image against naive loops; ranks against one process."""

import math

import numpy as np
import pytest
import torch

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.evaluation.boundary import boundary_areas
from segformer.evaluation.calibration import BINS, UNIT, calibration, calibration_counts
from segformer.evaluation.measures import Measures
from segformer.evaluation.metrics import SegmentationScores


def naive_boundary(mask, width):
    """Pixels of a mask with a pixel that is not in it, or none, at most `width` rows and columns away."""
    height, length = mask.shape
    found = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        for j in range(y - width, y + width + 1):
            for i in range(x - width, x + width + 1):
                if not (0 <= j < height and 0 <= i < length) or not mask[j, i]:
                    found[y, x] = True
    return found


def naive_areas(target, prediction, classes):
    width = max(1, round(0.02 * math.sqrt(target.shape[0] ** 2 + target.shape[1] ** 2)))
    found = np.zeros((3, classes), int)
    for k in range(classes):
        valid = target != IGNORE_INDEX
        label, other = (naive_boundary((mask == k) & valid, width) for mask in (target, prediction))
        found[:, k] = (label & other).sum(), label.sum(), other.sum()
    return found


@pytest.mark.parametrize("size", [(1, 1), (9, 14), (90, 70)])
def test_boundary_areas_are_those_of_a_loop_over_neighbors(size):
    random = np.random.default_rng(0)
    coarse = random.integers(0, 3, (size[0] // 12 + 1, size[1] // 9 + 1))
    target = np.kron(coarse, np.ones((12, 9), int))[: size[0], : size[1]].astype(np.uint8)
    prediction = np.roll(target, (1, 2), (0, 1))
    prediction[-1, -1] = 3  # one pixel, in the corner, of a class that is not labeled
    target[size[0] // 3 : size[0] // 2, : size[1] // 2] = IGNORE_INDEX
    found = boundary_areas(target, prediction, 5)
    assert found.tolist() == naive_areas(target, prediction, 5).tolist()
    assert not found[:, 4].any(), "the last class is nowhere"


def test_the_border_of_the_image_is_a_boundary_and_an_ignored_image_has_none():
    whole = np.zeros((20, 20), np.uint8)
    assert boundary_areas(whole, whole, 1).tolist() == [[76], [76], [76]]
    assert not boundary_areas(np.full_like(whole, IGNORE_INDEX), whole, 1).any()


def test_calibration_is_that_of_a_loop_over_pixels():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 20, 24), dtype=torch.uint8)
    target[:, :3] = IGNORE_INDEX
    counts = calibration_counts(logits, target).numpy()
    shares = torch.nn.functional.interpolate(logits, (20, 24), mode="bilinear").softmax(1).numpy()
    bins = [[] for _ in range(BINS)]
    for b, y, x in zip(*np.nonzero(target.numpy() != IGNORE_INDEX), strict=True):
        top, k = shares[b, :, y, x].max(), shares[b, :, y, x].argmax()
        bins[math.ceil(top * BINS) - 1].append((top, k == int(target[b, y, x])))
    assert counts[0].tolist() == [len(one) for one in bins]
    assert counts[1].tolist() == [sum(right for _, right in one) for one in bins]
    assert counts[2] / UNIT == pytest.approx([sum(top for top, _ in one) for one in bins], abs=1e-3)
    gaps = [abs(sum(r for _, r in one) - sum(top for top, _ in one)) for one in bins]
    assert calibration(counts)[0] == pytest.approx(sum(gaps) / counts[0].sum(), abs=1e-5)


def test_certainty_falls_into_the_last_bin_and_probabilities_are_taken_as_they_are():
    shares = torch.tensor([[1.0, 0.21], [0.0, 0.79]]).view(1, 2, 1, 2)
    counts = calibration_counts(shares, torch.zeros(1, 1, 2, dtype=torch.uint8), probabilities=True)
    assert counts[0].nonzero().flatten().tolist() == [11, 14]
    assert counts[1].tolist() == [0] * 14 + [1]
    error, rows = calibration(np.zeros((3, BINS), np.int64))
    assert math.isnan(error)
    assert rows[0]["right"] is None


def test_images_are_counted_one_by_one_and_in_parts():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 8, 8), torch.randint(0, 4, (3, 16, 16), dtype=torch.uint8)
    measures = Measures(2, 4, boundary=True, left_out=[3])
    total = measures.count(logits, target, [1, 0, 1])  # two parts of image 1
    assert total.sum() == 3 * 256
    assert measures.areas[:, 1].sum(1).tolist() == [256, 512]
    scores = SegmentationScores.from_counts(total)
    assert measures.areas.sum(0)[0].tolist() == np.diag(scores.confusion).tolist()
    hits, labeled, predicted = measures.areas[0][:, :3].astype(float)
    assert measures.scores()[0] == pytest.approx(np.mean(hits / (labeled + predicted - hits)))
