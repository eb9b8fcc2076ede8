"""A program, not a test: compile what the kernels launch, for a GPU that is not there, and print JSON.

    python tests/models/ops_triton/ahead_of_time.py <compute capability, 80 or 90> [<case> ...; all without]

The functions of models/ops/*_triton.py are called with CPU tensors of real sizes. Every launch is compiled as
it would be for the GPU, with the same specialization, down to machine code, and is not made. An entry has
the case, the kernel, its hash, the bytes of local memory of a thread (spills) and of shared memory of a
program, and how many of its instructions copy asynchronously.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from segformer.models.ops import argmax_triton as argmax
from segformer.models.ops import cross_entropy_triton as cross_entropy
from segformer.models.ops import depthwise_triton as depthwise
from segformer.models.ops import resize_triton as resize


class AbsentGpu(CudaDriver):
    """Answers what Triton asks of the driver before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def run_depthwise(dtype: torch.dtype) -> None:
    for height, width, channels in ((32, 32, 1280), (61, 45, 256)):
        tokens = empty(2, height * width, channels, dtype=dtype)
        weight, bias = empty(channels, 1, 3, 3), empty(channels)
        depthwise.forward(tokens, height, width, weight, bias)
        depthwise.backward(tokens, tokens, height, width, weight, bias)


def run_resize(dtype: torch.dtype) -> None:
    for scale, sizes in ((128, [(16, 16), (32, 32), (64, 64)]), (61, [(8, 1), (16, 16), (31, 3)])):
        base = empty(2, scale, 128, 768, dtype=dtype)
        resize.upsample_sum(base, [empty(2, *size, 768, dtype=dtype) for size in sizes])
        resize.upsample_sum_backward(base, *map(list, zip(*sizes, strict=True)))


def run_odd(dtype: torch.dtype) -> None:
    """Channels that no vector divides."""
    tokens = empty(1, 35, 37, dtype=dtype)
    depthwise.forward(tokens, 5, 7, empty(37, 1, 3, 3), empty(37))
    depthwise.backward(tokens, tokens, 5, 7, empty(37, 1, 3, 3), empty(37))
    resize.upsample_sum(empty(1, 9, 7, 37, dtype=dtype), [empty(1, 1, 1, 37, dtype=dtype)])
    resize.upsample_sum_backward(empty(1, 9, 7, 37, dtype=dtype), [1, 5], [1, 3])


def run_classes(classes: int, dtype: torch.dtype, *, everything: bool = False) -> None:
    for h, w, height, width in ((128, 128, 512, 512), (47, 72, 185, 287)):
        logits = empty(2, h, w, classes, dtype=dtype).permute(0, 3, 1, 2)
        target = empty(2, height, width, dtype=torch.uint8 if classes <= 255 else torch.int64)
        pixels, weights = (empty(2, height, width), empty(classes)) if everything else (None, None)
        cross_entropy.forward(logits, target, pixels, weights, 0.1 if everything else 0.0, 255, True)
        if not everything:
            cross_entropy.forward(logits, target, None, None, 0.0, 255, False)
            argmax.upsample_argmax(logits, height, width)
            argmax.upsample_confusion(logits, target, 255)


CASES: dict[str, Callable[[], None]] = {
    "depthwise bf16": lambda: run_depthwise(torch.bfloat16),
    "depthwise fp32": lambda: run_depthwise(torch.float32),
    "resize bf16": lambda: run_resize(torch.bfloat16),
    "resize fp32": lambda: run_resize(torch.float32),
    "37 channels bf16": lambda: run_odd(torch.bfloat16),
    "19 classes bf16": lambda: run_classes(19, torch.bfloat16),
    "19 classes fp32": lambda: run_classes(19, torch.float32),
    "150 classes bf16": lambda: run_classes(150, torch.bfloat16),
    "150 classes fp32": lambda: run_classes(150, torch.float32),
    "150 classes, all weights, fp32": lambda: run_classes(150, torch.float32, everything=True),
    "1024 classes fp32": lambda: run_classes(1024, torch.float32),
}


def usage(kernel: Any) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return {"local": int(stack) + int(local), "shared": kernel.metadata.shared}


def compiled(capability: int, names: list[str]) -> list[dict[str, Any]]:
    """Every launch of the named cases."""
    driver.set_active(AbsentGpu(capability))
    found: list[dict[str, Any]] = []
    case = ""
    launch = JITFunction.run

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(function, *args, grid=grid, warmup=True, **options)
        row = {"case": case, "kernel": function.__name__, "hash": kernel.hash, **usage(kernel)}
        found.append({**row, "copies": kernel.asm["ptx"].count("cp.async.c")})
        return kernel

    JITFunction.run = compile_only
    for name in names:
        case = name
        CASES[name]()
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]), sys.argv[2:] or list(CASES))))
