"""Checkpoints: the canonical state of a run, written atomically, verified when read, for any world and stage.

    runs/x/checkpoints/
      step-00016000/
        model.safetensors        parameters and buffers by name, fp32, whole
        optimizer.safetensors    exp_avg.<parameter>, exp_avg_sq.<parameter>, fp32, whole
        state.json               TrainState: step, order spec, digest of the data, best score
        MANIFEST.json            {file: {bytes, sha256}} of the files above; written last
      .tmp-step-00016000/        a save in progress; removed at the next start

Save: every rank takes part in gathering the tensors, rank zero writes: files, fsync each, MANIFEST, fsync,
fsync the folder, rename to step-*, fsync the parent. A crash at any point leaves the old checkpoints and
perhaps a .tmp folder. Load: newest first; a checkpoint whose manifest, sizes or sha256 disagree is renamed
bad-* and the next older one is tried. Where there are checkpoints but no good one, loading stops: training
never restarts silently from scratch.

Because tensors are stored whole and by name, a run resumes at any world size and ZeRO stage. There is no
pickle. DeepSpeed's own checkpoints do none of this: they need the same world size, and `latest` can point to
a torn one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from segformer.dist import World
from segformer.errors import CheckpointError, ConfigError
from segformer.partition import gather_model, gather_optimizer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "MANIFEST.json"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every: int = 1000
    "Optimiser steps between checkpoints; others are written for a new best, at a stop and at the end."
    keep_last: int = 3
    "Newest checkpoints to keep; the one with the best validation mIoU stays beside them."

    def __post_init__(self) -> None:
        if self.save_every < 1 or self.keep_last < 1:
            raise ConfigError("checkpoint.save_every and checkpoint.keep_last must be 1 or more")


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Everything a resume needs beside the tensors; the position in the data is step x global_batch."""

    step: int = 0
    "Optimiser steps done."
    order_spec: dict[str, Any] = field(default_factory=dict)
    "The frozen sample order (data.order.OrderSpec)."
    data_digest: str = ""
    "Digest of the shards that the order refers to."
    best_miou: float | None = None
    "Best validation mIoU so far; None before the first evaluation."
    best_step: int | None = None
    "Step of best_miou."
    corrupt: list[int] = field(default_factory=list)
    "Samples of the training split that were found corrupt and replaced."


def save_checkpoint(
    engine: Any, state: TrainState, cfg: CheckpointConfig, folder: Path, world: World
) -> Path:
    """Write the run's state as folder/step-*, commit it, remove what `cfg` no longer keeps; all ranks.

    Raises:
        CheckpointError: a tensor is not finite, or the disk is full; older checkpoints stay as they are.
    """
    model, optimizer = gather_model(engine), gather_optimizer(engine, world)
    return world.on_main(lambda: write_checkpoint(model, optimizer, state, cfg, folder))


def write_checkpoint(
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: TrainState,
    cfg: CheckpointConfig,
    folder: Path,
) -> Path:
    """The part of `save_checkpoint` that rank zero does alone."""
    for name, value in (model | optimizer).items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(f"not saving step {state.step}: {name} is not finite; lower optim.lr")
    final = folder / f"step-{state.step:08d}"
    temporary = folder / f".tmp-{final.name}"
    written = (save(model), save(optimizer), json.dumps(asdict(state), indent=1).encode())
    contents = dict(zip(FILES, written, strict=True))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in contents.items():
            _write_durable(temporary / name, data)
        _write_durable(temporary / MANIFEST, _manifest(contents))
        _sync_folder(temporary)
        if final.exists():  # the same step again: the new one holds the same state
            _delete(final)
        temporary.rename(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final} can't be written: {error.strerror}; free space and start again"
        ) from error
    _prune(folder, cfg.keep_last, state.best_step)
    return final


def _manifest(contents: dict[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    return json.dumps(entries, indent=1).encode()


def _write_durable(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    for step in list_steps(folder)[:-keep_last]:
        if step != best_step:
            _delete(folder / f"step-{step:08d}")


def _delete(path: Path) -> None:
    """First out of sight, so that no half-deleted checkpoint is ever read; `clean` removes what stays."""
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def list_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in `folder`, ascending."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def read_checkpoint(path: Path) -> dict[str, bytes]:
    """The verified contents of one checkpoint folder by file name.

    Raises:
        CheckpointError: a file is missing, or the manifest is not exactly the one of these files.
    """
    try:
        contents = {name: (path / name).read_bytes() for name in FILES}
        manifest = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} is incomplete: {Path(error.filename).name}: {error.strerror}"
        ) from error
    if manifest != _manifest(
        contents
    ):  # no parsing: a flipped bit anywhere, in the manifest too, is a difference
        raise CheckpointError(
            f"{path} is damaged: its files do not match the sizes and sha256 sums of {MANIFEST}"
        )
    return contents


def load_checkpoint(
    folder: Path,
    *,
    step: int | None = None,
    quarantine: bool = False,
    warn: Callable[[str], None] = print,
) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainState] | None:
    """(model, optimizer, state) of the newest good checkpoint in `folder`, or of `step`; None without any.

    A damaged checkpoint is passed over with a warning and, where `quarantine` is set, renamed bad-*: a run
    does that once, when it starts; who only reads a run leaves it as it is.

    Raises:
        CheckpointError: `step` is missing or damaged, or there are checkpoints but none is good.
    """
    steps = list_steps(folder)
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    if not steps and not list(folder.glob("bad-*")):
        return None
    for candidate in [step] if step is not None else reversed(steps):
        path = folder / f"step-{candidate:08d}"
        try:
            contents = read_checkpoint(path)
        except CheckpointError as error:
            if step is not None:
                raise
            warn(f"{error}; trying the one before it")
            if quarantine:
                _set_aside(path)
            continue
        state = TrainState(**json.loads(contents["state.json"]))
        return load(contents["model.safetensors"]), load(contents["optimizer.safetensors"]), state
    raise CheckpointError(
        f"no checkpoint in {folder} is good; restore one, or delete the folder to start from scratch"
    )


def _set_aside(path: Path) -> None:
    names = (f"bad-{path.name}" + (f".{count}" if count else "") for count in itertools.count())
    path.rename(next(target for name in names if not (target := path.with_name(name)).exists()))


def clean(folder: Path) -> None:
    """Remove what interrupted saves and deletions left behind; rank zero, at start."""
    for pattern in (".tmp-*", ".del-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def load_model_state(run_dir: Path, step: int | None = None) -> tuple[dict[str, Tensor], TrainState]:
    """Parameters and buffers of a run's newest good checkpoint (or of `step`), and the state they belong to.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    loaded = load_checkpoint(run_dir / "checkpoints", step=step)
    if loaded is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first, or name another run")
    model, _, state = loaded
    return model, state
