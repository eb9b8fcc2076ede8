"""The operations of the network through the kernels: casts, strides, argument order, gradients, shapes.

On a GPU the operations take the kernels by themselves. In the interpreter their modules are told that every
tensor is on one; what is compared with is the reference in float64, and for the network what runs on a CPU.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from comparing import distance
from torch import Tensor

from segformer.models.head import AllMLPHead
from segformer.models.mit import MixTransformer
from segformer.models.ops import argmax, cross_entropy, decode, depthwise, dispatch, resize
from segformer.models.ops.backend import BACKENDS
from segformer.models.segformer import SegFormer
from segformer.training.losses import LossConfig, SegmentationLoss

pytest.importorskip("triton", reason="Triton is not installed")

FUNCTIONS = {
    "depthwise": ("forward", "backward"),
    "resize": ("upsample_sum", "upsample_sum_backward"),
    "cross_entropy": ("forward",),
    "argmax": ("upsample_argmax", "upsample_confusion"),
}
FP32, BF16 = torch.float32, torch.bfloat16
# As in the tests of the kernels: ten roundings of float32, one or two of bfloat16.
TOLERANCE = {FP32: 2e-6, BF16: 5e-3}
CLASSES, IGNORE = 8, 255


@pytest.fixture
def through_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Send every operation from now on to its kernel; the list of those that were called."""
    called: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            called.append(name)
            return function(*given)

        return call

    def begin() -> list[str]:
        for kernel, names in FUNCTIONS.items():
            module = import_module(f"segformer.models.ops.{kernel}_triton")
            for name in names:
                monkeypatch.setattr(module, name, recorded(f"{kernel}.{name}", getattr(module, name)))
        if device.type == "cpu":
            monkeypatch.setattr(dispatch, "use_triton", lambda tensor: tensor.dtype in dispatch.FLOATS)
            for module in (dispatch, decode):
                monkeypatch.setattr(module, "exact_on_cpu", lambda tensor: False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        return called

    return begin


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def check(
    given: Sequence[Tensor],
    device: torch.device,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tolerance: float,
) -> None:
    """Result and gradients of all of `given`, for a gradient that is not contiguous; `theirs` in float64."""
    leaves = [tensor.to(device).requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    out, expected = ours(*leaves), theirs(*exact)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(expected.shape, generator=generator).to(out.dtype)
    found = torch.autograd.grad(out, leaves, spread(grad.to(device)))
    right = torch.autograd.grad(expected, exact, grad.double())
    assert distance(out, expected) < tolerance
    for leaf, mine, best in zip(leaves, found, right, strict=True):
        assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
        assert distance(mine, best) < tolerance


def randoms(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kinds", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=str)
def test_depthwise_gelu_and_its_gradients_are_those_of_the_reference(device, through_kernels, kinds):
    size, called = (5, 7), through_kernels()
    tokens, weight, bias = randoms((2, 35, 6), (6, 1, 3, 3), (6,))
    given = [spread(tokens.to(kinds[0])), weight.to(kinds[1]), bias.to(kinds[1])]
    check(
        given,
        device,
        lambda tokens, weight, bias: depthwise.depthwise_gelu(tokens, size, weight, bias),
        lambda tokens, weight, bias: depthwise.depthwise_gelu_reference(tokens, size, weight, bias),
        TOLERANCE[kinds[0]],
    )
    assert called == ["depthwise.forward", "depthwise.backward"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_project_sum_and_its_gradients_are_those_of_the_reference(device, through_kernels, dtype):
    called = through_kernels()
    maps, weight, *others = randoms((2, 8, 6, 5), (7, 5), (2, 2, 3, 7), (2, 4, 3, 7), seed=1)
    given = [value.to(dtype) for value in (maps, weight, *map(spread, others))]
    check(
        given,
        device,
        lambda maps, weight, *others: resize.project_sum(maps, weight, list(others)),
        lambda maps, weight, *others: resize.upsample_sum_reference(maps @ weight.t(), list(others)),
        TOLERANCE[dtype],
    )
    assert called == ["resize.upsample_sum", "resize.upsample_sum_backward"]


def loss_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (2, K, 3, 4) in channels-last memory, labels (2, 9, 14), pixel weights and class weights."""
    logits, pixels, classes = randoms((2, 3, 4, CLASSES), (2, 9, 14), (CLASSES,), seed=2)
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, CLASSES, (2, 9, 14), generator=generator)
    target[:, :2] = IGNORE
    return 3 * logits.permute(0, 3, 1, 2).to(dtype), target, pixels.abs(), classes.abs()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights and smoothing"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_and_its_gradient_are_those_of_the_reference(device, through_kernels, dtype, weighted):
    called = through_kernels()
    logits, target, pixels, classes = loss_problem(dtype)

    def settings(place: torch.device, kind: torch.dtype) -> dict[str, Any]:
        if not weighted:
            return {}
        weights = {"pixel_weights": pixels.to(place, kind), "class_weights": classes.to(place, kind)}
        return {**weights, "label_smoothing": 0.1}

    leaf, exact = logits.to(device).requires_grad_(), logits.double().requires_grad_()
    labels = spread(target.to(torch.uint8)).to(device)
    total, losses = cross_entropy.upsampled_cross_entropy(leaf, labels, IGNORE, **settings(device, FP32))
    right = settings(torch.device("cpu"), torch.float64)
    expected, plain = cross_entropy.upsampled_cross_entropy_reference(exact, target, IGNORE, **right)
    (grad,) = torch.autograd.grad(total, leaf, torch.full_like(total, 0.5))
    (best,) = torch.autograd.grad(expected, exact, torch.full_like(expected, 0.5))
    assert distance(total, expected) < TOLERANCE[FP32]
    assert distance(losses, plain) < TOLERANCE[FP32]
    assert grad.dtype == dtype
    assert distance(grad, best) < TOLERANCE[dtype]
    assert called == ["cross_entropy.forward"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_labels_and_confusion_are_those_of_the_reference(device, through_kernels, dtype):
    called = through_kernels()
    logits, target, *_ = loss_problem(dtype)
    expected = argmax.upsample_argmax_reference(logits.double(), (9, 14))
    assert torch.equal(argmax.upsample_argmax(logits.to(device), (9, 14)).cpu(), expected)
    confusion = argmax.upsample_confusion(logits.to(device), target.to(device), IGNORE).cpu()
    counted = target != IGNORE
    pairs = target[counted] * CLASSES + expected[counted].long()
    assert torch.equal(confusion, torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES))
    assert called == ["argmax.upsample_argmax", "argmax.upsample_confusion"]


# 1: it has a gradient
OPERATIONS = {
    "depthwise_gelu": 1,
    "depthwise_gelu_backward": 0,
    "upsample_sum": 1,
    "upsample_sum_backward": 0,
    "upsampled_cross_entropy": 1,
    "upsample_argmax": 0,
    "upsample_confusion": 0,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_types_and_strides_are_those_that_torch_compile_is_told(device, through_kernels, name):
    through_kernels()
    logits, target, pixels, classes = (value.to(device) for value in loss_problem(FP32))
    tokens, weight, bias = (v.to(device, BF16) for v in randoms((2, 12, 6), (6, 1, 3, 3), (6,)))
    base, small = (value.to(device) for value in randoms((1, 4, 6, 5), (1, 2, 3, 5)))
    if OPERATIONS[name]:
        for value in (tokens, weight, bias, base, small, logits):
            value.requires_grad_()
    given = {
        "depthwise_gelu": (tokens, 3, 4, weight, bias),
        "depthwise_gelu_backward": (tokens.detach(), tokens, 3, 4, weight, bias),
        "upsample_sum": (base, [small]),
        "upsample_sum_backward": (base, [2], [3]),
        "upsampled_cross_entropy": (logits, target, pixels, classes, 0.1, IGNORE, True),
        "upsample_argmax": (logits, 9, 14),
        "upsample_confusion": (logits, target, IGNORE),
    }[name]
    torch.library.opcheck(getattr(torch.ops.segformer, name).default, given)


def network(device: torch.device) -> tuple[SegFormer, SegmentationLoss]:
    torch.manual_seed(0)
    dims, ops = (8, 16, 40, 64), BACKENDS["fused"]
    encoder = MixTransformer(
        dims, (1, 1, 1, 1), (1, 2, 5, 8), (8, 4, 2, 1), (4, 4, 4, 4), ops=ops, drop_path_rate=0.0
    )
    model = SegFormer(encoder, AllMLPHead(dims, 16, CLASSES, ops=ops, dropout=0.0), CLASSES)
    criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), CLASSES)
    return model.to(device), criterion.to(device)


def batch(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator)
    target = torch.randint(0, CLASSES, (2, *size), generator=generator)
    target[:, :8] = IGNORE
    return images.to(device), target.to(device)


def step(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and all gradients of a training step, on the CPU."""
    (model, criterion), (images, target) = network(device), batch(size, device)
    logits = model(images)
    loss = criterion(logits, target)[0]
    loss.backward()
    grads = {name: value.grad.cpu().double() for name, value in model.named_parameters()}
    return logits.detach().cpu().double(), loss.detach().cpu().double(), grads


def allowed(device: torch.device) -> float:
    """Relative distance of what a whole network computes: on a GPU the other sums have another order too."""
    return 1e-5 if device.type == "cpu" else 1e-4


@pytest.mark.parametrize("size", [(32, 64), pytest.param((64, 96), marks=pytest.mark.slow)], ids=str)
def test_a_training_step_of_the_network_is_that_of_the_form_for_cpus(device, through_kernels, size):
    logits, loss, grads = step(size, torch.device("cpu"))
    called = through_kernels()
    found_logits, found_loss, found = step(size, device)
    assert distance(found_logits, logits) < allowed(device)
    assert distance(found_loss, loss) < allowed(device)
    # A bias before the batch norm has no gradient but rounding: that is small beside all gradients.
    noise = 0.1 * allowed(device) * torch.stack([grad.norm() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        assert (found[name] - grad).norm() < 2 * allowed(device) * grad.norm() + noise, name
    assert set(called) == {
        *("depthwise.forward", "depthwise.backward", "cross_entropy.forward"),
        *("resize.upsample_sum", "resize.upsample_sum_backward"),
    }
    assert called.count("depthwise.forward") == 8, "4 blocks, each of which is computed again"


def evaluate(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and confusion matrix in eval mode, on the CPU."""
    (model, _), (images, target) = network(device), batch((32, 64), device)
    with torch.no_grad():
        logits = model.eval()(images)
        labels = argmax.upsample_argmax(logits, (32, 64))
        confusion = argmax.upsample_confusion(logits, target, IGNORE)
    return logits.cpu().double(), labels.cpu().long(), confusion.cpu()


def test_an_evaluation_of_the_network_is_that_of_the_form_for_cpus(device, through_kernels):
    logits, labels, confusion = evaluate(torch.device("cpu"))
    called = through_kernels()
    found_logits, found_labels, found_confusion = evaluate(device)
    assert distance(found_logits, logits) < allowed(device)
    assert (found_labels != labels).float().mean() < 1e-3, "two classes can be equal but for rounding"
    assert (found_confusion - confusion).abs().sum() <= 2 * (found_labels != labels).sum()
    assert called.count("depthwise.forward") == 4
    assert called[4:] == ["resize.upsample_sum", "argmax.upsample_argmax", "argmax.upsample_confusion"]
