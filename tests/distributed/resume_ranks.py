"""What a resume gives each world: `resume_ranks.py <out.json> <override> ...`.

Compares model and moments in the engine with the checkpoint, bit by bit, writes down the next 20 global
batches, and then trains on.
"""

import json
import sys
from pathlib import Path

import torch

from segformer.checkpoint.reader import load_checkpoint
from segformer.distributed.watchdog import Watchdog
from segformer.distributed.world import StopFlag, init_world
from segformer.distributed.zero_state import gather_model, gather_optimizer
from segformer.telemetry.logger import Telemetry
from segformer.training.config import RunConfig, compose
from segformer.training.loop import train
from segformer.training.run import config_summary, set_up


def main():
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    cfg = compose(RunConfig, "config", overrides)
    world = init_world()
    folder = Path(cfg.run_dir)
    with (
        StopFlag() as stop,
        Watchdog(folder / "stacks", world, 100) as watchdog,
        Telemetry(
            cfg.telemetry, folder, world, name="x", steps=cfg.steps, config=config_summary(cfg)
        ) as telemetry,
    ):
        run = set_up(cfg, world, telemetry, stop, watchdog)
        model, optimizer = gather_model(run.engine), gather_optimizer(run.engine, world)
        average = run.average.gather(world)
        if world.is_main:
            saved = load_checkpoint(folder / "checkpoints")
            for found, wanted in ((model, saved.model), (optimizer, saved.optimizer), (average, saved.ema)):
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[name], wanted[name]) for name in found)
        steps = []
        for _ in range(20):
            ids = []
            while len(ids) * world.size < cfg.global_batch:
                ids += next(run.batches).sample_ids.tolist()
            steps.append([sample for part in world.gather(ids) for sample in part])
        if world.is_main:
            out.write_text(json.dumps(steps))
        run.batches.close()
    world.any(False)
    train(cfg, world)
    world.close()


if __name__ == "__main__":  # a loader's process imports this file, too
    main()
