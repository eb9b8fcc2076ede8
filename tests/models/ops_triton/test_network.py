"""The network through the kernels against its form for CPUs: casts, strides, argument order, gradients."""

from functools import partial
from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from comparing import REGISTERED, check_registered, distance
from small import CLASSES, cross_entropy, small
from torch import Tensor

from segformer.models.ops import dispatch, trial
from segformer.models.ops.argmax import upsample_argmax, upsample_confusion
from segformer.training.run import agree_on_kernels

pytest.importorskip("triton", reason="Triton is not installed")

IGNORE = 255


@pytest.mark.parametrize("name", REGISTERED)
def test_types_and_strides_are_those_that_torch_compile_is_told(device, called, name):
    check_registered(name, device, torch.bfloat16)


def batch(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images, target = torch.randn(1, 3, 32, width), torch.randint(0, CLASSES, (1, 32, width))
    target[:, :8] = IGNORE
    return images.to(device), target.to(device)


def step(device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and all gradients of a training step, on the CPU."""
    model, (images, target) = small().to(device), batch(device, 64)
    logits = model(images)
    loss = cross_entropy(model).to(device)(logits, target)[0]
    loss.backward()
    grads = {name: value.grad.cpu().double() for name, value in model.named_parameters()}
    return logits.detach().cpu().double(), loss.detach().cpu().double(), grads


def allowed(device: torch.device) -> float:
    """Relative distance of what a whole network computes: on a GPU the other sums have another order too."""
    return 1e-5 if device.type == "cpu" else 1e-4


def test_a_training_step_of_the_network_is_that_of_the_form_for_cpus(device, through_kernels):
    logits, loss, grads = step(torch.device("cpu"))
    called = through_kernels()
    found_logits, found_loss, found = step(device)
    assert distance(found_logits, logits) < allowed(device)
    assert distance(found_loss, loss) < allowed(device)
    # A bias before the batch norm has no gradient but rounding: that is small beside all gradients.
    noise = 0.1 * allowed(device) * torch.stack([grad.norm() for grad in grads.values()]).norm()
    for name, grad in grads.items():
        assert (found[name] - grad).norm() < 2 * allowed(device) * grad.norm() + noise, name
    assert set(called) == {
        *("depthwise.forward", "depthwise.backward", "cross_entropy.forward"),
        *("resize.upsample_sum", "resize.upsample_sum_backward"),
    }
    assert called.count("depthwise.forward") == 8, "4 blocks, each of which is computed again"


def evaluate(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and confusion matrix in eval mode, on the CPU."""
    model, (images, target) = small().to(device).eval(), batch(device, 32)
    with torch.no_grad():
        logits = model(images)
        labels = upsample_argmax(logits, (32, 32))
        confusion = upsample_confusion(logits, target, IGNORE)
    return logits.cpu().double(), labels.cpu().long(), confusion.cpu()


def test_an_evaluation_of_the_network_is_that_of_the_form_for_cpus(device, through_kernels):
    logits, labels, confusion = evaluate(torch.device("cpu"))
    called = through_kernels()
    found_logits, found_labels, found_confusion = evaluate(device)
    assert distance(found_logits, logits) < allowed(device)
    assert (found_labels != labels).float().mean() < 1e-3, "two classes can be equal but for rounding"
    assert (found_confusion - confusion).abs().sum() <= 2 * (found_labels != labels).sum()
    assert called.count("depthwise.forward") == 4
    assert called[4:] == ["resize.upsample_sum", "argmax.upsample_argmax", "argmax.upsample_confusion"]


@pytest.fixture
def tried(device, monkeypatch):
    """() -> what the trial of all kernels finds."""
    if device.type == "cpu":  # no for the plain forms, which ask for tensors that are not empty
        monkeypatch.setattr(dispatch, "use_triton", lambda tensor: tensor.numel() == 0)
    return lambda: trial.failing_kernels(device)


def test_every_registered_kernel_passes_its_trial(tried):
    assert tried() == {}
    assert trial._inputs(torch.float32).keys() == dispatch.REGISTERED.keys() == set(REGISTERED)


def raising(*_):
    raise RuntimeError("out of registers\nwith a second line")


WRONG = {
    "upsample_argmax": (lambda out: out.roll(1, 2), "differs by "),
    "upsample_sum_backward": (lambda out: [1.01 * out[0], out[1]], "differs by 1.0e-02 in torch.float32"),
    "depthwise_gelu": (lambda out: out * torch.nan, "differs by nan in "),
    "upsampled_cross_entropy": (raising, "out of registers with a second line"),
}


def test_wrong_kernels_are_found(tried, monkeypatch):
    for name, (planted, _) in WRONG.items():
        module, _, function = dispatch.REGISTERED[name].kernel.partition(".")
        module = import_module(f"segformer.models.ops.{module}")
        honest = getattr(module, function)
        wrong = partial(lambda planted, honest, *given: planted(honest(*given)), planted, honest)
        monkeypatch.setattr(module, function, wrong)
    found = tried()
    assert found.keys() == WRONG.keys()
    for name, (_, why) in WRONG.items():
        assert why in found[name], found[name]


class Ranks(NamedTuple):
    """Two ranks; what the other one has found."""

    other: dict[str, str]

    def gather(self, mine):
        return [mine, self.other]


def test_a_kernel_that_fails_on_one_rank_is_left_out_on_all(through_kernels, device, monkeypatch):
    monkeypatch.setattr(dispatch, "_plain", set())
    lines, logits = [], torch.randn(1, 3, 2, 2).to(device)
    agree_on_kernels(Ranks({}), {}, lines.append)
    assert lines == []
    agree_on_kernels(Ranks({"upsample_argmax": "differs"}), {"upsample_sum": "raised"}, lines.append)
    (line,) = lines
    assert "of upsample_argmax, upsample_sum, which fail here (upsample_argmax on rank 1: differs)" in line
    called = through_kernels()
    upsample_argmax(logits, (4, 4))
    upsample_confusion(logits, torch.zeros(1, 4, 4, dtype=torch.uint8, device=device), IGNORE)
    assert called == ["argmax.upsample_confusion"]
