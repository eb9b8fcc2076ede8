"""Operations on tokens, each against the library calls that define it, values and gradients in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_same, values

from segformer.models.ops import attention, depthwise, ffn
from segformer.models.ops.linear import _through_convolution, linear, linear_backward


def to_map(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, N, C) -> contiguous (B, C, H, W)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


@pytest.mark.parametrize(
    "shape", [(2, 35, 64), (2, 400, 64), (21, 1000), (1, 1, 1), (3, 7), (2, 3, 4, 5), (0, 6)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_the_product_in_float32_through_the_convolution(shape, has_bias, two_threads):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(9, shape[-1], requires_grad=True)
    bias = torch.randn(9, requires_grad=True) if has_bias else None
    inputs = [x, weight] + ([bias] if has_bias else [])
    out = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    cotangent = torch.randn_like(out)
    gradients = [
        torch.autograd.grad(y, inputs, cotangent.to(y.dtype), retain_graph=True) for y in (out, expected)
    ]
    assert out.is_contiguous()
    for got, want in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("pixels", [11, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_backward_is_the_gradient_of_linear(dtype, pixels, two_threads):
    x, weight, bias = (values(*shape).to(dtype) for shape in ((2, pixels, 6), (9, 6), (9,)))
    assert _through_convolution(x) == (dtype == torch.float32 and pixels == 4000)
    grad = torch.randn(2, pixels, 9, dtype=dtype)
    exact = [part.double() for part in (x, weight, bias)]
    expected = torch.autograd.grad(F.linear(*exact), exact, grad.double())
    for got, want in zip(linear_backward(grad, x, weight), expected, strict=True):
        assert (got - want).norm() <= (1e-5 if dtype == torch.float32 else 1e-14) * want.norm()


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7), (1, 1)])
def test_depthwise_gelu_is_gelu_of_the_convolution_of_the_map(size):
    x, weight, bias = values(2, size[0] * size[1], 8), values(8, 1, 3, 3), values(8)
    maps = F.gelu(F.conv2d(to_map(x, size), weight, bias, padding=1, groups=8))
    expected = maps.flatten(2).transpose(1, 2)
    for run in (depthwise.depthwise_gelu, depthwise.depthwise_gelu_reference):
        assert_same(run(x, size, weight, bias), expected, (x, weight, bias))


def test_depthwise_gelu_is_registered_as_torch_library_asks():
    inputs = (torch.randn(2, 12, 8, requires_grad=True), 3, 4, torch.randn(8, 1, 3, 3), torch.randn(8))
    torch.library.opcheck(torch.ops.segformer.depthwise_gelu.default, inputs)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_mix_ffn_is_the_composition_and_keeps_its_input_only(size, monkeypatch):
    monkeypatch.setattr(ffn, "CPU_BLOCK_BYTES", 8 * 16 * size[0] * size[1])  # 16 or 4 channels at a time
    shapes = [(5,), (5,), (40, 5), (40,), (40, 1, 3, 3), (40,), (5, 40), (5,)]
    x, (gamma, beta, *parameters) = values(2, size[0] * size[1], 5), [values(*shape) for shape in shapes]
    norm, kept = (gamma, beta, 1e-5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = ffn.prenorm_ffn(x, size, norm, parameters)
    statistics = (*x.shape[:2], 1)
    assert [t.shape for t in kept] == [x.shape, statistics, statistics, *shapes]
    assert_same(got, ffn.prenorm_ffn_reference(x, size, norm, parameters), (x, gamma, beta, *parameters))


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_attention_inputs_are_the_composition_and_keep_their_input_only(ratio):
    x, shapes = (
        values(2, 9 * 7, 5),
        [(5,), (5,), (5, 5), (5,)] + ([(5, 5, ratio, ratio), (5,)] if ratio > 1 else []),
    )
    parameters = [values(*shape) for shape in shapes]
    arguments = ((9, 7), (*parameters[:2], 1e-5), tuple(parameters[2:4]), tuple(parameters[4:]) or None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = attention.norm_query_reduce(x, *arguments)
    assert [t.shape for t in kept] == [x.shape, (2, 63, 1), (2, 63, 1), *shapes]
    expected = attention.norm_query_reduce_reference(x, *arguments)
    got, expected = (torch.cat(pair, dim=1) for pair in (got, expected))
    assert_same(got, expected, (x, *parameters))


def test_mix_ffn_under_autocast_runs_in_bfloat16_with_gradients_in_the_parameters_type():
    torch.manual_seed(0)
    shapes = [(20, 5), (20,), (20, 1, 3, 3), (20,), (5, 20), (5,)]
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    norm = (torch.rand(5, requires_grad=True), torch.randn(5, requires_grad=True), 1e-5)
    x = torch.randn(2, 12, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ffn.prenorm_ffn(x, (3, 4), norm, parameters)
    exact = ffn.prenorm_ffn_reference(x, (3, 4), norm, parameters)
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 0.02 * exact.norm()
    cotangent, inputs = torch.randn_like(exact), (x, *norm[:2], *parameters)
    mine = torch.autograd.grad(got, inputs, cotangent.bfloat16())
    theirs = torch.autograd.grad(exact, inputs, cotangent)
    for left, right in zip(mine, theirs, strict=True):
        assert left.dtype == torch.float32
        assert (left - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize(("size", "ratio"), [((8, 8), 4), ((9, 14), 4), ((7, 5), 2), ((11, 8), 8)])
def test_reduce_tokens_is_the_strided_convolution_and_floors_odd_sizes(size, ratio):
    x, weight, bias = values(2, size[0] * size[1], 6), values(10, 6, ratio, ratio), values(10)
    expected = F.conv2d(to_map(x, size), weight, bias, stride=ratio).flatten(2).transpose(1, 2)
    for run in (attention.reduce_tokens, attention.reduce_tokens_reference):
        assert_same(run(x, size, weight, bias), expected, (x, weight, bias))


def test_attend_is_softmax_attention_per_head():
    query, pairs = values(2, 11, 12), values(2, 5, 24)
    key, value = pairs.chunk(2, dim=-1)
    heads = []
    for part in range(3):
        columns = slice(4 * part, 4 * part + 4)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ value[..., columns])
    for run in (attention.sdpa, attention.sdpa_reference):
        assert_same(run(query, pairs, 3), torch.cat(heads, -1), (query, pairs))
