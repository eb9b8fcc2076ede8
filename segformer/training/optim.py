"""The optimizers, their parameter groups, and the learning rate as a pure function of the step.

Official SegFormer recipe (NVlabs, `custom_keys` of its configs): AdamW, base lr 6e-5, weight decay 0.01;

    group      parameters                         lr      weight decay
    backbone   encoder weights and biases         1x      yes
    norm       encoder LayerNorms                 1x      no
    head       everything in decode_head          10x     yes (BatchNorm and biases too)

With no_decay=norms_and_biases (DeiT) every 1-d parameter is without decay: those of the encoder are `norm`,
those of the head `head_norm`.

With layer_decay below 1 (BEiT; Swin of SimMIM) the lr of an encoder parameter is multiplied by
layer_decay ** (L - layer), and its group is named after its layer, backbone.07 or norm.07. Layers are counted
along the depth, d_s being the blocks of the stages before stage s and L one more than all blocks:

    embed of stage s   d_s          the last block before it; 0 for the first
    block j            d_s + j + 1
    norm               d_(s+1)      the last block of its stage
    head               L            its lr is not decayed

    lr(step) = base x warm-up(step) x (floor + (1 - floor) x decay(step))
    poly     : decay = (1 - step / steps) ** power
    cosine   : decay = (1 + cos(pi step / steps)) / 2
    constant : decay = 1
    warm-up  : for step < warmup_steps, a straight line from warmup_start to 1
    floor    : min_lr_factor

`step` counts optimizer steps from 0, or from schedule_start; the first of them runs at lr(0). There is no
scheduler object: whoever resumes at a step has its lr, so nothing about it needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from segformer.errors import ConfigError, at_least, within
from segformer.models.backbone import Backbone
from segformer.models.layers import DropPath

SCHEDULES: dict[str, Callable[[float, float], float]] = {  # (progress, power) -> decay
    "poly": lambda progress, power: (1 - progress) ** power,
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress, power: 1.0,
}
NO_DECAY = ("norms", "norms_and_biases")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: str = "adamw"
    "adamw, sgd (with momentum) or lion."
    lr: float = 6e-5
    "Peak learning rate of the encoder, for the global batch of the recipe."
    head_lr_factor: float = 10.0
    "Learning rate of decode_head over that of the encoder."
    weight_decay: float = 0.01
    "Weight decay of every group that `no_decay` does not spare; decoupled, but for sgd."
    no_decay: str = "norms"
    "norms spares the encoder's LayerNorms (official), norms_and_biases every 1-d parameter (DeiT)."
    frozen_stages: int = 0
    """Stages of the encoder, from the first, that keep their weights: 0 none, 4 the whole encoder. Their
    stochastic depth is off."""
    layer_decay: float = 1.0
    "Factor on the encoder's lr for each layer further from the head, above 0 to 1; 1 = one lr for all."
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    "adamw: decay rates of both moments; lion: of the update's average and of the moment, [0.9, 0.99] there."
    eps: float = 1e-8
    "Denominator term of adamw."
    momentum: float = 0.9
    "Momentum of sgd, 0 for none."
    schedule: str = "poly"
    "poly, cosine or constant; how the lr falls from the first step to the last."
    schedule_start: int = 0
    "Step at which the schedule begins, warm-up included: that of a run which is extended by a new one."
    power: float = 1.0
    "Exponent of the poly schedule."
    warmup_steps: int = 1500
    "Optimizer steps of linear warm-up; 0 for none."
    warmup_start: float = 1e-6
    "Share of the lr at step 0 of the warm-up."
    min_lr_factor: float = 0.0
    "Share of the lr that poly and cosine fall to instead of 0."
    ema: float = 0.0
    "Decay of the EMA of the weights, as min(ema, (1 + t) / (10 + t)) at step t; 0 = none is kept."

    def __post_init__(self) -> None:
        for key, choices in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("no_decay", NO_DECAY)):
            if (value := getattr(self, key)) not in choices:
                raise ConfigError(f"optim.{key}={value!r} is unknown; use one of {', '.join(choices)}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1")
        within(self, "optim.", frozen_stages=(0, 4), min_lr_factor=(0, 1))
        at_least(self, "optim.", weight_decay=0, eps=1e-37, power=0)  # fp32 has no smaller eps
        at_least(self, "optim.", warmup_steps=0, schedule_start=0)
        within(self, "optim.", head_lr_factor=(0, 1e6), warmup_start=(0, 1e6))
        if not self.lr > 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        for key in ("ema", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must be at least 0 and below 1")


def lr_factor(cfg: OptimConfig, step: int, steps: int) -> float:
    """lr(step) / base for step in [schedule_start, steps); see the module's formulas."""
    step, steps = step - cfg.schedule_start, steps - cfg.schedule_start
    decay = SCHEDULES[cfg.schedule](step / steps, cfg.power)
    decay = cfg.min_lr_factor + (1 - cfg.min_lr_factor) * decay
    if step < cfg.warmup_steps:
        decay *= cfg.warmup_start + (1 - cfg.warmup_start) * step / cfg.warmup_steps
    return decay


