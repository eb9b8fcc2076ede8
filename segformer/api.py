"""The commands from Python, in this process: for a notebook, or a program around them.

    result = segformer.train("experiment=scratch", "data.shards=data/mine", steps=500, optim={"lr": 1e-3})
    result.scores.miou, result.run, result.export
    segformer.evaluate("runs/sample", split="test", flip=True)
    segformer.export("runs/sample", output="exports/sample")

Settings have the names of the command line, as texts or as keywords; a dictionary holds those of a group.
What is wrong is a SegformerError with the text that a command would print.

    segformer.train("experiment=scratch", train=pairs, val=others, classes=["background", "leaf"])

trains on anything with a length whose items are (image, mask): a torch Dataset, a list. It is written as
shards, once, into <run>/data, or where data.shards says: order, checks and resume are those of every other
set. An image is a path of a file that sharding takes, or what inference/photograph.py takes: with
data.channels=5, arrays (H, W, 5) of uint8, uint16 or float32, all of one type. A mask is a path of a PNG or
(H, W) class ids, 255 = ignored. Augmentation belongs to the run, not to the dataset.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from segformer.checkpoint.reader import newest_state
from segformer.data.loading.workers import refuse_second_run
from segformer.data.shards.sharding import OtherSet, write_shards
from segformer.data.sources.dataset import (
    DTYPES,
    IGNORE_INDEX,
    IMAGE_SUFFIXES,
    RGB,
    DatasetConfig,
    Pixels,
)
from segformer.data.sources.tiff import encode_tiff
from segformer.errors import ConfigError, DataError, is_main_rank, reraise_as
from segformer.evaluation.metrics import Scores
from segformer.inference.export import ExportConfig
from segformer.inference.export import export as export_run
from segformer.inference.photograph import to_pixels
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.job import run_job
from segformer.training.config import RunConfig, compose
from segformer.training.overrides import flat


class Pairs(Protocol):
    """Images and masks by their number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training has left."""

    scores: Scores
    "Of the last step, on the validation images."
    run: Path
    "Directory of the run; report.html in it shows how it went."
    export: Path
    "The model of the last step: for Predictor, for model.pretrained=..., for transformers."
    best: Path
    "The model of the step with the best scores, likewise."
    best_step: int | None
    "That step."
    best_score: float | None
    "Its score, the first that a line of the run names; None where none was a number."


def train(
    *overrides: str | RunConfig,
    train: Pairs | None = None,
    val: Pairs | None = None,
    classes: Sequence[str] = (),
    **settings: Any,
) -> TrainingResult:
    """Train, or continue, a run; then export it and write its report, as launch/train.py does.

    overrides: settings as on the command line, or one composed RunConfig, which is left as it is. train, val,
    classes: see above.

    Raises:
        SegformerError: as `segformer.training.loop.train`; Preempted after Ctrl-C, when the state is saved.
    """
    refuse_second_run()
    if isinstance(classes, str):
        raise ConfigError(f"classes={classes!r} is one text; give a list of names: classes=[{classes!r}]")
    if any(isinstance(override, RunConfig) for override in overrides):
        if len(overrides) > 1 or settings or classes:
            raise ConfigError(
                "a RunConfig has all settings, so no others are taken beside it; set them in it, "
                "such as cfg.steps = 500, or give texts and keywords alone"
            )
        cfg = copy.deepcopy(overrides[0])
        assert isinstance(cfg, RunConfig)
    else:
        given = [str(override) for override in overrides]
        if train is not None and not any(override.startswith("data=") for override in given):
            given.append("data=folder")
        if classes:
            given.append(f"data.classes={_written(list(classes))}")
        cfg = _composed(RunConfig, "config", given, settings)
    if train is not None or val is not None:
        cfg.data.shards = cfg.data.shards or str(Path(cfg.run_dir) / "data")
        if is_main_rank():  # the others wait for it where ranks meet
            _write(cfg.data, {cfg.train_split: train, cfg.eval_split: val}, Path(cfg.run_dir))
    scores, run = run_job(cfg), Path(cfg.run_dir)
    state = newest_state(run / "checkpoints")
    best = (None, None) if state is None else (state.best_step, state.best_score)
    return TrainingResult(scores, run, run / "export", run / "export_best", *best)


def evaluate(checkpoint: str | Path, *overrides: str, **settings: Any) -> Scores:
    """Score a run or an export on a split, as launch/evaluate.py does, and return the scores."""
    refuse_second_run()
    given = [f"checkpoint={checkpoint}", *overrides]
    return evaluate_checkpoint(_composed(EvaluateConfig, "evaluate", given, settings))


def export(checkpoint: str | Path, *overrides: str, **settings: Any) -> Path:
    """Export a run, as launch/export.py does, and return the folder."""
    return export_run(_composed(ExportConfig, "export", [f"checkpoint={checkpoint}", *overrides], settings))


def _composed(schema: type[Any], name: str, overrides: list[str], settings: Mapping[str, Any]) -> Any:
    given = [f"{key}={_written(value)}" for key, value in flat(dict(settings)).items()]
    return compose(schema, name, [*overrides, *given])


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value)


def _write(cfg: DatasetConfig, splits: dict[str, Pairs | None], run: Path) -> None:
    """The pairs of each split as shards in cfg.shards, by way of a folder of files, which goes again."""
    if not cfg.classes:
        raise ConfigError("classes is empty; give the names of the classes in the order of their ids")
    source = run / ".data"
    shutil.rmtree(source, ignore_errors=True)
    try:
        for split, pairs in splits.items():
            if pairs is None or not (hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")):
                raise ConfigError(
                    f"{split} is no dataset; give one with a length whose items are (image, mask)"
                )
            if not len(pairs):
                raise DataError(f"{split} is empty; give at least one pair (image, mask)")
            for kind in ("images", "masks"):
                (source / kind / split).mkdir(parents=True)
            for index in range(len(pairs)):
                pair = _item(pairs, split, index)
                with reraise_as(DataError, f"{split}[{index}]", on=(DataError, OSError)):
                    _write_pair(pair, source, f"{split}/{index:06d}", cfg)
        try:
            write_shards(cfg, source, Path(cfg.shards), seed=0, samples_per_shard=256, workers=1)
        except OtherSet as error:
            what = f"{cfg.shards} holds other pairs, with which this run began"
            raise DataError(f"{what}; give these, or another name=") from error
        except DataError as error:  # its files are not those of the caller
            raise DataError(_by_index(str(error), source)) from error
    finally:
        shutil.rmtree(source, ignore_errors=True)
        with suppress(OSError):  # a refused call leaves nothing
            run.rmdir()


def _item(pairs: Pairs, split: str, index: int) -> Any:
    try:
        return pairs[index]
    except Exception as error:
        error.add_note(f"raised by {split}[{index}] of the dataset")
        raise


def _by_index(text: str, source: Path) -> str:
    """A message about the files of the pairs that names items: masks/train/000001.png -> train[1]."""
    file = rf"'?(?:{re.escape(str(source))}/(?:images|masks)/)?\b([\w-]+)/(\d{{6}})\b(?:\.\w+)?'?"
    return re.sub(file, lambda found: f"{found[1]}[{int(found[2])}]", text)


def _write_pair(pair: Any, folder: Path, name: str, cfg: DatasetConfig) -> None:
    """One item of a dataset as two files; DataError where it is none. Files are taken as they are."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"it is a {type(pair).__name__}; an item is a pair (image, mask)")
    image, mask = pair
    target = folder / "images" / name
    if isinstance(image, str | Path):
        if Path(image).suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{str(image)!r} is no file of {', '.join(IMAGE_SUFFIXES)}")
        shutil.copyfile(image, f"{target}{Path(image).suffix.lower()}")
    elif cfg.pixels == RGB:
        _write_png(Path(f"{target}.png"), cv2.cvtColor(to_pixels(image, cfg.image_range), cv2.COLOR_RGB2BGR))
    else:
        Path(f"{target}.tif").write_bytes(encode_tiff(_bands(image, cfg)))
    target = folder / "masks" / f"{name}.png"
    if isinstance(mask, str | Path):
        shutil.copyfile(mask, target)
        return
    ids = np.asarray(mask)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise DataError(
            f"its mask is an array of {ids.dtype} {ids.shape}; give (height, width) whole class ids"
        )
    if not 0 <= ids.min() <= ids.max() <= IGNORE_INDEX:
        raise DataError(
            f"its mask has ids from {ids.min()} to {ids.max()}; give class ids, and 255 where none counts"
        )
    _write_png(target, ids.astype(np.uint8))


def _bands(image: Any, cfg: DatasetConfig) -> np.ndarray:
    """An image of other channels or type than 8-bit RGB; the type is that of the settings, or its own."""
    own = str(getattr(image, "dtype", "")).removeprefix("torch.")
    return to_pixels(image, (), Pixels(cfg.channels, cfg.dtype or (own if own in DTYPES else RGB.dtype)))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
