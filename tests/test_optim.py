"""The schedule against the formulas of mmcv's hooks, the groups against the official recipe."""

import math

import pytest
import torch

from segformer.errors import ConfigError
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.optim import OptimConfig, build_optimizer, lr_factor, parameter_groups, set_learning_rate


def official(step: int, base: float = 6e-5, steps: int = 160_000) -> float:
    """mmcv: PolyLrUpdaterHook(power=1, min_lr=0) under warmup='linear', 1500 steps, ratio 1e-6."""
    regular = base * (1 - step / steps)
    if step < 1500:
        k = (1 - step / 1500) * (1 - 1e-6)
        return regular * (1 - k)
    return regular


@pytest.mark.parametrize("step", [0, 1, 750, 1499, 1500, 1501, 80_000, 159_999])
def test_poly_with_warm_up_equals_the_official_schedule(step):
    assert 6e-5 * lr_factor(OptimConfig(), step, 160_000) == pytest.approx(official(step), rel=1e-9)


def test_cosine_falls_from_one_to_nearly_zero():
    cfg = OptimConfig(schedule="cosine", warmup_steps=0)
    assert lr_factor(cfg, 0, 100) == 1
    assert lr_factor(cfg, 50, 100) == pytest.approx(0.5)
    assert lr_factor(cfg, 99, 100) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)


def test_groups_have_the_official_lr_and_decay():
    model = build_model(ModelConfig(variant="b0"), 19)
    by_id = {id(p): group for group in parameter_groups(model, OptimConfig()) for p in group["params"]}
    assert len(by_id) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = by_id[id(parameter)]
        head = name.startswith("decode_head.")
        norm = "norm" in name and not head
        assert group["base_lr"] == pytest.approx(6e-4 if head else 6e-5), name
        assert group["weight_decay"] == (0.0 if norm else 0.01), name


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(build_model(ModelConfig(variant="b0"), 2), OptimConfig())
    rates = set_learning_rate(optimizer.param_groups, OptimConfig(), 3000, 160_000)
    factor = 1 - 3000 / 160_000
    assert rates == pytest.approx({"backbone": 6e-5 * factor, "norm": 6e-5 * factor, "head": 6e-4 * factor})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(list(rates.values()))


def test_one_step_of_each_group_is_adamw_by_hand():
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant="b0"), 2)
    optimizer = build_optimizer(model, OptimConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        head = name.startswith("decode_head.")
        lr = 6e-4 if head else 6e-5
        decay = 0.0 if "norm" in name and not head else 0.01
        # first step: both moments are bias-corrected to the gradient itself
        expected = before[name] * (1 - lr * decay) - lr * parameter.grad / (parameter.grad.abs() + 1e-8)
        assert torch.allclose(parameter, expected, atol=1e-7), name


@pytest.mark.parametrize(
    "bad",
    [{"schedule": "linear"}, {"lr": 0.0}, {"betas": [0.9]}, {"weight_decay": -1.0}, {"warmup_steps": -1}],
)
def test_nonsense_is_refused_by_name(bad):
    with pytest.raises(ConfigError, match=rf"optim\.{next(iter(bad))}"):
        OptimConfig(**bad)
