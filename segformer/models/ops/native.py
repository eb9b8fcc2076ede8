"""What a CPU does better without torch: the cross entropy of native.cpp, and keeping freed memory.

native.cpp is compiled at the first use, by $CXX or c++, and kept in the cache of the user. Without a
compiler, or with SEGFORMER_NATIVE=0, `available` is False, `missing` says why, and the operation runs as
calls of torch: the same to rounding, and slower. The library's name holds the sum of source, compiler and
CPU, so that machines may share a home.

Shapes: B batch, K classes, h w logits, H W target.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
# Pointers, floats and integers in the order of native.cpp.
_SIGNATURE = [c_void_p] * 7 + [c_float] + [c_int64] * 7 + [c_int]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _cpu() -> str:
    """What -march=native depends on."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return "\n".join(
        line for line in first.splitlines() if line.startswith(("model name", "flags", "Features"))
    )


def _compile() -> Path:
    """The shared library, made unless it is there; an error where it can't be."""
    compiler = os.environ.get("CXX") or "c++"
    parts = (SOURCE.read_text(encoding="utf-8"), _run(compiler, "--version"), _cpu(), *_FLAGS)
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segformer"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise PermissionError(f"{folder}: others may write there")
    library = folder / f"native-{name}.so"
    if not library.is_file():
        # A folder of this process: ranks start at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            _run(compiler, *_FLAGS, str(SOURCE), "-o", str(made))
            made.replace(library)
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("SEGFORMER_NATIVE") == "0":
        return "SEGFORMER_NATIVE=0"
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        return " ".join(f"{getattr(error, 'stderr', None) or error}".split())[:300]
    library.cross_entropy.argtypes = _SIGNATURE
    return library


def missing() -> str:
    """Why native.cpp isn't used on this machine, empty where it is."""
    found = _library()
    return found if isinstance(found, str) else ""


def keep_freed_memory() -> None:
    """Keep up to 256 MiB of freed memory in this process, where the C library is glibc.

    It gives back what is free above 64 MiB, and every page of the next forward pass is then a page fault.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    set_option(_TRIM_THRESHOLD, 256 << 20)
    set_option(_MMAP_THRESHOLD, 32 << 20)  # the largest there is; setting one stops the other's adaptation


def available(tensor: Tensor) -> bool:
    """True for a float32 tensor on a CPU, where native.cpp could be compiled."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not missing()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weights: Tensor | None,
    class_weights: Tensor | None,
    smoothing: float,
    ignore_index: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Weighted sum of the pixel losses, -log p_t (B, H, W), gradient of the sum (B, K, h, w) or nothing).

    IndexError for a label that is neither `ignore_index` nor a class.
    """
    library = cast(ctypes.CDLL, _library())
    values = logits.permute(0, 2, 3, 1).contiguous()
    losses, grad = values.new_empty(target.shape), torch.empty_like(values) if needs_grad else None
    total = c_double()
    tensors = (losses, grad, values, target.to(torch.int64), pixel_weights, class_weights)
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]  # alive during the call
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in kept]
    sizes = (len(values), logits.shape[1], *logits.shape[2:], *target.shape[1:])
    numbers = (smoothing, ignore_index, *sizes, torch.get_num_threads())
    if library.cross_entropy(ctypes.addressof(total), *addresses, *numbers):
        found = target.unique().tolist()
        raise IndexError(f"labels {found[:9]} are not all 0 to {logits.shape[1] - 1} or {ignore_index}")
    gradient = values.new_empty(0) if grad is None else grad.permute(0, 3, 1, 2)
    return values.new_tensor(total.value), losses, gradient
