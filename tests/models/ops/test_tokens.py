"""Operations on tokens, each against the library calls that define it, values and gradients in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_same, values

from segformer.models.ops import block, depthwise
from segformer.models.ops.linear import _through_convolution, linear, linear_backward


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn(request, monkeypatch, two_threads):
    """Whether linear maps of float32 are convolutions on this CPU."""
    monkeypatch.setattr("segformer.models.ops.linear._ONEDNN", request.param)
    return request.param


def to_map(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, N, C) -> contiguous (B, C, H, W)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


@pytest.mark.parametrize(
    ("shape", "has_bias"),
    [((2, 35, 64), True), ((2, 400, 64), True), ((21, 1000), False), ((1, 1, 1), False), ((0, 6), True)],
)
def test_linear_is_the_product_in_float32_through_either_library(shape, has_bias, onednn):
    torch.manual_seed(0)
    inputs = [torch.randn(of, requires_grad=True) for of in (shape, (9, shape[-1]), (9,))[: 2 + has_bias]]
    out, expected = linear(*inputs), F.linear(*(one.double() for one in inputs))
    cotangent = torch.randn_like(out)
    gradients = [
        torch.autograd.grad(y, inputs, cotangent.to(y.dtype), retain_graph=True) for y in (out, expected)
    ]
    assert out.is_contiguous()
    for got, want in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("pixels", [11, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_backward_is_the_gradient_of_linear(dtype, pixels, onednn):
    x, weight, bias = (values(*shape).to(dtype) for shape in ((2, pixels, 6), (9, 6), (9,)))
    assert _through_convolution(x) == (onednn and dtype == torch.float32 and pixels == 4000)
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


FFN = [(40, 5), (40,), (40, 1, 3, 3), (40,), (5, 40), (5,)]
QUERY = [(5, 5), (5,)]


@pytest.mark.parametrize(
    ("run", "reference", "size", "shapes"),
    [
        (block.prenorm_ffn, block.prenorm_ffn_reference, (4, 6), FFN),
        (block.prenorm_ffn, block.prenorm_ffn_reference, (5, 3), FFN),
        (block.norm_query_reduce, block.norm_query_reduce_reference, (9, 7), QUERY),
        (block.norm_query_reduce, block.norm_query_reduce_reference, (9, 7), [*QUERY, (5, 5, 2, 2), (5,)]),
        (block.norm_query_reduce, block.norm_query_reduce_reference, (9, 7), [*QUERY, (5, 5, 4, 4), (5,)]),
    ],
    ids=["ffn", "ffn, odd", "attention", "attention of half", "attention of a quarter"],
)
def test_a_branch_is_the_composition_and_keeps_its_input_only(run, reference, size, shapes, monkeypatch):
    monkeypatch.setattr(block, "CPU_BLOCK_BYTES", 8 * 16 * 2 * size[0] * size[1])  # 32 channels at a time
    x, (gamma, beta, *parameters) = (
        values(2, size[0] * size[1], 5),
        [values(*shape) for shape in ((5,), (5,), *shapes)],
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        got = run(x, size, (gamma, beta, 1e-5), parameters)
    statistics = (*x.shape[:2], 1)
    assert [t.shape for t in kept] == [x.shape, statistics, statistics, (5,), (5,), *shapes]
    expected = reference(x, size, (gamma, beta, 1e-5), parameters)
    if isinstance(got, tuple):
        got, expected = (torch.cat(pair, dim=1) for pair in (got, expected))
    assert_same(got, expected, (x, gamma, beta, *parameters))


def test_mix_ffn_under_autocast_runs_in_bfloat16_with_gradients_in_the_parameters_type():
    torch.manual_seed(0)
    parameters = [torch.randn(shape, requires_grad=True) for shape in FFN]
    norm = (torch.rand(5, requires_grad=True), torch.randn(5, requires_grad=True), 1e-5)
    x = torch.randn(2, 12, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = block.prenorm_ffn(x, (3, 4), norm, parameters)
    exact = block.prenorm_ffn_reference(x, (3, 4), norm, parameters)
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 0.02 * exact.norm()
    cotangent, inputs = torch.randn_like(exact), (x, *norm[:2], *parameters)
    mine = torch.autograd.grad(got, inputs, cotangent.bfloat16())
    theirs = torch.autograd.grad(exact, inputs, cotangent)
    for left, right in zip(mine, theirs, strict=True):
        assert left.dtype == torch.float32
        assert (left - right).norm() < 0.03 * right.norm()


def test_attend_is_softmax_attention_per_head():
    query, pairs = values(2, 11, 12), values(2, 5, 24)
    key, value = pairs.chunk(2, dim=-1)
    heads = []
    for part in range(3):
        columns = slice(4 * part, 4 * part + 4)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ value[..., columns])
    for run in (block.sdpa, block.sdpa_reference):
        assert_same(run(query, pairs, 3), torch.cat(heads, -1), (query, pairs))
