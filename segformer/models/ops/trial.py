"""Each kernel once against the plain form of its operation, on the GPU that it is to run on.

A compiler or driver that was never tried can refuse a kernel, or make one that is wrong. Inputs are tiny, of
odd sizes, and the same everywhere; the plain form is computed on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from segformer.errors import reason_of, reported
from segformer.models.ops import argmax, cross_entropy, depthwise, dispatch, resize

_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # ||kernel - plain|| / ||plain||
_MODULES = (argmax, cross_entropy, depthwise, resize)  # their import registers the operations


def _inputs(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each registered operation."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens, weight, bias = random(2, 15, 7), random(7, 1, 3, 3), random(7)
    base, others = random(1, 3, 5, 7), [random(1, 2, 3, 7), random(1, 1, 2, 7)]
    logits = random(1, 5, 2, 3).to(memory_format=torch.channels_last)
    target = torch.randint(0, 6, (1, 5, 7), generator=generator)
    target[target == 5] = 255
    pixels, classes = (random(*shape, dtype=torch.float32).abs() for shape in ((1, 5, 7), (5,)))
    return {
        "depthwise_gelu": (tokens, 3, 5, weight, bias),
        "depthwise_gelu_backward": (random(2, 15, 7), tokens, 3, 5, weight, bias),
        "upsample_sum": (base, others),
        "upsample_sum_backward": (base, [2, 1], [3, 2]),
        "upsampled_cross_entropy": (logits, target, pixels, classes, 0.1, 255, True),
        "upsample_argmax": (logits, 5, 7),
        "upsample_confusion": (logits, target, 255),
    }


def failing_kernels(device: torch.device) -> dict[str, str]:
    """Operations whose kernel raises or differs on `device`, and why; {} where no kernel is used."""
    if not dispatch.use_triton(torch.empty(0, device=device)):
        return {}
    found: dict[str, str] = {}
    for dtype, limit in _LIMITS.items():
        for name, given in _inputs(dtype).items():
            errors: list[Exception] = []
            with reported(errors.append, on=Exception):  # whatever a compiler raises
                got = _flat(dispatch.REGISTERED[name].triton()(*(_moved(value, device) for value in given)))
                expected = _flat(dispatch.REGISTERED[name].compute(*given))
                if wrong := [apart for apart in map(_distance, got, expected) if not apart < limit]:  # or NaN
                    errors.append(ValueError(f"differs by {wrong[0]:.1e} in {dtype}"))
            if errors:
                found.setdefault(name, reason_of(errors[0])[:200])
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _distance(got: Tensor, expected: Tensor) -> float:
    left, right = got.cpu().double(), expected.double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))
