"""Operations of the decode head, each against the library calls that define it."""

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_same, values

from segformer.models.ops import batch_norm, decode, resize
from segformer.models.ops.batch_norm import BatchNorm, norm_relu_linear, norm_relu_linear_reference
from segformer.models.ops.decode import decode_bands, fold_projections
from segformer.models.ops.resize import project_sum, upsample_sum_reference


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small tensors have several."""
    for module in (resize, decode, batch_norm):
        monkeypatch.setattr(module, "band_rows", lambda device, row_bytes: max(1, 1000 // row_bytes))


def test_folded_weights_stay_float32_under_autocast():
    weights, biases, fuse = [torch.randn(4, 3)], [torch.randn(4)], torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, bias = fold_projections(list(zip(weights, biases, strict=True)), fuse)
    assert folded[0].dtype == bias.dtype == torch.float32
    torch.testing.assert_close(folded[0], fuse @ weights[0])


def test_project_sum_adds_the_resized_maps_to_the_projected_one(small_blocks):
    maps, weight = values(2, 7, 9, 3), values(4, 3)
    others = [values(2, 4, 5, 4), values(2, 2, 3, 4), values(2, 1, 2, 4)]
    expected = maps @ weight.t()
    for other in others:
        resized = F.interpolate(other.permute(0, 3, 1, 2), (7, 9), mode="bilinear", align_corners=False)
        expected = expected + resized.permute(0, 2, 3, 1)
    for got in (project_sum(maps, weight, others), upsample_sum_reference(maps @ weight.t(), others)):
        assert_same(got, expected, (maps, weight, *others))


def norm_problem():
    """maps, norm, channel factors of a dropout, weight and bias of the prediction."""
    torch.manual_seed(0)
    maps = (values(3, 5, 7, 16).detach() * 3 + 40).requires_grad_()  # far from 0: digits would be lost
    keep = torch.empty(3, 16, dtype=torch.float64).bernoulli_(0.6).div_(0.6)
    norm = BatchNorm(16, momentum=1.0).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return maps, norm, keep, values(6, 16), values(6)


@pytest.mark.parametrize("run", [norm_relu_linear, norm_relu_linear_reference])
@pytest.mark.parametrize(("dropped", "strided"), [(False, False), (True, True)])
def test_norm_relu_linear_is_batch_norm_relu_dropout2d_and_a_1x1_convolution(
    run, dropped, strided, small_blocks
):
    maps, norm, keep, weight, bias = norm_problem()
    if strided:
        maps = maps.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    plain = torch.nn.BatchNorm2d(16, momentum=1.0).double()
    plain.weight, plain.bias = norm.weight, norm.bias
    hidden = plain(maps.permute(0, 3, 1, 2)).relu()
    if dropped:
        hidden = hidden * keep[:, :, None, None]
    expected = F.conv2d(hidden, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    got = run(maps, norm, keep if dropped else None, weight, bias)
    assert_same(got, expected, (maps, norm.weight, norm.bias, weight, bias))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_norm_relu_linear_keeps_its_input_and_nothing_else_of_that_size():
    maps, norm, _, weight, bias = norm_problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_relu_linear(maps, norm, None, weight, bias)
    large = [t for t in kept if t.numel() >= maps.numel()]
    assert [t.untyped_storage().data_ptr() for t in large] == [maps.untyped_storage().data_ptr()]


def test_norm_relu_linear_in_bfloat16_has_statistics_in_float32():
    maps, norm, _, weight, bias = norm_problem()
    maps = maps.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = norm_relu_linear(maps, norm.float(), None, weight.detach().float(), bias.detach().float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, maps.float().mean((0, 1, 2)))


def test_decode_bands_is_the_sum_of_enlarged_projections_relu_and_prediction(small_blocks):
    torch.manual_seed(0)
    sizes, dims = [(1, 2), (2, 3), (4, 5), (7, 9)], (6, 5, 4, 3)
    stages = [torch.randn(2, *size, dim) for size, dim in zip(sizes, dims, strict=True)]
    projections, offset = [torch.randn(8, dim) for dim in dims], torch.randn(8)
    weight, bias = torch.randn(5, 8), torch.randn(5)
    hidden = offset
    for stage, projection in zip(stages, projections, strict=True):
        maps = (stage @ projection.t()).permute(0, 3, 1, 2)
        hidden = hidden + F.interpolate(maps, (7, 9), mode="bilinear").permute(0, 2, 3, 1)
    expected = hidden.relu() @ weight.t() + bias
    with torch.no_grad():
        torch.testing.assert_close(decode_bands(stages, projections, offset, weight, bias), expected)