def schedule_remark(cfg: OptimConfig, steps: int) -> str:
    """Remark on a warm-up that a run of `steps` steps does not outlast, for its log; or nothing."""
    start = cfg.schedule_start
    if cfg.warmup_steps < steps - start:
        return ""
    peak = max(lr_factor(cfg, step, steps) for step in range(start, steps))
    length = f"steps={steps}" + (f" - optim.schedule_start={start}" if start else "")
    return (
        f"optim.warmup_steps={cfg.warmup_steps} is not below {length}: the lr only reaches "
        f"{100 * peak:.2g} % of optim.lr={cfg.lr:g}"
    )


def freeze_stages(model: nn.Module, stages: int) -> None:
    """Exclude the first `stages` stages of the encoder from training; see OptimConfig.frozen_stages."""
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    for embed, blocks, norm in backbone.stages()[:stages]:
        for part in (embed, *blocks, norm):
            part.requires_grad_(False)
            for module in part.modules():
                if isinstance(module, DropPath):
                    module.rate = 0.0


def encoder_layers(model: nn.Module) -> tuple[dict[int, int], int]:
    """Layer of each encoder parameter by its id, for layer_decay; and that of the head."""
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    layers: dict[int, int] = {}
    depth = 0
    for embed, blocks, norm in backbone.stages():
        last = depth + len(blocks)
        for layer, module in [(depth, embed), *enumerate(blocks, start=depth + 1), (last, norm)]:
            layers.update((id(parameter), layer) for parameter in module.parameters())
        depth = last
    return layers, depth + 1


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """The groups described above that have members: name, params, base_lr, lr, weight_decay.

    Parameters without requires_grad are in none.
    """
    layer_norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    norms = {id(parameter) for module in layer_norms for parameter in module.parameters(recurse=False)}
    layers, head = encoder_layers(model) if cfg.layer_decay < 1 else ({}, 0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        flat = len(getattr(parameter, "ds_shape", parameter.shape)) == 1  # ZeRO-3 keeps the shape there
        spared = flat if cfg.no_decay == "norms_and_biases" else id(parameter) in norms
        if name.startswith(("decode_head.", "head.")):
            group, factor = "head_norm" if spared else "head", cfg.head_lr_factor
        else:
            group, factor = "norm" if spared else "backbone", 1.0
            if cfg.layer_decay < 1:
                layer = layers[id(parameter)]
                group, factor = f"{group}.{layer:02d}", cfg.layer_decay ** (head - layer)
        lr, decay = cfg.lr * factor, 0.0 if spared else cfg.weight_decay
        new = {"name": group, "params": [], "base_lr": lr, "lr": lr, "weight_decay": decay}
        groups.setdefault(group, new)["params"].append(parameter)
    return [groups[group] for group in sorted(groups, key=_reading_order)]


def _reading_order(group: str) -> tuple[int, str, int]:
    """Encoder before head, each layer's decayed parameters before its spared ones."""
    kinds = ("backbone", "norm", "head", "head_norm")
    kind, _, layer = group.partition(".")
    return int(kind.startswith("head")), layer, kinds.index(kind)


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): the sign of an average of gradients, with decoupled decay.

    update = sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g
    weights <- weights - lr (update + weight_decay weights)
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                update = torch.lerp(parameter.grad, moment, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                moment.lerp_(parameter.grad, 1 - beta2)


class Row(NamedTuple):
    """An optimizer of the table."""

    kind: type[torch.optim.Optimizer]
    settings: Callable[[OptimConfig, bool | None], dict[str, Any]]
    "(settings, fused: one kernel a group does the step; None where that can't be) -> its own arguments."
    states: tuple[str, ...]
    "Its state tensors, each of the shape of its parameter: what ZeRO cuts and a checkpoint keeps, by name."
    counts_steps: bool = False
    "Its state has a scalar `step`, too."


# ZeRO steps flat pieces of many parameters: only optimizers that work element by element can be rows here.
OPTIMIZERS = {
    "adamw": Row(
        torch.optim.AdamW,
        lambda cfg, fused: {"betas": tuple(cfg.betas), "eps": cfg.eps, "fused": fused},
        states=("exp_avg", "exp_avg_sq"),
        counts_steps=True,
    ),
    "sgd": Row(
        torch.optim.SGD, lambda cfg, fused: {"momentum": cfg.momentum, "fused": fused}, ("momentum_buffer",)
    ),
    "lion": Row(Lion, lambda cfg, fused: {"betas": tuple(cfg.betas)}, ("exp_avg",)),
}


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `cfg.name` over `parameter_groups`."""
    row, fused = OPTIMIZERS[cfg.name], all(parameter.is_cuda for parameter in model.parameters()) or None
    arguments = row.settings(cfg, fused)
    return row.kind(parameter_groups(model, cfg), lr=cfg.lr, weight_decay=cfg.weight_decay, **arguments)  # type: ignore[call-arg]


def set_learning_rate(groups: list[dict[str, Any]], cfg: OptimConfig, step: int, steps: int) -> None:
    """Set every group's lr for `step`."""
    factor = lr_factor(cfg, step, steps)
    for group in groups:
        group["lr"] = group["base_lr"] * factor
