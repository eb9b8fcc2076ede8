"""One rank of tests/training/test_task.py: scores a classifier whose forward is a collective; prints JSON.

python tests/evaluation/score_ranks.py <shards> <eval_batch>
"""

import json
import sys

import torch
from torch import Tensor, nn

from segformer.data.shards.format import ShardSet
from segformer.distributed.world import World, init_world
from segformer.training.config import RunConfig, compose
from segformer.training.task import make_task


class Collective(nn.Module):
    """As under ZeRO-3: a rank that makes a forward more than the others waits for them in vain."""

    def __init__(self, inner: nn.Module, world: World) -> None:
        super().__init__()
        self.inner, self.world = inner, world

    def forward(self, images: Tensor) -> Tensor:
        self.world.any(False)
        return self.inner(images)


def main(shards: str, batch: str) -> None:
    world = init_world(timeout_s=60)
    overrides = [f"data.shards={shards}", "data.task=classification", "loader.workers=0"]
    sizes = ["classification.size=48", "classification.eval_resize=56", f"eval_batch={batch}"]
    cfg = compose(RunConfig, "config", ["data=folder", *overrides, *sizes])
    task = make_task(cfg, ShardSet.open(shards), world)
    torch.manual_seed(0)
    model = Collective(task.build_model(cfg.model), world)
    scores = task.evaluate(model, world, should_stop=lambda: world.any(False), on_error=lambda error: None)
    assert scores is not None
    print(json.dumps(scores.to_dict()))
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
