"""The scores of a finished model: a run or an export, on any split of any shards with its classes.

    printed                                       the table
    <run>/scores/<split>[-<what differs>].json    scores, confusion, and what was scored on what, how and when
                                         .csv     a line a class and the mean, shares from 0 to 1
                                         .md      the table, to be pasted

The plain evaluation of a run's newest step on its own shards has the name of the split. Other shards, a step
that was asked for and another protocol are added to it: test-step-400-flip.json. output=<folder> takes the
files of any model; those of an export, which is a model and nothing else, are written with it alone.

Images are taken whole and at their own size, but not larger than those of the training, where shard.py has
reduced these; logits are brought to the size of the label, and one confusion matrix counts the split. A
classifier gets the center of every image, cropped as in its training. So do the evaluations during training:
the numbers agree with theirs. Published scores resize images, slide windows, flip and scale
(evaluation/inference_mode.py).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from segformer.checkpoint.reader import CONFIG, run_folder
from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.mixture import LabelMap
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet, Split
from segformer.data.sources.dataset import Pixels
from segformer.distributed.engine import EngineConfig, resolve_precision
from segformer.distributed.world import World, init_world, limit_threads
from segformer.errors import (
    CheckpointError,
    ConfigError,
    SegformerError,
    at_least,
    listed,
    reported,
    reraise_as,
    say,
)
from segformer.evaluation.evaluate import evaluate_labels, mode_of, protocol_of
from segformer.evaluation.inference_mode import InferenceModeConfig, check_images, settings, trained_at
from segformer.evaluation.metrics import Row, Scores, as_csv, as_markdown
from segformer.files import write_atomic
from segformer.inference.export import build, check_output, open_checkpoint
from segformer.models.weights.bundle import Weights
from segformer.models.weights.write import images_of
from segformer.telemetry.progress import duration, evaluated


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(InferenceModeConfig):
    """Which model to score, on which images, and how it sees them."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    shards: str = ""
    "Folder of shards, or a set of the run's mixture by name; empty takes those of the training."
    split: str = "val"
    "Split of the shards."
    batch: int = 1
    "Images per forward and rank, of one size each."
    precision: str = "auto"
    "fp32, bf16 or auto, as engine.precision of a run: bf16 where the GPU has it, fp32 on a CPU."
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    "Worker processes."
    output: str = ""
    "Folder for the scores as JSON, CSV and Markdown; empty = scores in the directory of the run."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        at_least(self, "", batch=1)
        EngineConfig(precision=self.precision)
        check_output(self.output, "the scores are written as several files")


def evaluate_checkpoint(cfg: EvaluateConfig) -> Scores:
    """Print the table of scores, write it (rank zero) and return the scores; all ranks."""
    world = init_world()
    try:
        limit_threads(world)
        world.on_main(lambda: _check(cfg))  # one message where something is wrong
        trained, shards, labels = open_scored(cfg)
        split, classes = shards.split(cfg.split), list(shards.classes)
        view = None
        if trained.arch.kind == "classification":
            size, short = trained.metadata.view
            view = ClassificationAugment(size=size, eval_resize=short)
        mode = mode_for(cfg, trained, split)
        start = time.monotonic()
        failures: list[SegformerError] = []
        with _progress(world, split) as advance:
            scores = evaluate_labels(
                build(trained).to(world.device),
                Normalize(trained.metadata.mean, trained.metadata.std).to(world.device),
                split,
                cfg.loader,
                world,
                num_classes=len(trained.metadata.classes),
                batch_size=cfg.batch,
                bf16=_dtype(cfg, world) == "bf16",
                should_stop=lambda: world.any(bool(failures)),
                on_error=failures.append,
                view=view,
                mode=mode,
                labels=labels,
                on_batch=lambda batch, _: advance(len(batch.targets) * world.size),
            )
    finally:
        world.close()
    if scores is None:  # logged once, by the rank that met it
        raise failures[0] if failures else SystemExit(SegformerError.exit_code)
    if world.is_main:
        seconds = time.monotonic() - start
        record = _record(cfg, trained, shards, scores, world)
        record |= {"protocol": protocol_of(view, mode), "seconds": round(seconds, 3)}
        record |= {"settings": settings(mode)} if view is None else {}
        say(f"{_title(record)} in {duration(seconds)}", file=sys.stderr)
        print(scores.table(classes), flush=True)
        other = f"{Path(record['shards']).name}-{shards.digest[:8]}"  # folders of one name hold other images
        other = cfg.shards if labels is not None else other
        differs = [] if shards.digest == trained.provenance.get("digest") else [other]
        usual = resolve_precision(EngineConfig(), world.device)
        differs += [] if record["dtype"] == usual else [record["dtype"]]
        if cfg.step != "newest" or Path(cfg.checkpoint) != run_folder(Path(cfg.checkpoint)):
            differs.append(f"step {record['step']}")
        if record["protocol"] != protocol_of(view, mode_for(None, trained, split)):
            differs.append(record["protocol"].partition(" (")[0])
        name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in (cfg.split, *differs))
        _keep(cfg, name, record, scores.rows(classes))
    return scores


