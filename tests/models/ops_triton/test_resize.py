"""The sum of enlarged maps and its gradient against F.interpolate in float64."""

import pytest
import torch

from segformer.models.ops.resize import project_sum, upsample_sum_reference

pytest.importorskip("triton", reason="Triton is not installed")

FP32, BF16 = torch.float32, torch.bfloat16
# float32: the place of a pixel is rounded too. bfloat16: one rounding, 2^-8 at most and 1.7e-3 in the mean.
LIMITS = {FP32: 2e-6, BF16: 2.5e-3}
CASES = [
    ((1, 1, 1, 1), [(1, 1)], FP32),
    ((2, 8, 8, 5), [(1, 1), (2, 2), (4, 4)], BF16),  # the head's factors 8, 4 and 2
    ((1, 13, 7, 70), [(4, 3), (5, 7)], FP32),
    ((1, 5, 3, 130), [(9, 2)], BF16),  # larger than the sum in one direction
    ((1, 4, 9, 64), [(3, 2), (1, 5), (2, 9), (4, 9)], FP32),
    ((1, 40, 2, 3), [(5, 1)], FP32),  # several chunks of rows
    ((1, 7, 11, 23), [(8, 5), (3, 7)], BF16),
]
LARGE = [  # decode heads
    ((2, 128, 128, 768), [(16, 16), (32, 32), (64, 64)]),
    ((1, 256, 512, 256), [(32, 64), (64, 128), (128, 256)]),
    ((3, 101, 67, 96), [(13, 9), (26, 17), (51, 34)]),
]
CASES += [(*case, dtype) for case in LARGE for dtype in LIMITS if torch.cuda.is_available()]


@pytest.mark.parametrize(("shape", "sizes", "dtype"), CASES, ids=str)
def test_sum_and_gradients_are_those_of_float64(check, called, shape, sizes, dtype):
    torch.manual_seed(0)
    maps = [torch.randn(shape), *(torch.randn(shape[0], *size, shape[3]) for size in sizes)]
    check(
        [one.to(dtype) for one in maps],
        lambda base, *others: torch.ops.segformer.upsample_sum(base, list(others)),
        lambda base, *others: upsample_sum_reference(base, list(others)),
        LIMITS,
    )
    assert called[:2] == ["resize.upsample_sum", "resize.upsample_sum_backward"]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_project_sum_and_its_gradients_are_those_of_float64(check, called, dtype):
    torch.manual_seed(1)
    shapes = (2, 8, 6, 5), (7, 5), (2, 2, 3, 7), (2, 4, 3, 7)
    check(
        [torch.randn(*shape, 2)[..., 0].to(dtype) for shape in shapes],
        lambda maps, weight, *others: project_sum(maps, weight, list(others)),
        lambda maps, weight, *others: upsample_sum_reference(maps @ weight.t(), list(others)),
        {FP32: 2e-6, BF16: 5e-3},
    )
    assert called[:2] == ["resize.upsample_sum", "resize.upsample_sum_backward"]


def test_nothing_around_the_inputs_is_read(surrounded):
    from segformer.models.ops import resize_triton

    results = [
        [resize_triton.upsample_sum(base, [maps]), *resize_triton.upsample_sum_backward(base, [3], [2])]
        for base, maps in surrounded(torch.randn(1, 7, 5, 6), torch.randn(1, 3, 2, 6))
    ]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_side_that_is_too_long_is_refused(device):
    from segformer.models.ops import resize_triton

    with pytest.raises(ValueError, match="a side of 40000 pixels"):
        resize_triton.upsample_sum_backward(torch.zeros(1, 1, 40000, 1, device=device), [1], [2])
