"""The gradient of the cross entropy for the logits, made while the enlarged logits pass through registers.

A program walks over the cells (bilinear_triton.py) of a few rows of the logits, each from left to right. It
makes the enlarged logits of a cell's pixels from the four corners, once: z -> exp2(z - bound) -> its sum over
the classes -> gradient of the corners. It stores per pixel the sum and the bound, of which
cross_entropy_triton.py makes the loss, and per corner the gradient. Logits are multiplied by log2(e) here.

bound, the interpolated maxima of the corners, is at least max_k z_k; where it is so far above that the sum
gets small, the maximum itself takes its place.

A corner belongs to four cells. Those to its left and right are visited by one program one after the other
(the cell left of a program's first column is made again, for its gradient). Those above and below are visited
in different walks: the second adds to what the first stored, and the row between two programs has a buffer of
its own, `edge`. Nothing is added atomically, so sums have one order.

FLAGS are: gradient wanted, label smoothing, pixel weights given, class weights given.
inputs are target, pixel weights, class weights; results are sums, bounds and means, (B, H, W) each.

Shapes: B batch, K classes, h w logits, H W target; parts as in bilinear_triton.py.
"""

import triton
import triton.language as tl

from segformer.models.ops.bilinear_triton import cell_start, center, load_pixel, mix

LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that are of any value: no compilation for each kind of size.
SIZES = ["height", "width", "rows", "columns", "ignore_index"]
_FADED = tl.constexpr(2.0**-24)  # below it the sum of exp2(z - bound) has lost digits


@triton.jit
def label_and_weights(place, inside, inputs, classes, ignore_index, smoothing, FLAGS: tl.constexpr):
    """If a pixel counts, its label (-1: no class), its weight, and the weight of -log p of its class."""
    target, pixel_weights, class_weights = inputs
    label = tl.load(target + place, mask=inside, other=0)
    if target.dtype.element_ty != tl.int64:
        label = label.to(tl.int32)
    counted = inside & (label != ignore_index)
    known = (label >= 0) & (label < classes)
    label = tl.where(known, label, -1).to(tl.int32)
    pixel = tl.where(counted, 1.0, 0.0)
    if FLAGS[2]:
        pixel = tl.where(counted, tl.load(pixel_weights + place, mask=counted, other=0.0), 0.0)
    pixel = tl.where(counted & (known == 0), float("nan"), pixel)
    own = (1 - smoothing) * pixel
    if FLAGS[3]:
        own *= tl.load(class_weights + label, mask=known, other=0.0)
    return counted, label, pixel, own


