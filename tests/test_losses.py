"""Losses against closed forms and the library's own cross entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from segformer.errors import ConfigError
from segformer.losses import (
    LOSSES,
    LossConfig,
    SegmentationLoss,
    cross_entropy,
    dice,
    focal,
    lovasz,
    ohem_cross_entropy,
)


def problem(classes=4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, K, 6, 7) and labels (2, 23, 26), the first rows of the first image ignored."""
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 6, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, classes, (2, 23, 26), dtype=torch.uint8)
    target[0, :5] = 255
    return logits, target


def certain(target: torch.Tensor, classes: int, confidence=60.0) -> torch.Tensor:
    """Logits at label size that give (nearly) all probability to `target`."""
    return confidence * F.one_hot(target.long().clamp(max=classes - 1), classes).permute(0, 3, 1, 2).double()


def enlarged(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)])
def test_cross_entropy_divides_by_all_pixels_or_by_the_valid_ones(class_weights):
    logits, target = problem()
    total = F.cross_entropy(
        enlarged(logits, target), target.long(), class_weights, ignore_index=255, reduction="sum"
    )
    for average, count in (("all", 2 * 23 * 26), ("valid", 2 * 23 * 26 - 5 * 26)):
        got = cross_entropy(logits, target, average=average, class_weights=class_weights)
        torch.testing.assert_close(got, total / count)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, total / count)]
        torch.testing.assert_close(*gradients)


def test_valid_average_without_weights_is_the_mean_of_torch():
    logits, target = problem()
    expected = F.cross_entropy(enlarged(logits, target), target.long(), ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, target, average="valid", label_smoothing=0.1), expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("average", ["all", "valid"])
def test_a_batch_without_labels_gives_zero_with_zero_gradients(name, average):
    logits = problem()[0]
    weights = [1.0, 2.0, 3.0, 4.0]
    cfg = LossConfig(terms={name: 1.0}, average=average, label_smoothing=0.1, class_weights=weights)
    loss, _ = SegmentationLoss(cfg, 4)(logits, torch.full((2, 23, 26), 255, dtype=torch.uint8))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_numerical_one(name):
    logits, target = problem()
    criterion = SegmentationLoss(LossConfig(terms={name: 1.0}), 4)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target)[0], (logits,), atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_certain_and_right_prediction_costs_nothing_and_a_wrong_one_does(name):
    target = problem()[1]
    criterion = SegmentationLoss(LossConfig(terms={name: 1.0}), 4)
    assert criterion(certain(target, 4), target)[0].item() < 1e-9
    assert criterion(certain((target + 1) % 4, 4), target)[0].item() > 0.5


def test_focal_with_gamma_zero_is_cross_entropy_and_with_two_its_definition():
    logits, target = problem()
    torch.testing.assert_close(focal(logits, target, gamma=0.0), cross_entropy(logits, target))
    hit = enlarged(logits, target).softmax(1).gather(1, target.long().clamp(max=3)[:, None])[:, 0]
    expected = -((1 - hit) ** 2 * hit.log())[target != 255].sum() / target.numel()
    torch.testing.assert_close(focal(logits, target, gamma=2.0), expected)


def test_dice_is_one_minus_the_f1_score_for_certain_predictions():
    target = torch.tensor([[[0, 0, 1, 1], [1, 1, 255, 0]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 1], [1, 0, 0, 2]]])
    # class 0: overlap 1, predicted 2, labelled 3; class 1: overlap 3 of 4 and 4; class 2: absent
    expected = ((1 - 2 / 5) + (1 - 6 / 8)) / 2
    assert dice(certain(predicted, 3), target).item() == pytest.approx(expected)


def test_lovasz_is_one_minus_the_iou_for_certain_predictions():
    target = torch.tensor([[[0, 0, 1, 1], [1, 1, 255, 0]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 1], [1, 0, 0, 2]]])
    expected = ((1 - 1 / 4) + (1 - 3 / 5)) / 2
    assert lovasz(certain(predicted, 3), target).item() == pytest.approx(expected)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.3, 0.0), (0.0, 0.25), (0.3, 0.9), (1.0, 0.0)])
def test_ohem_averages_the_pixels_below_the_threshold_or_the_hardest_share(threshold, min_kept):
    logits, target = problem()
    losses = F.cross_entropy(enlarged(logits, target), target.long(), ignore_index=255, reduction="none")
    losses = losses[target != 255].sort(descending=True).values
    count = max(int((losses >= -math.log(max(threshold, 1e-30))).sum()), math.ceil(min_kept * len(losses)), 1)
    got = ohem_cross_entropy(logits, target, threshold=threshold, min_kept=min_kept)
    torch.testing.assert_close(got, losses[:count].mean())


def test_the_loss_is_the_weighted_sum_of_its_terms_and_reports_each_without_gradient():
    logits, target = problem()
    loss, parts = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0, "dice": 0.5}), 4)(logits, target)
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy(logits, target).detach())
    torch.testing.assert_close(parts["dice"], dice(logits, target).detach())
    torch.testing.assert_close(loss.detach(), parts["cross_entropy"] + 0.5 * parts["dice"])
    assert not any(part.requires_grad for part in parts.values())


def test_bfloat16_logits_give_a_float32_loss():
    logits, target = problem()
    criterion = SegmentationLoss(LossConfig(terms=dict.fromkeys(LOSSES, 1.0)), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = criterion(logits.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in parts.values())
    expected, _ = criterion(logits.bfloat16().double(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_move_with_the_module_and_stay_out_of_checkpoints():
    criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}, class_weights=[1.0, 2.0]), 2)
    assert criterion.to("meta").class_weights.is_meta
    assert criterion.state_dict() == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"terms": {"crossentropy": 1.0}}, "unknown losses crossentropy; use cross_entropy"),
        ({"average": "mean"}, "loss.average=mean is unknown; use all or valid"),
        ({"terms": {"dice": -1.0}}, "negative"),
        ({"label_smoothing": 2.0}, "loss.label_smoothing=2.0 must be between 0 and 1"),
        ({}, "loss.terms is empty"),
        ({"terms": {"dice": 1.0}, "class_weights": [1.0]}, "has 1 numbers for 4 classes"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SegmentationLoss(LossConfig(**wrong), 4)
