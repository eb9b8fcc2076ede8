"""Cross entropy of enlarged logits and its gradient against F.interpolate and F.cross_entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import distance

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = 2e-6  # relative, largest difference over largest value; the logits are given, results are float32
PLAIN = {"pixel": False, "classes": False, "smoothing": 0.0}
OPTIONS = [
    PLAIN,
    {"pixel": True, "classes": False, "smoothing": 0.0},
    {"pixel": False, "classes": True, "smoothing": 0.1},
    {"pixel": True, "classes": True, "smoothing": 0.3},
]
# B, K, h, w, H, W
SHAPES = [
    (1, 1, 1, 1, 3, 2),  # one class, one pixel
    (2, 2, 2, 2, 8, 8),  # factor 4
    (1, 5, 5, 2, 7, 5),  # several chunks of rows, odd factors
    (1, 3, 1, 9, 2, 20),  # several chunks of columns
    (1, 4, 5, 3, 3, 2),  # smaller than the logits
    (1, 19, 2, 2, 1, 17),  # more pixels of a cell than a program makes at once
    (1, 33, 2, 2, 4, 4),
    (1, 150, 2, 2, 4, 5),  # 5 parts
    (1, 161, 1, 2, 2, 3),  # 2 warps
    (1, 1024, 1, 2, 1, 3),
]
LARGE = [
    (2, 150, 128, 128, 512, 512),
    (1, 19, 256, 512, 1024, 2048),
    (2, 2, 64, 64, 256, 256),
    (2, 171, 33, 47, 131, 187),
    (1, 1000, 16, 16, 61, 67),
]


def reference(logits, target, pixel_weights, class_weights, smoothing, ignore_index):
    """Total, -log p of every pixel and gradient, in float64."""
    logits = logits.double().requires_grad_()
    size = (target.shape[1], target.shape[2])
    enlarged = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    settings = {"ignore_index": ignore_index, "reduction": "none"}
    weights = None if class_weights is None else class_weights.double()
    losses = F.cross_entropy(enlarged, target.long(), weights, label_smoothing=smoothing, **settings)
    total = (losses if pixel_weights is None else losses * pixel_weights).sum()
    total.backward()
    return total.detach(), F.cross_entropy(enlarged, target.long(), **settings).detach(), logits.grad


def draw(shape, *, pixel, classes, smoothing, scale=2.0, seed=0):
    """Arguments of the loss for logits (B, h, w, K) in memory; a fifth of the labels is 255."""
    batch, count, h, w, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, h, w, count, generator=generator)
    target = torch.randint(0, count, (batch, height, width), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255 if count <= 255 else -100
    pixel_weights = torch.rand(target.shape, generator=generator) if pixel else None
    class_weights = 0.1 + torch.rand(count, generator=generator) if classes else None
    ignore = 255 if count <= 255 else -100
    return [logits.permute(0, 3, 1, 2), target, pixel_weights, class_weights, smoothing, ignore]


def check(device, arguments, tolerance=TOLERANCE):
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    placed = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    found = cross_entropy.forward(*placed, True)
    for value, expected in zip(found, reference(*arguments), strict=True):
        assert value.dtype == torch.float32
        assert value.shape == expected.shape
        assert (value.cpu() - expected).abs().max() <= tolerance * expected.abs().max() + 1e-7
    assert found[2].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_those_of_float64(device, shape):
    options = OPTIONS[SHAPES.index(shape) % len(OPTIONS)]
    arguments = draw(shape, **options)
    if shape[1] <= 255:
        arguments[1] = arguments[1].to(torch.uint8)
    check(device, arguments)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_and_smoothing_are_those_of_torch(device, options):
    check(device, draw((2, 5, 2, 2, 4, 3), **options, seed=1))


def test_without_a_gradient_the_losses_are_the_same(device):
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    placed = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in draw((1, 5, 2, 6, 3, 7), **OPTIONS[3])
    ]
    with_gradient = cross_entropy.forward(*placed, True)
    total, losses, grad = cross_entropy.forward(*placed, False)
    assert torch.equal(total, with_gradient[0])
    assert torch.equal(losses, with_gradient[1])
    assert grad.numel() == 0


@pytest.mark.parametrize("layout", ["bfloat16", "class outermost", "every second column", "one image, twice"])
def test_logits_of_other_types_and_strides(device, layout):
    arguments = draw((2, 6, 2, 2, 3, 4), **OPTIONS[3])
    logits = arguments[0]
    if layout == "bfloat16":
        logits = logits.bfloat16()
    elif layout == "class outermost":
        logits = logits.contiguous()
    elif layout == "every second column":
        logits = torch.randn(2, 2, 4, 6)[:, :, ::2].permute(0, 3, 1, 2)
    else:
        logits = logits[:1].expand(2, -1, -1, -1)
    arguments[0] = logits
    check(device, arguments)


@pytest.mark.parametrize("scale", [30.0, 300.0, 3000.0])
def test_logits_far_apart(device, scale):
    """Corners disagree by more than float32 can exponentiate: the maximum is taken at the pixel itself."""
    check(device, draw((1, 7, 2, 2, 6, 6), **OPTIONS[3], scale=scale), tolerance=5e-6)


def test_everything_ignored_is_zero(device):
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    logits = torch.randn(1, 4, 2, 2, device=device)
    target = torch.full((1, 5, 5), 255, dtype=torch.uint8, device=device)
    total, losses, grad = cross_entropy.forward(logits, target, None, None, 0.1, 255, True)
    assert total == 0
    assert not losses.any()
    assert not grad.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("label", [4, 200, -1, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan_and_reads_nothing_else(device, label):
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=device)
    target[0, 1, 2] = label
    logits = torch.randn(1, 4, 2, 2, device=device)
    weights = torch.ones(4, device=device)
    total, losses, _ = cross_entropy.forward(logits, target, None, weights, 0.0, 255, True)
    assert total.isnan()
    assert losses.isnan().nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_any_sizes(device, seed):
    generator = torch.Generator().manual_seed(seed)
    limits = (2, 40, 6, 6, 7, 7)
    shape = tuple(int(torch.randint(1, limit, (), generator=generator)) for limit in limits)
    check(device, draw(shape, **OPTIONS[seed % len(OPTIONS)], seed=seed))


def test_nothing_around_the_logits_is_read(device, surrounded):
    from segformer.models.ops import cross_entropy_triton

    logits, target, *rest = draw((1, 6, 2, 3, 5, 6), **PLAIN)
    results = [
        cross_entropy_triton.forward(inside.permute(0, 3, 1, 2), target.to(device), *rest, True)
        for (inside,) in surrounded(logits.permute(0, 2, 3, 1))
    ]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none")
@pytest.mark.parametrize("options", [PLAIN, OPTIONS[3]], ids=["plain", "weights and smoothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_sizes_of_a_network(device, shape, dtype, options):
    from segformer.models.ops import cross_entropy_triton

    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in draw(shape, **options)]
    arguments[0] = arguments[0].to(dtype)
    if shape[1] <= 255:
        arguments[1] = arguments[1].to(torch.uint8)
    found = cross_entropy_triton.forward(*arguments, True)
    exact = reference(*arguments)
    assert distance(found[0], exact[0]) < TOLERANCE
    assert distance(found[2], exact[2]) < 5 * TOLERANCE  # the largest term of a softmax is 1 - p
    for first, second in zip(found, cross_entropy_triton.forward(*arguments, True), strict=True):
        assert torch.equal(first, second)
