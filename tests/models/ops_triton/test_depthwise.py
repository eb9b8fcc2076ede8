"""Depthwise convolution with GELU and its gradients against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import distance

from segformer.models.ops.depthwise import depthwise_gelu, depthwise_gelu_reference

pytest.importorskip("triton", reason="Triton is not installed")

FP32, BF16 = torch.float32, torch.bfloat16
# Relative distance of float32 results: ten roundings. bfloat16 has 8 bits: one rounding is 2^-8 at most and
# 1.7e-3 in the mean.
LIMITS = {FP32: 1e-6, BF16: 2.5e-3}
# B, H, W, C, types of tokens and parameters: odd sizes, a row, a column, several blocks of channels, columns
# and rows
CASES = [
    ((2, 3, 5, 3), FP32, FP32),
    ((1, 1, 9, 16), BF16, FP32),
    ((1, 11, 1, 8), FP32, FP32),
    ((1, 3, 9, 70), BF16, BF16),
    ((1, 5, 17, 32), FP32, FP32),
    ((1, 18, 3, 64), BF16, FP32),
]
# Stages of MiT-B5 at 512 x 512, and prime sides
LARGE = [(2, 128, 128, 256), (2, 64, 64, 512), (2, 32, 32, 1280), (2, 16, 16, 2048), (2, 37, 53, 640)]
CASES += [(shape, dtype, FP32) for shape in LARGE for dtype in LIMITS if torch.cuda.is_available()]


def draw(shape, dtype=FP32, kind=FP32):
    """Tokens, weight and bias."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, height * width, channels), (channels, 1, 3, 3), (channels,)
    tokens, *parameters = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tokens.to(dtype), *(parameter.to(kind) for parameter in parameters)]


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES, ids=str)
def test_result_and_gradients_are_those_of_float64(check, called, shape, dtype, kind):
    limits = {name: limit * (2 if shape in LARGE else 1) for name, limit in LIMITS.items()}
    check(
        draw(shape, dtype, kind),
        lambda tokens, *parameters: depthwise_gelu(tokens, shape[1:3], *parameters),
        lambda tokens, *parameters: depthwise_gelu_reference(tokens, shape[1:3], *parameters),
        limits,
    )
    assert called[:2] == ["depthwise.forward", "depthwise.backward"]


def test_gelu_is_that_of_float64_everywhere(device, called):
    values = torch.cat([torch.linspace(-30, 30, 961), torch.tensor([-1e4, 1e4, 0.0, -1e-20, 1e-20])])
    weight, bias = torch.zeros(len(values), 1, 3, 3), torch.zeros(len(values), device=device)
    weight[:, 0, 1, 1] = 1  # every channel is one pixel, passed on as it is
    tokens = values.view(1, 1, -1).to(device).requires_grad_()
    out = depthwise_gelu(tokens, (1, 1), weight.to(device), bias)
    out.sum().backward()
    exact = values.double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    # of float32 itself: max |difference| / max(1, |x|) is 1.3e-7
    assert ((out.cpu().view(-1) - expected) / exact.abs().clamp(min=1)).abs().max().item() < 1.5e-7
    assert (tokens.grad.cpu().view(-1) - exact.grad).abs().max().item() < 2.5e-7


def run(tokens, weight, bias, grad, size):
    """Result and gradients of tokens, weight and bias by the kernels."""
    from segformer.models.ops import depthwise_triton

    out = depthwise_triton.forward(tokens, *size, weight, bias)
    return [out, *depthwise_triton.backward(grad, tokens, *size, weight, bias)]


def test_strides_of_any_kind(device):
    tokens, weight, bias = draw((2, 3, 4, 5))
    odd = [
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        weight.repeat(1, 2, 1, 1)[:, ::2],
        bias[:, None].repeat(1, 3)[:, 0],
        tokens[:1, :1].expand_as(tokens),
    ]
    same = [value.contiguous() for value in odd]
    results = [run(*(value.to(device) for value in given), (3, 4)) for given in (odd, same)]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_nothing_around_the_inputs_is_read(surrounded):
    tokens, weight, bias = draw((1, 5, 7, 6))
    results = [run(*given, (5, 7)) for given in surrounded(tokens, weight, bias, tokens.flip(1))]
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    if device.type == "cpu" or torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens = torch.randn(1, 512 * 512, 1024, device=device, dtype=torch.bfloat16).repeat(9, 1, 1)
    assert tokens.numel() > 2**31
    weight, bias = torch.randn(1024, 1, 3, 3, device=device), torch.randn(1024, device=device)
    alone = run(tokens[:1], weight, bias, tokens[:1], (512, 512))
    out, grad, *_ = run(tokens, weight, bias, tokens, (512, 512))
    for image in (0, 8):
        assert distance(out[image], alone[0][0]) < 1e-6
        assert distance(grad[image], alone[1][0]) < 1e-6
