"""The decode head: its reference is what the paper writes; dropout, memory layouts, initial weights."""

import pytest
import torch
import torch.nn.functional as F

from segformer.models.head import AllMLPHead, MMSegHead
from segformer.models.ops.backend import BACKENDS

DIMS = (32, 64, 160, 256)
EVEN, ODD = ((16, 16), (8, 8), (4, 4), (2, 2)), ((11, 17), (6, 9), (3, 5), (2, 3))


def heads(dtype=torch.float32, dropout=0.0) -> tuple[AllMLPHead, AllMLPHead]:
    """Fused and reference, with the same random parameters and running statistics."""
    torch.manual_seed(0)
    folded = AllMLPHead(DIMS, 64, 19, dropout=dropout, ops=BACKENDS["fused"]).to(dtype)
    folded.linear_fuse.bn.running_mean.normal_()
    folded.linear_fuse.bn.running_var.uniform_(0.5, 2)
    plain = AllMLPHead(DIMS, 64, 19, dropout=dropout, ops=BACKENDS["reference"]).to(dtype)
    plain.load_state_dict(folded.state_dict())
    return folded, plain


def maps(sizes, dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    tensors = [torch.randn(2, dim, *size, dtype=dtype) for dim, size in zip(DIMS, sizes, strict=True)]
    return [tensor.to(memory_format=torch.channels_last) for tensor in tensors]


def test_the_reference_is_concat_c4_to_c1_fuse_norm_relu_predict():
    plain = heads()[1].eval()
    inputs = maps(ODD)
    state = plain.state_dict()
    enlarged = []
    for stage in (4, 3, 2, 1):
        x = inputs[stage - 1].flatten(2).transpose(1, 2)
        x = x @ state[f"linear_c{stage}.proj.weight"].t() + state[f"linear_c{stage}.proj.bias"]
        x = x.transpose(1, 2).reshape(2, 64, *inputs[stage - 1].shape[2:])
        enlarged.append(F.interpolate(x, inputs[0].shape[2:], mode="bilinear", align_corners=False))
    x = torch.einsum("dc,bchw->bdhw", state["linear_fuse.conv.weight"][:, :, 0, 0], torch.cat(enlarged, 1))
    mean, var = state["linear_fuse.bn.running_mean"], state["linear_fuse.bn.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    scale, shift = state["linear_fuse.bn.weight"], state["linear_fuse.bn.bias"]
    x = (x * scale[:, None, None] + shift[:, None, None]).relu()
    x = torch.einsum("kd,bdhw->bkhw", state["linear_pred.weight"][:, :, 0, 0], x)
    expected = x + state["linear_pred.bias"][:, None, None]
    torch.testing.assert_close(plain(inputs), expected, atol=1e-5, rtol=1e-5)


def test_dropout_drops_whole_channels_of_an_image_and_rescales_the_rest():
    """In training; in eval mode all stay."""
    for head in heads(torch.float64, dropout=0.4):
        head.linear_pred.weight.data.copy_(torch.eye(64)[:19, :, None, None])  # class k shows channel k
        head.linear_pred.bias.data.zero_()
        torch.manual_seed(2)
        dropped = head(maps(EVEN, torch.float64))
        head.dropout = 0.0
        hidden = head(maps(EVEN, torch.float64))
        factor = (dropped.sum((2, 3)) / hidden.sum((2, 3))).detach()
        assert 0 < (factor == 0).sum() < factor.numel()
        torch.testing.assert_close(factor[factor != 0], torch.full_like(factor[factor != 0], 1 / 0.6))
        head.dropout = 0.4
        assert torch.equal(head.eval()(maps(EVEN, torch.float64)), head(maps(EVEN, torch.float64)))


@pytest.mark.parametrize(("training", "batch"), [(False, 1), (False, 2), (True, 2)])
def test_maps_of_any_memory_layout_give_the_same_logits_and_gradients(training, batch):
    head = heads(torch.float64)[0].train(training)
    head.linear_fuse.bn.momentum = 0.0
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        inputs = [x[:batch].clone(memory_format=layout) for x in maps(ODD, torch.float64)]
        with torch.no_grad():
            alone = head(inputs)
        inputs = [x.requires_grad_() for x in inputs]
        logits = head(inputs)
        torch.testing.assert_close(alone, logits)
        assert alone.is_contiguous(memory_format=torch.channels_last)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [*head.parameters(), *inputs])])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-7)


def test_initial_weights_are_those_of_the_original():
    torch.manual_seed(0)
    head = AllMLPHead((64, 128, 320, 512), 768, 150, ops=BACKENDS["fused"])
    assert head.linear_fuse.conv.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.01)
    bound = 512**-0.5  # torch's default: uniform in +-1 / sqrt(fan_in)
    assert head.linear_c4.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert head.linear_pred.weight.std().item() == pytest.approx((1 / 768 / 3) ** 0.5, rel=0.02)


@pytest.mark.parametrize("training", [False, True])
def test_the_head_of_mmseg_is_one_function_in_both_backends(training):
    """Logits, gradients, and the running statistics of all five batch norms."""
    found = []
    for ops in ("fused", "reference"):
        torch.manual_seed(0)
        head = MMSegHead(DIMS, 32, 19, dropout=0.3, ops=BACKENDS[ops]).double()
        for name, buffer in head.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2) if name.endswith("var") else buffer.normal_()
        head.train(training)
        inputs = [x.requires_grad_() for x in maps(ODD, torch.float64)]
        torch.manual_seed(4)
        logits = head(inputs)
        grads = torch.autograd.grad(logits.square().sum(), [*head.parameters(), *inputs])
        found.append([logits, *grads, *(b for b in head.buffers())])
        with torch.no_grad():
            torch.manual_seed(4)
            torch.testing.assert_close(head(inputs), logits)
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-7)
