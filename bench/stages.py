"""What each ZeRO stage costs and saves: time of a step and peak memory of a rank, with the real engine.

For every variant the stages take turns, round after round, and in every round another one begins. A turn is a
start of all ranks, each a process of its own (`python -m bench.stages '<Turn>'`), because memory that one
stage has taken would be there for the next. A rank builds model, AdamW and engine as a run does (run.py) and
takes steps on one batch: forward, loss, backward, the optimizer's step. Nothing is read from a disk.

    step     seconds of an optimizer step after `warmup` steps; of a turn, the median of the slowest rank's
    memory   of the rank with most, from before the model is built to the end of the last step:
             GPU: the peak of torch's allocator
             CPU: the peak of anonymous resident memory above that before: the kernel's high-water mark
             (Linux) less what the files that libraries map have grown by. It holds what the allocator keeps
             without need, because a user's process holds it too
    ideal    parameters, gradients and AdamW's two moments in fp32, with what the stage shares out divided by
             the ranks (Rajbhandari et al. 2020, section 5): no activations, buckets or copies

Ranks: all GPUs, one each, or two on a CPU with half the cores each.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.footprint import MARKS, STATUS
from bench.processes import on_ranks
from bench.record import conditions, spread, table, write_csv
from segformer.data.loading.order import BatchShape
from segformer.distributed.engine import (
    EngineConfig,
    build_engine,
    resolve_precision,
    take_step,
)
from segformer.distributed.world import World, init_world, limit_threads
from segformer.errors import ConfigError
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.training.losses import LossConfig, SegmentationLoss
from segformer.training.optim import OptimConfig, build_optimizer
from segformer.training.run import prepare_model

STAGES = {
    "0": EngineConfig(zero_stage=0, compile=False),
    "1": EngineConfig(zero_stage=1, compile=False),
    "2": EngineConfig(zero_stage=2, compile=False),
    "3": EngineConfig(zero_stage=3, compile=False),
    "3+offload": EngineConfig(zero_stage=3, compile=False, offload_optimizer=True, offload_parameters=True),
}
AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2}  # of the stages' losses, relative


@dataclass(kw_only=True, slots=True)
class StagesBench:
    """Which stages and networks are measured, and for how long."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))
    "0, 1, 2, 3 and 3+offload (optimizer and parameters)."
    variants: list[str] = field(default_factory=lambda: ["b0", "b5"])
    "Sizes of the network."
    ranks: int = 0
    "Processes; 0 = one for every GPU, or two on a CPU."
    crop: int = 0
    "Side of the images, pixels; 0 = 512 on GPUs, 64 on a CPU."
    micro_batch: int = 2
    "Images of a rank and step."
    classes: int = 150
    "Classes that the network predicts."
    warmup: int = 2
    "Steps of a turn that aren't timed; memory counts them, too."
    steps: int = 5
    "Timed steps of a turn."
    rounds: int = 3
    "Turns of each stage."

    def __post_init__(self) -> None:
        for name, known in (("stages", STAGES), ("variants", VARIANTS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ConfigError(f"stages.{name} has {', '.join(unknown)}; use {', '.join(known)}")
            if not getattr(self, name):
                raise ConfigError(f"stages.{name} is empty; use some of {', '.join(known)}")
        if min(self.micro_batch, self.classes, self.warmup, self.steps, self.rounds) < 1:
            raise ConfigError("stages.micro_batch, classes, warmup, steps and rounds must be 1 or more")
        if self.ranks < 0 or 0 < self.crop < 32:
            raise ConfigError("stages.ranks must be 0 or more, stages.crop 0 or 32 and more")


@dataclass(frozen=True, slots=True)
class Turn:
    """What the ranks of a turn run."""

    stage: str
    variant: str
    crop: int
    micro_batch: int
    classes: int
    warmup: int
    steps: int


def measure(cfg: StagesBench, out: Path) -> list[dict[str, Any]]:
    """Measure every stage of every variant; write stages.csv (stages-cuda.csv) into `out` by variant."""
    gpus = torch.cuda.device_count()
    ranks, crop = cfg.ranks or gpus or 2, cfg.crop or (512 if gpus else 64)
    if gpus and ranks > gpus:
        raise ConfigError(f"stages.ranks={ranks}, but there are {gpus} GPUs; a rank needs one of its own")
    found = conditions(("torch", "deepspeed"))
    if gpus:
        found["hardware"] = f"{gpus} x {torch.cuda.get_device_name()}, {found['hardware']}"
    rows: list[dict[str, Any]] = []
    for variant in cfg.variants:
        turns: dict[str, list[list[dict[str, float]]]] = {stage: [] for stage in cfg.stages}
        for index in range(cfg.rounds):
            first = index % len(cfg.stages)
            for stage in [*cfg.stages[first:], *cfg.stages[:first]]:
                shape = (crop, cfg.micro_batch, cfg.classes, cfg.warmup, cfg.steps)
                turns[stage].append(on_ranks("bench.stages", asdict(Turn(stage, variant, *shape)), ranks))
        here = [_row(cfg, variant, stage, ranks, crop, turns) for stage in cfg.stages]
        check_losses(variant, {row["stage"]: row["loss"] for row in here}, here[0]["precision"])
        rows += here
        write_csv(out / ("stages-cuda.csv" if gpus else "stages.csv"), rows, found)
    print(table(rows))
    return rows


def check_losses(variant: str, losses: dict[str, float], precision: str) -> None:
    """RuntimeError where the stages' last losses, which are of the same steps, are not the same number."""
    (first, wanted), *others = losses.items()
    for stage, loss in others:
        if not abs(loss - wanted) <= AGREEMENT[precision] * abs(wanted):
            raise RuntimeError(f"{variant}: stage {stage} has a loss of {loss}, stage {first} of {wanted:g}")


def run_rank(turn: Turn) -> dict[str, float]:
    """Take the steps of a turn on this rank; all ranks."""
    world = init_world()
    limit_threads(world)
    import deepspeed  # noqa: F401  what it takes is the same for every stage

    memory = Memory(world)
    engine, loss = _set_up(turn, world)
    images = torch.randn(turn.micro_batch, 3, turn.crop, turn.crop, device=world.device)
    target = torch.randint(turn.classes, (turn.micro_batch, turn.crop, turn.crop), device=world.device)
    seconds = []
    for _ in range(turn.warmup + turn.steps):
        _wait(world)
        begun = time.monotonic()
        engine.train()
        value, _ = loss(engine(images), target)
        engine.backward(value)
        _, taken = take_step(engine, 0.0)
        _wait(world)
        seconds.append(time.monotonic() - begun)
        if not taken:
            raise RuntimeError(f"{turn}: a step was not taken")
    found = {"step_s": median(seconds[turn.warmup :]), "peak_mib": memory.peak_mib(), "loss": float(value)}
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    world.close()
    return found


def _set_up(turn: Turn, world: World) -> tuple[Any, torch.nn.Module]:
    torch.manual_seed(0)
    cfg = STAGES[turn.stage]
    model = build_model(ModelConfig(variant=turn.variant), turn.classes)
    prepare_model(model, cfg, world)
    batch = BatchShape(turn.micro_batch * world.size, turn.micro_batch, world.size)
    engine = build_engine(model, build_optimizer(model, OptimConfig(lr=1e-4)), cfg, world, batch)
    return engine, SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), turn.classes).to(world.device)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


