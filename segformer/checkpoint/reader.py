"""Run directories, opened: the one reader behind resume, from_pretrained, convert, export and prediction.

    runs/x/config.yaml               the configuration, as plain data here
    runs/x/checkpoints/step-N/       newest first (format.py has the files of each)

What decides the result is taken from the checkpoint, whose sums cover it, whatever has become of it in
config.yaml: that one decides on its own only for checkpoints of an older version, and on the rest (places).

A checkpoint whose manifest, sizes or sha256 disagree is passed over with a warning and the next older one is
tried; the folder of one checkpoint stands for that step alone. Where there are checkpoints but no good one,
reading stops: training never restarts silently from scratch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from segformer.checkpoint.atomic import MANIFEST, read_verified, set_aside
from segformer.checkpoint.format import (
    MODEL,
    STATE,
    Checkpoint,
    TrainState,
    decode_state,
    read_files,
    step_name,
)
from segformer.errors import CheckpointError, ConfigError, reraise_as
from segformer.files import parse_yaml, read_text

CONFIG = "config.yaml"
_MOST = 2**23  # bytes of a config.yaml; 65,535 class folders take 2.5 MB
_NAME = re.compile(r"step-([0-9]{8,})")


@dataclass(kw_only=True, slots=True)
class Run:
    """A checkpoint of a run, and the run's configuration."""

    folder: Path
    weights: dict[str, Tensor]
    "Parameters and buffers; of a run with optim.ema the averaged parameters, and the model's own buffers."
    state: TrainState
    averaged: bool
    "The parameters are averages of those of the steps (EMA)."
    config: dict[str, Any]
    "The configuration; {} where neither the checkpoint nor a config.yaml has one."


def is_run(path: Path) -> bool:
    """`path` is a run directory, or the folder of one of its checkpoints."""
    configured = (path / CONFIG).is_file() and not (path / "config.json").is_file()  # no export
    return configured or (path / "checkpoints").is_dir() or _step_folder(path) is not None


def open_run(path: Path, step: str = "newest", *, warn: Callable[[str], None] = print) -> Run:
    """Open a run directory at its newest good checkpoint, its best or that of a step (a number).

    The folder of a checkpoint stands for that step of its run.

    Raises:
        CheckpointError: there is no such checkpoint, or no good one.
        ConfigError: `step` is none of the three, or contradicts `path`.
    """
    run, number = run_folder(path), step
    if (place := _step_folder(path)) is not None:
        number = str(int(place.name.removeprefix("step-")))
        if step not in ("newest", number):
            raise ConfigError(f"step={step} is another checkpoint than {path}; give {run}, or leave step out")
    folder = run / "checkpoints" if place is None else place.parent
    if number not in ("newest", "best") and not re.fullmatch(r"[0-9]{1,18}", number):
        raise ConfigError(f"step={step!r} is unknown; use newest, best or the number of a step")
    loaded = load_checkpoint(folder, step=int(number) if number.isdigit() else None, warn=warn)
    if loaded is None:
        raise CheckpointError(f"{run} has no checkpoint yet; train it first, or name another run")
    if number == "best" and loaded.state.best_step != loaded.state.step:
        if loaded.state.best_step is None:
            raise CheckpointError(
                f"{run} has no best checkpoint, it has not been evaluated yet; use step=newest"
            )
        loaded = load_checkpoint(folder, step=loaded.state.best_step, warn=warn)
        assert loaded is not None  # a step that is asked for is there, or an error
    weights = loaded.model | loaded.ema
    config = stored_config(run, loaded.state)
    return Run(folder=run, weights=weights, state=loaded.state, averaged=bool(loaded.ema), config=config)


def run_folder(path: Path) -> Path:
    """The directory of the run that `path` is, or is a checkpoint of."""
    place = _step_folder(path)
    return path if place is None else place.absolute().parent.parent


def _step_folder(path: Path) -> Path | None:
    """The folder of a checkpoint that `path`, or the weights at `path`, is; it may be gone."""
    folder = path.parent if path.name == MODEL else path
    is_ours = (folder / MANIFEST).is_file() or not folder.exists()
    return folder if is_ours and _NAME.fullmatch(folder.name) else None


def at_state(config: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """A configuration with the settings that a state of its run was trained with; CheckpointError where the
    state has none that can be read."""
    with reraise_as(
        CheckpointError, "the settings in the checkpoint can't be read", on=(ValueError, TypeError)
    ):
        settings = dict(parse_yaml(state.settings)) if state.settings else {}
    return config | {key: _over(config.get(key), value) for key, value in settings.items()}


def _over(written: Any, value: Any) -> Any:
    """A value, completed by what is written: of a group (data, engine) or a set of a mixture the state may
    have a part."""
    if not (isinstance(written, dict) and isinstance(value, dict)):
        return value
    tables = {
        key: {name: _over(written.get(key, {}).get(name), one) for name, one in table.items()}
        for key, table in value.items()
        if isinstance(table, dict) and all(isinstance(one, dict) for one in table.values())
    }
    return written | value | tables


def stored_config(run: Path, state: TrainState) -> dict[str, Any]:
    """The configuration that a state of a run was trained with; {} where nothing says it.

    Raises:
        CheckpointError: settings or config.yaml can't be read.
    """
    path = run / CONFIG
    again = {"do": "the command that began the run writes it again"} if state.settings else {}
    return at_state(read_config(path, **again) if path.exists() else {}, state)


def read_config(path: Path, do: str = "restore it from a copy") -> dict[str, Any]:
    """The plain data of a configuration that was written as YAML.

    Raises:
        CheckpointError: it is damaged, or has aliases, as ours never do.
    """
    what = f"{path} can't be read as a configuration"
    with reraise_as(CheckpointError, what, do, on=(OSError, ValueError)):
        content = parse_yaml(read_text(path, most=_MOST))
        if not isinstance(content, dict):
            raise ValueError("it is no table of settings")
    return content


def newest_state(folder: Path) -> TrainState | None:
    """The state of the newest checkpoint in `folder` that has a whole one; the tensors are not looked at."""
    for step in reversed(list_steps(folder)):
        with contextlib.suppress(CheckpointError):  # who loads the checkpoint says what is wrong with it
            path = folder / step_name(step)
            return decode_state(path, read_verified(path, STATE))
    return None


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
    """Load the newest good checkpoint in `folder`, or that of `step`; None without any.

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
