"""The kernels on a GPU: sizes of a real network, bfloat16 against the reference's, the same bits every time.

tests/models/ops_triton runs its own cases on the GPU as well where there is one.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

# Distance from float64 of float32 results; sums over the pixels of a batch for the weight gradient.
EXACT = 2e-6


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left - right|| / ||right||."""
    return ((left.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30)).item()


def assert_as_near_as(found, plain, exact):
    """bfloat16: no further from float64 than the plain form in bfloat16 is."""
    for ours, theirs, best in zip(found, plain, exact, strict=True):
        assert distance(ours, best) <= 1.02 * distance(theirs, best) + 1e-7


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def depthwise_reference(tokens, size, weight, bias, grad):
    leaves = [value.detach().requires_grad_() for value in (tokens, weight, bias)]
    maps = leaves[0].unflatten(1, size).permute(0, 3, 1, 2)
    out = F.gelu(F.conv2d(maps, *leaves[1:], padding=1, groups=len(weight))).flatten(2).transpose(1, 2)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def depthwise_kernels(tokens, size, weight, bias, grad):
    from segformer.models.ops import depthwise_triton as depthwise

    return [
        depthwise.forward(tokens, *size, weight, bias),
        *depthwise.backward(grad, tokens, *size, weight, bias),
    ]


# Stages of MiT-B5 at 512 x 512, and prime sides
DEPTHWISE = [((128, 128), 256), ((64, 64), 512), ((32, 32), 1280), ((16, 16), 2048), ((37, 53), 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "channels"), DEPTHWISE, ids=str)
def test_depthwise(size, channels, dtype):
    tokens = random(2, size[0] * size[1], channels, dtype=dtype)
    grad = random(2, size[0] * size[1], channels, dtype=dtype, seed=1)
    weight, bias = 0.3 * random(channels, 1, 3, 3), random(channels)
    found = depthwise_kernels(tokens, size, weight, bias, grad)
    exact = depthwise_reference(tokens.double(), size, weight.double(), bias.double(), grad.double())
    if dtype == torch.float32:
        for ours, best in zip(found, exact, strict=True):
            assert distance(ours, best) < EXACT
    else:
        plain = depthwise_reference(tokens, size, weight.to(dtype), bias.to(dtype), grad)
        assert_as_near_as(found, plain, exact)
    for first, second in zip(found, depthwise_kernels(tokens, size, weight, bias, grad), strict=True):
        assert torch.equal(first, second)


def test_depthwise_beyond_32_bit_offsets():
    channels, batch = 1024, 9
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens = torch.randn(1, 512 * 512, channels, device="cuda", dtype=torch.bfloat16).repeat(batch, 1, 1)
    assert tokens.numel() > 2**31
    weight, bias = random(channels, 1, 3, 3), random(channels)
    alone = depthwise_kernels(tokens[:1], (512, 512), weight, bias, tokens[:1])
    out, grad, *_ = depthwise_kernels(tokens, (512, 512), weight, bias, tokens)
    for image in (0, batch - 1):
        assert distance(out[image], alone[0][0]) < 1e-6
        assert distance(grad[image], alone[1][0]) < 1e-6


def resize_reference(base, others, grad):
    size, leaves = base.shape[1:3], [maps.detach().requires_grad_() for maps in others]
    total = base
    for maps in leaves:
        enlarged = F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        total = total + enlarged.permute(0, 2, 3, 1)
    total.backward(grad)
    return [total.detach(), *(leaf.grad for leaf in leaves)]


def resize_kernels(base, others, grad):
    from segformer.models.ops import resize_triton as resize

    sizes = zip(*(maps.shape[1:3] for maps in others), strict=True)
    return [resize.upsample_sum(base, others), *resize.upsample_sum_backward(grad, *map(list, sizes))]


RESIZE = [
    ((2, 128, 128, 768), [(16, 16), (32, 32), (64, 64)]),
    ((1, 256, 512, 256), [(32, 64), (64, 128), (128, 256)]),
    ((3, 101, 67, 96), [(13, 9), (26, 17), (51, 34)]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "sizes"), RESIZE, ids=str)
def test_resize(shape, sizes, dtype):
    base, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    others = [random(shape[0], *size, shape[3], dtype=dtype, seed=2) for size in sizes]
    found = resize_kernels(base, others, grad)
    exact = resize_reference(base.double(), [maps.double() for maps in others], grad.double())
    if dtype == torch.float32:
        for ours, best in zip(found, exact, strict=True):
            assert distance(ours, best) < EXACT
    else:
        assert_as_near_as(found, resize_reference(base, others, grad), exact)
    for first, second in zip(found, resize_kernels(base, others, grad), strict=True):
        assert torch.equal(first, second)


def loss_reference(logits, target, pixel_weights, class_weights, smoothing, ignore):
    logits = logits.detach().requires_grad_()
    enlarged = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    settings = {"ignore_index": ignore, "reduction": "none", "label_smoothing": smoothing}
    losses = F.cross_entropy(enlarged, target.long(), weights, **settings)
    total = (losses if pixel_weights is None else losses * pixel_weights).sum()
    total.backward()
    return total.detach(), logits.grad


# B, K, h, w, H, W
LOGITS = [
    (2, 150, 128, 128, 512, 512),
    (1, 19, 256, 512, 1024, 2048),
    (2, 2, 64, 64, 256, 256),
    (2, 171, 33, 47, 131, 187),
    (1, 1000, 16, 16, 61, 67),
]


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "weights and smoothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_cross_entropy(shape, dtype, everything):
    from segformer.models.ops import cross_entropy_triton as cross_entropy

    batch, classes, h, w, *size = shape
    logits = 3 * random(batch, h, w, classes, dtype=dtype).permute(0, 3, 1, 2)
    target = torch.randint(0, classes, (batch, *size), device="cuda")
    ignore = 255 if classes <= 255 else -1
    target[:, :9] = ignore
    target = target.to(torch.uint8) if classes <= 255 else target
    pixels = torch.rand(batch, *size, device="cuda") if everything else None
    weights = torch.rand(classes, device="cuda") if everything else None
    arguments = (target, pixels, weights, 0.1 if everything else 0.0, ignore)
    total, _, grad = cross_entropy.forward(logits, *arguments, True)
    exact = loss_reference(logits.double(), *arguments)
    assert distance(total, exact[0]) < EXACT
    assert distance(grad, exact[1]) < 5 * EXACT  # the largest term of a softmax is 1 - p
    again = cross_entropy.forward(logits, *arguments, True)
    assert torch.equal(total, again[0])
    assert torch.equal(grad, again[2])


@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_argmax_and_confusion(shape):
    from segformer.models.ops import argmax_triton as argmax

    batch, classes, h, w, *size = shape
    logits = random(batch, classes, h, w)
    target = torch.randint(0, classes, (batch, *size), device="cuda")
    target[:, :5] = -1
    enlarged = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    found = argmax.upsample_argmax(logits, *size).long()
    reached = enlarged.gather(1, found[:, None])[:, 0]
    assert (reached >= enlarged.amax(1) - 1e-5).all()
    counted = target >= 0
    pairs = target[counted] * classes + found[counted]
    expected = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    assert torch.equal(argmax.upsample_confusion(logits, target, -1), expected)
