"""Bilinear resizing with align_corners=False, as the kernels see it.

A line of `source` pixels is resized to `target`. Target pixel t lies at

    center(t) = clamp((t + 0.5) * source / target - 0.5, 0, source - 1)

of the source, between pixels i = floor(center) and min(i + 1, source - 1), with weights 1 - f and f. The cell
of source pixel i is made of the target pixels that lie between i and the next. It begins at `cell_start(i)`,
in whole numbers, so that cells cover every target pixel exactly once whatever the rounding of a center; where
the rounding disagrees, f is 1 + 1e-7 of one cell in place of 1e-7 of the next, which is the same value.

The logits of a pixel are PARTS tensors of shape (1, WIDTH), together the K classes and some padding: 150
classes are 5 times 32, where one tensor would need 256. For a factor of 4 the four pixels at the corners of a
cell make its 16 target pixels without being read again.
"""

import triton
import triton.language as tl

LONGEST_SIDE = 32767  # pixels; places along a line are 32-bit numbers
# The logit of padding. Finite, so that the differences of two are not NaN.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def center(target_pixel, scale, source):
    """scale = source / target."""
    place = (tl.cast(target_pixel, tl.float32) + 0.5) * scale - 0.5
    return tl.minimum(tl.maximum(place, 0.0), source - 1.0)


@triton.jit
def cell_start(pixel, source, target):
    """The first target pixel of the cell of source pixel `pixel`; of pixel `source` the end of the line."""
    # ceil((pixel + 0.5) * target / source - 0.5), but 0 for the first
    start = ((2 * pixel + 1) * target + source - 1) // (2 * source)
    return tl.where(pixel >= source, target, tl.where(pixel <= 0, 0, start))


@triton.jit
def load_pixel(place, stride, classes, scale: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """scale times the logits of the pixel at `place`, float32."""
    parts = ()
    for part in tl.static_range(PARTS):
        k = part * WIDTH + tl.arange(0, WIDTH)[None, :]
        logits = tl.load(place + k.to(tl.int64) * stride, mask=k < classes, other=0.0)
        parts += (tl.where(k < classes, logits.to(tl.float32) * scale, _LOWEST),)
    return parts


@triton.jit
def mix(first, second, share, PARTS: tl.constexpr):
    """first + share * (second - first), part by part."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (first[part] + share * (second[part] - first[part]),)
    return parts


def class_parts(classes: int) -> dict[str, int]:
    """How the classes of a pixel are spread over threads: up to 5 for each, and more beyond 1280 classes."""
    warps = min(8, triton.next_power_of_2(triton.cdiv(classes, 160)))
    width = min(32 * warps, triton.next_power_of_2(classes))
    return {"PARTS": triton.cdiv(classes, width), "WIDTH": width, "num_warps": warps}


def pixels_at_once(source: int, target: int) -> int:
    """Target pixels of one line that a program makes together: those of a cell, at most 8."""
    return min(8, triton.next_power_of_2(triton.cdiv(target, source)))


def check_sides(*sides: int) -> None:
    """ValueError where `cell_start` would overflow."""
    if max(sides) > LONGEST_SIDE:
        raise ValueError(f"a map with a side of {max(sides)} pixels; the kernels take up to {LONGEST_SIDE}")
