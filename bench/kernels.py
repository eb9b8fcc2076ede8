"""Each Triton kernel against what torch.compile makes of the reference operation, on a GPU.

The sizes are those of one network in training. A case of a `+ backward` kernel is forward and backward
together on both sides, because the loss kernel can't be taken apart. Results are compared first; a case
whose results differ, or that fails, is not timed: its row says why, and an error at the end names it. Every
side is captured as a graph of one call per set of inputs, with as many sets as no cache holds, and the two
take turns. Of a graph only the GPU's time counts, not that of the launches.

least_mb is what a kernel must move at least (kernel_cases.py). The time of a copy that moves as many bytes,
measured in the same run, is the roofline.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.kernel_cases import Case, Inputs, Results, cases, size_of
from bench.record import conditions, spread, table, write_csv
from segformer.errors import ConfigError, SegformerError
from segformer.models.variants import VARIANTS

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 2e-2  # relative distance of two results in bf16; of labels, the share that differs
ROTATE = 256 << 20  # bytes of inputs that no cache holds
COPY = 1 << 30  # bytes of the measured copy
SPREAD = ("median", "min", "max", "min/max")
NUMBERS = (
    *(f"ms_{kind}" for kind in SPREAD),
    *(f"compiled_ms_{kind}" for kind in SPREAD),
    *("times_faster", "times_faster_min", "peak_mib", "compiled_peak_mib"),
    *("least_mb", "gb_per_s", "copy_gb_per_s", "share_of_roofline"),
)


@dataclass(kw_only=True, slots=True)
class KernelsBench:
    """Which kernels are measured, and at which sizes."""

    variant: str = "b5"
    """The network whose sizes are taken."""
    size: int = 512
    """Side of the images, a multiple of 32."""
    batch: int = 8
    """Images in a batch of each case."""
    classes: int = 150
    """Classes, at most 255."""
    precision: str = "bf16"
    """bf16 or fp32, of activations; the logits of the loss are float32 in both."""
    rounds: int = 15
    """Turns of each side."""
    turn_ms: float = 20.0
    """Least length of a turn."""
    only: str = ""
    """Kernels whose name contains this; empty = all."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"kernels.variant={self.variant!r} is unknown; use {', '.join(VARIANTS)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"kernels.precision={self.precision!r} is unknown; use {', '.join(PRECISIONS)}")
        if min(self.batch, self.rounds) < 1 or not 1 <= self.classes <= 255 or self.turn_ms <= 0:
            raise ConfigError("kernels.batch, rounds and turn_ms must be above 0, classes 1 to 255")
        if self.size < 32 or self.size % 32:
            raise ConfigError(f"kernels.size={self.size} is not a multiple of 32")


def difference(left: Tensor, right: Tensor) -> float:
    """Relative distance of two results; of labels the share that differs, of counts of what is counted."""
    if left.dtype == torch.uint8:
        return (left != right).float().mean().item()
    left, right = left.double(), right.double()
    return ((left - right).norm() / right.norm().clamp(min=1e-30)).item()


def compare(case: Case, ours: Results, theirs: Results) -> None:
    """SegformerError where the results are not the same function's."""
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        found = difference(left, right)
        if not found <= TOLERANCE:
            raise SegformerError(
                f"{case.kernel} of {case.shape}: result {index} is {found:.2g} away from the reference"
            )


def row(cfg: KernelsBench, case: Case, copied: float) -> dict[str, Any]:
    """A case and what was measured of it, or a note why nothing was."""
    found = {"kernel": case.kernel, "shape": case.shape, "note": "", **dict.fromkeys(NUMBERS)}
    try:
        return found | numbers(cfg, case, copied)
    except Exception as error:  # Triton's are of no common kind
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or ["unknown"])[0][:200]
        return found | {"note": f"{type(error).__name__}: {reason}"}
    finally:
        torch.cuda.empty_cache()


