"""Comparisons that several tests make: checkpoints bit by bit, an operation with its reference."""

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
