"""Images per second of one CPU core: this loader, its stages, and what it is compared with (naive.py).

Everything uses one thread and is measured in CPU seconds, user and system, so that other programs disturb
little. The pipelines take turns, `repeats` times; a row has the median and the spread.

    mode in process    no worker processes: what it costs to make a batch
    mode 1 worker      worker and trainer together: also what it costs to hand the batch over, as in training

    ours        local shards -> Batch of uint8 in memory (train_batches)
    files       naive.py from single files
    webdataset  naive.py behind stock webdataset, from the same shards
    stage: ...  the stages of `ours` one by one; device stages run on this core only to be measured
"""

import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch

from bench.naive import from_files, from_webdataset, naive_loader
from bench.processes import cpu_seconds, settle
from bench.record import conditions, spread, table, write_csv
from bench.synthetic import KINDS, write_folder
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig, train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.loading.photometric import Normalize
from segformer.data.loading.samples import Samples, collate
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.errors import ConfigError

SEED = 7
MODES = {"in process": 0, "1 worker": 1}  # mode -> worker processes
STAGES = (
    *("read and crc", "crc alone", "decode image", "decode mask", "geometry", "collate"),
    "device: photometric and normalise",
)
RATES = (300, 1000)  # images/s of a GPU whose cores are counted


@dataclass(kw_only=True, slots=True)
class LoaderBench:
    """How the loader is measured."""

    sets: str = "camvid,ade"
    "Kinds of pictures, by commas; those of bench/synthetic.py. `root` replaces camvid by a real folder."
    images: int = 64
    "Pictures that are made for a synthetic set."
    batch: int = 16
    "Images of one batch."
    batches: int = 12
    "Batches in one repetition."
    repeats: int = 7
    "Repetitions of every pipeline, taken in turns."

    def __post_init__(self) -> None:
        unknown = [name for name in self.sets.split(",") if name not in KINDS]
        if unknown:
            raise ConfigError(f"loader.sets names {', '.join(unknown)}; use {', '.join(KINDS)}")
        if min(self.images, self.batch, self.batches, self.repeats) < 1:
            raise ConfigError("loader.images, batch, batches and repeats must be 1 or more")


def measure(cfg: LoaderBench, root: str, out: Path) -> list[dict[str, Any]]:
    """Measure every set and write loader.csv into `out`."""
    rows = []
    with _one_thread(), tempfile.TemporaryDirectory() as scratch:
        for name in cfg.sets.split(","):
            real = root and name == "camvid"
            folder = Path(root) if real else Path(scratch) / name
            if not real:
                write_folder(folder, KINDS[name], cfg.images)
            rows += _measure_set(
                cfg, name if not real else f"{name} (real)", folder, Path(scratch) / f"{name}-shards"
            )
    found = conditions(("numpy", "opencv-python-headless", "pillow", "torch", "webdataset"))
    write_csv(out / "loader.csv", rows, found)
    print(table(rows))
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def _measure_set(cfg: LoaderBench, name: str, folder: Path, out: Path) -> list[dict[str, Any]]:
    classes = [str(label) for label in range(150)]
    data = DatasetConfig(name="bench", classes=classes, splits=["train"], allow_unseen=["*"])
    write_shards(data, folder, out, seed=0, samples_per_shard=256, workers=1)
    split = ShardSet.open(out).split("train")
    augment = AugmentConfig()
    count = cfg.batch * cfg.batches
    order = SampleOrder(make_order_spec(split.shard_sizes, seed=SEED, global_batch=cfg.batch))
    tars = [str(out / file) for file in split.files]
    seconds: dict[tuple[str, str], list[float]] = {}
    stages: dict[str, list[float]] = {}
    with ExitStack() as opened:
        streams = {
            (pipeline, mode): opened.enter_context(
                _opened(pipeline, mode, split, order, folder, tars, cfg.batch)
            )
            for pipeline in ("ours", "files", "webdataset")
            for mode in MODES
        }
        for _ in range(cfg.repeats):
            for place, stream in streams.items():
                seconds.setdefault(place, []).append(_timed(stream, cfg.batches) / count)
            for stage, taken in _stages(split, augment, order, count, cfg.batch).items():
                stages.setdefault(stage, []).append(taken / count)
    rows = [
        _row(name, pipeline, mode, np.array(taken), np.array(taken) / np.array(seconds["ours", mode]))
        for (pipeline, mode), taken in seconds.items()
    ]
    return rows + [
        _row(name, f"stage: {stage}", "in process", np.array(taken), None) for stage, taken in stages.items()
    ]


