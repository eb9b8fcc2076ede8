"""Bilinear resizing as small matmuls, align_corners=False throughout, as in every published SegFormer.

    bilinear_matrix   the matrix that resizes a line of pixels
    row_bands         an enlargement in bands of rows, each from the few rows that it depends on
    Enlargement       the same in both directions, for logits
    project_sum       a linear map of the largest map + sum of enlarged maps

On a CPU `project_sum` widens the rows of each small map and adds it to the large result band by band, in the
cache; on CUDA the sum is the kernel of resize_triton.py, whose backward pass gathers instead of adding
atomically. torch.compile fuses the reference itself on a CPU.

Shapes: B batch, C D channels, H W large map, h w small map.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops import dispatch
from segformer.models.ops.dispatch import CPU_BLOCK_BYTES, GPU_BLOCK_BYTES, first_derivative, fused, register
from segformer.models.ops.linear import linear, linear_backward

_TILE_COLUMNS = 128


def upsample_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, C, H, W) bilinearly to `size`."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def upsample_sum_reference(base: Tensor, others: list[Tensor]) -> Tensor:
    """base (B, H, W, D) + every map of `others` (B, h_i, w_i, D) enlarged to H x W."""
    size = (base.shape[1], base.shape[2])
    for maps in others:
        base = base + upsample_to(maps.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return base


def bilinear_matrix(source: int, target: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (target, source) that resizes a line of pixels bilinearly, align_corners=False."""
    center = (torch.arange(target, dtype=dtype, device=device) + 0.5) * (source / target) - 0.5
    distance = center.clamp(0, source - 1)[:, None] - torch.arange(source, dtype=dtype, device=device)
    return (1 - distance.abs()).clamp_(min=0)


@dataclass(frozen=True, slots=True)
class Band:
    """Rows of an enlarged map, the rows of the small map they depend on, and the matrix between the two."""

    rows: slice
    source: slice
    matrix: Tensor


def row_bands(matrix: Tensor, step: int) -> list[Band]:
    """The enlargement `matrix` (target, source) in bands of `step` rows."""
    target, source = matrix.shape
    scale, slack = source / target, 1e-3  # slack: the matrix may have rounded a center across a pixel
    bands = []
    for top in range(0, target, step):
        bottom = min(top + step, target)
        first = min(source - 1, max(0, math.floor((top + 0.5) * scale - 0.5 - slack)))
        last = min(source, math.floor((bottom - 0.5) * scale - 0.5 + slack) + 2)
        block = matrix[top:bottom, first:last].contiguous()
        bands.append(Band(slice(top, bottom), slice(first, last), block))
    return bands


