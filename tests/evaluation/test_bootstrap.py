"""Intervals over images: held against a loop over lists, and a closed form."""

import math
import statistics

import numpy as np
import pytest

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.evaluation import bootstrap
from segformer.evaluation.bootstrap import image_areas, interval, mean_iou, replicates


@pytest.fixture
def areas():
    """Areas of seven images of four classes, the last of which is nowhere."""
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, (7, 9, 11)).astype(np.uint8)
    predictions = np.where(random.random((7, 9, 11)) < 0.6, targets, random.integers(0, 3, (7, 9, 11)))
    targets[:, 0] = IGNORE_INDEX
    return np.stack([image_areas(t, p, 4) for t, p in zip(targets, predictions, strict=True)])


def test_areas_and_mean_iou_are_those_of_sets_of_pixels():
    target = np.array([[0, 0, 1, 1, IGNORE_INDEX]], np.uint8)
    prediction = np.array([[0, 1, 1, 2, 2]], np.uint8)
    found = image_areas(target, prediction, 4)
    assert found.tolist() == [[1, 1, 0, 0], [2, 2, 0, 0], [1, 2, 1, 0]]
    assert mean_iou(found) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3), "class 3 is nowhere and has no IoU"


def test_replicates_are_those_of_a_loop_over_the_drawn_images(areas, monkeypatch):
    monkeypatch.setattr(bootstrap, "REPLICATES", 70)  # more than one block of rows
    draws = np.random.default_rng(3)
    times = np.concatenate([draws.multinomial(7, [1 / 7] * 7, size=rows) for rows in (64, 6)])
    expected = []
    for counts in times:
        images = [image for image, count in zip(areas.tolist(), counts, strict=True) for _ in range(count)]
        ious = []
        for k in range(4):
            right, labeled, predicted = (sum(image[row][k] for image in images) for row in range(3))
            if union := labeled + predicted - right:
                ious.append(right / union)
        expected.append(sum(ious) / len(ious))
    assert replicates(areas, seed=3) == pytest.approx(expected)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    random = np.random.default_rng(1)
    right = random.integers(300, 900, 400)
    areas = np.stack([right, np.full(400, 1000), right], 1)[..., None]  # each union is 1000: IoU is a mean
    low, high = interval(replicates(areas))
    spread = statistics.stdev((right / 1000).tolist()) / math.sqrt(400)
    assert low == pytest.approx(right.mean() / 1000 - 1.96 * spread, abs=0.15 * spread)
    assert high == pytest.approx(right.mean() / 1000 + 1.96 * spread, abs=0.15 * spread)


def test_pairs_on_the_same_images_leave_out_what_is_hard_for_both(areas):
    assert interval(replicates(areas) - replicates(areas.copy())) == (0.0, 0.0)
    worse = areas.copy()
    worse[:, 0] -= areas[:, 0] // 10  # a tenth less is right on every image
    low, high = interval(replicates(worse) - replicates(areas))
    alone = interval(replicates(areas))
    assert high < 0
    assert high - low < (alone[1] - alone[0]) / 3
