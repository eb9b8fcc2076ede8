"""Depthwise convolution with GELU and its gradients against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import distance

pytest.importorskip("triton", reason="Triton is not installed")

# Relative distance of float32 results: ten roundings. bfloat16 has 8 bits: one rounding is 2^-8 at most and
# 1.7e-3 in the mean; the gradient of the tokens has two.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
# B, H, W, C: one pixel, odd sizes, a row, a column, several blocks of channels, columns and rows
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 1, 9, 16), (1, 11, 1, 8)]
SHAPES += [(1, 3, 9, 70), (1, 5, 17, 32), (1, 18, 3, 64)]
# Stages of MiT-B5 at 512 x 512, and prime sides
LARGE = [(2, 128, 128, 256), (2, 64, 64, 512), (2, 32, 32, 1280), (2, 16, 16, 2048), (2, 37, 53, 640)]


def reference(tokens, height, width, weight, bias):
    maps = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return F.gelu(F.conv2d(maps, weight, bias, padding=1, groups=len(weight))).flatten(2).transpose(1, 2)


def draw(shape, dtype, *, seed=0):
    """Tokens, weight, bias and a gradient of the result, float32 but tokens and gradient of `dtype`."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    tokens, grad = torch.randn(2, batch, height * width, channels, generator=generator).to(dtype)
    weight = torch.randn(channels, 1, 3, 3, generator=generator)
    return tokens, weight, torch.randn(channels, generator=generator), grad


def run(tokens, weight, bias, grad, shape):
    """Result and gradients of tokens, weight and bias."""
    from segformer.models.ops import depthwise_triton

    size = shape[1:3]
    out = depthwise_triton.forward(tokens, *size, weight, bias)
    return [out, *depthwise_triton.backward(grad, tokens, *size, weight, bias)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES + (LARGE if torch.cuda.is_available() else []), ids=str)
def test_result_and_gradients_are_those_of_float64(device, shape, dtype):
    tokens, weight, bias, grad = (value.to(device) for value in draw(shape, dtype))
    leaves = [value.double().requires_grad_() for value in (tokens, weight, bias)]
    expected = reference(leaves[0], shape[1], shape[2], *leaves[1:])
    expected.backward(grad.double())
    found = run(tokens, weight, bias, grad, shape)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].shape == weight.shape
    # One pixel can lie where gelu is small: there the distance is that to its argument.
    slack = 100 if shape == SHAPES[0] else 2 if shape in LARGE else 1
    limits = [TOLERANCE[dtype], 1.5 * TOLERANCE[dtype], TOLERANCE[torch.float32], TOLERANCE[torch.float32]]
    for ours, exact, limit in zip(found, (expected, *(leaf.grad for leaf in leaves)), limits, strict=True):
        assert distance(ours, exact) < slack * limit
    for first, second in zip(found, run(tokens, weight, bias, grad, shape), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 9, 16, 64)], ids=str)
def test_bfloat16_is_no_further_from_float64_than_torch_in_bfloat16(device, shape):
    tokens, weight, bias, grad = draw(shape, torch.bfloat16)
    tensors = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [value.to(dtype).requires_grad_() for value in (tokens, weight, bias)]
        out = reference(leaves[0], shape[1], shape[2], *leaves[1:])
        out.backward(grad.to(dtype))
        tensors.append([out.detach(), *(leaf.grad for leaf in leaves)])
    found = run(*(value.to(device) for value in (tokens, weight, bias, grad)), shape)
    for ours, exact, theirs in zip(found, *tensors, strict=True):
        assert distance(ours, exact) <= 1.02 * distance(theirs, exact)


def test_gelu_is_that_of_float64_everywhere(device):
    from segformer.models.ops import depthwise_triton as depthwise

    values = torch.cat([torch.linspace(-30, 30, 961), torch.tensor([-1e4, 1e4, 0.0, -1e-20, 1e-20])])
    weight, bias = torch.zeros(len(values), 1, 3, 3), torch.zeros(len(values), device=device)
    weight[:, 0, 1, 1] = 1  # every channel is one pixel, passed on as it is
    tokens, weight = values.view(1, 1, -1).to(device), weight.to(device)
    out = depthwise.forward(tokens, 1, 1, weight, bias).cpu().view(-1)
    slope, _, _ = depthwise.backward(torch.ones_like(tokens), tokens, 1, 1, weight, bias)
    exact = values.double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    # of float32 itself: max |difference| / max(1, |x|) is 1.3e-7
    assert ((out - expected) / exact.abs().clamp(min=1)).abs().max().item() < 1.5e-7
    assert (slope.cpu().view(-1) - exact.grad).abs().max().item() < 2.5e-7


def test_strides_of_any_kind(device):
    tokens, weight, bias, grad = draw((2, 3, 4, 5), torch.float32)
    spread = [
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        weight.repeat(1, 2, 1, 1)[:, ::2],
        bias[:, None].repeat(1, 3)[:, 0],
        grad[:1, :1].expand_as(grad),
    ]
    same = [value.contiguous() for value in spread]
    results = [run(*(value.to(device) for value in given), (2, 3, 4, 5)) for given in (spread, same)]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_nothing_around_the_inputs_is_read(device, surrounded):
    shape = (1, 5, 7, 6)
    results = [run(*given, shape) for given in surrounded(*draw(shape, torch.float32))]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    if device.type == "cpu" or torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    shape = (9, 512, 512, 1024)
    tokens = torch.randn(1, 512 * 512, 1024, device=device, dtype=torch.bfloat16).repeat(9, 1, 1)
    assert tokens.numel() > 2**31
    weight, bias = torch.randn(1024, 1, 3, 3, device=device), torch.randn(1024, device=device)
    alone = run(tokens[:1], weight, bias, tokens[:1], shape)
    out, grad, *_ = run(tokens, weight, bias, tokens, shape)
    for image in (0, 8):
        assert distance(out[image], alone[0][0]) < 1e-6
        assert distance(grad[image], alone[1][0]) < 1e-6
