"""Schedules, groups and optimizers against their formulas; those of the recipes are in test_recipes.py."""

import math
import re

import numpy as np
import pytest
import torch

from segformer.errors import ConfigError
from segformer.models.layers import DropPath
from segformer.models.segformer import MiTClassifier, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.training.optim import (
    OPTIMIZERS,
    Lion,
    OptimConfig,
    build_optimizer,
    freeze_stages,
    lr_factor,
    parameter_groups,
    schedule_remark,
)


def on_meta(variant: str, *, classifier: bool = False) -> torch.nn.Module:
    with torch.device("meta"):
        cfg = ModelConfig(variant=variant)
        return MiTClassifier(build_encoder(cfg), 10) if classifier else build_model(cfg, 19)


def found(model: torch.nn.Module, cfg: OptimConfig) -> dict[str, tuple[str, float, float]]:
    """(group, lr at step 0, decay) of each parameter by name; every parameter is in exactly one group."""
    groups = parameter_groups(model, cfg)
    by_id = {
        id(p): (group["name"], group["base_lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    parameters = list(model.parameters())
    assert len(by_id) == len(parameters) == sum(len(group["params"]) for group in groups)
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("floor", [0, 0.1])
@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_the_lr_falls_to_its_floor(schedule, floor):
    cfg = OptimConfig(schedule=schedule, warmup_steps=0, min_lr_factor=floor)
    shape = {"poly": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}[schedule]
    for step in (0, 30, 999_999):
        # mmcv's min_lr and timm's lr_min alike: (base - min_lr) x decay + min_lr
        assert lr_factor(cfg, step, 10**6) == pytest.approx((1 - floor) * shape(step / 10**6) + floor)
    assert lr_factor(cfg, 999_999, 10**6) == pytest.approx(floor, abs=1e-5)


def test_the_groups_of_the_official_recipe_keep_their_names_and_order():
    model = on_meta("b0")
    assert [group["name"] for group in parameter_groups(model, OptimConfig())] == ["backbone", "norm", "head"]
    both = parameter_groups(model, OptimConfig(no_decay="norms_and_biases"))
    assert [group["name"] for group in both] == ["backbone", "norm", "head", "head_norm"]


# Layers of b0 (2, 2, 2, 2 blocks), counted by hand; the head is layer 9. Some of b2: test_recipes.py.
LAYERS_B0 = {
    "patch_embed1.": 0, "block1.0.": 1, "block1.1.": 2, "norm1.": 2,
    "patch_embed2.": 2, "block2.0.": 3, "block2.1.": 4, "norm2.": 4,
    "patch_embed3.": 4, "block3.0.": 5, "block3.1.": 6, "norm3.": 6,
    "patch_embed4.": 6, "block4.0.": 7, "block4.1.": 8, "norm4.": 8,
}  # fmt: skip


@pytest.mark.parametrize("classifier", [False, True])
def test_layer_decay_multiplies_the_lr_once_for_each_layer_below_the_head(classifier):
    rates = found(on_meta("b0", classifier=classifier), OptimConfig(layer_decay=0.8))
    for name, (group, lr, decay) in rates.items():
        if not name.startswith("backbone."):
            assert (group, lr) == ("head", pytest.approx(6e-4)), name
            continue
        (layer,) = [layer for key, layer in LAYERS_B0.items() if name.startswith(f"backbone.{key}")]
        assert lr == pytest.approx(6e-5 * 0.8 ** (9 - layer)), name
        assert group == f"{'norm' if 'norm' in name else 'backbone'}.{layer:02d}"
        assert decay == (0 if "norm" in name else 0.01), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_names_the_state_that_its_optimizer_makes(name):
    model = build_model(ModelConfig(variant="b0"), 2)
    optimizer = build_optimizer(model, OptimConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert state.keys() - {"step"} == set(OPTIMIZERS[name].states)
        assert ("step" in state) == OPTIMIZERS[name].counts_steps
        assert all(state[key].shape == parameter.shape for key in OPTIMIZERS[name].states)


def test_lion_follows_algorithm_2_of_its_paper():
    generator = np.random.default_rng(0)
    theta, moment = generator.normal(size=(4, 5)), np.zeros((4, 5))
    weight = torch.nn.Parameter(torch.tensor(theta))
    optimizer = Lion([weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        gradient = generator.normal(size=(4, 5))
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        update = np.sign(0.9 * moment + (1 - 0.9) * gradient)
        theta = theta - 0.01 * (update + 0.1 * theta)
        moment = 0.99 * moment + (1 - 0.99) * gradient
        np.testing.assert_allclose(weight.detach().numpy(), theta, atol=1e-12)


WRONG = {
    "name": ["adam"], "schedule": ["linear"], "lr": [0.0, math.nan], "betas": [[0.9]], "weight_decay": [-1.0],
    "warmup_steps": [-1], "no_decay": ["biases"], "layer_decay": [0.0, 1.1], "min_lr_factor": [-0.1, 2.0],
    "ema": [1.0, -0.5], "momentum": [1.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_nonsense_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"optim\.{key}"):
        OptimConfig(**{key: value})


@pytest.mark.parametrize("stages", [0, 2, 4])
def test_frozen_stages_are_in_no_group_and_have_no_stochastic_depth(stages):
    model = build_model(ModelConfig(variant="b1", drop_path_rate=0.2), 3)
    freeze_stages(model, stages)
    groups = parameter_groups(model, OptimConfig(frozen_stages=stages))
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        stage = re.match(r"backbone\.(?:patch_embed|block|norm)(\d)\.", name)
        frozen = stage is not None and int(stage[1]) <= stages
        assert (id(parameter) not in trained) == frozen, name
        assert parameter.requires_grad != frozen, name
    names = [group["name"] for group in groups]
    assert names == (["head"] if stages == 4 else ["backbone", "norm", "head"])
    rates = [m.rate for m in model.backbone.modules() if isinstance(m, DropPath)]
    dropped = [rate for rate in rates if rate > 0]
    assert len(dropped) == 8 - max(1, 2 * stages)  # 2 blocks a stage; the rate of the first is 0 anyway


def test_a_warm_up_that_the_run_does_not_outlast_is_remarked_on():
    cfg = OptimConfig(lr=1e-3, warmup_steps=500, warmup_start=0.0, schedule="constant")
    assert schedule_remark(cfg, 501) == ""
    said = "optim.warmup_steps=500 is not below steps=5: the lr only reaches 0.8 % of optim.lr=0.001"
    assert schedule_remark(cfg, 5) == said
