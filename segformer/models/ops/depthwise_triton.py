"""Depthwise 3x3 convolution, bias and GELU on tokens in one pass, and their gradient in two, on CUDA.

A program owns a block of channels, a few columns and a chunk of rows. It walks down the rows, and each row of
the input that it reads (at three shifts, two of which are in the cache) goes into the three output rows that
it touches, so an activation is read from memory once per pass:

    forward         reads tokens, writes gelu(conv + bias)
    backward, 1st   reads tokens and grad, writes dz = grad * gelu'(conv + bias), adds up dweight and dbias
    backward, 2nd   reads dz, writes dtokens, the convolution of dz with the filter turned by 180 degrees

Arithmetic is float32; dz is kept in the type of the tokens, as autograd would. Sums over pixels have one
order: every program writes its own, and one reduction adds them.

gelu is z * Phi(z) with the exact normal distribution. Phi(-a) = exp2(polynomial of degree 8 in a), a >= 0,
has an absolute error of 7e-8 (float32 rounds 1 + erf by 6e-8) at half the instructions of erf.

Shapes: B batch, C channels, H W map, N = H * W tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's tile: 4 per thread. Of 8 the filter and the sums of its gradient would fill the
# registers; of 4 in bfloat16 a warp still reads 256 bytes at once.
_TILE = 512
_WARPS = 4
_REGISTERS = 168  # of a thread of the kernel with sums: three programs on a processor, and no spills
# Rows are split until there are so many programs, 2.6 times what an H100 runs at once of them.
_PROGRAMS = 2048
_PROGRAMS_WITH_SUMS = 1024
_MIN_ROWS = 8
_SIZES = ["height", "width", "row_chunks", "rows"]  # of any value: no compilation for each kind of size


@triton.jit
def _lower_tail(a):
    """The normal distribution at -a, a >= 0; the coefficients are a minimax fit of its logarithm."""
    p = -9.08543476e-07 * a + 1.62170256e-05
    p = p * a - 7.84575951e-05
    p = p * a - 3.85626958e-04
    p = p * a + 7.36665920e-03
    p = p * a - 5.26875971e-02
    p = p * a - 4.59151574e-01
    p = p * a - 1.15111134e00
    p = p * a - 9.99999887e-01
    return tl.exp2(p)


@triton.jit
def _gelu(z):
    tail = _lower_tail(tl.abs(z))
    return z * tl.where(z < 0, tail, 1 - tail)


@triton.jit
def _gelu_slope(z):
    tail = _lower_tail(tl.abs(z))
    density = 0.3989422804 * tl.exp2(-0.7213475204 * z * z)
    return tl.where(z < 0, tail, 1 - tail) + z * density


@triton.jit
def _place(height, width, channels, row_chunks, rows, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: its image and chunk, first row, row after the last, columns and channels."""
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(width, COLUMNS)
    c = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    spatial = program // channel_blocks
    x = spatial % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    chunk = spatial // column_blocks
    top = chunk % row_chunks * rows
    return spatial, chunk // row_chunks, top, tl.minimum(top + rows, height), x, c


