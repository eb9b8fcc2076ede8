"""Cross entropy of bilinearly enlarged logits and its gradient, without the enlarged logits, on CUDA.

    total = sum of w * loss      loss = (1 - e) c_y (lse - z_y) + e / K sum_k c_k (lse - z_k)
    z: logits at a pixel, y: its label, w: its weight, c: class weights, e: label smoothing

Two kernels: sweep_triton.py makes the gradient and, per pixel, the sum of exponentials whose logarithm is
lse; the one here makes -log p_y = lse - z_y per pixel, with z_y from the four corners, and the sum of a block
of them.

A label that is neither a class nor `ignore_index` makes the loss NaN and reads nothing out of bounds.

Shapes: B batch, K classes, h w logits, H W target.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from segformer.models.ops.bilinear_triton import center, check_sides, class_parts, pixels_at_once
from segformer.models.ops.sweep_triton import LOG2_E, SIZES, label_and_weights, sweep

_LN_2 = tl.constexpr(0.6931471805599453)
_ROWS = 4  # rows of cells of a program
_PROGRAMS = 2048  # columns are split until there are so many programs: 16 for each processor of an H100
_COLUMNS = (4, 16)  # fewest and most columns of cells
# Registers of a thread of the sweep for fewer than 5 parts and for 5: as few as go without spills, for 16 and
# 12 warps on a processor. Without a limit the compiler takes 255 for 5 parts, for 8 warps.
_REGISTERS = (128, 168)
_BLOCK = 512  # pixels of a program of _losses


@triton.jit(do_not_specialize=[*SIZES, "blocks"])
def _losses(
    logits, strides, inputs, results, losses, totals, height, width, rows, columns, scales, blocks, classes,
    ignore_index, smoothing, FLAGS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-log p_y of every pixel, and the weighted sum of a block of them; arguments as in sweep_triton.py."""
    spread = smoothing
    if FLAGS[3]:
        k = tl.arange(0, CLASSES)
        spread *= tl.sum(tl.load(inputs[2] + k, mask=k < classes, other=0.0)) / classes
    image = tl.cast(tl.program_id(0) // blocks, tl.int64)
    pixel_of_image = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel_of_image < height * width
    place = image * height * width + pixel_of_image
    counted, label, pixel, own = label_and_weights(
        place, inside, inputs, classes, ignore_index, smoothing, FLAGS
    )  # fmt: skip
    center_y = center(pixel_of_image // width, scales[0], rows)
    center_x = center(pixel_of_image % width, scales[1], columns)
    top, left = center_y.to(tl.int32), center_x.to(tl.int32)
    down, share = center_y - top, center_x - left
    upper = logits + image * strides[0] + tl.maximum(label, 0).to(tl.int64) * strides[1]
    upper += top.to(tl.int64) * strides[2]
    lower = upper + tl.where(top < rows - 1, strides[2], 0)
    near = left.to(tl.int64) * strides[3]
    far = near + tl.where(left < columns - 1, strides[3], 0)
    start = tl.load(upper + near, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    start += down * (tl.load(lower + near, mask=inside, other=0.0).to(tl.float32) * LOG2_E - start)
    end = tl.load(upper + far, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    end += down * (tl.load(lower + far, mask=inside, other=0.0).to(tl.float32) * LOG2_E - end)
    sums, bounds, means = results
    bound = tl.load(bounds + place, mask=inside, other=0.0)
    log_sum = tl.log2(tl.load(sums + place, mask=inside, other=1.0))
    nll = (log_sum + (bound - (start + share * (end - start)))) * _LN_2
    nll = tl.where(label < 0, float("nan"), tl.where(nll < 0, 0.0, nll))
    weighted = own * nll
    if FLAGS[1]:
        mean = tl.load(means + place, mask=inside, other=0.0)
        weighted += pixel * (spread * (log_sum + bound) - mean) * _LN_2
    tl.store(losses + place, tl.where(counted, nll, 0.0), mask=inside)
    tl.store(totals + tl.program_id(0), tl.sum(tl.where(counted, weighted, 0.0)))


def _columns_each(batch: int, height: int, width: int) -> int:
    """Columns of cells of a program, by the shape alone, so that sums have one order everywhere."""
    across, columns = batch * triton.cdiv(height, _ROWS), _COLUMNS[1]
    while columns > _COLUMNS[0] and across * triton.cdiv(width, columns) < _PROGRAMS:
        columns //= 2
    return columns


def forward(
    logits: Tensor,
    target: Tensor,
    pixel_weights: Tensor | None,
    class_weights: Tensor | None,
    smoothing: float,
    ignore_index: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K, h, w) of any strides, target (B, H, W) of uint8 or int64 -> total, losses, grad.

    total is the sum of pixel_weights (B, H, W) times the loss; losses (B, H, W) is -log p_y, 0 where ignored;
    grad (B, K, h, w), in channels-last memory, is that of the total for the logits, empty without needs_grad.
    pixel_weights and class_weights (K,) are float32, like all results.
    """
    target = target.contiguous()
    batch, classes, *sides = logits.shape
    size = target.shape[1:]
    check_sides(*sides, *size)
    row_chunks, columns_each = triton.cdiv(sides[0], _ROWS), _columns_each(batch, sides[0], sides[1])
    column_chunks, blocks = triton.cdiv(sides[1], columns_each), triton.cdiv(size[0] * size[1], _BLOCK)
    new = partial(torch.empty, dtype=torch.float32, device=logits.device)
    sums, bounds, losses = new(target.shape), new(target.shape), new(target.shape)
    means = new(target.shape) if smoothing > 0 else sums
    totals = new(batch * blocks)
    grad = new(batch, *sides, classes) if needs_grad else new(0)
    edge = new(batch, row_chunks, sides[1], classes) if needs_grad else grad
    # What is not there is another pointer that is not used.
    given = [target if one is None else one.contiguous() for one in (pixel_weights, class_weights)]
    inputs, results = (target, *given), (sums, bounds, means)
    flags = (needs_grad, smoothing > 0, pixel_weights is not None, class_weights is not None)
    parts = class_parts(classes)
    shapes = (*size, *sides, (sides[0] / size[0], sides[1] / size[1]))
    with torch.cuda.device_of(logits):
        sweep[(batch * row_chunks * column_chunks,)](
            logits, logits.stride(), inputs, results, grad, edge, *shapes, row_chunks, column_chunks, _ROWS,
            columns_each, classes, ignore_index, smoothing, FLAGS=flags,
            PIXELS=pixels_at_once(sides[1], size[1]), maxnreg=_REGISTERS[parts["PARTS"] >= 5], **parts,
        )  # fmt: skip
        _losses[(batch * blocks,)](
            logits, logits.stride(), inputs, results, losses, totals, *shapes, blocks, classes, ignore_index,
            smoothing, FLAGS=flags, CLASSES=triton.next_power_of_2(classes), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    if needs_grad:
        grad[:, _ROWS::_ROWS] += edge[:, :-1]
        grad = grad.permute(0, 3, 1, 2)
    return totals.sum(), losses, grad
