"""The class of every pixel of bilinearly enlarged logits, and its confusion matrix, on CUDA.

A program walks over the cells (bilinear_triton.py) of a row of the logits. The enlarged logits of a cell's
pixels are made from its corners in registers. A thread keeps the best of its own classes, and two reductions
of whole numbers find the best of a warp: the highest logit, as a number that sorts like it, and the lowest
class that has it, so that the first of equals wins as in torch.argmax.

The confusion matrix is counted while the classes are found. A walk keeps the last pair (label, class) of each
of its columns and how often it came in a row, and adds to memory when another pair comes: the entry that half
of an image falls into gets one addition per run and not one per pixel. Counts are whole numbers, so the order
of additions is free.

Shapes: B batch, K classes, h w map of the logits, H W image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segformer.models.ops.bilinear_triton import (
    cell_start,
    center,
    check_sides,
    class_parts,
    load_pixel,
    mix,
    pixels_at_once,
)

_COLUMNS = 16  # columns of cells of a program
# Arguments that are of any value: no compilation for each kind of size.
_SIZES = ["height", "width", "rows", "columns", "column_chunks", "ignore_index"]


@triton.jit
def _best(left, slope, share, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The first class of the highest of left + share * slope: (PIXELS, 1)."""
    highest = left[0] + share * slope[0]
    first = tl.zeros_like(highest).to(tl.int32) + tl.arange(0, WIDTH)[None, :]
    for part in tl.static_range(1, PARTS):
        logits = left[part] + share * slope[part]
        better = logits > highest
        highest = tl.where(better, logits, highest)
        first = tl.where(better, part * WIDTH + tl.arange(0, WIDTH)[None, :], first)
    bits = (highest + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 is 0.0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    first = tl.where(order == tl.max(order, axis=1, keep_dims=True), first, 0x7FFFFFFF)
    return tl.min(first, axis=1, keep_dims=True)


@triton.jit
def _count(now, inside, runs, confusion):
    """Go on with the runs (pair, length) of the columns; those that end are added to the matrix."""
    last, length = runs
    ends = inside & (now != last)
    tl.atomic_add(confusion + last, length.to(tl.int64), mask=ends & (last >= 0), sem="relaxed")
    return tl.where(ends, now, last), tl.where(ends, 1, length + tl.where(inside, 1, 0))


@triton.jit
def _cell(
    corners, row, column, begin_x, end_x, image, target, out, runs, classes, size, sides, scales,
    ignore_index, COUNT: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the classes of the pixels of one cell, or count them."""
    height, width = size
    for y in range(cell_start(row, sides[0], height), cell_start(row + 1, sides[0], height)):
        down = center(y, scales[0], sides[0]) - row
        left = mix(corners[0], corners[1], down, PARTS)
        end = mix(corners[2], corners[3], down, PARTS)
        slope = ()
        for part in tl.static_range(PARTS):
            slope += (end[part] - left[part],)
        for x in range(begin_x, end_x, PIXELS):
            at = x + tl.arange(0, PIXELS)[:, None]
            inside = at < end_x
            place = (image * height + y) * width + at
            share = tl.minimum(center(at, scales[1], sides[1]) - column, 1.0)
            # Padding wins only over logits of -inf or NaN.
            best = tl.minimum(_best(left, slope, share, PARTS, WIDTH), classes - 1)
            if COUNT:
                label = tl.load(target + place, mask=inside, other=0)
                if target.dtype.element_ty != tl.int64:
                    label = label.to(tl.int32)
                counted = (label != ignore_index) & (label >= 0) & (label < classes)
                runs = _count(tl.where(counted, label.to(tl.int32) * classes + best, -1), inside, runs, out)
            else:
                tl.store(out + place, best.to(out.dtype.element_ty), mask=inside)
    return runs


@triton.jit(do_not_specialize=_SIZES)
def _walk(
    logits, strides, target, out, height, width, rows, columns, scales, column_chunks, columns_each, classes,
    ignore_index, COUNT: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some cells of one row, from left to right. rows and columns are those of the logits."""
    program = tl.program_id(0)
    first = program % column_chunks * columns_each
    row = program // column_chunks % rows
    image = tl.cast(program // column_chunks // rows, tl.int64)
    upper = logits + image * strides[0] + tl.cast(row, tl.int64) * strides[2]
    lower = upper + tl.where(row < rows - 1, strides[2], 0)
    offset = tl.cast(first, tl.int64) * strides[3]
    left_top = load_pixel(upper + offset, strides[1], classes, 1.0, PARTS, WIDTH)
    left_bottom = load_pixel(lower + offset, strides[1], classes, 1.0, PARTS, WIDTH)
    begin_x = cell_start(first, columns, width)
    runs = (tl.full([PIXELS, 1], -1, tl.int32), tl.zeros([PIXELS, 1], tl.int32))
    for column in range(first, tl.minimum(first + columns_each, columns)):
        offset = tl.cast(tl.minimum(column + 1, columns - 1), tl.int64) * strides[3]
        right_top = load_pixel(upper + offset, strides[1], classes, 1.0, PARTS, WIDTH)
        right_bottom = load_pixel(lower + offset, strides[1], classes, 1.0, PARTS, WIDTH)
        end_x = cell_start(column + 1, columns, width)
        runs = _cell(
            (left_top, left_bottom, right_top, right_bottom), row, column, begin_x, end_x, image, target, out,
            runs, classes, (height, width), (rows, columns), scales, ignore_index,
            COUNT, PIXELS, PARTS, WIDTH,
        )  # fmt: skip
        left_top, left_bottom, begin_x = right_top, right_bottom, end_x
    if COUNT:
        tl.atomic_add(out + runs[0], runs[1].to(tl.int64), mask=runs[0] >= 0, sem="relaxed")


def _launch(
    logits: Tensor, target: Tensor, out: Tensor, size: tuple[int, int], ignore_index: int, *, count: bool
) -> None:
    batch, classes, *sides = logits.shape
    check_sides(*sides, *size)
    chunks = triton.cdiv(sides[1], _COLUMNS)
    scales = (sides[0] / size[0], sides[1] / size[1])
    with torch.cuda.device_of(logits):
        _walk[(batch * sides[0] * chunks,)](
            logits, logits.stride(), target, out, *size, *sides, scales, chunks, _COLUMNS, classes,
            ignore_index, COUNT=count, PIXELS=pixels_at_once(sides[1], size[1]), **class_parts(classes),
        )  # fmt: skip


def upsample_argmax(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits (B, K, h, w) of any strides -> their class at every pixel (B, H, W), the first one of equals.

    uint8 up to 256 classes, int64 beyond.
    """
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    out = torch.empty(logits.shape[0], height, width, dtype=dtype, device=logits.device)
    _launch(logits, out, out, (height, width), -1, count=False)
    return out


def upsample_confusion(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """confusion[t, p]: pixels of class t in target (B, H, W) whose enlarged logits (B, K, h, w) choose p.

    (K, K) int64. target is uint8 or int64; pixels of `ignore_index` and of a label that is no class are left
    out.
    """
    classes = logits.shape[1]
    out = torch.zeros(classes, classes, dtype=torch.int64, device=logits.device)
    size = (target.shape[1], target.shape[2])
    _launch(logits, target.contiguous(), out, size, ignore_index, count=True)
    return out
