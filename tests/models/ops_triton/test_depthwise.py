"""Depthwise convolution with GELU and its gradients against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

# Relative distance of float32 results: ten roundings. bfloat16 has 8 bits: one rounding is 2^-8 at most and
# 1.7e-3 in the mean; the gradient of the tokens has two.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
# B, H, W, C: one pixel, odd sizes, a row, a column, several blocks of channels, columns and rows
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 3), (1, 1, 9, 16), (1, 11, 1, 8)]
SHAPES += [(1, 3, 9, 70), (1, 5, 17, 32), (1, 18, 3, 64)]


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left - right|| / ||right||."""
    return ((left.cpu().double() - right).norm() / right.norm()).item()


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_are_those_of_float64(device, shape, dtype):
    from segformer.models.ops import depthwise_triton as depthwise

    tokens, weight, bias, grad = draw(shape, dtype)
    leaves = [value.double().requires_grad_() for value in (tokens, weight, bias)]
    expected = reference(leaves[0], shape[1], shape[2], *leaves[1:])
    expected.backward(grad.double())
    tokens, weight, bias, grad = (value.to(device) for value in (tokens, weight, bias, grad))
    out = depthwise.forward(tokens, shape[1], shape[2], weight, bias)
    grads = depthwise.backward(grad, tokens, shape[1], shape[2], weight, bias)
    assert out.dtype == grads[0].dtype == dtype
    # One pixel can lie where gelu is small: there the distance is that to its argument.
    slack = 100 if shape == (1, 1, 1, 1) else 1
    assert distance(out, expected.detach()) < slack * TOLERANCE[dtype]
    assert distance(grads[0], leaves[0].grad) < slack * 1.5 * TOLERANCE[dtype]
    assert grads[1].shape == weight.shape
    assert grads[1].dtype == torch.float32
    assert distance(grads[1], leaves[1].grad) < slack * TOLERANCE[torch.float32]
    assert distance(grads[2], leaves[2].grad) < slack * TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 9, 16, 64)], ids=str)
def test_bfloat16_is_no_further_from_float64_than_torch_in_bfloat16(device, shape):
    from segformer.models.ops import depthwise_triton as depthwise

    tokens, weight, bias, grad = draw(shape, torch.bfloat16)
    tensors = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [value.to(dtype).requires_grad_() for value in (tokens, weight, bias)]
        out = reference(leaves[0], shape[1], shape[2], *leaves[1:])
        out.backward(grad.to(dtype))
        tensors.append([out.detach(), *(leaf.grad for leaf in leaves)])
    placed = [value.to(device) for value in (grad, tokens, weight, bias)]
    found = [
        depthwise.forward(placed[1], shape[1], shape[2], *placed[2:]),
        *depthwise.backward(*placed[:2], shape[1], shape[2], *placed[2:]),
    ]
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
    from segformer.models.ops import depthwise_triton as depthwise

    tokens, weight, bias, grad = draw((2, 3, 4, 5), torch.float32)
    spread = [
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        weight.repeat(1, 2, 1, 1)[:, ::2],
        bias[:, None].repeat(1, 3)[:, 0],
        grad[:1, :1].expand_as(grad),
    ]
    results = []
    for values in (spread, [value.contiguous() for value in spread]):
        placed = [value.to(device) for value in values]
        out = depthwise.forward(placed[0], 3, 4, *placed[1:3])
        results.append([out, *depthwise.backward(placed[3], placed[0], 3, 4, *placed[1:3])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_nothing_around_the_inputs_is_read(device):
    from segformer.models.ops import depthwise_triton as depthwise

    shape = (1, 5, 7, 6)
    tokens, weight, bias, grad = draw(shape, torch.float32)
    results = []
    for around in (0.0, float("nan")):
        inside = []
        for value in (tokens, weight, bias, grad):
            room = torch.full((value.numel() + 400,), around)
            room[200:-200] = value.flatten()
            inside.append(room.to(device)[200:-200].view(value.shape))
        out = depthwise.forward(inside[0], 5, 7, inside[1], inside[2])
        results.append([out, *depthwise.backward(inside[3], inside[0], 5, 7, inside[1], inside[2])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
