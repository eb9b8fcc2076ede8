"""The choice between the implementations of an operation, made here for all of them.

They stand side by side: three in the module of the operation, the kernel in the file beside it.

    reference   plain library calls: what the others are tested against, and what model.ops=reference runs
    eager       recomputes in its backward pass and works in blocks, on any device
    traced      the plain composition of registered operations, in place of eager while torch.compile traces:
                it decides itself what to keep
    kernel      Triton, in <module>_triton.py, of a registered operation on an NVIDIA GPU

A Backend (backend.py) holds the reference or the fused operations. A fused one is eager or traced (`fused`),
a registered one runs its kernel or the operations of torch (`register`).
"""

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

# Large intermediate results are made in blocks of about this size, so that a block stays in the cache of a
# CPU and a GPU gets enough work per launch.
CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Asked here: torch.compile can't trace it. torch for AMD's GPUs calls them "cuda"; no kernel was tried there.
_TRITON = find_spec("triton") is not None and torch.version.hip is None

Operation = TypeVar("Operation", bound=Callable[..., Any])


def use_triton(tensor: Tensor) -> bool:
    """True for a tensor of a type that the kernels know, on an NVIDIA GPU that Triton compiles for.

    That is capability 8.0 (A100) and later, where Triton is installed.
    """
    if not (tensor.is_cuda and tensor.dtype in FLOATS and _TRITON):
        return False
    return torch.cuda.get_device_properties(tensor.device).major >= 8


def exact_on_cpu(tensor: Tensor) -> bool:
    """True for a tensor on a CPU that is computed with in float32 or float64."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def fused(*, eager: Operation, traced: Operation) -> Operation:
    """The operation that is `traced` while torch.compile traces it, and else `eager`."""

    @functools.wraps(eager)
    def choose(*arguments: Any, **options: Any) -> Any:
        return (traced if torch.compiler.is_compiling() else eager)(*arguments, **options)

    return cast(Operation, choose)


class Registered(NamedTuple):
    """The two forms of a registered operation."""

    compute: Callable[..., Any]
    "In operations of torch, on any device."
    kernel: str
    "<module>.<function> in Triton."

    def triton(self) -> Callable[..., Any]:
        """The kernel, imported now: Triton is not everywhere."""
        module, _, function = self.kernel.partition(".")
        return getattr(import_module(f"segformer.models.ops.{module}"), function)


REGISTERED: dict[str, Registered] = {}
_plain: set[str] = set()


def take_plain(names: Iterable[str]) -> None:
    """From now on these operations are computed without their kernels."""
    _plain.update(names)


def register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kernel: str,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register segformer::<schema> for CPU and CUDA and return it; torch.compile then calls it whole.

    compute: the operation; fake: its result's shape, for tracing; kernel: <module>.<function> that takes its
    place where `use_triton` of the first argument; backward and setup_context: as in
    torch.library.register_autograd. torch.library.custom_op does the same, but imports
    torch._dynamo at the first call, which takes a second or more.
    """

    short = schema.partition("(")[0]
    forms = REGISTERED[short] = Registered(compute, kernel)

    def run(tensor: Tensor, *arguments: Any) -> Any:
        if short in _plain or not use_triton(tensor):
            return compute(tensor, *arguments)
        return forms.triton()(tensor, *arguments)

    name = f"segformer::{short}"
    torch.library.define(name, "(" + schema.partition("(")[2], tags=(torch.Tag.needs_exact_strides,))
    torch.library.impl(name, ("cpu", "cuda"), run)
    torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
    return getattr(torch.ops.segformer, short).default


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