@contextmanager
def _opened(
    pipeline: str, mode: str, split: Split, order: SampleOrder, folder: Path, tars: list[str], batch: int
) -> Iterator[tuple[Iterator[Any], list[int]]]:
    """A running stream of batches, and the processes that work for it."""
    before = set(multiprocessing.active_children())
    workers = MODES[mode]
    augment = AugmentConfig()
    stream: Any
    if pipeline == "ours":
        loader, shape = LoaderConfig(workers=workers), BatchShape(batch, batch, 1)
        stream = iter(
            train_batches(split, order, augment, loader, batch=shape, seed=SEED, rank=0, start_step=0)
        )
    else:
        source = partial(from_files, folder) if pipeline == "files" else partial(from_webdataset, tars)
        stream = naive_loader(partial(source, augment, SEED), batch, workers)
    next(stream)  # opens files and starts processes
    own = set(multiprocessing.active_children()) - before
    try:
        yield stream, [process.pid for process in own if process.pid is not None]
    finally:
        if hasattr(stream, "close"):
            stream.close()
        del stream


def _timed(stream: tuple[Iterator[Any], list[int]], batches: int) -> float:
    """CPU seconds for `batches` batches; with a worker the queue is full before and after."""
    iterator, children = stream
    if children:
        settle(children)
    began = cpu_seconds(children)
    for _ in range(batches):
        next(iterator)
    if children:
        settle(children)
    return cpu_seconds(children) - began


def _row(
    name: str, pipeline: str, mode: str, seconds: np.ndarray, ratio: np.ndarray | None
) -> dict[str, Any]:
    """One line of the table; ratio: seconds over ours, of the same repetition."""
    found = spread((1e3 * seconds).tolist())
    rate = 1000 / found["median"] if found["median"] else float("inf")
    relative = {"": ""} if ratio is None else spread(ratio.tolist(), 3)
    row: dict[str, Any] = {"set": name, "pipeline": pipeline, "mode": mode}
    row |= {f"cpu_ms_{key}": value for key, value in found.items()}
    row["images_per_s_per_core"] = round(rate, 1)
    row["times_ours"] = relative.get("median", "")
    row["times_ours_min"] = relative.get("min", "")
    whole = ratio is not None
    return row | {f"cores_for_{gpu}_images_per_s": round(gpu / rate, 2) if whole else "" for gpu in RATES}


def _stages(
    split: Split, augment: AugmentConfig, order: SampleOrder, count: int, batch: int
) -> dict[str, float]:
    """CPU seconds of each stage over `count` samples, stage after stage in batches as the loader has them."""
    samples, taken = Samples(split, augment, seed=SEED), dict.fromkeys(STAGES, 0.0)
    normalize = Normalize(augment.mean, augment.std)

    for start in range(0, count, batch):
        ids = [int(sample_id) for sample_id in order.ids(start, batch)]
        clock = [time.process_time()]
        raw = [samples.reader.read(sample_id) for sample_id in ids]
        clock.append(time.process_time())
        for sample in raw:
            zlib.crc32(sample.image), zlib.crc32(sample.target)
        clock.append(time.process_time())
        images = [decode_image(sample.image) for sample in raw]
        clock.append(time.process_time())
        masks = [decode_mask(sample.target) for sample in raw]
        clock.append(time.process_time())
        pairs = dict(zip(ids, zip(images, masks, strict=True), strict=True))
        with patch.object(samples, "picture", pairs.__getitem__):
            ready = [samples.sample(sample_id, 0) for sample_id in ids]
        clock.append(time.process_time())
        collated = collate(ready)
        clock.append(time.process_time())
        normalize(collated.images, collated.photometric, collated.valid)
        clock.append(time.process_time())
        for stage, seconds in zip(STAGES, np.diff(clock).tolist(), strict=True):
            taken[stage] += seconds
    return taken
