"""Each rank's share of a batch through a synchronized BatchNorm: `batch_norm_ranks.py <folder>`."""

import sys
from pathlib import Path

import torch

from segformer.distributed.world import SumOverRanks, init_world
from segformer.models.ops.batch_norm import BatchNorm, synchronize_batch_norm

world = init_world()
folder = Path(sys.argv[1])
data = torch.load(folder / "input.pt", weights_only=True)
torch.manual_seed(0)
model = torch.nn.Sequential(BatchNorm(6, momentum=0.3))
synchronize_batch_norm(model, SumOverRanks.apply)
bounds = [0, *data["shares"]]
mine = slice(bounds[world.rank], bounds[world.rank + 1])
x = data["x"][mine].clone().requires_grad_()
y = model(x)
(y * data["weight"][mine]).sum().backward()
gradients = [world.sum(parameter.grad.clone()) for parameter in model.parameters()]
rest = {
    "y": y.detach(),
    "grad_x": x.grad,
    "gradients": gradients,
    "buffers": list(model.buffers()),
    "evaluated": model.eval()(x).detach(),
    "names": list(model.state_dict()),
}
torch.save(rest, folder / f"rank-{world.rank}.pt")
assert world.any(world.rank == 1) is True
assert world.any(False) is False
assert world.gather(world.rank) == [0, 1]
assert world.on_main(lambda: world.rank) == 0
world.close()
