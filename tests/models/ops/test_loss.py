"""Cross entropy, argmax and confusion of enlarged logits against interpolate and the library's own."""

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_same

from segformer.models.ops import native, resize
from segformer.models.ops.argmax import upsample_argmax, upsample_confusion, upsample_confusion_reference
from segformer.models.ops.cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_reference


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 rows and 7 columns, so that small images have many."""
    monkeypatch.setattr(resize, "band_rows", lambda device, row_bytes: 3)
    monkeypatch.setattr(resize, "_TILE_COLUMNS", 7)


@pytest.mark.parametrize(
    ("source", "target", "classes"),
    [
        ((9, 13), (35, 50), 150),
        ((16, 16), (64, 64), 2),
        ((8, 8), (8, 8), 1),
        ((1, 2), (7, 9), 300),
        ((12, 9), (5, 4), 5),
    ],
)
def test_upsample_argmax_is_the_argmax_of_the_enlarged_logits(source, target, classes, small_tiles):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, *source, dtype=torch.float64)
    got = upsample_argmax(logits, target)
    assert torch.equal(got.long(), F.interpolate(logits, target, mode="bilinear").argmax(1))
    assert got.dtype == (torch.uint8 if classes <= 256 else torch.int64)


@pytest.mark.parametrize("classes", [2, 300])
def test_upsample_confusion_counts_target_against_argmax_without_the_ignored(classes):
    torch.manual_seed(0)
    logits, target = torch.randn(2, classes, 5, 6), torch.randint(0, classes, (2, 17, 23))
    target[0, :4] = 999
    predicted = F.interpolate(logits, (17, 23), mode="bilinear").argmax(1)
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for truth, guess in zip(target.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if truth != 999:
            expected[truth, guess] += 1
    for run in (upsample_confusion, upsample_confusion_reference):
        assert torch.equal(run(logits, target, 999), expected)
        target[0, 0] = classes + 3  # ignored until now; no class, and left out as well
        assert torch.equal(run(logits, target, 999), expected)


def problem(dtype=torch.float64, classes=5):
    """Logits (2, K, 9, 13), labels (2, 35, 50) with ignored pixels, class weights and pixel weights."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, classes, 9, 13, dtype=dtype)).requires_grad_()
    target = torch.randint(0, classes, (2, 35, 50), dtype=torch.uint8)
    target[0, :9] = 255
    target[1, 20:, 7] = 255
    return logits, target, torch.rand(classes, dtype=dtype), torch.rand(2, 35, 50, dtype=dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_upsampled_cross_entropy_is_cross_entropy_of_interpolate(smoothing, weighted, masked, small_tiles):
    logits, target, class_weights, pixel_weights = problem()
    kwargs = {
        "class_weights": class_weights if weighted else None,
        "pixel_weights": pixel_weights if masked else None,
        "label_smoothing": smoothing,
    }
    total, losses = upsampled_cross_entropy(logits, target, 255, **kwargs)
    expected, each = upsampled_cross_entropy_reference(logits, target, 255, **kwargs)
    torch.testing.assert_close(losses, each)
    assert_same(total, expected, (logits,))


@pytest.mark.parametrize("target_size", [(36, 52), (33, 49), (9, 13), (5, 6), (100, 14)])
def test_upsampled_cross_entropy_takes_any_label_size(target_size):
    logits = problem()[0]
    target = torch.randint(0, 5, (2, *target_size), dtype=torch.uint8)
    total, _ = upsampled_cross_entropy(logits, target, 255)
    assert_same(total, upsampled_cross_entropy_reference(logits, target, 255)[0], (logits,))


@pytest.mark.parametrize("compiled", [True, False])
def test_upsampled_cross_entropy_is_finite_and_right_where_the_probability_underflows(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda tensor: False)
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, :, 0] = 300.0
    logits.requires_grad_()
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    total, _ = upsampled_cross_entropy(logits, target, 255)
    assert_same(total, upsampled_cross_entropy_reference(logits, target, 255)[0], (logits,))


def test_upsampled_cross_entropy_never_holds_the_enlarged_logits():
    """The largest tensor made for 150 classes at 256 x 256 is the gradient of the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    logits = torch.randn(2, 150, 64, 64)
    with Largest() as largest:
        upsampled_cross_entropy(logits, torch.zeros(2, 256, 256, dtype=torch.uint8), 255)
    assert largest.numel <= 2 * 150 * 64 * 64


def test_logits_in_bfloat16_and_under_autocast_are_computed_with_in_float32():
    logits, target, class_weights, pixel_weights = problem(torch.bfloat16)
    weights = {"class_weights": class_weights, "pixel_weights": pixel_weights}
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = upsampled_cross_entropy(logits, target, 255, **weights)
    wide = logits.detach().float().requires_grad_()
    expected, each = upsampled_cross_entropy(wide, target, 255, **weights)
    assert total.dtype == losses.dtype == torch.float32
    assert torch.equal(total, expected)
    assert torch.equal(losses, each)
    (grad,), (exact,) = torch.autograd.grad(total, logits), torch.autograd.grad(expected, wide)
    assert torch.equal(grad, exact.bfloat16())
    for op, inputs in ((upsample_argmax, ((35, 50),)), (upsample_confusion, (target, 255))):
        assert torch.equal(op(logits.detach(), *inputs), op(wide.detach(), *inputs))


@pytest.mark.parametrize(
    ("logits", "target", "weights", "message"),
    [
        ((2, 5, 4, 4), (3, 8, 8), {}, "don't belong together"),
        ((2, 5, 4, 4), (1, 8, 8), {}, "don't belong together"),
        ((2, 5, 4, 4), (8, 8), {}, "don't belong together"),
        ((2, 5, 4, 4), (2, 0, 8), {}, "side of 0"),
        ((2, 5, 4, 4), (2, 8, 8), {"class_weights": (6,)}, r"class_weights of \(6,\).*give \(5,\)"),
        ((2, 5, 4, 4), (2, 8, 8), {"pixel_weights": (2, 8, 7)}, r"pixel_weights.*give \(2, 8, 8\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(logits, target, weights, message):
    given = {name: torch.ones(shape) for name, shape in weights.items()}
    with pytest.raises(ValueError, match=message):
        upsampled_cross_entropy(torch.zeros(logits), torch.zeros(target, dtype=torch.uint8), 255, **given)
    if not weights:
        with pytest.raises(ValueError, match=message):
            upsample_confusion(torch.zeros(logits), torch.zeros(target, dtype=torch.uint8), 255)
