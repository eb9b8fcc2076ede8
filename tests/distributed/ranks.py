"""One of two ranks of test_world.py: `ranks.py <folder>`; what it finds goes to rank-<n>.pt."""

import sys
from pathlib import Path

import torch
from torch import nn

from segformer.distributed.world import SumOverRanks, init_world
from segformer.models.ops.batch_norm import BatchNorm, synchronize_batch_norm

world, folder = init_world(), Path(sys.argv[1])
data = torch.load(folder / "input.pt", weights_only=True)
model = nn.Sequential(BatchNorm(6, momentum=0.3))
synchronize_batch_norm(model, SumOverRanks.apply)
bounds = [0, *data["shares"]]
mine = slice(bounds[world.rank], bounds[world.rank + 1])
x = data["x"][mine].clone().requires_grad_()
y = model(x)
(y * data["weight"][mine]).sum().backward()
found = {
    "y": y.detach(),
    "grad_x": x.grad,
    "gradients": [world.sum(parameter.grad.clone()) for parameter in model.parameters()],
    "buffers": list(model.buffers()),
    "evaluated": model.eval()(x).detach(),
    "names": list(model.state_dict()),
    "collectives": [world.any(world.rank == 1), world.any(False), world.gather(world.rank)],
    "main": world.on_main(lambda: world.rank),
}
torch.save(found, folder / f"rank-{world.rank}.pt")
world.close()
