"""The canonical state of a run at one step, as files that any world and ZeRO stage can continue from.

    model.safetensors        parameters and buffers by name, fp32, whole
    optimizer.safetensors    <state>.<parameter>, fp32, whole: exp_avg and exp_avg_sq of AdamW, ...
    ema.safetensors          EMA of the parameters by name, fp32, whole; only with optim.ema
    state.json               TrainState: step, order spec, digest of the data, settings, best score

Because tensors are stored whole and by name, a run resumes at any world size and ZeRO stage. There is no
pickle. DeepSpeed's own checkpoints do none of this: they need the same world size, and `latest` can point to
a torn one.

Tensors are streamed to their file and mapped from it: they cost no memory beside their own when they are
written, and none until they are read when they are loaded; copy what shall outlive the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from segformer.checkpoint.atomic import verify
from segformer.errors import CheckpointError, reraise_as
from segformer.files import parse_json, read_bytes

MODEL, OPTIMIZER, STATE = FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
EMA = "ema.safetensors"


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Everything a resume needs beside the tensors; the position in the data is step x global_batch."""

    step: int = 0
    "Optimizer steps done."
    order_spec: dict[str, Any] = field(default_factory=dict)
    "The frozen sample order (data.order.OrderSpec)."
    data_digest: str = ""
    "Digest of the shards that the order refers to."
    long_side: int | None = None
    "Pixels that sharding reduced the long side of larger images to, 0 = none; an older version has None."
    pixels: dict[str, Any] | None = None
    "dtype, mean and std of images that are not 8-bit RGB; None: uint8, mean and std of the settings."
    best_score: float | None = None
    "Best validation score so far (mIoU or top-1); None before the first evaluation."
    best_step: int | None = None
    "Step of best_score."
    evaluated: int = 0
    "The step that was evaluated last; 0 before the first, and in states of older versions."
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    "Step and scores of each evaluation of eval_every, for early_stop; an older version has none."
    corrupt: list[int] = field(default_factory=list)
    "Samples of the training split that were found corrupt and replaced."
    skipped: int = 0
    "Optimizer steps that were left out because loss or gradient was not finite."
    skipped_in_a_row: int = 0
    "How many of them came last, one after the other."
    bad_step: int = 0
    "The step from which the run went back to a checkpoint and which it has not passed yet; 0 = none."
    settings: str = ""
    "The settings that decide what is learned (FROZEN in training/config), YAML; an older version has none."


class Checkpoint(NamedTuple):
    """Content of one checkpoint; tensors by name on the CPU, of a loaded one mapped from the files."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor]
    "EMA of the parameters; {} where the run keeps none."
    state: TrainState


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def check_finite(groups: tuple[dict[str, Tensor], ...], step: int) -> None:
    """Refuse a tensor with NaN or infinity: it would be the end of the run that continues from it.

    Raises:
        CheckpointError: it names the first one.
    """
    for name, value in (item for group in groups for item in group.items()):
        if not is_finite(value):
            raise CheckpointError(f"not saving step {step}: {name} is not finite; lower optim.lr")


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity. By its extremes, for NaN is passed on by both: a mask would cost memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


def writers_of(content: Checkpoint) -> dict[str, Callable[[Path], object]]:
    """File name -> function that writes it, as `commit` takes them. The state is copied, tensors are not."""
    text = json.dumps(asdict(content.state), indent=1).encode()  # now: the loop goes on changing the state
    tensors = {MODEL: content.model, OPTIMIZER: content.optimizer}
    tensors |= {EMA: content.ema} if content.ema else {}
    writers: dict[str, Callable[[Path], object]] = {STATE: partial(Path.write_bytes, data=text)}
    return {name: partial(write_tensors, values) for name, values in tensors.items()} | writers


def write_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Stream tensors into a file: no copy of them is made."""
    path.touch()
    mode = path.stat().st_mode  # as the umask says; save_file leaves a file that only its owner can read
    with reraise_as(OSError, path.name, on=SafetensorError):  # what the operating system said, as text
        save_file(tensors, path, header)
    path.chmod(mode)


def read_files(path: Path, *, digests: bool) -> tuple[Checkpoint, bytes]:
    """Read the tensors, with an empty state, and the text of the state; `digests` as in `verify`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    names = verify(path, FILES, digests=digests)
    with reraise_as(CheckpointError, f"{path} is damaged", on=(SafetensorError, OSError)):
        model, optimizer = load_file(path / MODEL), load_file(path / OPTIMIZER)
        ema = load_file(path / EMA) if EMA in names else {}
        return Checkpoint(model, optimizer, ema, TrainState()), read_bytes(path / STATE)


def decode_state(path: Path, text: bytes) -> TrainState:
    """The state of the checkpoint `path`; fields that an older version did not write take their defaults.

    Raises:
        CheckpointError: another version wrote it, or the folder was renamed.
    """
    with reraise_as(CheckpointError, f"{path}/{STATE} is damaged", on=(ValueError, TypeError)):
        values = dict(parse_json(text))
        if not isinstance(values.get("step", 0), int):
            raise ValueError(f"its step {values['step']!r} is no number")
    if unknown := sorted(values.keys() - {field.name for field in fields(TrainState)}):
        raise CheckpointError(
            f"{path}/{STATE} has {', '.join(unknown)}, which this version does not know; continue with the "
            "version that wrote it, or choose another name=..."
        )
    state = TrainState(**values)
    if path.name != step_name(state.step):
        raise CheckpointError(f"{path} holds step {state.step}; name it {step_name(state.step)} again")
    return state
