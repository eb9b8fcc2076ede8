"""What tests of runs compare: the tensors of a checkpoint, bit by bit."""

from pathlib import Path

import torch
from torch import Tensor

from segformer.checkpoint.reader import load_checkpoint


def saved_state(run_dir: Path, step: int | None = None) -> dict[str, Tensor]:
    """Weights, buffers, moments and averages (as ema.<name>) of a run's newest checkpoint, or of `step`."""
    loaded = load_checkpoint(run_dir / "checkpoints", step=step)
    assert loaded is not None
    averages = {f"ema.{name}": value for name, value in loaded.ema.items()}
    return {**loaded.model, **loaded.optimizer, **averages}


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, first {different[0]}"
