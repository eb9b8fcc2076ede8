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
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segformer.checkpoint.reader import CONFIG, run_folder
from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.photometric import Normalize
from segformer.data.loading.samples import Batch
from segformer.data.shards.format import ShardSet, Split
from segformer.distributed.engine import EngineConfig, resolve_precision
from segformer.distributed.world import World, init_world, limit_threads
from segformer.errors import (
    ConfigError,
    SegformerError,
    listed,
    reported,
    reraise_as,
    say,
)
from segformer.evaluation.evaluate import evaluate_labels, protocol_of
from segformer.evaluation.findings import Findings
from segformer.evaluation.inference_mode import InferenceModeConfig, settings
from segformer.evaluation.measures import Measures
from segformer.evaluation.metrics import Scores, SegmentationScores
from segformer.evaluation.tables import Row, as_csv, as_markdown
from segformer.files import write_atomic
from segformer.inference.evaluated import EvaluateConfig, mode_for, open_scored
from segformer.inference.export import build
from segformer.models.ops.native import keep_freed_memory
from segformer.models.weights.bundle import Weights
from segformer.telemetry.progress import duration, evaluated

MASKS_ONLY = ("ignore_classes", "boundary", "calibration", "worst", "against")


@dataclass(frozen=True)
class Scored:
    """A model's scores on a split, and what else was measured of its masks; of a classifier nothing."""

    scores: Scores
    measures: Measures | None
    trained: Weights
    shards: ShardSet
    view: ClassificationAugment | None
    mode: InferenceModeConfig
    seconds: float


def evaluate_checkpoint(cfg: EvaluateConfig) -> Scores:
    """Print the table of scores, write it (rank zero) and return the scores; all ranks."""
    world = init_world()
    try:
        limit_threads(world)
        world.on_main(lambda: _check(cfg))  # one message where something is wrong
        found = _scored(cfg, world)
        plain = replace(cfg, checkpoint=cfg.against, against="", step="newest", worst=0)
        other = _scored(plain, world) if cfg.against else None
    finally:
        world.close()
    if not world.is_main:
        return found.scores
    trained, shards, scores = found.trained, found.shards, found.scores
    record = _record(cfg, trained, shards, scores, world)
    record |= {"protocol": protocol_of(found.view, found.mode), "seconds": round(found.seconds, 3)}
    record |= {"settings": settings(found.mode)} if found.view is None else {}
    say(f"{_title(record)} in {duration(found.seconds)}", file=sys.stderr)
    print(scores.table(list(shards.classes)), flush=True)
    findings = None
    if found.measures is not None and isinstance(scores, SegmentationScores):
        split = shards.split(cfg.split)
        findings = Findings(scores, found.measures, split, list(shards.classes), cfg.worst)
        if other is not None and other.measures is not None:
            findings.against(other.measures, cfg.checkpoint, cfg.against)
        print(f"\n{findings.text()}", flush=True)
        record |= findings.record
    _keep(cfg, _file_name(cfg, found, record, world), record, scores.rows(list(shards.classes)), findings)
    return scores


def _scored(cfg: EvaluateConfig, world: World) -> Scored:
    """The scores of cfg.checkpoint on cfg.split; all ranks."""
    trained, shards, labels = open_scored(cfg)
    split, view = shards.split(cfg.split), None
    if trained.arch.kind == "classification":
        size, short = trained.metadata.view
        view = ClassificationAugment(size=size, eval_resize=short)
    mode, measures = mode_for(cfg, trained, split), None
    if view is None:
        measures = Measures(
            len(split.tiled.images) if split.tiled else split.num_samples,
            len(shards.classes),
            folded=labels.folded if labels else lambda counts: counts,
            boundary=cfg.boundary,
            calibration=cfg.calibration,
            probabilities=mode.flip or len(mode.scales) > 1,
            left_out=[shards.classes.index(name) for name in cfg.ignore_classes],
            drawn=cfg.worst,
            palette=None if labels or split.tiled else np.array(trained.metadata.palette, np.uint8),
        )
    if world.device.type == "cpu":
        keep_freed_memory()
    start = time.monotonic()
    failures: list[SegformerError] = []
    with _progress(world, split) as advance:

        def counted(batch: Batch, logits: Tensor) -> None:
            if measures is not None:
                measures.draw(batch, logits)
            advance(len(batch.targets) * world.size)

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
            count=measures and measures.count,
            on_batch=counted,
        )
    if scores is None:  # logged once, by the rank that met it
        raise failures[0] if failures else SystemExit(SegformerError.exit_code)
    if measures is not None and isinstance(scores, SegmentationScores):
        measures.sum(world)
        scores = SegmentationScores.from_counts(torch.tensor(scores.confusion), measures.left_out)
    return Scored(scores, measures, trained, shards, view, mode, time.monotonic() - start)


