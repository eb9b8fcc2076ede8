"""Cross entropy of enlarged logits and its gradient against F.interpolate and F.cross_entropy in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from segformer.models.ops.cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_reference

pytest.importorskip("triton", reason="Triton is not installed")

# Largest difference over largest value; results are float32, the gradient has the type of the logits.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
# Pixel weights, class weights, label smoothing
OPTIONS = [(False, False, 0.0), (True, False, 0.0), (False, True, 0.1), (True, True, 0.3)]
# B, K, h, w, H, W
SHAPES = [
    (1, 1, 1, 1, 3, 2),  # one class, one pixel
    (2, 2, 2, 2, 8, 8),  # factor 4
    (1, 5, 5, 2, 7, 5),  # several chunks of rows, odd factors
    (1, 3, 1, 9, 2, 20),  # several chunks of columns
    (1, 4, 5, 3, 3, 2),  # smaller than the logits
    (1, 19, 2, 2, 1, 17),  # more pixels of a cell than a program makes at once
    (1, 33, 2, 2, 4, 4),
    (1, 150, 2, 2, 4, 5),  # 5 parts
    (1, 161, 1, 2, 2, 3),  # 2 warps
    (1, 1024, 1, 2, 1, 3),
]
LARGE = [
    (2, 150, 128, 128, 512, 512),
    (1, 19, 256, 512, 1024, 2048),
    (2, 2, 64, 64, 256, 256),
    (2, 171, 33, 47, 131, 187),
    (1, 1000, 16, 16, 61, 67),
]


def draw(shape: tuple[int, ...], option: int = 3, scale: float = 2.0) -> tuple[Tensor, Tensor, int, dict]:
    """Logits (B, K, h, w) in channels-last memory, labels, of which a fifth is ignored, and weights."""
    batch, count, h, w, height, width = shape
    pixels, classes, smoothing = OPTIONS[option]
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(batch, h, w, count, generator=generator).permute(0, 3, 1, 2)
    target, ignore = torch.randint(0, count, (batch, height, width), generator=generator), -100
    chance, weights = torch.rand(2, *target.shape, generator=generator)
    if count <= 255:
        target, ignore = target.to(torch.uint8), 255
    target[chance < 0.2] = ignore
    found = {"pixel_weights": weights} if pixels else {}
    found |= {"class_weights": 0.1 + torch.rand(count, generator=generator)} if classes else {}
    return logits, target, ignore, {**found, "label_smoothing": smoothing}


@pytest.fixture
def check(device: torch.device, called: list[str]) -> Callable[..., list[Tensor]]:
    """Compare total, -log p of every pixel and gradient with those of float64."""

    def placed(weights: dict[str, Any], place: torch.device | torch.dtype) -> dict[str, Any]:
        return {name: one.to(place) if isinstance(one, Tensor) else one for name, one in weights.items()}

    def compare(
        logits: Tensor, target: Tensor, ignore: int, weights: dict, factor: float = 1.0
    ) -> list[Tensor]:
        leaf, exact = logits.to(device).requires_grad_(), logits.double().requires_grad_()
        total, losses = upsampled_cross_entropy(leaf, target.to(device), ignore, **placed(weights, device))
        (grad,) = torch.autograd.grad(total, leaf, torch.full_like(total, 0.5))
        wide = placed(weights, torch.float64)
        right, plain = upsampled_cross_entropy_reference(exact, target, ignore, **wide)
        (best,) = torch.autograd.grad(right, exact, torch.full_like(right, 0.5))
        assert total.dtype == losses.dtype == torch.float32
        assert grad.dtype == logits.dtype
        assert grad.is_contiguous(memory_format=torch.channels_last)
        for value, expected in ((total, right), (losses, plain), (grad, best)):
            limit = factor * LIMITS[value.dtype] * expected.detach().abs().max() + 1e-7
            assert value.shape == expected.shape
            assert (value.detach().cpu() - expected.detach()).abs().max() <= limit
        assert called.pop() == "cross_entropy.forward"
        return [total, losses, grad]

    return compare


@pytest.mark.parametrize("shape", SHAPES, ids=str)  # with all options between them
def test_loss_and_gradient_are_those_of_float64(check, shape):
    check(*draw(shape, SHAPES.index(shape) % len(OPTIONS)))


def test_without_a_gradient_the_losses_are_the_same(device, called):
    logits, target, ignore, _ = draw((1, 5, 2, 6, 3, 7))
    leaf = logits.to(device).requires_grad_()
    alone, with_gradient = (
        upsampled_cross_entropy(given, target.to(device), ignore, label_smoothing=0.1)
        for given in (logits.to(device), leaf)
    )
    assert all(torch.equal(left, right) for left, right in zip(alone, with_gradient, strict=True))


@pytest.mark.parametrize("layout", ["bfloat16", "class outermost", "every second column", "one image, twice"])
def test_logits_of_other_types_and_strides(check, layout):
    logits, target, *rest = draw((2, 6, 2, 2, 3, 4))
    logits = {
        "bfloat16": logits.bfloat16(),
        "class outermost": logits.contiguous(),
        "every second column": torch.randn(2, 2, 4, 6)[:, :, ::2].permute(0, 3, 1, 2),
        "one image, twice": logits[:1].expand(2, -1, -1, -1),
    }[layout]
    labels = torch.stack([target, target], dim=-1)[..., 0]  # not contiguous
    check(logits, labels, *rest)


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_logits_far_apart(check, scale):
    """Corners disagree by more than float32 can exponentiate: the maximum is taken at the pixel itself."""
    check(*draw((1, 7, 2, 2, 6, 6), scale=scale), factor=2.5)


def test_everything_ignored_is_zero(device, called):
    logits = torch.randn(1, 4, 2, 2, device=device, requires_grad=True)
    target = torch.full((1, 5, 5), 255, dtype=torch.uint8, device=device)
    total, losses = upsampled_cross_entropy(logits, target, 255, label_smoothing=0.1)
    total.backward()
    assert total == 0
    assert not losses.any()
    assert not logits.grad.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan_and_reads_nothing_else(device, called, label):
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=device)
    target[0, 1, 2] = label
    logits, weights = torch.randn(1, 4, 2, 2, device=device), torch.ones(4, device=device)
    total, losses = upsampled_cross_entropy(logits, target, 255, class_weights=weights)
    assert total.isnan()
    assert losses.isnan().nonzero().tolist() == [[0, 1, 2]]


def test_nothing_around_the_logits_is_read(device, called, surrounded):
    logits, target, ignore, _ = draw((1, 6, 2, 3, 5, 6))
    found = []
    for (inside,) in surrounded(logits.permute(0, 2, 3, 1)):
        leaf = inside.permute(0, 3, 1, 2).requires_grad_()
        total, losses = upsampled_cross_entropy(leaf, target.to(device), ignore)
        found.append((total, losses, torch.autograd.grad(total, leaf)[0]))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none")
@pytest.mark.parametrize("option", [0, 3])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_sizes_of_a_network(check, shape, dtype, option):
    logits, *rest = draw(shape, option)
    # the largest term of a softmax is 1 - p
    first, second = (check(logits.to(dtype), *rest, factor=5) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
