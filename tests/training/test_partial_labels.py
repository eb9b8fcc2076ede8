"""Labels of a part of the classes or of several at once, against probabilities summed up pixel by pixel."""

import math

import pytest
import torch
import torch.nn.functional as F

from segformer.data.loading.mixture import LabelMap
from segformer.errors import ConfigError
from segformer.models.ops.backend import BACKENDS
from segformer.training.losses import LOSSES, LossConfig, SegmentationLoss
from segformer.training.partial_labels import PartialLabels, check_partial

K = 6
FULL = LabelMap(tuple("abcdef"), tuple((k,) for k in range(K)))
PART = LabelMap(("x", "void", "y", "z"), ((4,), (), (1,), (0,)))
JOINT = LabelMap(("street", "rest"), ((1, 2), (5, 0, 4)))


def problem(maps: list[LabelMap]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, K, 5, 6), own labels (B, 17, 21) and the set of each of two images a set."""
    torch.manual_seed(0)
    sets = torch.arange(len(maps)).repeat(2)
    logits = 3 * torch.randn(len(sets), K, 5, 6, dtype=torch.float64)
    labels = torch.stack([torch.randint(0, len(maps[s].labels), (17, 21)) for s in sets.tolist()])
    labels[0, :4] = 255
    return logits.requires_grad_(), labels, sets


def targets(maps: list[LabelMap], labels: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    tables = torch.stack([torch.from_numpy(one.table(range(K))) for one in maps])
    return tables[sets[:, None, None], labels]


def naive(
    maps: list[LabelMap], logits: torch.Tensor, labels: torch.Tensor, sets: torch.Tensor
) -> torch.Tensor:
    """Mean over all pixels of -log of the summed probabilities, pixel by pixel in plain loops."""
    enlarged = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    total = enlarged.new_zeros(())
    for image, mask, index in zip(enlarged, labels.tolist(), sets.tolist(), strict=True):
        groups = maps[index].groups
        annotated = [k for group in groups for k in group]
        for y, row in enumerate(mask):
            for x, label in enumerate(row):
                if label != 255 and groups[label]:
                    shares = {k: image[k, y, x].exp() for k in annotated}
                    total = total - (sum(shares[k] for k in groups[label]) / sum(shares.values())).log()
    return total / labels.numel()


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("maps", [[FULL, PART], [PART, JOINT, FULL]], ids=["partial", "joint"])
def test_cross_entropy_is_minus_log_of_the_summed_probabilities(maps, ops):
    logits, labels, sets = problem(maps)
    criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), K, BACKENDS[ops])
    partial = PartialLabels(maps, K)
    loss, _ = criterion(partial(logits, sets, (17, 21)), targets(maps, labels, sets))
    expected = naive(maps, logits, labels, sets)
    (grad,), (wanted) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (grad - wanted).abs().max() < 1e-14
    unseen = sorted(set(range(K)) - set(PART.annotated))
    assert not grad[sets == maps.index(PART)][:, unseen].any(), "what is not annotated is not pushed away"


def test_logits_of_sets_that_annotate_all_classes_are_as_they_came():
    logits, _, sets = problem([FULL, FULL])
    assert PartialLabels([FULL, FULL], K)(logits, sets, (17, 21)) is logits


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_that_of_a_network_of_the_labels_of_the_set(name):
    """Of one set: the logits of its labels alone, joined at the size of the label, and its numbers."""
    for one in (PART, JOINT):
        logits, labels, sets = problem([one])
        enlarged = F.interpolate(logits, (17, 21), mode="bilinear", align_corners=False)
        kept = [group for group in one.groups if group]
        own = torch.stack([enlarged[:, list(group)].exp().sum(1).log() for group in kept], 1)
        numbers = torch.tensor(
            [kept.index(g) if g else 255 for g in one.groups] + [255] * (256 - len(one.groups))
        )
        cfg = LossConfig(terms={name: 1.0}, average="valid")
        expected, _ = SegmentationLoss(cfg, len(kept))(own, numbers[labels])
        mapped = PartialLabels([one], K)(logits, sets, (17, 21))
        loss, _ = SegmentationLoss(cfg, K)(mapped, targets([one], labels, sets))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        grads = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
        assert (grads[0] - grads[1]).abs().max() < 1e-9


def test_half_precision_logits_stay_finite():
    logits, labels, sets = problem([PART, JOINT])
    for dtype in (torch.float16, torch.bfloat16):
        for maps in ([PART, FULL], [PART, JOINT]):
            mapped = PartialLabels(maps, K)(logits.detach().to(dtype), sets, (17, 21))
            loss, _ = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), K)(
                mapped, targets(maps, labels.clamp(max=1), sets)
            )
            assert math.isfinite(loss.item())


def test_settings_without_a_meaning_for_the_labels_are_refused():
    smooth, weighted = LossConfig(label_smoothing=0.1), LossConfig(class_weights=[1.0] * K)
    check_partial(smooth, [FULL], K)
    check_partial(weighted, [FULL, PART], K)
    for cfg, maps in ((smooth, [FULL, PART]), (smooth, [FULL, JOINT]), (weighted, [JOINT])):
        with pytest.raises(
            ConfigError, match=r"loss\.(label_smoothing|class_weights) .*; give loss\.\w+=(0|\[\])$"
        ):
            check_partial(cfg, maps, K)