def band_rows(device: torch.device, row_bytes: int) -> int:
    """Rows of `row_bytes` that a band holds."""
    return max(1, (CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES) // row_bytes)


class Enlargement:
    """An image of small logits (K, h, w) enlarged to H x W tile by tile, and the transposed map.

    A tile is a band of rows times a band of columns. Memory order is (h, K, w): both resizes are then one
    matmul over all classes, and a softmax over K runs along whole rows. 16 rows at a factor of 4 depend on
    6, so the products are a small part of those with the dense matrices.
    """

    def __init__(self, logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
        """For logits (B, K, h, w), whose images are given in `dtype`; tiles of about one block."""
        classes, height, width = logits.shape[1:]
        device = logits.device
        columns = min(size[1], _TILE_COLUMNS) if device.type == "cpu" else size[1]
        step = band_rows(device, classes * columns * dtype.itemsize)
        vertical = bilinear_matrix(height, size[0], dtype=dtype, device=device)
        horizontal = bilinear_matrix(width, size[1], dtype=dtype, device=device)
        self.rows = row_bands(vertical, step)
        self.columns = row_bands(horizontal, columns)

    def tiles(self) -> Iterator[tuple[Band, Band]]:
        """The tiles in a fixed order: (band of rows, band of columns)."""
        return itertools.product(self.rows, self.columns)

    def tile(self, image: Tensor, row: Band, column: Band) -> Tensor:
        """Logits (h, K, w) of an image -> the tile (rows, K, columns)."""
        part = image[row.source, :, column.source]
        wide = part.reshape(-1, part.shape[2]) @ column.matrix.t()
        return (row.matrix @ wide.view(len(part), -1)).view(len(row.matrix), image.shape[1], -1)

    def add_transposed(self, out: Tensor, tile: Tensor, row: Band, column: Band) -> None:
        """Add to out (h, K, w) what the transposed map makes of a tile (rows, K, columns)."""
        part = out[row.source, :, column.source]
        wide = (row.matrix.t() @ tile.view(len(tile), -1)).view(-1, len(column.matrix))
        part += (wide @ column.matrix).view(part.shape)


def check_target(logits: Tensor, target: Tensor) -> None:
    """ValueError unless target (B, H, W) can be the labels of logits (B, K, h, w)."""
    shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
    if logits.ndim != 4 or target.ndim != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(f"{shapes} don't belong together; give (B, K, h, w) and (B, H, W)")
    if 0 in (*logits.shape[1:], *target.shape[1:]):
        raise ValueError(f"{shapes} have a side of 0")


Widened = list[tuple[Tensor, list[Band]]]


def widen(others: Iterable[Tensor], size: tuple[int, int], step: int) -> Widened:
    """Every map (B, h, w, D) with its rows resized to W, (B, h, W * D), and the bands of `step` of H rows."""
    height, width = size
    found = []
    for maps in others:
        batch, rows, columns, dim = maps.shape
        vertical = bilinear_matrix(rows, height, dtype=maps.dtype, device=maps.device)
        horizontal = bilinear_matrix(columns, width, dtype=maps.dtype, device=maps.device)
        found.append(((horizontal @ maps).reshape(batch, rows, width * dim), row_bands(vertical, step)))
    return found


def add_bands(rows: Tensor, index: int, small: Widened, image: int) -> None:
    """Add to rows (r, W * D), the rows of band `index`, what each widened map gives them."""
    for wide, bands in small:
        band = bands[index]
        rows.addmm_(band.matrix, wide[image, band.source])


def _shrink(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """The transpose of an enlargement: grad (B, H, W, D) -> (B, *size, D)."""
    batch, height, width, dim = grad.shape
    small = torch.ops.aten.upsample_bilinear2d_backward(
        grad.permute(0, 3, 1, 2), (height, width), (batch, dim, *size), False
    )
    return small.permute(0, 2, 3, 1).contiguous()


class _ProjectSum(torch.autograd.Function):
    """maps (B, H, W, C) times weight (D, C), + maps (B, h_i, w_i, D) enlarged: added in bands of rows."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        out = linear(maps, weight)
        batch, height, width, dim = out.shape
        step = band_rows(out.device, width * dim * out.element_size())
        small = widen(others, (height, width), step)
        flat = out.view(batch, height, width * dim)
        for image in range(batch):
            for index, top in enumerate(range(0, height, step)):
                add_bands(flat[image, top : top + step], index, small, image)
        ctx.save_for_backward(maps, weight)
        ctx.sizes = [other.shape[1:3] for other in others]
        return out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        maps, weight = ctx.saved_tensors
        inner, kernel, _ = linear_backward(grad, maps, weight)
        return inner, kernel, *(_shrink(grad, size) for size in ctx.sizes)


def _compute_backward(grad: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    return [_shrink(grad, size) for size in zip(heights, widths, strict=True)]


def _fake_backward(grad: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    batch, dim = grad.shape[0], grad.shape[3]
    return [grad.new_empty(batch, *size, dim) for size in zip(heights, widths, strict=True)]


_upsample_sum_backward = register(
    "upsample_sum_backward(Tensor grad, SymInt[] heights, SymInt[] widths) -> Tensor[]",
    _compute_backward,
    _fake_backward,
    kernel="resize_triton.upsample_sum_backward",
)


def _keep_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.heights = [maps.shape[1] for maps in inputs[1]]
    ctx.widths = [maps.shape[2] for maps in inputs[1]]


@first_derivative
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    return grad, _upsample_sum_backward(grad, ctx.heights, ctx.widths)


_upsample_sum = register(
    "upsample_sum(Tensor base, Tensor[] others) -> Tensor",
    upsample_sum_reference,
    lambda base, others: base.new_empty(base.shape),
    kernel="resize_triton.upsample_sum",
    backward=_differentiate,
    setup_context=_keep_sizes,
)


def _traced(maps: Tensor, weight: Tensor, others: list[Tensor]) -> Tensor:
    base = linear(maps, weight)
    if dispatch.use_triton(base):
        return _upsample_sum(base.contiguous(), [other.contiguous() for other in others])
    return upsample_sum_reference(base, others)


def _eager(maps: Tensor, weight: Tensor, others: list[Tensor]) -> Tensor:
    """maps (B, H, W, C) times weight (D, C) + every map of `others` (B, h_i, w_i, D) enlarged to H x W."""
    if dispatch.exact_on_cpu(maps):
        return _ProjectSum.apply(maps, weight, *others)
    return _traced(maps, weight, others)


project_sum = fused(eager=_eager, traced=_traced)
