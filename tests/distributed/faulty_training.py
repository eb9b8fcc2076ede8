"""A run whose losses go wrong where the plan says: `faulty_training.py <plan.json> <override> ...`.

plan: {"rank": 1, "steps": [5], "kind": "loss" | "gradient", "once": true, "accumulation": 1};
steps count from 1; of accumulated micro batches the first one goes wrong.
"""

import json
import sys
from pathlib import Path

import torch

from segformer.job import run_job
from segformer.training.config import RunConfig, cli
from segformer.training.task import Segmentation

honest = Segmentation.loss


def wrong_loss(plan):
    """Segmentation.loss that goes wrong as planned."""
    left = [*plan["steps"]]

    def loss(self, model, batch, position):
        value, parts = honest(self, model, batch, position)
        micro_step, rank = divmod(position, torch.distributed.get_world_size())
        step, index = divmod(micro_step, plan.get("accumulation", 1))
        if index:
            return value, parts
        if rank != plan["rank"] or step + 1 not in plan["steps"]:
            return value, parts
        if plan.get("once", True):
            if step + 1 not in left:
                return value, parts
            left.remove(step + 1)
        if plan["kind"] == "gradient":
            return value + (value * 0).sqrt(), parts  # the value is right, its derivative 0 x infinity
        return value * torch.nan, parts

    return loss


if __name__ == "__main__":  # a loader's process imports this file, too
    Segmentation.loss = wrong_loss(json.loads(Path(sys.argv.pop(1)).read_text()))
    cli(RunConfig, "config", run_job)
