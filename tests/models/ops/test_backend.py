"""The two backends of the network, `model.ops=fused` and `reference`, are one function."""

import pytest
import torch
from comparing import REGISTERED, check_registered, distance
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CLASSES, cross_entropy, small

from segformer.models.ops.backend import BACKENDS
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import OPS, ModelConfig


def gradients(model: SegFormer, images: torch.Tensor, target: torch.Tensor, bf16: bool = False):
    """Logits, and the gradient of the cross entropy by every parameter as one vector, both in float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images)
        loss, _ = cross_entropy(model)(logits, target)
    loss.backward()
    found = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    return logits.detach().double(), found


def test_the_backends_are_the_choices_of_the_configuration():
    assert tuple(BACKENDS) == OPS


@pytest.mark.parametrize("name", REGISTERED)
def test_operations_are_registered_as_torch_library_asks(name):
    check_registered(name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("variant", "training", "threads"),  # on two, linear maps are oneDNN's convolutions
    [("b0", True, 1), ("b0", False, 2), ("b2", True, 2), ("b2", False, 1)],
)
def test_logits_and_gradients_agree_within_1e_5_in_float32(variant, training, threads, use_threads):
    use_threads(threads)
    torch.manual_seed(0)
    images, target = torch.randn(2, 3, 95, 130), torch.randint(0, 150, (2, 95, 130))
    found = []
    for backend in OPS:
        torch.manual_seed(1)
        cfg = ModelConfig(variant=variant, ops=backend, drop_path_rate=0.0, dropout=0.0)
        model = build_model(cfg, 150).train(training)
        # every ReLU on its right side: at its kink, a difference in the last digit is one in the gradient
        torch.nn.init.constant_(model.decode_head.linear_fuse.bn.bias, 8.0)
        found.append(gradients(model, images, target))
    (logits, grads), (expected, exact) = found
    assert distance(logits, expected) < 1e-5
    assert distance(grads, exact) < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_agree_within_1e_9_in_float64(training):
    images, target = torch.randn(2, 3, 95, 130).double(), torch.randint(0, CLASSES, (2, 95, 130))
    found = [gradients(small(backend).double().train(training), images, target) for backend in OPS]
    for got, expected in zip(*found, strict=True):
        assert distance(got, expected) < 1e-9


def test_in_bfloat16_the_fused_backend_is_no_further_from_float64_than_the_reference():
    torch.manual_seed(0)
    images, target = torch.randn(2, 3, 96, 128), torch.randint(0, CLASSES, (2, 96, 128))
    exact, exact_grads = gradients(small("reference").double(), images.double(), target)
    errors = {}
    for backend in OPS:
        logits, grads = gradients(small(backend), images, target, bf16=True)
        errors[backend] = distance(logits, exact), distance(grads, exact_grads)
    for fused, reference in zip(errors["fused"], errors["reference"], strict=True):
        assert 0 < fused < 1.1 * reference < 0.1  # a tenth: two roundings of one size


def penalty(model: SegFormer, images: torch.Tensor, target: torch.Tensor | None, **options: bool):
    """Squares of all gradients of the cross entropy, or of the sum of the logits, added up."""
    logits = model(images)
    loss = logits.sum() if target is None else cross_entropy(model)(logits, target)[0]
    grads = torch.autograd.grad(loss, list(model.parameters()), **options)
    return torch.stack([grad.square().sum() for grad in grads]).sum()


@pytest.mark.parametrize("labelled", [False, True])
def test_a_second_derivative_is_refused_by_the_fused_backend_and_right_in_the_reference(labelled):
    """The sum of the logits has a constant gradient, where once_differentiable would say nothing."""
    images = torch.randn(1, 3, 32, 64).double()
    target = torch.randint(0, CLASSES, (1, 32, 64)) if labelled else None
    models = {backend: small(backend).double().eval() for backend in OPS}
    with pytest.raises(RuntimeError, match=r"no second derivative.*model.ops=reference"):
        penalty(models["fused"], images, target, create_graph=True)
    model = models["reference"]
    weight = model.backbone.patch_embed1.proj.weight
    way = torch.randn_like(weight)
    (slope,) = torch.autograd.grad(penalty(model, images, target, create_graph=True), weight)
    values = []
    for shift in (1e-5, -2e-5):  # one step up, and from there one below the start
        with torch.no_grad():
            weight += shift * way
        values.append(penalty(model, images, target).item())
    assert (slope * way).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.tuples(st.integers(29, 500), st.integers(29, 500)))
def test_any_image_size_gives_shape_and_values_of_the_reference(size):
    check_size(size)


@pytest.mark.parametrize("size", [(29, 64), (32, 32), (32, 1100), (547, 1093), (33, 33)])
def test_extreme_image_sizes_give_shape_and_values_of_the_reference(size):
    check_size(size)


def check_size(size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size)
    for gradient in (False, True):  # without, the head runs band by band
        with torch.set_grad_enabled(gradient):
            got, expected = (small(backend).eval()(images).detach() for backend in OPS)
        assert got.shape == expected.shape == (1, CLASSES, -(-size[0] // 4), -(-size[1] // 4))
        assert distance(got, expected.double()) < 1e-5


def bytes_kept(function, images: torch.Tensor) -> int:
    """Bytes of the tensors that autograd keeps of one call, parameters among them."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(images)  # kept alive until the count
        return sum(storage.nbytes() for storage in kept.values()) if result is not None else 0


@pytest.mark.parametrize("backend", OPS)
def test_checkpointing_gives_the_same_gradients_with_the_same_random_drops(backend):
    images, target = torch.randn(2, 3, 64, 96), torch.randint(0, CLASSES, (2, 64, 96))
    found = []
    for stages in ((), (1, 2, 3, 4)):
        model = small(backend, checkpointing=stages, drop_path_rate=0.3, dropout=0.3).train()
        torch.manual_seed(3)
        found.append(gradients(model, images, target))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert distance(found[1][1], found[0][1]) < 1e-6


def test_checkpointing_keeps_less_than_half_of_the_reference_encoder():
    images = torch.randn(2, 3, 64, 96)
    whole, again = (
        bytes_kept(small("reference", checkpointing=stages).train().backbone, images)
        for stages in ((), (1, 2, 3, 4))
    )
    assert again < whole / 2


def test_the_fused_step_keeps_less_than_six_tenths_of_the_reference():
    images = torch.randn(2, 3, 64, 96)
    fused, reference = (bytes_kept(small(backend).train(), images) for backend in OPS)
    assert fused < 0.6 * reference
