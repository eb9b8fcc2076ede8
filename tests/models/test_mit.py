"""The encoder: stochastic depth, initial weights, memory layout."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segformer.errors import DataError
from segformer.models.layers import DropPath
from segformer.models.mit import Block
from segformer.models.ops.backend import BACKENDS
from segformer.models.segformer import build_encoder, build_model
from segformer.models.variants import ModelConfig


@pytest.fixture(scope="module")
def b1():
    torch.manual_seed(0)
    return build_encoder(ModelConfig(variant="b1"))


def test_drop_path_grows_linearly_over_all_blocks():
    backbone = build_encoder(ModelConfig(drop_path_rate=0.1))
    rates = [m.rate for m in backbone.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean_and_in_eval_adds_the_branch():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.zeros(20_000, 2, 3), torch.ones(20_000, 2, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert abs(out.mean().item() - 1) < 0.02  # standard error 0.004
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(DropPath(0.9).eval()(a, b), a + b)


def test_initial_weights_are_those_of_the_original(b1):
    block = b1.block4[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert b1.patch_embed4.proj.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert block.mlp.dwconv.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert b1.block1[0].attn.sr.weight.std().item() == pytest.approx((2 / (64 * 64)) ** 0.5, rel=0.01)
    for name, parameter in b1.named_parameters():
        if name == "patch_embed1.proj.bias":
            assert 0.01 < parameter.std().item() < 0.03
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_padding_does_not_rule_the_first_gradient(ops):
    """With a bias of 0 in the first embedding it does: 1616 against 0.9 here, as padding has no variance."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant="b0", ops=ops), 4).train()
    norms = []
    for valid in (64, 40):
        images, target = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
        images[:, :, valid:], target[:, valid:] = 0, 255
        logits = F.interpolate(model(images), size=(64, 64), mode="bilinear")
        loss = F.cross_entropy(logits, target, ignore_index=255)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    assert norms[1] < 10 * norms[0]


def test_the_maps_have_strides_4_8_16_32_rounded_up_and_channels_last_memory(b1):
    with torch.no_grad():
        maps = b1.eval()(torch.randn(2, 3, 75, 130))
    shapes = [tuple(x.shape) for x in maps]
    assert shapes == [(2, 64, 19, 33), (2, 128, 10, 17), (2, 320, 5, 9), (2, 512, 3, 5)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@pytest.mark.parametrize("sr_ratio", [1, 4])
def test_a_block_copies_no_activation_but_the_patches_of_the_reduction(sr_ratio, two_threads, monkeypatch):
    """The backward pass recomputes the patches and turns their gradient back; where nothing is reduced, it
    puts the gradients of keys and values together. MKL copies the bias into its result."""
    monkeypatch.setattr("segformer.models.ops.linear._ONEDNN", True)
    block = Block(64, 2, sr_ratio, 4, drop_path=0.1, eps=(1e-6, 1e-5), ops=BACKENDS["fused"])
    tokens = torch.randn(2, 32 * 24, 64, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as forward:
        out = block(tokens, (32, 24))
    with torch.profiler.profile(record_shapes=True) as backward:
        out.sum().backward()
    patches = [2, 8, 6, 4, 4, 64]
    assert copies(forward, tokens.numel()) == ([patches] if sr_ratio > 1 else [])
    again = [patches, [2, 8, 4, 6, 4 * 64]] if sr_ratio > 1 else [[2, 768, 2, 2, 32]]
    assert copies(backward, tokens.numel()) == again


def copies(profile: torch.profiler.profile, least: int) -> list[list[int]]:
    """Shapes of copied tensors of `least` numbers and more."""
    return [
        event.input_shapes[0]
        for event in profile.events()
        if event.name == "aten::copy_" and math.prod(event.input_shapes[0]) >= least
    ]


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 64, 64, 3),
        torch.zeros(3, 64, 64),
        torch.zeros(1, 4, 64, 64),
    ],
    ids=["uint8", "channels last", "no batch", "4 channels"],
)
def test_what_is_no_batch_of_images_is_refused(b1, images):
    with pytest.raises(DataError, match=r"images of shape .*; give \(B, 3, H, W\) in floating point"):
        b1(images)


def test_a_batch_of_no_images_gives_no_logits():
    for ops in ("fused", "reference"):
        model = build_model(ModelConfig(variant="b0", ops=ops), 4).eval()
        assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 4, 16, 16)


class LoRA(nn.Module):
    """A layer whose function is not its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", ["attn.q", "mlp.fc1", "mlp.fc2"])
def test_a_layer_that_is_not_called_can_not_be_wrapped_without_a_word(place):
    encoder = build_encoder(ModelConfig(variant="b0"))
    block = encoder.block1[0]
    layer = block.get_submodule(place)
    for other in (LoRA(layer), Doubled(layer.in_features, layer.out_features)):
        block.set_submodule(place, other)
        with pytest.raises(TypeError, match=f"{type(other).__name__} in the place of a layer"):
            encoder(torch.zeros(1, 3, 64, 64))


def test_a_parametrised_layer_has_its_effect():
    encoder = build_encoder(ModelConfig(variant="b0")).eval()
    images = torch.randn(1, 3, 64, 64)
    before = encoder(images)[0]
    torch.nn.utils.parametrizations.weight_norm(encoder.block1[0].attn.q)
    torch.testing.assert_close(encoder(images)[0], before)
    with torch.no_grad():
        encoder.block1[0].attn.q.parametrizations.weight.original0.mul_(20)
    assert not torch.allclose(encoder(images)[0], before, atol=1e-3)
