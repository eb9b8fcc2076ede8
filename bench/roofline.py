"""How fast the arithmetic and the memory of a device are, and the shortest time that work can take on it.

CPU: measured in the run that uses it, several times, and the fastest counts: the faster of two ways to a
large matrix product (the BLAS behind matmul, and the convolution library on a 1x1 convolution of a
channels-last map, which on some processors is twice as fast), and a stream triad a = b + s * c on arrays that
no cache holds. GPU: the data sheet; a device that isn't listed has no roofline.

A bound is the larger of operations / peak and bytes / bandwidth. A layer that finds its input in a cache
moves fewer bytes than models/macs.py counts, so the second term speaks of large maps and GPUs rather than of
CPUs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from segformer.models.encoders import BACKBONES
from segformer.models.macs import head_products
from segformer.models.variants import RGB, VARIANTS
from segformer.telemetry.meter import PEAK_FLOPS

REPEATS = 8
SIDE = 2048  # of the matrices
TRIAD = 48 * 2**20  # elements of each array: 192 MiB in float32

# Bytes of memory per second by the name of the device, from the sources of PEAK_FLOPS (dense bf16 products).
# float32 at full precision doesn't use the matrix units and is not listed.
BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 NVL": 3.9e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
}
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to do: multiply-accumulates, and elements between memory and the chip."""

    macs: int
    elements: int


def work(
    name: str, size: tuple[int, int], num_classes: int, *, batch: int = 1, folded: bool, training: bool
) -> Work:
    """The work of one step of VARIANTS[name] on `batch` images.

    A training step is three times the forward, because each product has a gradient to either factor, of the
    same size and over the same three tensors; less the gradient of the images, which nobody needs. The folded
    head multiplies its weights once a training step; in inference they are constant.
    """
    macs = elements = 0
    variant = VARIANTS[name]
    products = BACKBONES[variant.backbone].products(variant, size, RGB)
    for product in products + head_products(variant, size, num_classes, folded=folded):
        times = (2 if product.leads else 3) if training else 1
        macs += times * (batch * product.macs + (product.shared if training else 0))
        elements += times * (batch * product.moved + product.weights)
    return Work(macs, elements)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Floating-point operations and bytes per second, and where they are from."""

    flops: float
    bandwidth: float
    source: str

    def best(self, other: "Peaks") -> "Peaks":
        """The faster of two measurements of one device; what runs beside a measurement only slows it."""
        return Peaks(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth), self.source)

    def bound(self, work: Work, precision: str) -> float:
        """The shortest time of `work`, seconds; a multiply-accumulate is two operations."""
        return max(2 * work.macs / self.flops, BYTES[precision] * work.elements / self.bandwidth)


def peaks(device: torch.device, precision: str, *, side: int = SIDE, triad: int = TRIAD) -> Peaks | None:
    """The peaks of a device at fp32 or bf16; None where they are not known."""
    if device.type == "cpu":
        return measured(side, triad) if precision == "fp32" else None
    name = torch.cuda.get_device_name(device)
    if precision != "bf16" or name not in BANDWIDTH:
        return None
    return Peaks(PEAK_FLOPS[name], BANDWIDTH[name], "data sheet")


def measured(side: int, triad: int) -> Peaks:
    """The fastest of REPEATS products of matrices of `side`, and of triads of `triad` elements."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    maps = left.view(1, 1, side, side).permute(0, 3, 1, 2)  # side channels, channels-last
    kernels = right[:, :, None, None].contiguous(memory_format=torch.channels_last)
    first, second, out = torch.rand(triad), torch.rand(triad), torch.empty(triad)
    with torch.inference_mode():
        product = _fastest(lambda: left @ right)
        convolution = _fastest(lambda: F.conv2d(maps, kernels))
        stream = _fastest(lambda: torch.add(first, second, alpha=3.0, out=out))
    return Peaks(2 * side**3 / min(product, convolution), 3 * 4 * triad / stream, "measured")


def _fastest(call: Callable[[], torch.Tensor]) -> float:
    best = float("inf")
    call()
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
