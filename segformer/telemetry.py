"""What a person sees of a run: progress bar or log lines, metrics.jsonl, log.txt, wandb.

Rank zero alone writes; on other ranks every method returns at once.

    metrics.jsonl   one JSON object a line, "kind" first:
                    {"kind": "train", "step", "loss", <loss parts>, "lr", "lr_head", "grad_norm",
                     "images_per_s", "step_s", "data_wait", "memory_gib"}
                    {"kind": "eval" | "final", "step", "miou", "macc", "aacc", "iou", "acc", "confusion"}
    log.txt         the lines that were printed, with the time of day

`data_wait` is the share of the time that the loop waited for a batch. `memory_gib` is the peak of the
device's allocator, or the resident set on a CPU. Unknown values are null, never guesses. Non-finite numbers
are written as strings, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segformer.dist import World
from segformer.errors import ConfigError

WANDB_MODES = ("disabled", "offline", "online")


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """Logging of a run."""

    log_every: int = 10
    "Optimiser steps between two log lines and metrics.jsonl entries."
    progress: bool | None = None
    "Progress bar; null shows it when standard error is a terminal, and prints lines otherwise."
    wandb: str = "disabled"
    "disabled, offline (files in the run directory, for `wandb sync` later) or online (needs WANDB_API_KEY)."
    wandb_project: str = "segformer"
    "wandb project."
    wandb_entity: str | None = None
    "wandb user or team; null takes the account's default."

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ConfigError(
                f"telemetry.wandb={self.wandb!r} is unknown; use one of {', '.join(WANDB_MODES)}"
            )
        if self.log_every < 1:
            raise ConfigError(f"telemetry.log_every={self.log_every} must be 1 or more")

    def check_account(self) -> None:
        """ConfigError where wandb is to be online and nobody has logged in."""
        if self.wandb == "online" and not (
            "WANDB_API_KEY" in os.environ or (Path.home() / ".netrc").exists()
        ):
            raise ConfigError(
                "telemetry.wandb=online needs an account; run `wandb login`, set WANDB_API_KEY or use offline"
            )


class Meter:
    """Wall time, waiting time and images between two log lines, by a clock that nobody sets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start = time.monotonic()
        self.waited = 0.0
        self.images = 0
        self.steps = 0

    def add(self, images: int, waited: float) -> None:
        """Count an optimiser step of `images` images over all ranks that waited `waited` seconds for data."""
        self.images += images
        self.waited += waited
        self.steps += 1

    def rates(self) -> dict[str, float | None]:
        """images_per_s, step_s (mean) and data_wait (share of the time) since the last reset."""
        elapsed = time.monotonic() - self.start
        return {
            "images_per_s": self.images / elapsed,
            "step_s": elapsed / max(1, self.steps),
            "data_wait": self.waited / elapsed,
        }


def memory_gib(device: torch.device) -> float | None:
    """Peak memory of the device's allocator, or the process's resident set on a CPU; GiB."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**30)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return float(pages * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value


def duration(seconds: float) -> str:
    """Seconds as 47s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Telemetry:
    """The run's log; a context manager, so that bar, files and wandb are closed also when training fails."""

    def __init__(
        self,
        cfg: TelemetryConfig,
        run_dir: Path,
        world: World,
        *,
        name: str,
        steps: int,
        config: dict[str, Any],
    ):
        self.world = world
        self.steps = steps
        self._bar: Any = None
        self._wandb: Any = None
        world.on_main(lambda: self._open(cfg, run_dir, name, config))

    def _open(self, cfg: TelemetryConfig, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._log = (run_dir / "log.txt").open("a", buffering=1)
        self._show_bar = sys.stderr.isatty() if cfg.progress is None else cfg.progress
        if cfg.wandb != "disabled":
            self._wandb = _start_wandb(cfg, run_dir, name, config)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def line(self, text: str) -> None:
        """Print a line (above the bar) and keep it in log.txt; rank zero."""
        if not self.world.is_main:
            return
        self._log.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def start(self, step: int) -> None:
        """Begin to show progress from `step`; rank zero."""
        if self.world.is_main and self._show_bar and step < self.steps:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )

    def advance(self) -> None:
        """One optimiser step is done; rank zero."""
        if self._bar is not None:
            self._bar.update(1)

    def train(self, step: int, values: dict[str, float | None]) -> None:
        """Record a training interval that ended with `step` steps done; rank zero."""
        if not self.world.is_main:
            return
        self._record("train", step, values)
        shown = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
        if (norm := values.get("grad_norm")) is not None:
            shown.append(f"grad {norm:.2f}")
        shown += [f"{values['images_per_s']:.1f} img/s", f"data wait {values['data_wait']:.0%}"]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown))
            self._log.write(f"{time.strftime('%H:%M:%S')} step {step} {'  '.join(shown)}\n")
        else:
            eta = duration((self.steps - step) * (values["step_s"] or 0.0))
            self.line(f"step {step}/{self.steps}  {'  '.join(shown)}  eta {eta}")

    def scores(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record an evaluation ("eval") or the last one ("final"); rank zero."""
        if self.world.is_main:
            self._record(kind, step, values)

    def replaced(self, step: int, sample_id: int, reason: str) -> None:
        """Say that a corrupt sample was replaced, and why; rank zero."""
        if self.world.is_main:
            self.line(f"replaced by its neighbour: {reason}")
            self._record("replaced", step, {"sample_id": sample_id, "reason": reason})

    def _record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        entry = {"kind": kind, "step": step, **{name: _jsonable(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(entry) + "\n")
        if self._wandb is not None:
            scalars = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, int | float)}
            self._wandb.log(scalars, step=step)

    def stop_bar(self) -> None:
        """Take the bar away, so that what follows is printed plainly."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Close bar, files and wandb."""
        if not self.world.is_main:
            return
        self.stop_bar()
        self._metrics.close()
        self._log.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _start_wandb(cfg: TelemetryConfig, run_dir: Path, name: str, config: dict[str, Any]) -> Any:
    """A wandb run whose id is kept in the run directory, so that a restart continues it.

    Code, git state and machine environment are not uploaded, and settings that look like secrets are left
    out.
    """
    import wandb

    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        mode=cfg.wandb,  # type: ignore[arg-type]
        project=cfg.wandb_project,
        entity=cfg.wandb_entity,
        name=name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(run_dir),
        config=config,
        settings=wandb.Settings(
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_machine_info=True,
            console="off",
            silent=True,
        ),
    )
