"""How the scores of a run came about: data, weights, protocol, machine and code, as rows of text.

From the configuration, the checkpoint's state, the shards where they can be opened, and metrics.jsonl. What
an older version did not write down is left out.
"""

from pathlib import Path
from typing import Any

import numpy as np

from segformer.checkpoint.format import TrainState
from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet
from segformer.evaluation.evaluate import mode_of, protocol_of
from segformer.evaluation.metrics import SCORES
from segformer.inference.pictures import series
from segformer.telemetry.jsonl import newest_row, read_metrics
from segformer.telemetry.progress import duration
from segformer.training.config import RunConfig


def provenance(
    run: Path,
    cfg: RunConfig,
    state: TrainState,
    rows: list[dict[str, Any]],
    shards: ShardSet | Mixture | None,
) -> list[tuple[str, str]]:
    """(what, text) of a run whose history (pictures.history) is `rows`."""
    average = f"average over the steps, EMA of decay {cfg.optim.ema:g}"
    view = cfg.classification if cfg.data.task == "classification" else None
    mode = mode_of(shards.split(cfg.eval_split)) if isinstance(shards, ShardSet) else None
    digest = state.data_digest or (shards.digest if shards else "unknown")
    found = [
        ("data", f"{data_of(cfg)}, digest {', '.join(one[:12] for one in digest.split())}"),
        ("trained on", _split(cfg.train_split, shards)),
        ("scored on", f"{_split(cfg.eval_split, shards)}; {_own_size(protocol_of(view, mode))}"),
        ("began from", cfg.model.pretrained or "random weights"),
        ("weights", average if cfg.optim.ema else "of the last step, not averaged"),
        ("scores", _best_and_last(cfg, rows)),
        ("training", _time(run, rows)),
        ("ended", _ending(run)),
    ]
    if start := newest_row(run, "start"):
        packages = [name for name in ("segformer", "torch", "deepspeed") if start.get(name)]
        versions = ", ".join(f"{name} {start[name]}" for name in packages)
        found += [
            ("machine", f"{start['devices']}; {versions}, Python {start['python']}"),
            ("code", f"commit {start['commit']}" if start.get("commit") else "not a checkout of git"),
            ("command", start["command"]),
        ]
    return [(what, text) for what, text in found if text]


def data_of(cfg: RunConfig) -> str:
    """The shards of a run, those of every set of a mixture."""
    return cfg.data.shards or ", ".join(f"{name} {one.shards}" for name, one in cfg.mixture.sets.items())


def _split(name: str, shards: ShardSet | Mixture | None) -> str:
    return f"split {name}" if shards is None else f"split {name}, {shards.split(name).extent}"


def _own_size(protocol: str) -> str:
    return f"{protocol}, each at its own size" if protocol == "whole images" else protocol


def _best_and_last(cfg: RunConfig, rows: list[dict[str, Any]]) -> str:
    key, name = next(iter(SCORES[cfg.data.task].NAMES.items()))
    steps, values = series(rows, ("eval", "final"), key)
    if not len(steps):
        return ""
    places = (("best", int(values.argmax())), ("last", -1))
    return ", ".join(f"{word} {name} {100 * values[k]:.2f} at step {steps[k]}" for word, k in places)


def _time(run: Path, rows: list[dict[str, Any]]) -> str:
    """Steps, the time that they took, first and last day, number of starts."""
    steps, seconds = series(rows, ("train",), "step_s")
    parts = []
    if len(steps):
        spent = float(seconds @ np.diff(steps, prepend=0))
        parts.append(f"{duration(spent)} in {steps[-1]:,} steps")
    starts = [row["time"] for row in read_metrics(run, "start")]
    if starts:
        ends = [row["time"] for row in read_metrics(run, "end")]
        first, last = (_minute(time) for time in (min(starts), max([*starts, *ends])))
        parts.append(f"{first} to {last} UTC" if first != last else f"{first} UTC")
        parts.append(f"{len(starts)} starts" if len(starts) > 1 else "1 start")
    return ", ".join(parts)


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _ending(run: Path) -> str:
    row = newest_row(run, "start", "end")
    if row is None:
        return ""
    return str(row["reason"]) if row["kind"] == "end" else "runs still, or was killed"
