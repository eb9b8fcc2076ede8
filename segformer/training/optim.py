"""The optimiser: parameter groups, AdamW, and the learning rate as a pure function of the step.

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

`step` counts optimiser steps from 0; the first step runs at lr(0). There is no scheduler object: whoever
resumes at a step has its lr, so nothing about it needs to be saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from segformer.errors import ConfigError
from segformer.models.backbone import Backbone, DropPath

SCHEDULES = ("poly", "cosine", "constant")
NO_DECAY = ("norms", "norms_and_biases")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-5
    "Peak learning rate of the encoder, for the global batch of the recipe."
    head_lr_factor: float = 10.0
    "Learning rate of decode_head over that of the encoder."
    weight_decay: float = 0.01
    "Decoupled weight decay of every group that `no_decay` does not spare."
    no_decay: str = "norms"
    "norms spares the encoder's LayerNorms (official), norms_and_biases every 1-d parameter (DeiT)."
    frozen_stages: int = 0
    """Stages of the encoder, from the first, that keep their weights: 0 none, 4 the whole encoder. Their
    stochastic depth is off."""
    layer_decay: float = 1.0
    "Factor on the encoder's lr for each layer further from the head, above 0 to 1; 1 = one lr for all."
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
    min_lr_factor: float = 0.0
    "Share of the lr that poly and cosine fall to instead of 0."
    ema: float = 0.0
    "Decay of the averaged weights, as min(ema, (1 + t) / (10 + t)) at step t; 0 = no average is kept."

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"optim.schedule={self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
            )
        if self.no_decay not in NO_DECAY:
            raise ConfigError(f"optim.no_decay={self.no_decay!r} is unknown; use {' or '.join(NO_DECAY)}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay={self.layer_decay} must be above 0 and at most 1")
        if not 0 <= self.frozen_stages <= 4:
            raise ConfigError(f"optim.frozen_stages={self.frozen_stages} must be from 0 to 4")
        if not 0 <= self.min_lr_factor <= 1:
            raise ConfigError(f"optim.min_lr_factor={self.min_lr_factor} must be between 0 and 1")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema={self.ema} must be at least 0 and below 1")
        if not self.lr > 0:
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
    decay = cfg.min_lr_factor + (1 - cfg.min_lr_factor) * decay
    if step < cfg.warmup_steps:
        decay *= cfg.warmup_start + (1 - cfg.warmup_start) * step / cfg.warmup_steps
    return decay


def schedule_remark(cfg: OptimConfig, steps: int) -> str:
    """What is odd about the schedule of a run of `steps` steps, for its log; or nothing."""
    if cfg.warmup_steps < steps:
        return ""
    peak = max(lr_factor(cfg, step, steps) for step in range(steps))
    return (
        f"optim.warmup_steps={cfg.warmup_steps} is not below steps={steps}: the lr only reaches "
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


def parameter_groups(model: nn.Module, cfg: OptimConfig) -> list[dict[str, object]]:
    """The groups described above that have members: name, params, base_lr, lr, weight_decay.

    Parameters without requires_grad are in none.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    layers, head = encoder_layers(model) if cfg.layer_decay < 1 else ({}, 0)
    members: dict[str, list[nn.Parameter]] = {}
    factors: dict[str, float] = {}
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
        members.setdefault(group, []).append(parameter)
        factors[group] = factor
    return [
        {
            "name": group,
            "params": members[group],
            "base_lr": cfg.lr * factors[group],
            "lr": cfg.lr * factors[group],
            "weight_decay": 0.0 if "norm" in group else cfg.weight_decay,
        }
        for group in sorted(members, key=_reading_order)
    ]


def _reading_order(group: str) -> tuple[int, str, int]:
    """Encoder before head, each layer's decayed parameters before its spared ones."""
    kinds = ("backbone", "norm", "head", "head_norm")
    kind, _, layer = group.partition(".")
    return int(kind.startswith("head")), layer, kinds.index(kind)


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