def _check(cfg: EvaluateConfig) -> None:
    """What is wrong with model, shards and mode, and with a place that was asked for; rank zero."""
    open_scored(cfg)
    if cfg.output:
        with reraise_as(ConfigError, f"output={cfg.output} can't be written", "choose another folder"):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)


def mode_for(cfg: InferenceModeConfig | None, trained: Weights, split: Split) -> InferenceModeConfig:
    """The inference mode of `cfg`, or that of a plain evaluation: images are as large as in training."""
    names = [field.name for field in fields(InferenceModeConfig)]
    mode = InferenceModeConfig(**{name: getattr(cfg, name) for name in names if cfg is not None})
    if split.tiled:
        return mode_of(split, mode)
    longest = int(max(split.heights.max(), split.widths.max()))
    reduced = trained.arch.kind == "segmentation" and longest > trained.metadata.long_side
    return trained_at(mode, trained.metadata.long_side) if reduced else mode


def _progress(world: World, split: Split) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """How far the evaluation is, on standard error; rank zero."""
    if not world.is_main:
        return contextlib.nullcontext(lambda images: None)
    return evaluated(split.num_samples, lambda line: say(line, file=sys.stderr))


def _dtype(cfg: EvaluateConfig, world: World) -> str:
    return resolve_precision(EngineConfig(precision=cfg.precision), world.device)


def _record(
    cfg: EvaluateConfig, trained: Weights, shards: ShardSet, scores: Scores, world: World
) -> dict[str, Any]:
    """What was scored, on what, by what, and the scores: the content of the JSON file."""
    device, said, split = world.device, trained.provenance, shards.split(cfg.split)
    tiled = split.tiled
    return ({"tiles": split.num_samples} if tiled else {}) | {
        "checkpoint": cfg.checkpoint,
        "step": said.get("step"),
        "averaged": said.get("averaged"),
        "variant": trained.arch.variant,
        "shards": cfg.shards or said.get("shards"),
        "digest": shards.digest,
        "split": cfg.split,
        "images": len(tiled.images) if tiled else split.num_samples,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": world.size,
        "dtype": _dtype(cfg, world),
        "versions": {"segformer": sys.modules["segformer"].__version__, "torch": torch.__version__},
        "classes": list(shards.classes),
        "scores": scores.details(),
    }


def _title(record: dict[str, Any]) -> str:
    """What was scored on what and how, in one line."""
    ema = " (EMA)" if record["averaged"] else ""
    tiles = f" in {record['tiles']} tiles" if "tiles" in record else ""
    return (
        f"{record['checkpoint']} at step {record['step']}{ema} on {record['images']} images{tiles} of "
        f"{record['split']} ({record['protocol']})"
    )


