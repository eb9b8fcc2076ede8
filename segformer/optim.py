"""The optimiser: parameter groups, AdamW, and the learning rate as a pure function of the step.

Official SegFormer recipe (NVlabs, `custom_keys` of its configs): AdamW, base lr 6e-5, weight decay 0.01;

    group      parameters                         lr      weight decay
    backbone   encoder weights and biases         1x      yes
    norm       encoder LayerNorms                 1x      no
    head       everything in decode_head          10x     yes (BatchNorm and biases too)

    lr(step) = base x warm-up(step) x decay(step)
    poly     : decay = (1 - step / steps) ** power
    cosine   : decay = (1 + cos(pi step / steps)) / 2
    constant : decay = 1
    warm-up  : for step < warmup_steps, a straight line from warmup_start to 1

`step` counts optimiser steps from 0; the first step runs at lr(0). There is no scheduler object: whoever
resumes at a step has its lr, so nothing about it needs to be saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from segformer.errors import ConfigError

SCHEDULES = ("poly", "cosine", "constant")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-5
    "Peak learning rate of the encoder, for the global batch of the recipe."
    head_lr_factor: float = 10.0
    "Learning rate of decode_head over that of the encoder."
    weight_decay: float = 0.01
    "Decoupled weight decay of every group but the encoder's norms."
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    "Decay rates of AdamW's first and second moments."
    eps: float = 1e-8
    "AdamW's denominator term."
    schedule: str = "poly"
    "poly, cosine or constant; how the lr falls from the first step to the last."
    power: float = 1.0
    "Exponent of the poly schedule."
    warmup_steps: int = 1500
    "Optimiser steps of linear warm-up; 0 for none."
    warmup_start: float = 1e-6
    "Share of the lr at step 0 of the warm-up."

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"optim.schedule={self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
            )
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        for name in ("head_lr_factor", "weight_decay", "eps", "power", "warmup_steps", "warmup_start"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")


def lr_factor(cfg: OptimConfig, step: int, steps: int) -> float:
    """lr(step) / base for step in [0, steps); see the module's formulas."""
    progress = step / steps
    decay = {
        "poly": (1 - progress) ** cfg.power,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "constant": 1.0,
    }[cfg.schedule]
    if step < cfg.warmup_steps:
        decay *= cfg.warmup_start + (1 - cfg.warmup_start) * step / cfg.warmup_steps
    return decay


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, object]]:
    """The groups of the table above that have members: name, params, base_lr, lr, weight_decay."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    members: dict[str, list[nn.Parameter]] = {"backbone": [], "norm": [], "head": []}
    for name, parameter in model.named_parameters():
        if name.startswith(("decode_head.", "head.")):
            members["head"].append(parameter)
        else:
            members["norm" if id(parameter) in norms else "backbone"].append(parameter)
    groups = []
    for name, parameters in members.items():
        lr = cfg.lr * (cfg.head_lr_factor if name == "head" else 1.0)
        decay = 0.0 if name == "norm" else cfg.weight_decay
        if parameters:
            groups.append(
                {"name": name, "params": parameters, "base_lr": lr, "lr": lr, "weight_decay": decay}
            )
    return groups


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused on CUDA, where one kernel a group does the step."""
    fused = all(parameter.is_cuda for parameter in model.parameters()) or None
    return torch.optim.AdamW(
        parameter_groups(model, cfg),
        lr=cfg.lr,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


def set_learning_rate(
    groups: list[dict[str, float]], cfg: OptimConfig, step: int, steps: int
) -> dict[str, float]:
    """Set every group's lr for `step` and return them by group name."""
    factor = lr_factor(cfg, step, steps)
    for group in groups:
        group["lr"] = group["base_lr"] * factor
    return {str(group["name"]): group["lr"] for group in groups}