@triton.jit
def class_spread(
    class_weights, smoothing, classes, FLAGS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """smoothing / K times the class weights, in parts, 0 for padding."""
    parts = ()
    for part in tl.static_range(PARTS):
        k = part * WIDTH + tl.arange(0, WIDTH)[None, :]
        weight = tl.where(k < classes, 1.0, 0.0)
        if FLAGS[3]:
            weight = tl.load(class_weights + k, mask=k < classes, other=0.0)
        parts += (weight * (smoothing / classes),)
    return parts


@triton.jit
def over_classes(parts, PARTS: tl.constexpr):
    """The sum over the classes, (..., 1)."""
    together = parts[0]
    for part in tl.static_range(1, PARTS):
        together += parts[part]
    return tl.sum(together, axis=1, keep_dims=True)


@triton.jit
def _highest(parts, PARTS: tl.constexpr):
    together = parts[0]
    for part in tl.static_range(1, PARTS):
        together = tl.maximum(together, parts[part])
    return tl.max(together, axis=1, keep_dims=True)


@triton.jit
def _blank(PARTS: tl.constexpr, WIDTH: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros([1, WIDTH], tl.float32),)
    return parts


@triton.jit
def _add(first, second, share, PARTS: tl.constexpr):
    """first + share * second, part by part."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (first[part] + share * second[part],)
    return parts


@triton.jit
def _exponentials(left, slope, share, PARTS: tl.constexpr):
    """exp2(left + share * slope - excess) in parts (PIXELS, WIDTH), their sums (PIXELS, 1), and excess."""
    excess = tl.zeros_like(share)
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (tl.exp2(left[part] + share * slope[part]),)
    total = over_classes(parts, PARTS)
    if tl.min(total) < _FADED:
        exponents = ()
        for part in tl.static_range(PARTS):
            exponents += (left[part] + share * slope[part],)
        excess = _highest(exponents, PARTS)
        parts = ()
        for part in tl.static_range(PARTS):
            parts += (tl.exp2(exponents[part] - excess),)
        total = over_classes(parts, PARTS)
    return parts, total, excess


@triton.jit
def _pixels_of_cell(
    left, slope, low, rise, x, end_x, column, first, line, inputs, spread, results, classes, width, columns,
    scale_x, ignore_index, smoothing,
    FLAGS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of line `line` from x on: stores their sums, returns the gradient of both ends.

    Their logits are left + low + share * (slope + rise), where low + share * rise is the bound. The sums of a
    column left of `first` are another program's to store.
    """
    at = x + tl.arange(0, PIXELS)[:, None]
    inside = at < end_x
    share = tl.minimum(center(at, scale_x, columns) - column, 1.0)
    exponentials, total, excess = _exponentials(left, slope, share, PARTS)
    place = line * width + at
    sums, bounds, means = results
    stored = inside & (column >= first)
    tl.store(sums + place, total, mask=stored)
    bound = low + share * rise
    tl.store(bounds + place, bound + excess, mask=stored)
    if FLAGS[1]:
        product = ()
        for part in tl.static_range(PARTS):
            product += (spread[part] * (left[part] + share * slope[part] + bound),)
        tl.store(means + place, over_classes(product, PARTS), mask=stored)
    at_left, at_right = (), ()
    if FLAGS[0]:
        _, label, pixel, own = label_and_weights(
            place, inside, inputs, classes, ignore_index, smoothing, FLAGS
        )  # fmt: skip
        factor = own
        if FLAGS[1]:
            factor += pixel * over_classes(spread, PARTS)
        factor = tl.where(inside, factor / total, 0.0)
        for part in tl.static_range(PARTS):
            k = part * WIDTH + tl.arange(0, WIDTH)[None, :]
            grad = exponentials[part] * factor - tl.where(k == label, own, 0.0)
            if FLAGS[1]:
                grad -= spread[part] * pixel
            right = tl.sum(share * grad, axis=0, keep_dims=True)
            at_left += (tl.sum(grad, axis=0, keep_dims=True) - right,)
            at_right += (right,)
    return at_left, at_right


@triton.jit
def _cell(
    corners, highs, row, column, first, begin_x, end_x, image, inputs, spread, results, classes, size, sides,
    scales, ignore_index, smoothing,
    FLAGS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The pixels of one cell; returns the gradient of its corners. Corners are top left, bottom left, top
    right and bottom right."""
    height, width = size
    grads = (_blank(PARTS, WIDTH), _blank(PARTS, WIDTH), _blank(PARTS, WIDTH), _blank(PARTS, WIDTH))
    for y in range(cell_start(row, sides[0], height), cell_start(row + 1, sides[0], height)):
        down = center(y, scales[0], sides[0]) - row
        low = highs[0] + down * (highs[1] - highs[0])
        rise = highs[2] + down * (highs[3] - highs[2]) - low
        start = mix(corners[0], corners[1], down, PARTS)
        end = mix(corners[2], corners[3], down, PARTS)
        left, slope = (), ()
        for part in tl.static_range(PARTS):
            left += (start[part] - low,)
            slope += (end[part] - start[part] - rise,)
        line = image * height + y
        at_left, at_right = _blank(PARTS, WIDTH), _blank(PARTS, WIDTH)
        for x in range(begin_x, end_x, PIXELS):
            more_left, more_right = _pixels_of_cell(
                left, slope, low, rise, x, end_x, column, first, line, inputs, spread, results, classes,
                width, sides[1], scales[1], ignore_index, smoothing, FLAGS, PIXELS, PARTS, WIDTH,
            )  # fmt: skip
            if FLAGS[0]:
                at_left = _add(at_left, more_left, 1.0, PARTS)
                at_right = _add(at_right, more_right, 1.0, PARTS)
        if FLAGS[0]:
            grads = (
                _add(grads[0], at_left, 1 - down, PARTS),
                _add(grads[1], at_left, down, PARTS),
                _add(grads[2], at_right, 1 - down, PARTS),
                _add(grads[3], at_right, down, PARTS),
            )
    return grads


@triton.jit
def _store_gradient(
    at_top, at_bottom, image, row, column, first_row, last_row, row_chunk, row_chunks, grad, edge, classes,
    sides, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a top corner to what the row above stored; keep that of the bottom corner."""
    height, width = sides
    for part in tl.static_range(PARTS):
        k = part * WIDTH + tl.arange(0, WIDTH)[None, :]
        place = grad + ((image * height + row) * width + column) * classes + k
        value = at_top[part]
        if row > first_row:
            value += tl.load(place, mask=k < classes, other=0.0)
        tl.store(place, value, mask=k < classes)
        if row < height - 1:
            if row < last_row:
                place += width * classes
            else:
                place = edge + ((image * row_chunks + row_chunk) * width + column) * classes + k
            tl.store(place, at_bottom[part], mask=k < classes)


@triton.jit(do_not_specialize=[*SIZES, "row_chunks", "column_chunks", "columns_each"])
def sweep(
    logits, strides, inputs, results, grad, edge, height, width, rows, columns, scales, row_chunks,
    column_chunks, rows_each, columns_each, classes, ignore_index, smoothing,
    FLAGS: tl.constexpr, PIXELS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A few rows of cells: results per pixel, grad (B, h, w, K), and edge (B, row_chunks, w, K), the gradient
    of the row below the last one. grad is complete when edge is added to it. h and w are rows and columns."""
    program = tl.program_id(0)
    size, sides = (height, width), (rows, columns)
    row_chunk = program // column_chunks % row_chunks
    image = tl.cast(program // (column_chunks * row_chunks), tl.int64)
    first = program % column_chunks * columns_each
    begin = tl.maximum(first - 1, 0) if FLAGS[0] else first
    end = tl.minimum(first + columns_each, columns)
    top = row_chunk * rows_each
    bottom = tl.minimum(top + rows_each, rows)
    spread = class_spread(inputs[2], smoothing, classes, FLAGS, PARTS, WIDTH)
    logits += image * strides[0]
    for row in range(top, bottom):
        upper = logits + tl.cast(row, tl.int64) * strides[2]
        lower = upper + tl.where(row < rows - 1, strides[2], 0)
        offset = tl.cast(begin, tl.int64) * strides[3]
        left_top = load_pixel(upper + offset, strides[1], classes, LOG2_E, PARTS, WIDTH)
        left_bottom = load_pixel(lower + offset, strides[1], classes, LOG2_E, PARTS, WIDTH)
        high_top, high_bottom = _highest(left_top, PARTS), _highest(left_bottom, PARTS)
        from_left = (_blank(PARTS, WIDTH), _blank(PARTS, WIDTH))
        begin_x = cell_start(begin, columns, width)
        for column in range(begin, end):
            offset = tl.cast(tl.minimum(column + 1, columns - 1), tl.int64) * strides[3]
            right_top = load_pixel(upper + offset, strides[1], classes, LOG2_E, PARTS, WIDTH)
            right_bottom = load_pixel(lower + offset, strides[1], classes, LOG2_E, PARTS, WIDTH)
            next_top, next_bottom = _highest(right_top, PARTS), _highest(right_bottom, PARTS)
            end_x = cell_start(column + 1, columns, width)
            grads = _cell(
                (left_top, left_bottom, right_top, right_bottom),
                (high_top, high_bottom, next_top, next_bottom), row, column, first, begin_x, end_x, image,
                inputs, spread, results, classes, size, sides, scales, ignore_index, smoothing,
                FLAGS, PIXELS, PARTS, WIDTH,
            )  # fmt: skip
            if FLAGS[0]:
                # In the last column the corners of a side are one pixel, in the last row those of a column.
                last = tl.where(column == columns - 1, 1.0, 0.0)
                at_top = _add(_add(grads[0], from_left[0], 1.0, PARTS), grads[2], last, PARTS)
                at_bottom = _add(_add(grads[1], from_left[1], 1.0, PARTS), grads[3], last, PARTS)
                at_top = _add(at_top, at_bottom, tl.where(row == rows - 1, 1.0, 0.0), PARTS)
                if column >= first:
                    _store_gradient(
                        at_top, at_bottom, image, row, column, top, bottom - 1, row_chunk, row_chunks, grad,
                        edge, classes, sides, PARTS, WIDTH,
                    )  # fmt: skip
                from_left = (grads[2], grads[3])
            left_top, left_bottom, high_top, high_bottom = right_top, right_bottom, next_top, next_bottom
            begin_x = end_x
        tl.debug_barrier()  # the next row adds to what this one stored