def _file_name(cfg: EvaluateConfig, found: Scored, record: dict[str, Any], world: World) -> str:
    """The name of the split, and what differs from a plain evaluation."""
    trained, shards = found.trained, found.shards
    other = f"{Path(record['shards']).name}-{shards.digest[:8]}"  # folders of one name hold other images
    other = cfg.shards if cfg.shards in trained.provenance.get("sets", {}) else other
    differs = [] if shards.digest == trained.provenance.get("digest") else [other]
    usual = resolve_precision(EngineConfig(), world.device)
    differs += [] if record["dtype"] == usual else [record["dtype"]]
    if cfg.step != "newest" or Path(cfg.checkpoint) != run_folder(Path(cfg.checkpoint)):
        differs.append(f"step {record['step']}")
    if record["protocol"] != protocol_of(found.view, mode_for(None, trained, shards.split(cfg.split))):
        differs.append(record["protocol"].partition(" (")[0])
    differs += ["without", *cfg.ignore_classes] if cfg.ignore_classes else []
    differs += ["against", Path(cfg.against).name] if cfg.against else []
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in (cfg.split, *differs))


def _check(cfg: EvaluateConfig) -> None:
    """What is wrong with models, shards and mode, and with a place that was asked for; rank zero."""
    trained, shards, labels = open_scored(cfg)
    asked = [key for key in MASKS_ONLY if getattr(cfg, key)]
    if asked and trained.arch.kind != "segmentation":
        raise ConfigError(f"{asked[0]}: {cfg.checkpoint} is a classifier, which has no masks; leave it out")
    unknown = sorted(set(cfg.ignore_classes) - set(shards.classes))
    if unknown:
        names = listed(list(shards.classes), 20)
        raise ConfigError(f"ignore_classes: no class is named {listed(unknown, 3)}; the classes are {names}")
    if set(cfg.ignore_classes) >= set(shards.classes):
        raise ConfigError("ignore_classes names every class, so there is no mean; leave some out of it")
    if cfg.boundary and (shards.split(cfg.split).tiled or labels):
        which = "that is cut into tiles" if not labels else "whose labels are others than the model's classes"
        raise ConfigError(f"boundary=true: {cfg.split} is a split {which}; leave this out")
    if cfg.against:
        _, others, _ = open_scored(replace(cfg, checkpoint=cfg.against, step="newest"))
        if others.digest != shards.digest:
            raise ConfigError(
                f"against={cfg.against} is scored on other images than {cfg.checkpoint} (the digest of their "
                "shards differs); give the shards of both: shards=<folder>"
            )
    if cfg.output:
        with reraise_as(ConfigError, f"output={cfg.output} can't be written", "choose another folder"):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)


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


def _finite(value: Any) -> Any:
    """What JSON can hold: null where nothing was measured."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep(
    cfg: EvaluateConfig, name: str, record: dict[str, Any], rows: list[Row], findings: Findings | None
) -> None:
    """Write the files and say where; rank zero. Only in a place that was asked for is it an error not to."""
    run = run_folder(Path(cfg.checkpoint))
    if not cfg.output and not (run / CONFIG).is_file():
        return say("scores of an export are written with output=<folder>", file=sys.stderr)
    folder = Path(cfg.output) if cfg.output else run / "scores"
    texts = {
        "json": json.dumps(_finite(record), indent=1, allow_nan=False) + "\n",
        "csv": as_csv(rows),
        "md": f"{_title(record)}, {record['date'][:10]}\n\n{as_markdown(rows)}",
    }

    if findings is not None:
        texts["md"] += findings.markdown()

    def unwritten(error: ConfigError) -> None:
        if cfg.output:
            raise error
        say(str(error), file=sys.stderr)

    what, do = f"the scores can't be written into {folder}", "output=<folder> writes them elsewhere"
    with reported(unwritten, on=ConfigError), reraise_as(ConfigError, what, do):
        folder.mkdir(exist_ok=True)
        for suffix, text in texts.items():
            write_atomic(folder / f"{name}.{suffix}", text, durable=False)
        if findings is not None:
            findings.write(folder, name)
        say(f"scores: {folder / name}.json, .csv and .md", file=sys.stderr)
