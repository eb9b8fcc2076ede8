"""Each operation against the library calls that define it."""

import pytest
import torch
import torch.nn.functional as F

from segformer.models import ops

RESIZES = [
    ((9, 13), (35, 50)),
    ((16, 16), (64, 64)),
    ((3, 5), (11, 20)),
    ((8, 8), (8, 8)),
    ((1, 2), (7, 9)),
    ((12, 9), (5, 4)),
]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def to_map(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, N, C) -> contiguous (B, C, H, W)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def assert_same(got, expected, inputs):
    """Values and gradients with respect to `inputs` agree in float64."""
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(value, inputs, cotangent) for value in (got, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7)])
def test_depthwise_conv_is_the_convolution_of_the_map(size):
    x, weight, bias = tokens(2, size[0] * size[1], 8), tokens(8, 1, 3, 3), tokens(8)
    expected = F.conv2d(to_map(x, size), weight, bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    assert_same(ops.depthwise_conv(x, size, weight, bias), expected, (x, weight, bias))


@pytest.mark.parametrize(("size", "ratio"), [((8, 8), 4), ((9, 14), 4), ((7, 5), 2), ((11, 8), 8)])
def test_reduce_tokens_is_the_strided_convolution_and_floors_odd_sizes(size, ratio):
    x, weight, bias = tokens(2, size[0] * size[1], 6), tokens(10, 6, ratio, ratio), tokens(10)
    expected = F.conv2d(to_map(x, size), weight, bias, stride=ratio).flatten(2).transpose(1, 2)
    assert_same(ops.reduce_tokens(x, size, weight, bias), expected, (x, weight, bias))


def test_attend_is_softmax_attention_per_head():
    query, pairs = tokens(2, 11, 12), tokens(2, 5, 24)
    key, value = pairs.chunk(2, dim=-1)
    heads = []
    for part in range(3):
        columns = slice(4 * part, 4 * part + 4)
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ value[..., columns])
    assert_same(ops.attend(query, pairs, 3), torch.cat(heads, -1), (query, pairs))


def test_fold_projections_is_the_projection_followed_by_its_slice_of_the_fuse_weight():
    weights, biases, fuse = [tokens(4, 3), tokens(4, 5)], [tokens(4), tokens(4)], tokens(4, 8)
    inputs = [tokens(7, 3), tokens(7, 5)]
    projected = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    folded, bias = ops.fold_projections(weights, biases, fuse)
    got = inputs[0] @ folded[0].t() + inputs[1] @ folded[1].t() + bias
    assert_same(got, F.linear(torch.cat(projected, -1), fuse), (*weights, *biases, fuse, *inputs))


def test_folded_weights_stay_float32_under_autocast():
    weights, biases, fuse = [torch.randn(4, 3)], [torch.randn(4)], torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, bias = ops.fold_projections(weights, biases, fuse)
    assert folded[0].dtype == bias.dtype == torch.float32
    torch.testing.assert_close(folded[0], fuse @ weights[0])


