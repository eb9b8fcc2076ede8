"""What every launch of a kernel has in common."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LONGEST_SIDE = 32767  # pixels; places along a line are 32-bit numbers


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def ceil_div(count: int, size: int) -> int:
    """count / size, rounded up."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least power of two that is `count` or more."""
    return 1 << max(count - 1, 0).bit_length()
