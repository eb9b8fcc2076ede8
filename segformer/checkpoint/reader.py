"""Checkpoints of a run, found and read again.

Newest first: a checkpoint whose manifest, sizes or sha256 disagree is passed over with a warning and the next
older one is tried. Where there are checkpoints but no good one, reading stops: training never restarts
silently from scratch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from segformer.checkpoint.atomic import set_aside
from segformer.checkpoint.format import Checkpoint, TrainState, decode_state, read_files, step_name
from segformer.errors import CheckpointError

_NAME = re.compile(r"step-([0-9]{8,})")


def list_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in `folder`, ascending."""
    found = (_NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match and match[0] == step_name(int(match[1])))


def load_checkpoint(
    folder: Path,
    *,
    step: int | None = None,
    quarantine: bool = False,
    warn: Callable[[str], None] = print,
    verify: bool = True,
) -> Checkpoint | None:
    """The newest good checkpoint in `folder`, or that of `step`; None without any.

    A damaged checkpoint is passed over with a warning and, where `quarantine` is set, renamed bad-*: a run
    does that once, when it starts; who only reads a run leaves it as it is. Without `verify` only presence
    and sizes are looked at: for ranks that follow rank zero's choice.

    Raises:
        CheckpointError: `step` is missing or damaged, or there are checkpoints but none is good, or one was
            written by another version of this program.
    """
    steps = list_steps(folder)
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    if not steps and not list(folder.glob("bad-*")):
        return None
    for candidate in [step] if step is not None else reversed(steps):
        path = folder / step_name(candidate)
        try:
            content, text = read_files(path, digests=verify)
        except CheckpointError as error:
            if step is not None:
                raise
            warn(f"{error}; trying the one before it")
            if quarantine:
                set_aside(path)
            continue
        return content._replace(state=decode_state(path, text))
    raise CheckpointError(
        f"no checkpoint in {folder} is good; restore one, or delete the folder to start from scratch"
    )


def load_model_state(
    run_dir: Path, step: int | None = None, *, averaged: bool = True
) -> tuple[dict[str, Tensor], TrainState]:
    """Parameters and buffers of a run's newest good checkpoint (or of `step`), and the state they belong to.

    Where the run averages its weights, those are the parameters, unless `averaged` is off; buffers are
    always the model's.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    loaded = load_checkpoint(run_dir / "checkpoints", step=step)
    if loaded is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first, or name another run")
    if unknown := sorted(loaded.ema.keys() - loaded.model.keys()):
        raise CheckpointError(f"{run_dir}: the averaged weights have {unknown[0]}, which the model has not")
    return (loaded.model | loaded.ema if averaged else loaded.model), loaded.state
