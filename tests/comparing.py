"""Comparisons that several tests make: checkpoints bit by bit, an operation with its reference, its fake."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from segformer.checkpoint.reader import load_checkpoint


def saved_state(run_dir: Path, step: int | None = None) -> dict[str, Tensor]:
    """Weights, buffers, moments and averages (as ema.<name>) of a run's newest checkpoint, or of `step`."""
    loaded = load_checkpoint(run_dir / "checkpoints", step=step)
    assert loaded is not None
    averages = {f"ema.{name}": value for name, value in loaded.ema.items()}
    return {**loaded.model, **loaded.optimizer, **averages}


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, first {different[0]}"


def values(*shape: int) -> Tensor:
    """Random float64 numbers that want a gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(got: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Values and gradients with respect to `inputs` agree as their type allows."""
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(value, inputs, cotangent, retain_graph=True) for value in (got, expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def distance(left: Tensor, right: Tensor) -> float:
    """||left - right|| / ||right||."""
    left, right = left.detach().double(), right.detach().to(left.device).double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))


REGISTERED = (
    "depthwise_gelu",
    "depthwise_gelu_backward",
    "upsample_sum",
    "upsample_sum_backward",
    "upsampled_cross_entropy",
    "upsample_argmax",
    "upsample_confusion",
)


def check_registered(name: str, device: torch.device, kind: torch.dtype = torch.float32) -> None:
    """The registered operation is as torch.library asks: types, strides and gradients that its fake has."""
    torch.manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        differentiable = name in ("depthwise_gelu", "upsample_sum", "upsampled_cross_entropy")
        return torch.randn(shape, device=device).to(dtype).requires_grad_(differentiable)

    tokens, weight, bias = (random(*shape, dtype=kind) for shape in ((2, 12, 6), (6, 1, 3, 3), (6,)))
    base, small, logits = random(1, 4, 6, 5), random(1, 2, 3, 5), random(1, 6, 2, 3)
    target = torch.randint(0, 6, (1, 5, 7), device=device)
    pixels, classes = torch.rand(1, 5, 7, device=device), torch.rand(6, device=device)
    given = {
        "depthwise_gelu": (tokens, 3, 4, weight, bias),
        "depthwise_gelu_backward": (tokens.detach(), tokens, 3, 4, weight, bias),
        "upsample_sum": (base, [small]),
        "upsample_sum_backward": (base, [2], [3]),
        "upsampled_cross_entropy": (logits, target, pixels, classes, 0.1, 255, True),
        "upsample_argmax": (logits, 5, 7),
        "upsample_confusion": (logits, target, 255),
    }[name]
    torch.library.opcheck(getattr(torch.ops.segformer, name).default, given)
