"""The linear map of tokens, through the library that is fastest at it.

On CPUs torch sends fp32 matrix products to MKL and convolutions to oneDNN. A 1x1 convolution on channels-last
memory is the same product: on two AMD EPYC cores, MKL reaches 200 GFLOP/s and oneDNN 440 (forward) and 350
(backward) for the shapes of SegFormer. So in fp32 on several threads of such a CPU `linear` is that
convolution, without a copy. On one thread it stays with MKL: oneDNN rounds differently for each batch size
there. So it does on Intel's CPUs: on two Xeon cores the maps of B5 at 512 x 512 take 369 ms with MKL and 402
with oneDNN, their gradients 759 and 966.

Shapes: B batch, C D channels.
"""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops.dispatch import exact_on_cpu, fused

Affine = tuple[Tensor, Tensor]  # weight and bias of a linear map or convolution


def _made_by_intel() -> bool:
    """Whether the CPU is Intel's, as far as Linux says it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        return "GenuineIntel" in stream.read(1024)  # of the first core: many cores take long to list
    return False


_FEW = 20480  # torch takes its own, slower convolution for inputs of no more numbers, and on one thread
# Asked here: torch.compile does not trace it.
_ONEDNN = torch.backends.mkldnn.is_available() and not _made_by_intel()


def _through_convolution(values: Tensor) -> bool:
    return (
        exact_on_cpu(values)
        and values.dtype == torch.float32
        and _ONEDNN
        and values.numel() > _FEW
        and torch.get_num_threads() > 1
    )


def _pixels(values: Tensor) -> Tensor:
    """values (..., C) as the channels-last image (1, C, 1, n)."""
    return values.reshape(1, 1, -1, values.shape[-1]).permute(0, 3, 1, 2)


def _linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """values (..., C), weight (D, C), bias (D,) -> values @ weight.T + bias (..., D)."""
    if not _through_convolution(values):
        return F.linear(values, weight, bias)
    out = F.conv2d(_pixels(values), weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*values.shape[:-1], weight.shape[0]).contiguous()


def linear_reference(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as one call of torch, whose graph does not depend on the size."""
    return F.linear(values, weight, bias)


linear = fused(eager=_linear, traced=linear_reference)


def linear_backward(grad: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear` with a bias: of values (..., C), weight (D, C), bias (D,), from grad (..., D)."""
    if not _through_convolution(values):
        flat = grad.flatten(0, -2)
        offset = flat.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32))
        return grad @ weight, flat.t() @ values.flatten(0, -2), offset
    inner, kernel, offset = torch.ops.aten.convolution_backward(
        _pixels(grad),
        _pixels(values),
        weight[:, :, None, None],
        [len(weight)],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, True],
    )
    return inner.permute(0, 2, 3, 1).reshape(values.shape), kernel.flatten(1), offset
