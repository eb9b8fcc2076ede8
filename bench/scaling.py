"""What more nodes bring: a model, not a measurement.

    step = max(compute, exchanged / bandwidth) + latency            gradients travel while others are computed
    step = compute + exchanged / bandwidth + latency                nothing overlaps
    efficiency = compute / step

A step exchanges 2 (R - 1) / R gradients at ZeRO-0, 1 and 2 (an all-reduce, or a reduce-scatter of the
gradients and an all-gather of the weights), and 3 (R - 1) / R at ZeRO-3 (the weights are gathered for the
forward and again for the backward pass, the gradients reduced). NCCL's rings pass every node's border once,
each over an adapter of its own if there are several: what limits them is the narrower of NVLink within a node
and all the adapters of a node together. Compute is the training FLOPs of a rank's images over `mfu` of its
peak. Images per rank stay, so the global batch grows with the ranks.

Every figure is a setting; none was measured here. Left out: the loader, the host's time to launch kernels
(which rules small networks), stragglers, batch norm's small messages, contention on the network.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.record import conditions, table, write_csv
from segformer.errors import ConfigError
from segformer.models.macs import training_flops
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig

SHARES = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0}  # of the parameters, per step and rank, times (R - 1) / R


@dataclass(kw_only=True, slots=True)
class ScalingBench:
    """The cluster and the run of the model."""

    variants: list[str] = field(default_factory=lambda: ["b0", "b2", "b5", "b5_w4"])
    "Sizes of the network that are computed."
    nodes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    "Numbers of nodes that are computed."
    gpus_per_node: int = 8
    "GPUs of a node, one rank each."
    images: int = 4
    "Images per rank and step."
    side: int = 512
    "Height and width of the crop, pixels."
    classes: int = 150
    "Classes that the network predicts."
    peak_tflops: float = 989.4
    "Of a GPU at the precision that is trained in: H100, bf16, dense."
    mfu: float = 0.15
    "Share of the peak that the computation reaches."
    nvlink_gb_s: float = 450.0
    "What a GPU sends to others of its node, 1e9 bytes a second, one way."
    network_gb_s: list[float] = field(default_factory=lambda: [400.0, 12.5])
    "What all adapters of a node send together: eight of 400 Gb/s, or one of 100 Gb/s."
    reached: float = 0.7
    "Share of either that a collective reaches."
    latency_us: float = 20.0
    "Of one collective, for each doubling of the ranks."
    collectives: int = 8
    "Collectives of a step: gradients in buckets, batch norm."
    stage: int = 1
    "ZeRO stage; b5_w4 is always at 3."
    gradient_bytes: int = 4
    "Bytes of a gradient or weight on the wire."

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise ConfigError(f"scaling.variants has {unknown[0]}; use {', '.join(VARIANTS)}")
        if self.stage not in SHARES:
            raise ConfigError(f"scaling.stage={self.stage}; use 0, 1, 2 or 3")
        if min(self.nodes, default=0) < 1 or min(self.gpus_per_node, self.images, self.side) < 1:
            raise ConfigError("scaling.nodes, gpus_per_node, images and side must be 1 or more")


def measure(cfg: ScalingBench, out: Path) -> list[dict[str, Any]]:
    """Print the model's table and write scaling.csv into `out`."""
    rows = [
        row(cfg, variant, network, nodes)
        for variant in cfg.variants
        for network in cfg.network_gb_s
        for nodes in cfg.nodes
    ]
    write_csv(out / "scaling.csv", rows, conditions(("torch",)))
    print(table(rows))
    return rows


def row(cfg: ScalingBench, variant: str, network: float, nodes: int) -> dict[str, Any]:
    """One size of MiT on a number of nodes that send `network` 1e9 bytes a second each."""
    model = ModelConfig(variant=variant)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(model, cfg.classes).parameters())
    ranks, stage = nodes * cfg.gpus_per_node, 3 if variant == "b5_w4" else cfg.stage
    flops = training_flops(model, (cfg.side, cfg.side), cfg.classes) * cfg.images
    compute = flops / (cfg.mfu * cfg.peak_tflops * 1e12)
    sent = SHARES[stage] * (ranks - 1) / ranks * parameters * cfg.gradient_bytes
    width = min(cfg.nvlink_gb_s, network if nodes > 1 else cfg.nvlink_gb_s) * 1e9 * cfg.reached
    latency = cfg.collectives * cfg.latency_us * 1e-6 * max(1, ranks - 1).bit_length()
    hidden, exposed = max(compute, sent / width) + latency, compute + sent / width + latency
    return {
        "variant": variant,
        "stage": stage,
        "network_gb_s": network,
        "nodes": nodes,
        "ranks": ranks,
        "global_batch": ranks * cfg.images,
        "m_parameters": round(parameters / 1e6, 2),
        "compute_ms": round(compute * 1e3, 2),
        "sent_mb": round(sent / 1e6, 1),
        "exchange_ms": round(sent / width * 1e3, 2),
        "latency_ms": round(latency * 1e3, 2),
        "efficiency_overlapped": round(compute / hidden, 3),
        "efficiency_exposed": round(compute / exposed, 3),
        "images_per_s": round(ranks * cfg.images / hidden),
    }
