"""The sum of enlarged maps and its gradient against F.interpolate in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import distance

pytest.importorskip("triton", reason="Triton is not installed")

# float32: the place of a pixel is rounded too. bfloat16: one rounding, 2^-8 at most and 1.7e-3 in the mean.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3}
CASES = [
    ((1, 1, 1, 1), [(1, 1)]),
    ((2, 8, 8, 5), [(1, 1), (2, 2), (4, 4)]),  # the head's factors 8, 4 and 2
    ((1, 13, 7, 70), [(4, 3), (5, 7)]),
    ((1, 5, 3, 130), [(9, 2)]),  # larger than the sum in one direction
    ((1, 4, 9, 64), [(3, 2), (1, 5), (2, 9), (4, 9)]),
    ((1, 40, 2, 3), [(5, 1)]),  # several chunks of rows
]
LARGE = [  # decode heads
    ((2, 128, 128, 768), [(16, 16), (32, 32), (64, 64)]),
    ((1, 256, 512, 256), [(32, 64), (64, 128), (128, 256)]),
    ((3, 101, 67, 96), [(13, 9), (26, 17), (51, 34)]),
]


def reference(base, others):
    size = (base.shape[1], base.shape[2])
    enlarged = [
        F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        for maps in others
    ]
    return base + sum(maps.permute(0, 2, 3, 1) for maps in enlarged)


def run(base, others, grad):
    """The sum, and the gradients of `others`."""
    from segformer.models.ops import resize_triton

    heights, widths = ([maps.shape[axis] for maps in others] for axis in (1, 2))
    total = resize_triton.upsample_sum(base, others)
    return [total, *resize_triton.upsample_sum_backward(grad, heights, widths)]


def check(device, shape, sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base, grad = torch.randn(2, *shape, generator=generator).to(device, dtype)
    others = [torch.randn(shape[0], *size, shape[3], generator=generator) for size in sizes]
    others = [maps.to(device, dtype) for maps in others]
    exact = [maps.double().requires_grad_() for maps in others]
    expected = reference(base.double(), exact)
    expected.backward(grad.double())
    found = run(base, others, grad)
    for ours, right in zip(found, [expected, *(maps.grad for maps in exact)], strict=True):
        assert (ours.shape, ours.dtype) == (right.shape, dtype)
        assert distance(ours, right) < TOLERANCE[dtype]
    for first, second in zip(found, run(base, others, grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "sizes"), CASES + (LARGE if torch.cuda.is_available() else []), ids=str)
def test_sum_and_gradients_are_those_of_float64(device, shape, sizes, dtype):
    check(device, shape, sizes, dtype)


@pytest.mark.parametrize("seed", range(5))
def test_any_sizes(device, seed):
    def draw(limit: int) -> int:
        return int(torch.randint(1, limit, (), generator=generator))

    generator = torch.Generator().manual_seed(seed)
    sizes = [(draw(9), draw(9)) for _ in range(draw(4))]
    check(device, (1, draw(16), draw(16), draw(40)), sizes, torch.float32, seed)


def test_nothing_around_the_inputs_is_read(device, surrounded):
    given = torch.randn(2, 1, 7, 5, 6), torch.randn(1, 3, 2, 6)
    results = [run(base, [maps], grad) for base, grad, maps in surrounded(*given[0], given[1])]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_side_that_is_too_long_is_refused(device):
    from segformer.models.ops import resize_triton

    with pytest.raises(ValueError, match="a side of 40000 pixels"):
        resize_triton.upsample_sum_backward(torch.zeros(1, 1, 40000, 1, device=device), [1], [2])