def _keep(cfg: EvaluateConfig, name: str, record: dict[str, Any], rows: list[Row]) -> None:
    """Write the files and say where; rank zero. Only in a place that was asked for is it an error not to."""
    run = run_folder(Path(cfg.checkpoint))
    if not cfg.output and not (run / CONFIG).is_file():
        return say("scores of an export are written with output=<folder>", file=sys.stderr)
    folder = Path(cfg.output) if cfg.output else run / "scores"
    texts = {
        "json": json.dumps(record, indent=1) + "\n",
        "csv": as_csv(rows),
        "md": f"{_title(record)}, {record['date'][:10]}\n\n{as_markdown(rows)}",
    }

    def unwritten(error: ConfigError) -> None:
        if cfg.output:
            raise error
        say(str(error), file=sys.stderr)

    what, do = f"the scores can't be written into {folder}", "output=<folder> writes them elsewhere"
    with reported(unwritten, on=ConfigError), reraise_as(ConfigError, what, do):
        folder.mkdir(exist_ok=True)
        for suffix, text in texts.items():
            write_atomic(folder / f"{name}.{suffix}", text, durable=False)
        say(f"scores: {folder / name}.json, .csv and .md", file=sys.stderr)


def _sets_of(cfg: EvaluateConfig, trained: Weights, key: str) -> dict[str, Any]:
    """The sets of the model's mixture by name; ConfigError where neither one of them nor shards are named."""
    said, wrong = trained.provenance.get("sets", {}), (AttributeError, TypeError, KeyError)
    with reraise_as(CheckpointError, f"{cfg.checkpoint}: what it says of its data sets is damaged", on=wrong):
        sets = {str(name): {"shards": one["shards"], "classes": one["classes"]} for name, one in said.items()}
    if (
        sets
        and cfg.shards not in sets
        and not (cfg.shards and (Path(cfg.shards).exists() or "://" in cfg.shards))
    ):
        wrong_name = f", and {key}={cfg.shards} is none of them" if cfg.shards else ""
        raise ConfigError(
            f"{cfg.checkpoint} was trained on several data sets{wrong_name}; give {_own(sets, key)}"
        )
    return sets


def _own(sets: dict[str, Any], key: str) -> str:
    return " or ".join(f"{key}={name}" for name in sets) or "shards of its own"


def open_scored(
    cfg: EvaluateConfig, splits: Sequence[str] | None = None, key: str = "shards"
) -> tuple[Weights, ShardSet, LabelMap | None]:
    """The model, its shards, checked for `splits` (None: cfg.split; empty: all), and what their labels are in
    its classes where these are others. key: names the shards."""
    trained = open_checkpoint(cfg.checkpoint, cfg.step, cfg.loader.storage)
    sets = _sets_of(cfg, trained, key)
    one = sets.get(cfg.shards, {})
    place = one.get("shards") or cfg.shards or trained.provenance.get("shards")
    kind, predicted = trained.arch.kind, trained.metadata.classes
    if not place:
        text = f"{cfg.checkpoint} does not say which shards it was trained with"
        raise ConfigError(f"{text}; give {key}=<shards>")
    shards = ShardSet.open(place, cfg.loader.storage)
    if shards.task != kind:
        raise ConfigError(
            f"{cfg.checkpoint} is a model for {kind}, {place} was sharded for {shards.task}; give shards of "
            "its own"
        )
    labels = None
    if one:
        key = f"{cfg.checkpoint}: mixture.sets.{cfg.shards}.classes"
        labels = LabelMap.of(key, one["classes"], shards.classes, predicted)
    elif list(shards.classes) != predicted:
        raise ConfigError(
            f"{cfg.checkpoint} predicts {len(predicted)} classes ({listed(predicted, 3)}), the shards have "
            f"{len(shards.classes)} ({listed(shards.classes, 3)}); give {_own(sets, key)}"
        )
    if shards.pixels != images_of(trained):
        raise ConfigError(
            f"{cfg.checkpoint} takes images of {Pixels(*images_of(trained))}, those of {place} are "
            f"{shards.pixels}; give shards of its own"
        )
    changed = settings(cfg)
    if changed and kind != "segmentation":
        raise ConfigError(
            f"{', '.join(changed)}: {cfg.checkpoint} is a classifier, which sees the center of each "
            "image; leave this out"
        )
    for split in map(shards.split, [cfg.split] if splits is None else splits or list(shards.splits)):
        if changed and split.tiled:
            mode_of(split, cfg)
        if changed:
            check_images(cfg, zip(split.heights.tolist(), split.widths.tolist(), strict=True))
    return trained, shards, labels
