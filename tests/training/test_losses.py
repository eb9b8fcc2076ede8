"""Losses against closed forms, torch's own cross entropy, and definitions written out pixel by pixel."""

import math

import pytest
import torch
import torch.nn.functional as F

from segformer.errors import ConfigError
from segformer.training.losses import (
    LOSSES,
    LossConfig,
    SegmentationLoss,
    boundary_cross_entropy,
    cross_entropy,
    dice,
    focal,
    lovasz,
    near_boundary,
    ohem_cross_entropy,
    soft_cross_entropy,
)


def problem(classes=4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, K, 6, 7) and labels (2, 23, 26), the first rows of the first image ignored."""
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 6, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, classes, (2, 23, 26), dtype=torch.uint8)
    target[0, :5] = 255
    return logits, target


def enlarged(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)


def pixels(logits: torch.Tensor, target: torch.Tensor) -> list[list[tuple[list[float], int]]]:
    """For each image the (probability of each class, label) of its labeled pixels, in plain numbers."""
    images = []
    for image, labels in zip(enlarged(logits, target).detach(), target, strict=True):
        rows = [
            (image[:, y, x].tolist(), int(labels[y, x]))
            for y in range(labels.shape[0])
            for x in range(labels.shape[1])
            if labels[y, x] != 255
        ]
        exponentials = [([math.exp(z) for z in scores], label) for scores, label in rows]
        images.append([([e / sum(exps) for e in exps], label) for exps, label in exponentials])
    return images


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_without_labels_changes_no_gradient_of_another(name, dtype):
    logits, target = problem()
    target[1] = 255
    logits = logits.detach().to(dtype).requires_grad_()
    loss, _ = SegmentationLoss(LossConfig(terms={name: 1.0}), 4)(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss > 0
    assert grad.isfinite().all()
    assert grad[0].any()
    assert torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logits_far_apart_give_finite_gradients(name, scale):
    logits, target = problem()
    logits = (logits.detach().float() * scale).requires_grad_()
    for gamma in (0, 0.5, 2) if name == "focal" else (2,):
        cfg = LossConfig(terms={name: 1.0}, focal_gamma=gamma, label_smoothing=0.1)
        loss, _ = SegmentationLoss(cfg, 4)(logits, target)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_numerical_one(name):
    logits, target = problem()
    criterion = SegmentationLoss(LossConfig(terms={name: 1.0}), 4)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target)[0], (logits,), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_is_its_definition_pixel_by_pixel(gamma):
    logits, target = problem()
    hits = [probabilities[label] for image in pixels(logits, target) for probabilities, label in image]
    expected = sum(-((1 - hit) ** gamma) * math.log(hit) for hit in hits)
    for average, count in (("all", target.numel()), ("valid", len(hits))):
        assert focal(logits, target, focal_gamma=gamma, average=average).item() == pytest.approx(
            expected / count
        )


def test_dice_is_its_definition_pixel_by_pixel():
    logits, target = problem()
    target[target == 2] = 0  # a class that no pixel has is left out of the mean
    found = [pixel for image in pixels(logits, target) for pixel in image]
    scores = []
    for k in (0, 1, 3):
        overlap = sum(probabilities[k] for probabilities, label in found if label == k)
        total = sum(probabilities[k] for probabilities, _ in found) + sum(label == k for _, label in found)
        scores.append(1 - 2 * overlap / total)
    assert dice(logits, target).item() == pytest.approx(sum(scores) / 3)


def test_lovasz_is_the_extension_of_the_jaccard_loss_by_its_definition():
    logits, target = problem()
    target[0][target[0] == 2] = 0
    images = []
    for found in pixels(logits, target):
        extensions = []
        for k in sorted({label for _, label in found}):
            truth = {i for i, (_, label) in enumerate(found) if label == k}
            error = [1 - p[k] if label == k else p[k] for p, label in found]
            wrong: set[int] = set()
            before = total = 0.0
            for i in sorted(range(len(found)), key=lambda i: -error[i]):
                wrong.add(i)  # the Jaccard loss where exactly these pixels are wrong
                jaccard = 1 - len(truth - wrong) / len(truth | wrong)
                total, before = total + error[i] * (jaccard - before), jaccard
            extensions.append(total)
        images.append(sum(extensions) / len(extensions))
    assert lovasz(logits, target).item() == pytest.approx(sum(images) / 2)


def naive_boundary(target: torch.Tensor, radius: int) -> torch.Tensor:
    near = torch.zeros(target.shape, dtype=torch.bool)
    for b, y, x in ((target != 255).nonzero()).tolist():
        window = target[b, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        near[b, y, x] = bool(((window != 255) & (window != target[b, y, x])).any())
    return near


def patches() -> torch.Tensor:
    """Labels (2, 23, 26) in areas of several pixels, the last class 254, with ignored pixels among them."""
    torch.manual_seed(1)
    coarse = torch.tensor([0, 1, 2, 254], dtype=torch.uint8)[torch.randint(0, 4, (2, 4, 5))]
    target = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :23, :26].contiguous()
    target[:, 9:12] = 255
    target[torch.rand(target.shape) < 0.05] = 255
    return target


@pytest.mark.parametrize("radius", [1, 2, 3, 7, 40])
def test_the_boundary_is_every_pixel_with_another_class_in_its_window(radius):
    target = patches()
    expected = naive_boundary(target, radius)
    assert expected.any()
    assert torch.equal(near_boundary(target, radius), expected)
    assert torch.equal(near_boundary(target.long(), radius), expected)


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)])
@pytest.mark.parametrize(("average", "radius", "weight"), [("all", 1, 0.5), ("valid", 3, 2.0)])
def test_boundary_cross_entropy_weighs_the_pixels_near_a_boundary(class_weights, average, radius, weight):
    logits, _ = problem()
    target = patches()
    target[target == 254] = 3
    losses = F.cross_entropy(
        enlarged(logits, target), target.long(), class_weights, ignore_index=255, reduction="none"
    )
    count = target.numel() if average == "all" else int((target != 255).sum())
    expected = (losses * (1 + weight * naive_boundary(target, radius))).sum() / count
    options = {"boundary_radius": radius, "boundary_weight": weight, "average": average}
    got = boundary_cross_entropy(logits, target, class_weights=class_weights, **options)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_soft_cross_entropy_is_that_of_torch_and_float32_of_bfloat16_scores():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 7, dtype=torch.float64).softmax(dim=1)
    got, expected = soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, expected)))
    rough = (logits.detach() * 1000).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_cross_entropy(rough, targets.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(soft_cross_entropy(rough.double(), targets).item(), rel=1e-6)
    assert soft_cross_entropy(rough * 1e30, targets).isfinite()


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 1.0, 2.0, 4.0]])
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.3, 0.0), (0.0, 0.25), (0.3, 0.9), (1.0, 0.0)])
def test_ohem_averages_the_pixels_below_the_threshold_or_the_hardest_share(threshold, min_kept, weights):
    logits, target = problem()
    hits = sorted((p[label], weights[label]) for image in pixels(logits, target) for p, label in image)
    least = max(1, math.ceil(min_kept * len(hits)))
    kept = [pair for index, pair in enumerate(hits) if pair[0] < threshold or index < least]
    classes = torch.tensor(weights, dtype=torch.float64)
    got = ohem_cross_entropy(
        logits, target, ohem_threshold=threshold, ohem_min_kept=min_kept, class_weights=classes
    )
    assert got.item() == pytest.approx(sum(-weight * math.log(hit) for hit, weight in kept) / len(kept))


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
        ({"label_smoothing": 2.0}, "loss.label_smoothing=2.0 must be from 0 to 1"),
        ({"focal_gamma": -1.0}, "loss.focal_gamma=-1.0 must be 0 or more"),
        ({"boundary_weight": math.nan}, "loss.boundary_weight=nan must be 0 or more"),
        ({"boundary_radius": 0}, "loss.boundary_radius=0 must be from 1 to 1024"),
        ({}, "loss.terms={} has no loss"),
        ({"terms": {"dice": 1.0}, "class_weights": [1.0]}, "has 1 numbers for 4 classes"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SegmentationLoss(LossConfig(**wrong), 4)