class Memory:
    """Peak memory of this rank since this object was made."""

    def __init__(self, world: World) -> None:
        self._cuda = world.device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            MARKS.write_text("5")  # the high-water mark starts anew
            self._before = _kib("VmRSS") - _kib("RssFile")

    def peak_mib(self) -> float:
        """MiB; see the module's docstring."""
        if self._cuda:
            return (torch.cuda.max_memory_allocated() - self._before) / 2**20
        return (_kib("VmHWM") - _kib("RssFile") - self._before) / 1024


def _kib(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def ideal_mib(stage: int, parameters: float, ranks: int) -> float:
    """MiB of fp32 parameters, gradients and two moments on a rank."""
    shared = [stage >= 3, stage >= 2, stage >= 1, stage >= 1]
    return sum(4 * parameters / (ranks if split else 1) for split in shared) / 2**20


def _row(
    cfg: StagesBench,
    variant: str,
    stage: str,
    ranks: int,
    crop: int,
    turns: dict[str, list[list[dict[str, float]]]],
) -> dict[str, Any]:
    """One line of the table; times_first: step over that of the first stage in the same round."""
    seconds = {
        name: [max(rank["step_s"] for rank in turn) for turn in found] for name, found in turns.items()
    }
    peaks = [max(rank["peak_mib"] for rank in turn) for turn in turns[stage]]
    relative = [a / b for a, b in zip(seconds[stage], seconds[cfg.stages[0]], strict=True)]
    parameters = turns[stage][0][0]["parameters"]
    row: dict[str, Any] = {"variant": variant, "stage": stage, "ranks": ranks}
    row |= {"crop": f"{crop}x{crop}", "micro_batch": cfg.micro_batch}
    row["precision"] = resolve_precision(
        STAGES[stage], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    row["m_parameters"] = round(parameters / 1e6, 2)
    step = spread([1e3 * value for value in seconds[stage]])
    row |= {f"step_ms_{name}": step[name] for name in ("median", "min", "max")}
    times = spread(relative, 3)
    row |= {f"times_first_{name}": times[name] for name in ("median", "min", "max")}
    peak = spread(peaks)
    row |= {f"peak_mib_{name}": peak[name] for name in ("median", "min", "max")}
    row["ideal_mib"] = round(ideal_mib(STAGES[stage].zero_stage or 0, parameters, ranks), 1)
    row["loss"] = float(f"{turns[stage][0][0]['loss']:.6g}")
    return row


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python launch/bench.py bench=stages")
    print(json.dumps(run_rank(Turn(**json.loads(sys.argv[1])))))
