"""The sum of enlarged maps and its gradient against F.interpolate in float64."""

import pytest
import torch
import torch.nn.functional as F

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


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left - right|| / ||right||."""
    return ((left.cpu().double() - right).norm() / right.norm().clamp(min=1e-30)).item()


def reference(base, others):
    size = (base.shape[1], base.shape[2])
    enlarged = [
        F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        for maps in others
    ]
    return base + sum(maps.permute(0, 2, 3, 1) for maps in enlarged)


def check(device, shape, sizes, dtype, seed=0):
    from segformer.models.ops import resize_triton as resize

    generator = torch.Generator().manual_seed(seed)
    base, grad = torch.randn(2, *shape, generator=generator).to(dtype)
    others = [torch.randn(shape[0], *size, shape[3], generator=generator).to(dtype) for size in sizes]
    exact = [maps.double().requires_grad_() for maps in others]
    expected = reference(base.double(), exact)
    expected.backward(grad.double())
    out = resize.upsample_sum(base.to(device), [maps.to(device) for maps in others])
    grads = resize.upsample_sum_backward(grad.to(device), *map(list, zip(*sizes, strict=True)))
    assert out.dtype == dtype
    assert distance(out, expected.detach()) < TOLERANCE[dtype]
    for found, maps in zip(grads, exact, strict=True):
        assert found.shape == maps.shape
        assert found.dtype == dtype
        assert distance(found, maps.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "sizes"), CASES, ids=str)
def test_sum_and_gradients_are_those_of_float64(device, shape, sizes, dtype):
    check(device, shape, sizes, dtype)


@pytest.mark.parametrize("seed", range(5))
def test_any_sizes(device, seed):
    def draw(limit: int) -> int:
        return int(torch.randint(1, limit, (), generator=generator))

    generator = torch.Generator().manual_seed(seed)
    sizes = [(draw(9), draw(9)) for _ in range(draw(4))]
    check(device, (1, draw(16), draw(16), draw(40)), sizes, torch.float32, seed)


def test_nothing_around_the_inputs_is_read(device):
    from segformer.models.ops import resize_triton as resize

    generator = torch.Generator().manual_seed(0)
    base, grad = torch.randn(2, 1, 7, 5, 6, generator=generator)
    maps = torch.randn(1, 3, 2, 6, generator=generator)
    results = []
    for around in (0.0, float("nan")):
        inside = []
        for value in (base, maps, grad):
            room = torch.full((value.numel() + 400,), around)
            room[200:-200] = value.flatten()
            inside.append(room.to(device)[200:-200].view(value.shape))
        total = resize.upsample_sum(inside[0], [inside[1]])
        results.append([total, *resize.upsample_sum_backward(inside[2], [3], [2])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_side_that_is_too_long_is_refused(device):
    from segformer.models.ops import resize_triton as resize

    with pytest.raises(ValueError, match="a side of 40000 pixels"):
        resize.upsample_sum_backward(torch.zeros(1, 1, 40000, 1, device=device), [1], [2])
