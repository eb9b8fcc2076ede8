"""The kernels run on the GPU where there is one, and else, slowly, in Triton's interpreter.

The interpreter takes the place of the compiler when Triton is imported, for the rest of the process. No other
test runs Triton on a machine without a GPU.

Operations are called, not kernels: on a GPU they take the kernels by themselves, in the interpreter they are
told that every tensor is on one. What is compared with are library calls in float64.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from comparing import distance
from torch import Tensor

from segformer.models.ops import decode, dispatch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import segformer.models.ops.argmax_triton
        import segformer.models.ops.cross_entropy_triton
        import segformer.models.ops.depthwise_triton
        import segformer.models.ops.resize_triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if isinstance(triton.language.cdiv, triton.JITFunction):
        pytest.skip(
            "Triton was imported before it could be told to interpret: run tests/models/ops_triton alone"
        )
    if triton.__version__ < "3.7":
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails with NumPy 2.4; 3.7 does not")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # some of its modules are imported by the first launch
    round_as_a_gpu(monkeypatch)
    return torch.device("cpu")


def round_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 -> bfloat16 to the nearest; the interpreter cuts off."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (float32, bfloat16):
            return convert(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def surrounded(device: torch.device) -> Callable[..., Iterator[list[torch.Tensor]]]:
    """Tensors as views into larger ones, first of zeros and then of NaN."""

    def place(*tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        for around in (0.0, float("nan")):
            inside = []
            for tensor in tensors:
                room = torch.full((tensor.numel() + 400,), around, device=device)
                room[200:-200] = tensor.flatten()
                inside.append(room[200:-200].view(tensor.shape))
            yield inside

    return place


KERNELS = {
    "depthwise": ("forward", "backward"),
    "resize": ("upsample_sum", "upsample_sum_backward"),
    "cross_entropy": ("forward",),
    "argmax": ("upsample_argmax", "upsample_confusion"),
}


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
        for kernel, names in KERNELS.items():
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


@pytest.fixture
def called(through_kernels: Callable[[], list[str]]) -> list[str]:
    """The kernels that were called; every operation of the test goes to its kernel."""
    return through_kernels()


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.fixture
def check(device: torch.device) -> Callable[..., None]:
    """Compare an operation and its gradients with `theirs` in float64, for a gradient in odd memory.

    The limits of the relative distance are by type; a gradient has two roundings.
    """

    def compare(
        given: Sequence[Tensor],
        ours: Callable[..., Tensor],
        theirs: Callable[..., Tensor],
        limits: dict[torch.dtype, float],
    ) -> None:
        leaves = [tensor.to(device).requires_grad_() for tensor in given]
        exact = [tensor.double().requires_grad_() for tensor in given]
        out, expected = ours(*leaves), theirs(*exact)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        found = torch.autograd.grad(out, leaves, spread(grad.to(device)), retain_graph=True)
        right = torch.autograd.grad(expected, exact, grad.double())
        assert out.shape == expected.shape
        assert distance(out, expected) < limits[out.dtype]
        for leaf, mine, best in zip(leaves, found, right, strict=True):
            assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
            assert distance(mine, best) < 1.5 * limits[leaf.dtype]
        if device.type == "cuda":  # sums have one order
            again = torch.autograd.grad(ours(*leaves), leaves, spread(grad.to(device)))
            assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))

    return compare
