"""What all operations share.

    register            an operation of torch.library
    first_derivative    the backward pass of an operation that has no second derivative
    use_triton          whether a Triton kernel is taken

and the size of the blocks in which large intermediate results are made.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# Large intermediate results are made in blocks of about this size, so that a block stays in the cache of a
# CPU and a GPU gets enough work per launch.
CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = find_spec("triton") is not None  # asked here: torch.compile can't trace it


def register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register segformer::<schema> for CPU and CUDA and return it; torch.compile then calls it whole.

    compute: the operation; fake: its result's shape, for tracing; backward and setup_context: as in
    torch.library.register_autograd. torch.library.custom_op does the same, but imports torch._dynamo at the
    first call, which takes a second or more.
    """
    name = "segformer::" + schema.partition("(")[0]
    torch.library.define(name, "(" + schema.partition("(")[2], tags=(torch.Tag.needs_exact_strides,))
    torch.library.impl(name, ("cpu", "cuda"), compute)
    torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
    return getattr(torch.ops.segformer, name.partition("::")[2]).default


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the backward pass of a fused operation: RuntimeError where its own graph is asked for.

    torch's once_differentiable refuses later, and not at all where the gradient that comes in is a constant,
    as that of a loss is: the second derivative is then silently without this operation's part.
    """

    @functools.wraps(backward)
    def refuse_graph(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # autograd was called with create_graph=True
            raise RuntimeError(
                "the fused operations have no second derivative (create_graph=True); build the model with "
                "ops='reference' (model.ops=reference)"
            )
        return backward(ctx, *grads)

    return refuse_graph


def use_triton(tensor: Tensor) -> bool:
    """Whether `tensor` is on an NVIDIA GPU, of a type that the kernels know, and Triton is installed."""
    return tensor.is_cuda and tensor.dtype in FLOATS and _TRITON