@triton.jit
def _filter(weight, c, channels, FLIP: tl.constexpr):
    """The 9 taps (1, BLOCK_C) of the filter, or of the filter turned by 180 degrees."""
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(weight + c * 9 + (8 - k if FLIP else k), mask=c < channels, other=0.0)
        taps += (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _row(image, y, x, c, height, width, channels):
    """Row y of an image (H, W, C) at columns x - 1, x, x + 1; zero outside."""
    inside = (y >= 0) & (y < height)
    place = image + (tl.cast(y, tl.int64) * width * channels + (x[:, None] * channels + c[None, :]))
    there = (c < channels)[None, :] & inside
    left = tl.load(place - channels, mask=there & ((x > 0) & (x <= width))[:, None], other=0.0)
    middle = tl.load(place, mask=there & (x < width)[:, None], other=0.0)
    right = tl.load(place + channels, mask=there & (x < width - 1)[:, None], other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit
def _along(taps, line: tl.constexpr, row, total):
    """total + one line of the filter on a row."""
    total += taps[3 * line] * row[0]
    total += taps[3 * line + 1] * row[1]
    return total + taps[3 * line + 2] * row[2]


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    source, weight, bias, out, height, width, channels, row_chunks, rows,
    ACTIVATE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """ACTIVATE: out = gelu(conv(source) + bias); else the convolution with the filter flipped, no bias."""
    _, image, top, bottom, x, c = _place(height, width, channels, row_chunks, rows, COLUMNS, BLOCK_C)
    taps = _filter(weight, c, channels, not ACTIVATE)
    start = tl.zeros([1, BLOCK_C], tl.float32)
    if ACTIVATE:
        start += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    start = tl.zeros([COLUMNS, BLOCK_C], tl.float32) + start
    source += image.to(tl.int64) * height * width * channels
    out += image.to(tl.int64) * height * width * channels
    inside = (x < width)[:, None] & (c < channels)[None, :]
    row = _row(source, top - 1, x, c, height, width, channels)
    this = _along(taps, 0, row, start)
    row = _row(source, top, x, c, height, width, channels)
    this = _along(taps, 1, row, this)
    after = _along(taps, 0, row, start)
    for y in tl.range(top, bottom, num_stages=3, loop_unroll_factor=2):
        row = _row(source, y + 1, x, c, height, width, channels)
        z = _along(taps, 2, row, this)
        this = _along(taps, 1, row, after)
        after = _along(taps, 0, row, start)
        if ACTIVATE:
            z = _gelu(z)
        place = out + (tl.cast(y, tl.int64) * width * channels + (x[:, None] * channels + c[None, :]))
        tl.store(place, z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward_of_gelu(
    grad, tokens, weight, bias, slopes, sums, height, width, channels, row_chunks, rows,
    COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """slopes (B, N, C) = grad * gelu'(conv + bias); sums (programs, 10, C) over the pixels of a program: of
    the slopes, and of their products with the 9 shifted inputs."""
    spatial, image, top, bottom, x, c = _place(height, width, channels, row_chunks, rows, COLUMNS, BLOCK_C)
    taps = _filter(weight, c, channels, False)
    start = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    image = image.to(tl.int64) * height * width * channels
    inside = (x < width)[:, None] & (c < channels)[None, :]
    above = _row(tokens + image, top - 1, x, c, height, width, channels)
    row = _row(tokens + image, top, x, c, height, width, channels)
    totals = ()
    for _ in tl.static_range(10):
        totals += (tl.zeros([COLUMNS, BLOCK_C], tl.float32),)
    for y in tl.range(top, bottom, num_stages=3, loop_unroll_factor=2):
        below = _row(tokens + image, y + 1, x, c, height, width, channels)
        place = image + (tl.cast(y, tl.int64) * width * channels + (x[:, None] * channels + c[None, :]))
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        z = _along(taps, 2, below, _along(taps, 1, row, _along(taps, 0, above, start)))
        slope = g * _gelu_slope(z)
        tl.store(slopes + place, slope.to(slopes.dtype.element_ty), mask=inside)
        inputs = above + row + below
        terms = (slope,)
        for k in tl.static_range(9):
            terms += (slope * inputs[k],)
        added = ()
        for k in tl.static_range(10):
            added += (totals[k] + terms[k],)
        totals = added
        above = row
        row = below
    for k in tl.static_range(10):
        place = (spatial.to(tl.int64) * 10 + k) * channels + c
        tl.store(sums + place, tl.sum(totals[k], axis=0), mask=c < channels)


def _split(tokens: Tensor, height: int, width: int, programs: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and how it splits the work; of the shape alone, so that sums have one order everywhere."""
    batch, _, channels = tokens.shape
    block = min(64, triton.next_power_of_2(channels))
    columns = min(_TILE // block, triton.next_power_of_2(width))
    across = batch * triton.cdiv(width, columns) * triton.cdiv(channels, block)
    rows = height
    while rows > _MIN_ROWS and across * triton.cdiv(height, rows) < programs:
        rows = triton.cdiv(rows, 2)
    chunks = triton.cdiv(height, rows)
    return (across * chunks,), {"rows": rows, "row_chunks": chunks, "COLUMNS": columns, "BLOCK_C": block}


def forward(tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(conv3x3(tokens) + bias), padding 1, of tokens (B, N, C); weight (C, 1, 3, 3), bias (C,).

    The result (B, N, C) has the type of the tokens; weight and bias may be of another.
    """
    tokens, weight, bias = tokens.contiguous(), weight.contiguous(), bias.contiguous()
    out, channels = torch.empty_like(tokens), tokens.shape[2]
    grid, split = _split(tokens, height, width, _PROGRAMS)
    with torch.cuda.device_of(tokens):
        _convolve[grid](
            tokens, weight, bias, out, height, width, channels, ACTIVATE=True, num_warps=_WARPS, **split
        )
    return out


def backward(
    grad: Tensor, tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for tokens, weight and bias, in their types.

    grad and tokens (B, N, C) are of one type. The convolution is computed again and not kept.
    """
    grad, tokens = grad.contiguous(), tokens.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    channels = tokens.shape[2]
    slopes, out = torch.empty_like(tokens), torch.empty_like(tokens)
    grid, split = _split(tokens, height, width, _PROGRAMS_WITH_SUMS)
    spatial = grid[0] // triton.cdiv(channels, split["BLOCK_C"])
    sums = torch.empty(spatial, 10, channels, dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _backward_of_gelu[grid](
            grad, tokens, weight, bias, slopes, sums, height, width, channels,
            num_warps=_WARPS, maxnreg=_REGISTERS, **split,
        )  # fmt: skip
        grid, split = _split(tokens, height, width, _PROGRAMS)
        _convolve[grid](
            slopes, weight, bias, out, height, width, channels, ACTIVATE=False, num_warps=_WARPS, **split
        )
    summed = sums.sum(0)  # (10, C)
    weight_grad = summed[1:].t().clone(memory_format=torch.contiguous_format).view(channels, 1, 3, 3)
    return out, weight_grad.to(weight.dtype), summed[0].to(bias.dtype)
