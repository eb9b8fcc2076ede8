"""Profile of a few optimizer steps: the time of every operation on the host and the device.

`profile.steps=[10,13]` records optimizer steps 10 to 13, counted from 1 as in the log, and writes

    profile/trace-rank<r>.json.gz   every operation and kernel in time, for ui.perfetto.dev
    profile/table.txt               the slowest operations by the shapes of their inputs, of the first rank

Steps before the first should have compiled what is compiled and filled the allocator: 10 is early enough. A
profiled step is slower than others, and after the last one the rank writes its files, some seconds in which
the others wait. A disk that is full costs the files and not the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from segformer.distributed.world import World
from segformer.errors import ConfigError, reason_of, reported
from segformer.files import remove, write_atomic

STEP = "optimizer step"  # the annotation of a whole step in trace and table
ROWS, SHAPES = 40, 90  # of the table: operations, characters of a column


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Profiling of a run."""

    steps: list[int] = field(default_factory=list)
    "First and last optimizer step to profile, as [10,13], counted from 1; empty profiles none."
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
    """Records the steps that its configuration names, once, on the ranks that it names."""

    def __init__(
        self, cfg: ProfileConfig, run_dir: Path, world: World, line: Callable[[str], None] = print
    ) -> None:
        """`line` logs a line; called on the first of the ranks."""
        self._cfg, self._world, self._line = cfg, world, line
        self._folder = run_dir / "profile"
        self._wanted = world.rank in cfg.ranks
        self._first = world.rank == min(cfg.ranks)
        self._profile: Any = None
        self._steps: list[int] = []

    def covers(self, step: int) -> bool:
        """True where a rank profiles optimizer step `step`, whose time means nothing then; all ranks."""
        return bool(self._cfg.steps) and self._cfg.steps[0] <= step <= self._cfg.steps[1]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the optimizer step number `step`, from 1; records it where it is one of profile.steps."""
        if not self._wanted or not self.covers(step):
            yield
            return
        if self._profile is None:
            self._start(step)
        self._steps.append(step)
        with torch.profiler.record_function(STEP):
            yield
        if step == self._cfg.steps[1]:
            self.close()

    def _start(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its lines about itself would go through the bar
        self._profile = torch.profiler.profile(record_shapes=True, profile_memory=self._cfg.memory)
        if self._first:
            self._line(f"profiling from step {step} to {self._cfg.steps[1]}: these steps are slower")
        self._profile.start()

    def close(self) -> None:
        """Write what has been recorded; also where the run ends before the last of the steps."""
        if self._profile is None:
            return
        profile, self._profile, self._wanted = self._profile, None, False
        profile.stop()
        trace, table = self._folder / f"trace-rank{self._world.rank}.json.gz", self._folder / "table.txt"
        steps = f"steps {self._steps[0]} to {self._steps[-1]}"

        def failed(error: OSError) -> None:
            remove(trace)
            self._line(f"the profile can't be written to {self._folder}: {reason_of(error)}")

        with reported(failed, on=OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(trace))
            if self._first:
                self._line(f"profile of {steps}: {trace} (for ui.perfetto.dev)")
                write_atomic(table, f"{steps} of rank {self._world.rank}\n{self._table(profile)}")
                self._line(f"the slowest operations: {table}")

    def _table(self, profile: Any) -> str:
        where = "device" if self._world.device.type == "cuda" else "cpu"
        averages = profile.key_averages(group_by_input_shape=True)
        table = averages.table(
            sort_by=f"self_{where}_time_total", row_limit=ROWS, max_shapes_column_width=SHAPES
        )
        return str(table)