def numbers(cfg: KernelsBench, case: Case, copied: float) -> dict[str, Any]:
    """Measure one case; `copied` is the bytes per second of a copy. SegformerError where results differ."""
    first = case.inputs()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=False)
    sides: list[Callable[[Inputs], Results]] = [case.ours, lambda given: case.plain(compiled, given)]
    results = [side(first) for side in sides]
    compare(case, *results)
    moved = case.least(first, results[0])
    count = max(1, -(-ROTATE // size_of(*first)))
    del results
    peaks = [peak(side, first) for side in sides]
    sets = [first, *(case.inputs() for _ in range(count - 1))]
    ours, theirs = take_turns(cfg, [capture(side, sets) for side in sides])
    found, other = spread([1e3 * value for value in ours]), spread([1e3 * value for value in theirs])
    ratio = spread([right / left for left, right in zip(ours, theirs, strict=True)])
    rate = moved / median(ours)
    return {
        **{f"ms_{name}": value for name, value in found.items()},
        **{f"compiled_ms_{name}": value for name, value in other.items()},
        "times_faster": ratio["median"],
        "times_faster_min": ratio["min"],
        "peak_mib": peaks[0],
        "compiled_peak_mib": peaks[1],
        "least_mb": round(moved / 1e6, 1),
        "gb_per_s": round(rate / 1e9),
        "copy_gb_per_s": round(copied / 1e9),
        "share_of_roofline": round(rate / copied, 3),
    }


def peak(side: Callable[[Inputs], Results], given: Inputs) -> float:
    """MiB that a call takes beyond its inputs, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side(given)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def capture(side: Callable[[Inputs], Results], sets: Sequence[Inputs]) -> Callable[[], int]:
    """A function that makes one call for every set of inputs and returns how many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            side(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in sets:
            side(given)

    def replay() -> int:
        graph.replay()
        return len(sets)

    return replay


def take_turns(cfg: KernelsBench, sides: Sequence[Callable[[], int]]) -> list[list[float]]:
    """Seconds of a call of every side, round by round; the first of a round changes."""
    repeats = [max(1, round(cfg.turn_ms * 1e-3 / (seconds(side, 1) * side()))) for side in sides]
    taken: list[list[float]] = [[] for _ in sides]
    for turn in range(cfg.rounds):
        for index in range(len(sides)):
            index = (index + turn) % len(sides)
            taken[index].append(seconds(sides[index], repeats[index]))
    return taken


def seconds(side: Callable[[], int], repeats: int) -> float:
    """GPU seconds of one call, over `repeats` replays after one that is not timed."""
    side()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    calls = sum(side() for _ in range(repeats))
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def copy_bandwidth(cfg: KernelsBench) -> float:
    """Bytes per second, read and written, of a copy within the GPU."""
    source = torch.randint(0, 255, (COPY,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> int:
        target.copy_(source)
        return 1

    return 2 * COPY / median(seconds(copy, 5) for _ in range(cfg.rounds))


def measure(cfg: KernelsBench, out: Path) -> list[dict[str, Any]]:
    """Measure every case and write kernels.csv into `out` case by case; ConfigError without a GPU.

    Raises SegformerError at the end, all rows written, where a case has a note.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench=kernels needs an NVIDIA GPU, and torch sees none here; run it on one")
    copied = copy_bandwidth(cfg)
    found = conditions(("numpy", "torch", "triton"))
    found["hardware"] = f"{torch.cuda.get_device_name()}, {found['hardware']}"
    rows: list[dict[str, Any]] = []
    sizes = (VARIANTS[cfg.variant], cfg.batch, cfg.size, cfg.classes, PRECISIONS[cfg.precision])
    for case in cases(*sizes, torch.device("cuda")):
        if cfg.only in case.kernel:
            torch.compiler.reset()
            rows.append(row(cfg, case, copied))
            print(table(rows[-1:]), flush=True)
            write_csv(out / "kernels.csv", rows, found)
    if not rows:
        raise ConfigError(f"kernels.only={cfg.only!r} is in the name of no kernel")
    print(table(rows))
    if wrong := [f"{one['kernel']} of {one['shape']}: {one['note']}" for one in rows if one["note"]]:
        raise SegformerError("all others were measured, but " + "; ".join(wrong))
    return rows
