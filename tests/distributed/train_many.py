"""Several runs one after the other in one process group: `train_many.py <overrides.json>`."""

import json
import sys
from pathlib import Path

from segformer.distributed.world import init_world
from segformer.training.config import RunConfig, compose
from segformer.training.loop import train

world = init_world()
for overrides in json.loads(Path(sys.argv[1]).read_text()):
    train(compose(RunConfig, "config", overrides), world)
world.close()
