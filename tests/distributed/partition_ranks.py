"""Whole moments into every ZeRO stage and back, for parameters that no number of ranks divides."""

import torch
from torch import nn

from segformer.data.loading.order import BatchShape
from segformer.distributed.engine import EngineConfig, build_engine
from segformer.distributed.world import init_world
from segformer.distributed.zero_state import gather_model, gather_optimizer, restore_optimizer

STATES = ("exp_avg", "exp_avg_sq")
world = init_world()


def build(stage, threshold):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 5), nn.ReLU(), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    extra = {} if stage < 3 else {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    cfg = EngineConfig(zero_stage=stage, extra=extra)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return build_engine(model, optimizer, cfg, world, BatchShape(2 * world.size, 2, world.size))


def step(engine, index):
    generator = torch.Generator().manual_seed(100 * index + world.rank)
    loss = engine(torch.randn(2, 37, generator=generator)).square().mean()
    engine.backward(loss)
    engine.step()


def main():
    results = {}
    for stage, threshold in ((0, 0), (1, 0), (2, 0), (3, 0), (3, 10**6)):
        engine = build(stage, threshold)
        for index in range(3):
            step(engine, index)
        moments = gather_optimizer(engine, STATES, world)
        moments = world.gather(moments)[0]  # what every rank reads from a checkpoint
        restore_optimizer(
            engine, STATES, {name: torch.zeros_like(value) for name, value in moments.items()}, 0
        )
        restore_optimizer(engine, STATES, moments, 3)
        again = gather_optimizer(engine, STATES, world)
        if world.is_main:
            assert again.keys() == moments.keys()
            assert all(torch.equal(again[name], moments[name]) for name in moments), (
                f"stage {stage}: round trip"
            )
            assert all(bool(value.any()) for name, value in moments.items() if "exp_avg." in name)
        step(engine, 3)
        results[stage, threshold] = gather_model(engine)

    if world.is_main:
        for key, state in results.items():
            for name, value in state.items():
                assert torch.allclose(value, results[0, 0][name], atol=1e-6), (key, name)


main()
world.any(False)  # rank zero is still comparing
world.close()