@pytest.mark.parametrize(("source", "target"), RESIZES)
def test_bilinear_bands_give_the_resize_of_torch_for_any_sizes(source, target, monkeypatch):
    monkeypatch.setattr(ops, "_CPU_BLOCK_BYTES", 3 * 4 * target[1] * 8)  # bands of three rows of 4 channels
    maps = torch.randn(1, 4, *source, dtype=torch.float64)
    bands, horizontal = ops.bilinear_bands(maps, target)
    got = torch.cat([band.matrix @ (maps[0] @ horizontal)[:, band.source] for band in bands], dim=1)
    torch.testing.assert_close(got, F.interpolate(maps, target, mode="bilinear", align_corners=False)[0])
    assert len(bands) == -(-target[0] // 3)


def test_upsample_sum_adds_the_resized_maps():
    base, others = tokens(2, 7, 9, 4), [tokens(2, 4, 5, 4), tokens(2, 2, 3, 4), tokens(2, 1, 2, 4)]
    expected = base
    for maps in others:
        resized = F.interpolate(maps.permute(0, 3, 1, 2), (7, 9), mode="bilinear", align_corners=False)
        expected = expected + resized.permute(0, 2, 3, 1)
    assert_same(ops.reference_upsample_sum(base, others), expected, (base, *others))
    assert_same(ops.upsample_sum(base * 1, others), expected, (base, *others))


def test_channel_dropout_linear_drops_whole_channels_of_an_image_and_rescales_the_rest():
    torch.manual_seed(0)
    maps, weight, bias = tokens(3, 4, 5, 16), tokens(6, 16), tokens(6)
    dropped = torch.zeros(3, 16, dtype=torch.bool)
    torch.manual_seed(1)
    got = ops.channel_dropout_linear(maps, weight, bias, 0.4)
    for image in range(3):
        (grad,) = torch.autograd.grad(got[image].sum(), maps, retain_graph=True)
        dropped[image] = (grad[image] == 0).all(0).all(0)
    assert 0 < dropped.sum() < dropped.numel()
    expected = F.linear(maps * ~dropped[:, None, None] / 0.6, weight, bias)
    assert_same(got, expected, (maps, weight, bias))


def test_channel_dropout_linear_keeps_the_mean():
    torch.manual_seed(0)
    maps, weight = torch.ones(4000, 1, 1, 8), torch.ones(1, 8)
    outputs = ops.channel_dropout_linear(maps, weight, torch.zeros(1), 0.1)
    assert abs(outputs.mean().item() - 8) < 0.06  # standard error 0.015


@pytest.mark.parametrize(("source", "target"), RESIZES)
@pytest.mark.parametrize("classes", [1, 2, 150, 300])
def test_upsample_argmax_is_the_argmax_of_the_enlarged_logits(source, target, classes, monkeypatch):
    monkeypatch.setattr(ops, "_CPU_BLOCK_BYTES", 5 * classes * target[1] * 8)
    torch.manual_seed(0)
    logits = torch.randn(2, classes, *source, dtype=torch.float64)
    got = ops.upsample_argmax(logits, target)
    assert torch.equal(got.long(), F.interpolate(logits, target, mode="bilinear").argmax(1))
    assert got.dtype == (torch.uint8 if classes <= 256 else torch.int64)


def problem(dtype=torch.float64, classes=5):
    """Logits (2, K, 9, 13), labels (2, 35, 50) with ignored pixels, class weights and pixel weights."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, classes, 9, 13, dtype=dtype)).requires_grad_()
    target = torch.randint(0, classes, (2, 35, 50), dtype=torch.uint8)
    target[0, :9] = 255
    target[1, 20:, 7] = 255
    return logits, target, torch.rand(classes, dtype=dtype), torch.rand(2, 35, 50, dtype=dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_upsampled_cross_entropy_is_cross_entropy_of_interpolate(smoothing, weighted, masked, monkeypatch):
    monkeypatch.setattr(ops, "_CPU_BLOCK_BYTES", 5 * 50 * 8 * 8)  # bands of 8 rows
    logits, target, class_weights, pixel_weights = problem()
    kwargs = {
        "class_weights": class_weights if weighted else None,
        "pixel_weights": pixel_weights if masked else None,
        "label_smoothing": smoothing,
    }
    total, losses = ops.upsampled_cross_entropy(logits, target, 255, **kwargs)
    expected, each = ops.reference_cross_entropy(logits, target, 255, **kwargs)
    torch.testing.assert_close(losses, each)
    assert_same(total, expected, (logits,))


def test_upsampled_cross_entropy_gradient_is_the_numerical_one():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (1, 7, 10), dtype=torch.uint8)
    target[0, 2] = 255
    assert torch.autograd.gradcheck(lambda z: ops.upsampled_cross_entropy(z, target, 255)[0], (logits,))


@pytest.mark.parametrize("target_size", [(36, 52), (33, 49), (34, 51), (9, 13), (5, 6), (100, 14)])
def test_upsampled_cross_entropy_takes_any_label_size(target_size):
    logits = problem()[0]
    target = torch.randint(0, 5, (2, *target_size), dtype=torch.uint8)
    total, _ = ops.upsampled_cross_entropy(logits, target, 255)
    assert_same(total, ops.reference_cross_entropy(logits, target, 255)[0], (logits,))


def test_upsampled_cross_entropy_is_finite_and_right_where_the_probability_underflows():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, :, 0] = 300.0
    logits.requires_grad_()
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    total, _ = ops.upsampled_cross_entropy(logits, target, 255)
    assert_same(total, ops.reference_cross_entropy(logits, target, 255)[0], (logits,))


def test_upsampled_cross_entropy_is_formed_in_float32_under_bfloat16_autocast():
    logits, target, *_ = problem(torch.float32)
    expected, _ = ops.upsampled_cross_entropy(logits, target, 255)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = ops.upsampled_cross_entropy(logits, target, 255)
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)
    (grad,) = torch.autograd.grad(ops.upsampled_cross_entropy(logits.bfloat16(), target, 255)[0], logits)
    assert grad.dtype == torch.float32


def test_upsampled_cross_entropy_never_holds_the_enlarged_logits():
    """The largest tensor made for 150 classes at 256 x 256 is the logits widened in one direction."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    logits = torch.randn(2, 150, 64, 64)
    with Largest() as largest:
        ops.upsampled_cross_entropy(logits, torch.zeros(2, 256, 256, dtype=torch.uint8), 255)
    assert largest.numel <= 150 * 64 * 256
