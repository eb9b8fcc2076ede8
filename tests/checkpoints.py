"""One checkpoint, written at once, as a run writes it."""

from pathlib import Path

import torch
from torch import Tensor

from segformer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from segformer.checkpoint.format import Checkpoint, TrainState, step_name
from segformer.distributed.world import World

ONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
Tensors = dict[str, Tensor]


def write_checkpoint(
    model: Tensors,
    optimizer: Tensors,
    state: TrainState,
    folder: Path,
    ema: Tensors | None = None,
    cfg: CheckpointConfig | None = None,
) -> Path:
    """Save one checkpoint into `folder` and return its place."""
    cfg = cfg or CheckpointConfig()
    checkpointer = Checkpointer(cfg, folder, ONE, warn=print, failed=lambda *_: None)
    checkpointer.save(Checkpoint(model, optimizer, ema or {}, state), last=True)
    return folder / step_name(state.step)
