"""Our launch/train.py beside what a user would take instead, a script around transformers.Trainer
(huggingface.py): how long training takes, and what it reaches.

Both train experiment=sample from scratch with the same recipe: data, steps, global batch, crop, strength of
the augmentation, AdamW and its groups, schedule, initialization but for one bias (mit.py), drop-out rate,
fp32. What differs is what a user gets with either: reading and augmentation, the network's operations, the
loop. Weights and order of the samples are drawn anew by each, so that scores are compared over several seeds.
Our loss is averaged over the labelled pixels (loss.average=valid), as transformers' is.

A few steps decide first how the Trainer is started: one process with all cores, as by default, or torchrun
with several. Then for every seed both commands run one after the other; the next seed begins with the other.
Afterwards the two models are scored alike: the validation images whole, `SegmentationMetric`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.record import ROOT, conditions, table, write_csv
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.sharding import write_shards
from segformer.distributed.rendezvous import free_port
from segformer.errors import ConfigError
from segformer.evaluation.metrics import SegmentationMetric
from segformer.models.segformer import SegFormer
from segformer.training.config import RunConfig, compose

if TYPE_CHECKING:
    from bench.huggingface import Request

SIDES = ("ours", "theirs")
PACKAGES = ("torch", "numpy", "transformers", "accelerate", "deepspeed", "pillow", "opencv-python-headless")
LOG_EVERY = 10  # steps between two log lines, on both sides


@dataclass(kw_only=True, slots=True)
class TrainersBench:
    """How long both train, and how they are started."""

    steps: int = 300
    "Optimizer steps of each run."
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    "One run of each side for each."
    ranks: int = 2
    "Processes of ours, as `make train` has them on two cores; 1 = plain python with all cores."
    ways: list[str] = field(default_factory=lambda: ["1+0", "1+2", "2+0"])
    """How the Trainer may be started: processes + dataloader_num_workers of each. Of several the one is taken
    that is fastest over `trial` steps."""
    trial: int = 20
    "Steps of each way before the first run."
    overrides: list[str] = field(default_factory=list)
    "Further settings of the run, for both sides: augment.crop=[64,64]."

    def __post_init__(self) -> None:
        if min(self.steps, self.ranks, len(self.seeds), len(self.ways)) < 1 or self.trial < LOG_EVERY:
            raise ConfigError(
                "trainers.steps, ranks and the number of seeds and ways must be 1 or more, trial "
                f"{LOG_EVERY} or more"
            )
        for way in self.ways:
            if not re.fullmatch(r"[1-9]\d*\+\d+", way):
                raise ConfigError(f"trainers.ways has {way!r}; write processes+workers: 1+2")


@dataclass(frozen=True, slots=True)
class Result:
    """What one command gave."""

    train_s: float
    "Seconds of the training loop: no start, no evaluation, nothing that is written."
    command_s: float
    "Seconds of the whole command; ours also evaluates, writes a checkpoint, an export and a report."
    first_loss: float
    "Mean of the first LOG_EVERY steps."
    loss: float
    "Mean of the LOG_EVERY steps before the last log line."
    miou: float


def measure(cfg: TrainersBench, root: str, out: Path) -> list[dict[str, Any]]:
    """Train and score both sides for every seed; write trainers.csv into `out` after each of them."""
    folder = Path(root) if root else ROOT / "data_prep/sample"
    found = conditions(PACKAGES)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shards = scratch / "shards"
        write_shards(settings(cfg, 0, scratch).data, folder, shards, seed=0, samples_per_shard=256, workers=1)
        way = fastest(cfg, folder, scratch)
        for index, seed in enumerate(cfg.seeds):
            run = settings(cfg, seed, scratch)
            order = SIDES if index % 2 == 0 else SIDES[::-1]
            results = {
                side: ours(cfg, run, folder) if side == "ours" else theirs(run, folder, way) for side in order
            }
            start = {
                "seed": seed,
                "first": order[0],
                "steps": cfg.steps,
                "ranks": cfg.ranks,
                "their_way": way,
            }
            rows.append(start | _columns(results["ours"], results["theirs"]))
            print(table(rows[-1:]), flush=True)
            write_csv(out / "trainers.csv", [*rows, *_summary(rows)], found)
    rows += _summary(rows)
    print(table(rows))
    return rows


def settings(cfg: TrainersBench, seed: int, scratch: Path) -> RunConfig:
    """The run of both sides for one seed."""
    return compose(RunConfig, "config", _overrides(cfg, seed, scratch))


def _overrides(cfg: TrainersBench, seed: int, scratch: Path) -> list[str]:
    return [
        *("experiment=sample", f"name=seed-{seed}", f"run_dir={scratch}/ours-{seed}", f"seed={seed}"),
        *(f"data.shards={scratch}/shards", f"steps={cfg.steps}", "engine.precision=fp32"),
        *(
            "loss.average=valid",
            "overlays=0",
            f"eval_every={cfg.steps}",
            f"checkpoint.save_every={cfg.steps}",
        ),
        *(f"telemetry.log_every={LOG_EVERY}", "telemetry.progress=false"),
        *cfg.overrides,
    ]


def ours(cfg: TrainersBench, run: RunConfig, folder: Path) -> Result:
    """Run launch/train.py and score its export."""
    scratch = Path(run.run_dir).parent
    launch = [sys.executable]
    if cfg.ranks > 1:
        port = str(free_port())
        launch = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning"]
        launch += ["--num_accelerators", str(cfg.ranks), "--master_port", port]
    seconds = _timed([*launch, "launch/train.py", *_overrides(cfg, run.seed, scratch)])
    lines = [json.loads(line) for line in (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["kind"] == "train"]
    steps = np.diff([0, *(line["step"] for line in logged)])  # of each interval
    model = SegFormer.from_pretrained(Path(run.run_dir) / "export").eval()
    return Result(
        train_s=float(sum(line["step_s"] * count for line, count in zip(logged, steps, strict=True))),
        command_s=seconds,
        first_loss=logged[0]["loss"],
        loss=logged[-1]["loss"],
        miou=score(model, run, folder),
    )


def request(run: RunConfig, folder: Path, out: Path, *, workers: int) -> "Request":
    """The run as the other side is asked for it."""
    from bench.huggingface import Request  # transformers belongs to the development packages

    return Request(
        root=str(folder.resolve()),
        out=str(out),
        classes=len(run.data.classes),
        variant=run.model.variant,
        steps=run.steps,
        batch=run.global_batch,
        seed=run.seed,
        lr=run.optim.lr,
        head_lr_factor=run.optim.head_lr_factor,
        weight_decay=run.optim.weight_decay,
        warmup_steps=run.optim.warmup_steps,
        drop_path_rate=run.model.drop_path_rate,
        dropout=run.model.dropout,
        augment=asdict(run.augment),
        log_every=LOG_EVERY,
        workers=workers,
    )


def fastest(cfg: TrainersBench, folder: Path, scratch: Path) -> str:
    """The way to start the Trainer whose loop takes least time here."""
    if len(cfg.ways) == 1:
        return cfg.ways[0]
    seconds = {}
    for index, way in enumerate(cfg.ways):
        run = settings(replace(cfg, steps=cfg.trial), 0, scratch)
        _, found = _start_trainer(run, folder, scratch / f"trial-{index}", way)
        seconds[way] = found["train_s"]
        print(f"{cfg.trial} steps of the Trainer, {way}: {seconds[way]:.1f} s", flush=True)
    return min(seconds, key=lambda way: seconds[way])


def theirs(run: RunConfig, folder: Path, way: str) -> Result:
    """Run huggingface.py and score the model it saved."""
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    out = Path(run.run_dir).with_name(f"theirs-{run.seed}")
    seconds, found = _start_trainer(run, folder, out, way)
    model = SegformerForSemanticSegmentation.from_pretrained(out).eval()
    return Result(
        train_s=found["train_s"],
        command_s=seconds,
        first_loss=found["losses"][0],
        loss=found["losses"][-1],
        miou=score(lambda images: model(images).logits, run, folder),
    )


def _start_trainer(run: RunConfig, folder: Path, out: Path, way: str) -> tuple[float, dict[str, Any]]:
    """Seconds of the whole command, and what it wrote beside the model in `out`."""
    from bench.huggingface import RESULT

    ranks, workers = map(int, way.split("+"))
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--nproc-per-node", str(ranks)]
        launch += ["--master-port", str(free_port()), "-m"]
    asked = json.dumps(asdict(request(run, folder, out, workers=workers)))
    seconds = _timed([*launch, "bench.huggingface", asked])
    return seconds, json.loads((out / RESULT).read_text())


def _timed(command: list[str]) -> float:
    """Run a command on the CPU and return its seconds; what it prints is shown where it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode != 0:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"{shlex.join(command[:4])} ... ended with {done.returncode}:\n{said}")
    return seconds


