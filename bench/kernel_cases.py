"""The kernels at the sizes of one network, and the reference operations that they are compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from segformer.models.ops.argmax import upsample_argmax_reference
from segformer.models.ops.cross_entropy import upsampled_cross_entropy_reference
from segformer.models.ops.depthwise import depthwise_gelu_reference
from segformer.models.ops.resize import upsample_sum_reference
from segformer.models.variants import Variant

IGNORE = 255


Inputs = Sequence[Tensor]
Results = list[Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel at one size, and its reference: `plain` applies `function`, compiled or not, to inputs.

    `least` is the bytes that a kernel must move, from inputs and results: in a forward pass what it reads and
    writes, each once, and in a backward pass again.
    """

    kernel: str
    shape: str
    inputs: Callable[[], Inputs]
    ours: Callable[[Inputs], Results]
    function: Callable[..., Tensor]
    plain: Callable[[Callable[..., Tensor], Inputs], Results]
    least: Callable[[Inputs, Results], int]


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in tensors)


def without_grad(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*given)


def with_grad(function: Callable[..., Tensor], *given: Tensor) -> Results:
    """Result and gradients of all inputs but the last, which is the gradient of the result."""
    leaves = [value.detach().requires_grad_() for value in given[:-1]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[-1])]


def depthwise_cases(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Convolution and GELU of (batch, side, channels)."""
    from segformer.models.ops import depthwise_triton as depthwise

    batch, side, channels = shape

    def inputs() -> Inputs:
        tokens, grad = torch.randn(2, batch, side * side, channels, device=device).to(dtype)
        weight, bias = torch.randn(channels, 10, device=device).mul(0.3).split([9, 1], dim=1)
        return [tokens, weight.reshape(channels, 1, 3, 3).to(dtype), bias.flatten().to(dtype), grad]

    def function(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return depthwise_gelu_reference(tokens, (side, side), weight, bias)

    def ours(given: Inputs) -> Results:
        tokens, weight, bias, grad = given
        out = depthwise.forward(tokens, side, side, weight, bias)
        return [out, *depthwise.backward(grad, tokens, side, side, weight, bias)]

    case = partial(Case, shape=f"{batch} x {side} x {side} x {channels}", inputs=inputs, function=function)
    yield case(
        kernel="depthwise",
        ours=lambda given: [depthwise.forward(given[0], side, side, given[1], given[2])],
        plain=lambda f, given: [without_grad(f, *given[:3])],
        least=lambda given, results: size_of(*given[:3], *results),
    )
    yield case(
        kernel="depthwise + backward",
        ours=ours,
        plain=lambda f, given: with_grad(f, *given),
        least=lambda given, results: size_of(*given[:3], *given, *results),
    )


def resize_cases(
    shape: tuple[int, int], sides: list[int], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The sum of the maps of the decode head, (batch, channels)."""
    from segformer.models.ops import resize_triton as resize

    batch, channels = shape

    def inputs() -> Inputs:
        maps = [torch.randn(batch, side, side, channels, device=device).to(dtype) for side in sides]
        return [*maps, torch.randn_like(maps[0])]

    def function(*maps: Tensor) -> Tensor:
        return upsample_sum_reference(maps[0], list(maps[1:]))

    def ours(given: Inputs) -> Results:
        out = resize.upsample_sum(given[0], list(given[1:-1]))
        grads = resize.upsample_sum_backward(given[-1], sides[1:], sides[1:])
        return [out, given[-1], *grads]  # the gradient of the largest map is that of the sum

    names = ", ".join(str(side) for side in sides[1:])
    shape_name = f"{batch} x {sides[0]} x {sides[0]} x {channels} from {names}"
    case = partial(Case, shape=shape_name, inputs=inputs, function=function)
    yield case(
        kernel="upsample_sum",
        ours=lambda given: [resize.upsample_sum(given[0], list(given[1:-1]))],
        plain=lambda f, given: [without_grad(f, *given[:-1])],
        least=lambda given, results: size_of(*given[:-1], *results),
    )
    yield case(
        kernel="upsample_sum + backward",
        ours=ours,
        plain=lambda f, given: with_grad(f, *given),
        least=lambda given, results: size_of(*given, results[0], *results[2:]),
    )


def loss_cases(shape: tuple[int, int, int], size: int, device: torch.device) -> Iterator[Case]:
    """Loss, classes and confusion matrix of logits (batch, classes, side) at size x size."""
    from segformer.models.ops import argmax_triton as argmax
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    batch, classes, side = shape

    def inputs() -> Inputs:
        logits = 3 * torch.randn(batch, side, side, classes, device=device).permute(0, 3, 1, 2)
        regions = torch.randint(0, classes, (batch, size // 32, size // 32), device=device)
        target = regions.repeat_interleave(32, 1).repeat_interleave(32, 2).to(torch.uint8)
        target[:, : size // 16] = IGNORE
        return [logits, target]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return upsampled_cross_entropy_reference(logits, target, IGNORE)[0]

    def labels(logits: Tensor, _: Tensor) -> Tensor:
        return upsample_argmax_reference(logits, (size, size))

    def confusion(logits: Tensor, target: Tensor) -> Tensor:
        pairs = target.long() * classes + upsample_argmax_reference(logits, (size, size)).long()
        pairs = pairs.where(target != IGNORE, classes * classes).flatten()
        counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=pairs.device)
        return counts.scatter_add(0, pairs, torch.ones_like(pairs))[:-1].view(classes, classes)

    def fused_loss(given: Inputs) -> Results:
        total, _, grad = cross_entropy.forward(given[0], given[1], None, None, 0.0, IGNORE, True)
        return [total, grad]

    def plain_loss(f: Callable[..., Tensor], given: Inputs) -> Results:
        logits = given[0].detach().requires_grad_()
        total = f(logits, given[1])
        return [total.detach(), *torch.autograd.grad(total, logits)]

    case = partial(
        Case,
        shape=f"{batch} x {classes} x {side} x {side} to {size}",
        inputs=inputs,
        least=lambda given, results: size_of(*given, *results),
    )
    yield case(kernel="cross_entropy + backward", ours=fused_loss, function=loss, plain=plain_loss)
    yield case(
        kernel="argmax",
        ours=lambda given: [argmax.upsample_argmax(given[0], size, size)],
        function=labels,
        plain=lambda f, given: [without_grad(f, *given)],
    )
    yield case(
        kernel="confusion",
        ours=lambda given: [argmax.upsample_confusion(given[0], given[1], IGNORE)],
        function=confusion,
        plain=lambda f, given: [without_grad(f, *given)],
    )


def cases(
    variant: Variant, batch: int, size: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Every kernel at the sizes of the network for images of size x size; at most 255 classes."""
    sides = [size // stride for stride in (4, 8, 16, 32)]
    for side, dim, ratio in zip(sides, variant.embed_dims, variant.mlp_ratios, strict=True):
        yield from depthwise_cases((batch, side, ratio * dim), dtype, device)
    yield from resize_cases((batch, variant.decoder_dim), sides, dtype, device)
    yield from loss_cases((batch, classes, sides[0]), size, device)
