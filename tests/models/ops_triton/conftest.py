"""The kernels run on the GPU where there is one, and else, slowly, in Triton's interpreter.

The interpreter takes the place of the compiler when Triton is imported, for the rest of the process. No other
test runs Triton on a machine without a GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

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
