"""base + the sum of bilinearly enlarged maps, in one pass over the large map, and the gradient, on CUDA.

forward   A program makes a block of pixels and channels of the result from the base and four pixels of every
          map, which are in the cache. Coordinates are computed once per pixel and not once per element.
backward  A program makes a few columns of some rows of a small map. It walks down the gradient: each of its
          rows is shrunk to those columns and goes into the two small rows that it came from. Nothing is added
          atomically, so sums have one order. One launch does all maps, image by image: the gradient of an
          image comes from memory for the first map and from the L2 cache for the rest, as long as it fits
          there (25 MB for 128 x 128 x 768 in bfloat16).

Arithmetic is float32. Coordinates are those of F.interpolate(mode="bilinear", align_corners=False).

Shapes: B batch, H W map, D channels, channels last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segformer.models.ops.bilinear_triton import cell_start, center, check_sides

_BLOCK = 64  # channels that a program has at once, of which the forward does two one after the other
_ROWS, _COLUMNS = 4, 8  # pixels of the result that a program of the forward makes
_SMALL_COLUMNS = 8  # columns of a small map that a program of the backward makes, ...
_LARGE_ROWS = 32  # ... and the rows of the gradient that it walks down
_SIZES = ["height", "width"]  # of any value: no compilation for each kind of size
_TAPS = tl.constexpr(4)  # pixels of one row that it loads together


@triton.jit
def _existing(d, channels, WHOLE: tl.constexpr):
    """Which of the channels d exist: all where WHOLE, and loads then need no mask."""
    return tl.full([1, d.shape[0]], True, tl.int1) if WHOLE else (d < channels)[None, :]


@triton.jit
def _add_corner(total, pixel, d, channels, share, WHOLE: tl.constexpr):
    """total + share times the channels d of the pixels."""
    value = tl.load(pixel[:, None] + d[None, :], mask=_existing(d, channels, WHOLE))
    return total + share[:, None] * value.to(tl.float32)


@triton.jit
def _shape(shape):
    """Of a small map: height, width, rows of a program of the backward, and h / H, w / W."""
    h, w, rows, scale_y, scale_x = shape
    return tl.cast(h, tl.int32), tl.cast(w, tl.int32), tl.cast(rows, tl.int32), scale_y, scale_x


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    base, maps, shapes, out, height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK * BLOCKS)
    c = program % channel_blocks * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    program = program // channel_blocks
    across = tl.cdiv(width, COLUMNS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    x = program % across * COLUMNS + pixel % COLUMNS
    program = program // across
    down_blocks = tl.cdiv(height, ROWS)
    y = program % down_blocks * ROWS + pixel // COLUMNS
    image = tl.cast(program // down_blocks, tl.int64)
    inside = (y < height) & (x < width)
    y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    place = ((image * height + y) * width + x) * channels
    totals = ()
    for block in tl.static_range(BLOCKS):
        d = c + block * BLOCK
        value = tl.load(base + place[:, None] + d[None, :], mask=_existing(d, channels, WHOLE))
        totals += (value.to(tl.float32),)
    for index in tl.static_range(len(maps)):
        rows, columns, _, scale_y, scale_x = _shape(shapes[index])
        center_y = center(y, scale_y, rows)
        center_x = center(x, scale_x, columns)
        top, left = center_y.to(tl.int32), center_x.to(tl.int32)
        down, right = center_y - top, center_x - left
        corner = maps[index] + ((image * rows + top) * columns + left) * channels
        step_x = tl.where(left < columns - 1, channels, 0)
        step_y = tl.where(top < rows - 1, columns * channels, 0)
        added = ()
        for block in tl.static_range(BLOCKS):
            d = c + block * BLOCK
            total = _add_corner(totals[block], corner, d, channels, (1 - down) * (1 - right), WHOLE)
            total = _add_corner(total, corner + step_x, d, channels, (1 - down) * right, WHOLE)
            total = _add_corner(total, corner + step_y, d, channels, down * (1 - right), WHOLE)
            added += (_add_corner(total, corner + step_x + step_y, d, channels, down * right, WHOLE),)
        totals = added
    for block in tl.static_range(BLOCKS):
        d = c + block * BLOCK
        there = inside[:, None] & _existing(d, channels, WHOLE)
        tl.store(out + place[:, None] + d[None, :], totals[block].to(out.dtype.element_ty), mask=there)


@triton.jit
def _shrink_row(line, x, c, scale, small_width, width, channels, first, taps, WHOLE: tl.constexpr):
    """Row `line` (W, D) of the gradient shrunk to the small columns x, a sum over the pixels they went to."""
    total = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    for start in range(0, taps, _TAPS):
        for tap in tl.static_range(_TAPS):
            at = first + (start + tap)
            share = tl.maximum(1 - tl.abs(center(at, scale, small_width) - x), 0.0)
            share = tl.where(at < width, share, 0.0)
            place = line + tl.minimum(at, width - 1)[:, None] * channels + c[None, :]
            pixel = tl.load(place, mask=_existing(c, channels, WHOLE))
            total += share[:, None] * pixel.to(tl.float32)
    return total


@triton.jit(do_not_specialize=[*_SIZES, "programs"])
def _shrink_kernel(
    grad, outs, shapes, height, width, channels, programs,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    image = tl.cast(tl.program_id(0) // programs, tl.int64)
    program = tl.program_id(0) % programs
    channel_blocks = tl.cdiv(channels, BLOCK)
    # The programs of an image are those of the first map, then those of the second, ...
    out = outs[0]
    small_h, small_w, rows, scale_y, scale_x = _shape(shapes[0])
    for index in tl.static_range(1, len(outs)):
        before = tl.cdiv(small_h, rows) * tl.cdiv(small_w, COLUMNS) * channel_blocks
        past = program >= before
        program = tl.where(past, program - before, program)
        out = tl.where(past, outs[index], out)
        next_h, next_w, next_rows, next_y, next_x = _shape(shapes[index])
        small_h, small_w = tl.where(past, next_h, small_h), tl.where(past, next_w, small_w)
        scale_y, scale_x = tl.where(past, next_y, scale_y), tl.where(past, next_x, scale_x)
        rows = tl.where(past, next_rows, rows)
    c = program % channel_blocks * BLOCK + tl.arange(0, BLOCK)
    across = tl.cdiv(small_w, COLUMNS)
    x = program // channel_blocks % across * COLUMNS + tl.arange(0, COLUMNS)
    top = program // channel_blocks // across * rows
    bottom = tl.minimum(top + rows, small_h)
    grad += image * height * width * channels
    out += image * small_h * small_w * channels
    # The pixels t of a row with |center(t) - x| < 1 are `taps` or fewer from `first` on.
    twice = (2 * x - 1) * width - small_w
    first = tl.where(twice < 0, 0, twice // (2 * small_w) + 1)
    taps = tl.cdiv(2 * width, small_w)
    total = tl.zeros([COLUMNS, BLOCK], tl.float32)
    for row in range(tl.maximum(top - 1, 0), bottom):
        after = tl.zeros([COLUMNS, BLOCK], tl.float32)
        for y in range(cell_start(row, small_h, height), cell_start(row + 1, small_h, height)):
            down = center(y, scale_y, small_h) - row
            line = grad + tl.cast(y, tl.int64) * width * channels
            shrunk = _shrink_row(line, x, c, scale_x, small_w, width, channels, first, taps, WHOLE)
            total += (1 - down) * shrunk
            after += down * shrunk
        if row >= top:
            place = tl.cast(row * small_w + x, tl.int64)[:, None] * channels + c[None, :]
            there = (x < small_w)[:, None] & (c < channels)[None, :]
            tl.store(out + place, total.to(out.dtype.element_ty), mask=there)
        total = after


def _shapes(sizes: list[tuple[int, int]], height: int, width: int) -> tuple[tuple[float, ...], ...]:
    """What _shape says of every map. Numbers of float: a kernel is not compiled again for another value."""
    check_sides(height, width, *(side for size in sizes for side in size))
    rows = [min(h, triton.cdiv(_LARGE_ROWS * h, height)) for h, _ in sizes]
    return tuple(
        (float(h), float(w), float(each), h / height, w / width)
        for (h, w), each in zip(sizes, rows, strict=True)
    )


def upsample_sum(base: Tensor, others: list[Tensor]) -> Tensor:
    """base (B, H, W, D) + every map of `others` (B, h_i, w_i, D) enlarged to H x W, in the type of base."""
    base, others = base.contiguous(), [maps.contiguous() for maps in others]
    batch, height, width, channels = base.shape
    shapes = _shapes([(maps.shape[1], maps.shape[2]) for maps in others], height, width)
    out = torch.empty_like(base)
    block = min(_BLOCK, triton.next_power_of_2(channels))
    blocks = 2 if channels > block else 1
    pixel_blocks = batch * triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
    with torch.cuda.device_of(base):
        _sum_kernel[(pixel_blocks * triton.cdiv(channels, block * blocks),)](
            base, tuple(others), shapes, out, height, width, channels, ROWS=_ROWS, COLUMNS=_COLUMNS,
            BLOCK=block, BLOCKS=blocks, WHOLE=channels % (block * blocks) == 0, num_warps=8,
        )  # fmt: skip
    return out


def upsample_sum_backward(grad: Tensor, heights: list[int], widths: list[int]) -> list[Tensor]:
    """The gradients (B, h_i, w_i, D) of the maps from that of the sum, (B, H, W, D)."""
    grad, sizes = grad.contiguous(), list(zip(heights, widths, strict=True))
    batch, height, width, channels = grad.shape
    shapes = _shapes(sizes, height, width)
    outs = tuple(grad.new_empty(batch, *size, channels) for size in sizes)
    block, columns = min(_BLOCK, triton.next_power_of_2(channels)), _SMALL_COLUMNS
    blocks = sum(triton.cdiv(int(h), int(rows)) * triton.cdiv(int(w), columns) for h, w, rows, *_ in shapes)
    programs = blocks * triton.cdiv(channels, block)
    with torch.cuda.device_of(grad):
        _shrink_kernel[(batch * programs,)](
            grad, outs, shapes, height, width, channels, programs, COLUMNS=columns, BLOCK=block,
            WHOLE=channels % block == 0, num_warps=2,
        )  # fmt: skip
    return list(outs)
