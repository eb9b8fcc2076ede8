"""Classes of enlarged logits and their confusion matrix against F.interpolate in float64."""

import pytest
import torch
import torch.nn.functional as F

from segformer.models.ops.argmax import upsample_argmax, upsample_confusion

pytest.importorskip("triton", reason="Triton is not installed")

# B, K, h, w, H, W
SHAPES = [
    (1, 1, 1, 1, 3, 2),
    (2, 5, 2, 2, 8, 8),
    (1, 19, 5, 3, 4, 2),
    (1, 2, 1, 18, 1, 19),
    (1, 150, 2, 2, 5, 7),
    (1, 300, 2, 2, 3, 5),
]
LARGE = [(2, 150, 128, 128, 512, 512), (1, 19, 256, 512, 1024, 2048), (2, 171, 33, 47, 131, 187)]
SHAPES += LARGE if torch.cuda.is_available() else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_class_is_the_highest_one_and_every_pixel_that_is_not_ignored_counts_once(device, called, shape):
    torch.manual_seed(0)
    classes, size = shape[1], shape[4:]
    logits = torch.randn(shape[:4]).to(torch.float32 if SHAPES.index(shape) % 2 else torch.bfloat16)
    odd = logits.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).to(device)
    found = upsample_argmax(odd, size).cpu()
    enlarged = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    assert found.dtype == (torch.uint8 if classes <= 256 else torch.int64)
    reached = enlarged.gather(1, found.long()[:, None])[:, 0]
    # Equals up to the rounding of float32 are equals; far from the origin, that of places counts too.
    assert (reached >= enlarged.amax(1) - (1e-4 if shape in LARGE else 1e-6)).all()
    # Runs of one label, as in a picture, and some labels to ignore.
    target = torch.randint(0, classes, (shape[0], 1 + size[0] // 3, 1 + size[1] // 3))
    target = target.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : size[0], : size[1]].contiguous()
    ignore = 255 if classes <= 255 else -1
    target[torch.rand(target.shape) < 0.1] = ignore
    if classes <= 255:
        target = target.to(torch.uint8)
    counted = target != ignore
    pairs = target[counted].long() * classes + found[counted].long()
    expected = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    assert torch.equal(upsample_confusion(odd, target.to(device), ignore).cpu(), expected)
    assert called == ["argmax.upsample_argmax", "argmax.upsample_confusion"]


@pytest.mark.parametrize("winners", [(3, 5), (4, 36), (31, 32), (36, 37)])
def test_the_first_of_equals_wins(device, called, winners):
    logits = torch.full((1, 40, 2, 3), -2.0, device=device)
    logits[:, list(winners)] = -1.0
    assert (upsample_argmax(logits, (4, 5)) == winners[0]).all()


def test_zero_and_minus_zero_are_equal(device, called):
    logits = torch.full((1, 40, 2, 2), -1.0, device=device)
    logits[:, 3, 0, 0] = -0.0
    logits[:, 37, 0, 0] = 0.0
    assert upsample_argmax(logits, (4, 4))[0, 0, 0] == 3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("classes", [20, 37])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf"), -1e35])
def test_what_is_no_usual_number_gives_some_class(device, called, value, classes):
    logits = torch.full((1, classes, 2, 2), value, device=device)
    target = torch.zeros(1, 3, 3, dtype=torch.int64, device=device)
    assert (upsample_argmax(logits, (3, 3)) < classes).all()
    assert upsample_confusion(logits, target, 255).sum() == 9


def test_a_label_that_is_no_class_is_not_counted(device, called):
    target = torch.tensor([[[0, 1, 7, -3, 2**40, 255]]], device=device)
    found = upsample_confusion(torch.randn(1, 3, 1, 2, device=device), target, 255)
    assert found.sum(1).tolist() == [1, 1, 0]
