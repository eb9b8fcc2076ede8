"""A look inside a few steps: where the time of the host and of the device goes.

`profile.steps=[10,13]` profiles optimiser steps 10 to 13, counted from 1 as in the log, and writes

    profile/trace-rank<r>.json.gz   every operation and kernel in time, for ui.perfetto.dev
    profile/table.txt               the slowest operations by the shapes of their inputs, of the first rank

Steps before the first should have compiled what is compiled and filled the allocator: 10 is early enough. A
profiled step is slower than others, and after the last one the rank writes its files, some seconds in which
the others wait. A disk that is full costs the files and not the run.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from segformer.distributed.world import World
from segformer.errors import ConfigError

BETWEEN = "(between operations)"  # the annotation of a whole step: its own time is no operation's
ROWS = 40
SHAPES = 90  # characters


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Profiling of a run."""

    steps: list[int] = field(default_factory=list)
    "First and last optimiser step to profile, as [10,13], counted from 1; empty profiles none."
    ranks: list[int] = field(default_factory=lambda: [0])
    "Ranks that write a trace."
    memory: bool = False
    "Also record allocations: larger traces, slower steps."

    def __post_init__(self) -> None:
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ConfigError(
                f"profile.steps={self.steps} must be the first and the last step, as [10,13], or []"
            )
        if not self.ranks or min(self.ranks) < 0:
            raise ConfigError(f"profile.ranks={self.ranks} must be ranks from 0 on, as [0]")


class Profiler:
    """Profiles the steps that its configuration names, on the ranks that it names."""

    def __init__(
        self, cfg: ProfileConfig, run_dir: Path, world: World, line: Callable[[str], None] = print
    ) -> None:
        """`line` prints what has to be said; it is called on the first of the ranks."""
        self._cfg = cfg
        self._folder = run_dir / "profile"
        self._world = world
        self._line = line if world.rank == min(cfg.ranks) else _silent
        self._wanted = world.rank in cfg.ranks
        self._profile: Any = None
        self._last = 0

    def covers(self, step: int) -> bool:
        """Whether a rank profiles optimiser step `step`, so that its time says nothing; all ranks."""
        return bool(self._cfg.steps) and self._cfg.steps[0] <= step <= self._cfg.steps[1]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the optimiser step number `step`, from 1; profiles it where it is one of profile.steps."""
        if not self._wanted or not self.covers(step):
            yield
            return
        if self._profile is None:
            self._start(step)
        self._last = step
        try:
            with torch.profiler.record_function(BETWEEN):
                yield
        except BaseException:
            self._stop()
            raise
        if step == self._cfg.steps[1]:
            self.close()

    def close(self) -> None:
        """Write what has been profiled so far, where the run ends before the last step to profile."""
        if self._profile is None:
            return
        profile = self._stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace = self._folder / f"trace-rank{self._world.rank}.json.gz"
            _write_trace(profile, trace)
            self._line(f"profile of steps {self._first} to {self._last}: {trace} (for ui.perfetto.dev)")
            if self._world.rank == min(self._cfg.ranks):
                table = self._folder / "table.txt"
                table.write_text(self._table(profile))
                self._line(f"the slowest operations: {table}")
        except OSError as error:
            self._line(f"the profile can't be written to {self._folder}: {error.strerror or error}")

    def _start(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its lines about itself would go through the bar
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=self._cfg.memory
        )
        self._first = step
        self._line(f"profiling from step {step} to {self._cfg.steps[1]}: these steps are slower")
        self._profile.__enter__()

    def _stop(self) -> Any:
        profile, self._profile, self._wanted = self._profile, None, False
        profile.__exit__(None, None, None)
        return profile

    def _table(self, profile: Any) -> str:
        steps = self._last - self._first + 1
        where = self._world.device
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
        head = (
            f"steps {self._first} to {self._last} of rank {self._world.rank}, {name}; ms and calls a step\n\n"
        )
        return head + slowest(profile.key_averages(group_by_input_shape=True), steps, where.type == "cuda")


def _silent(text: str) -> None:
    pass


def _write_trace(profile: Any, path: Path) -> None:
    """The trace, compressed, whole or not at all."""
    with TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        plain, packed = Path(folder) / "trace.json", Path(folder) / path.name
        profile.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as out:
            shutil.copyfileobj(source, out, 2**20)
        packed.replace(path)


def slowest(events: Any, steps: int, on_gpu: bool, rows: int = ROWS) -> str:
    """A table of the operations with the largest own time (on the device where there is one).

    Own time is that of an operation without those that it calls, so that the columns add up. On a GPU it is
    that of the kernels which the operation has started; the kernels themselves are in the trace.
    """
    entries = [entry for entry in events if entry.device_type == torch.autograd.DeviceType.CPU]

    def own(entry: Any) -> float:
        return float(entry.self_device_time_total if on_gpu else entry.self_cpu_time_total)

    entries.sort(key=own, reverse=True)
    total = sum(map(own, entries)) or 1.0
    header = ["operation", "GPU ms" if on_gpu else "CPU ms", "share", "calls", "ms a call", "input shapes"]
    if on_gpu:
        header.insert(2, "CPU ms")
    lines = [header]
    for entry in entries[:rows]:
        row = [
            str(entry.key)[:60],
            f"{own(entry) / 1e3 / steps:.3f}",
            f"{own(entry) / total:.1%}",
            f"{entry.count / steps:g}",
            f"{own(entry) / 1e3 / max(1, entry.count):.4f}",
            _shapes(entry.input_shapes),
        ]
        if on_gpu:
            row.insert(2, f"{entry.self_cpu_time_total / 1e3 / steps:.3f}")
        lines.append(row)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
        for row in lines
    ]
    rest = sum(map(own, entries[rows:])) / total
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], f"{len(entries[rows:])} more: {rest:.1%}\n"])


def _shapes(shapes: Any) -> str:
    """[[2, 3, 64, 64], [32, 3, 7, 7], []] as 2x3x64x64, 32x3x7x7."""
    text = ", ".join("x".join(map(str, shape)) for shape in shapes or () if shape)
    return text if len(text) <= SHAPES else text[: SHAPES - 3] + "..."