@torch.no_grad()
def score(logits: Callable[[Tensor], Tensor], run: RunConfig, folder: Path) -> float:
    """mIoU of a function images (1, 3, H, W) -> logits (1, K, h, w) on the validation images, whole."""
    normalize = Normalize(run.augment.mean, run.augment.std)
    metric = SegmentationMetric(len(run.data.classes))
    for path in sorted((folder / "images/val").iterdir()):
        with Image.open(path) as picture:
            image = torch.from_numpy(np.array(picture.convert("RGB")))
        with Image.open(folder / "masks/val" / f"{path.stem}.png") as picture:
            target = torch.from_numpy(np.array(picture)).long()
        metric.update(logits(normalize(image.permute(2, 0, 1)[None], None)), target[None])
    return metric.compute().miou


def _columns(ours: Result, theirs: Result) -> dict[str, Any]:
    """What was measured; times_*: theirs over ours."""
    row: dict[str, Any] = {}
    for name, digits in (("miou", 4), ("train_s", 1), ("command_s", 1), ("first_loss", 4), ("loss", 4)):
        for side, result in zip(SIDES, (ours, theirs), strict=True):
            row[f"{side}_{name}"] = round(getattr(result, name), digits)
    row["times_train"] = round(theirs.train_s / ours.train_s, 3)
    row["times_command"] = round(theirs.command_s / ours.command_s, 3)
    return row


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, least and most of every column over the seeds."""
    measured = [name for name in rows[0] if name.startswith((*SIDES, "times"))]
    return [
        {**rows[0], "seed": name, "first": ""}
        | {column: round(float(function([row[column] for row in rows])), 4) for column in measured}
        for name, function in (("median", median), ("least", min), ("most", max))
    ]
