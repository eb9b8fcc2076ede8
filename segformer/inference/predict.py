"""Prediction: a trained model and photographs in files -> a class per pixel, and a picture of that.

`predict` takes what predicting/inputs.py finds, and writes for each picture what `save` names
(predicting/outputs.py), by default
    <output>/<name>.png           indexed PNG: pixel values are class ids, colors are the palette
    <output>/<name>_overlay.jpg   the photograph under the colors of its classes

Masks and overlays are upright, and of the size of the upright picture. Decoding and writing go on in threads
while the network computes (predicting/pipeline.py).

A picture that can't be used is named in a line when it is its turn, and skipped; so is what else a folder
holds, in one line at the start. Exit codes: 0 where all is done, 1 (Incomplete) where pictures were skipped,
2 (DataError) where none could be used, and for what is wrong before the first.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path

import numpy as np

from segformer.data.sources.folder import LeftOut, left_out_text
from segformer.errors import ConfigError, DataError, Incomplete, at_least, reported, say, within
from segformer.evaluation.inference_mode import InferenceModeConfig, settings
from segformer.inference.export import check_output
from segformer.inference.photograph import SUFFIXES
from segformer.inference.predicting.geotiff import NEEDED, there, writing
from segformer.inference.predicting.inputs import check_folder, find, plan
from segformer.inference.predicting.outputs import (
    ENDINGS,
    Done,
    check_probabilities,
    tables,
    write,
)
from segformer.inference.predicting.pipeline import ahead, same_size
from segformer.inference.predicting.tiled import Tiled, predict_large, predict_whole, read
from segformer.inference.predicting.tiles import Blending, check_tile
from segformer.inference.predictor import Prediction, Predictor
from segformer.telemetry.progress import beside_bars, evaluated

OTHER_PICTURES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jpe", ".svg", ".psd", ".ico", ".tga", ".exr"),
    *(".ppm", ".pgm", ".pbm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"),
)
Job = tuple[Path, Path]
"""A picture, and the path of its outputs without their ending."""
Pixels = np.ndarray | Tiled


@dataclass(kw_only=True, slots=True)
class PredictConfig(InferenceModeConfig):
    """A model, photographs for it, and how it sees them."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    input: str = "???"
    """A picture (JPEG, PNG, TIFF, WebP, BMP, GIF), a folder of them, a pattern as 'photos/*.jpg', a .txt with
    a file a line, or [several,of,these]."""
    recursive: bool = False
    "Also the folders in a folder; the output has the same folders."
    output: str = "???"
    "Folder to write to, not that of the input; made if it does not exist."
    save: list[str] = field(default_factory=lambda: ["mask", "overlay"])
    "What is written: mask, overlay, probabilities, confidence, entropy, polygons (COCO), areas (CSV)."
    device: str = "auto"
    "cpu, cuda, cuda:1, or auto: the first GPU where there is one."
    tile: int = 0
    """Larger pictures are predicted in tiles of so many pixels a side, which are blended where they overlap;
    0 = whole, up to 50 million pixels."""
    overlap: int | None = None
    "Pixels that neighboring tiles have in common; null = a quarter of a tile."
    batch: int = 0
    "Pictures of one size that go through the network together; 0 = 8 on a GPU, 1 on a CPU."
    alpha: float = 0.5
    "Share of the class color in the overlay, 0 to 1."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        within(self, "", alpha=(0, 1))
        at_least(self, "", batch=0)
        if self.tile:
            check_tile(self.tile, self.overlap)
            if given := settings(self):
                raise ConfigError(f"{', '.join(given)} and tile={self.tile} exclude each other; give one")
        elif self.overlap is not None:
            raise ConfigError(f"overlap={self.overlap} is that of tiles; give tile=1024")
        if not self.save or set(self.save).difference(ENDINGS):
            raise ConfigError(f"save={self.save} must be some of {', '.join(ENDINGS)}: save=[mask,areas]")
        check_output(self.output, "the outputs of each picture are written into a folder")


class _Run:
    """One call of `predict`: what it works with, and what it has done."""

    def __init__(self, cfg: PredictConfig, predictor: Predictor, pictures: int) -> None:
        self.cfg, self.predictor, self.pictures = cfg, predictor, pictures
        self.keep = [name for name in ("probabilities", "confidence", "entropy") if name in cfg.save]
        self.batch = cfg.batch or (8 if predictor.device.type == "cuda" else 1)
        self.masks: list[Path] = []
        self.done = 0
        self.refused: list[DataError] = []

    def decode(self, job: Job) -> tuple[Job, Pixels | DataError]:
        """A picture, or why it can't be used."""
        try:
            found = read(job[0], self.predictor, self.cfg.tile, self.cfg.save)
            if "probabilities" in self.keep:
                check_probabilities(len(self.predictor.classes), found.shape)
        except DataError as error:
            return job, error
        return job, found

    def refuse(self, error: DataError) -> None:
        """Name a picture that is skipped; a single one is named at the end."""
        self.refused.append(error)
        if self.pictures > 1:
            with beside_bars():
                say(f"skipped: {error}", file=sys.stderr)

    def predicted(
        self, decoded: Iterator[tuple[Job, Pixels | DataError]]
    ) -> Iterator[tuple[Job, Prediction | Done]]:
        """Each picture that can be used, with its prediction; those of one size together."""

        def usable() -> Iterator[tuple[Job, Pixels]]:
            for job, found in decoded:
                if isinstance(found, DataError):
                    self.refuse(found)
                else:
                    yield job, found

        for group in same_size(usable(), self.batch):
            images = [image for _, image in group if isinstance(image, np.ndarray)]
            predictions = iter(self.predictor.of_one_size(images, self.keep) if images else [])
            for job, found in group:
                if not isinstance(found, Tiled):
                    yield job, next(predictions)
                    continue
                with reported(self.refuse, on=DataError):  # damage that is seen as its rows are read
                    yield job, self._of_tiles(job, found)

    def _of_tiles(self, job: Job, found: Tiled) -> Prediction | Done:
        """A picture in tiles; one that is too large to be held is written as well."""
        (source, target), size, cfg = job, (found.shape[0], found.shape[1]), self.cfg
        overlap = check_tile(cfg.tile, cfg.overlap)
        blending = Blending(self.predictor, found.rows, size, tile=cfg.tile, overlap=overlap, keep=self.keep)
        verb, total = f"{source.name}: predicted", prod(blending.tiles)
        with evaluated(total, lambda line: say(line, file=sys.stderr), verb, "tiles") as advance:
            if found.image is not None:
                return predict_whole(found.image, blending, advance)
            self.make(target.parent)
            return predict_large(blending, source, target, cfg.save, cfg.alpha, advance)

    def make(self, folder: Path) -> None:
        """The folder of an output."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, one: tuple[Job, Prediction | Done]) -> tuple[Job, Done]:
        """The files of a prediction."""
        (source, target), found = one
        if isinstance(found, Done):
            return one[0], found
        self.make(target.parent)
        return one[0], write(found, source, target, self.cfg.save, self.cfg.alpha)

    def finish(self, job: Job, done: Done) -> None:
        """Say what is in a picture whose files are written."""
        self.done += 1
        shares = done.pixels / max(1, done.size[0] * done.size[1])
        largest = ", ".join(
            f"{self.predictor.classes[k]} {f'{shares[k]:.0%}' if shares[k] >= 0.005 else '<1%'}"
            for k in np.argsort(-shares, kind="stable")[:4].tolist()
            if shares[k] > 0
        )
        with beside_bars():
            say(f"{job[0]} -> {done.mask or job[1]}: {largest}")
        if done.mask:
            self.masks.append(done.mask)


def predict(cfg: PredictConfig) -> list[Path]:
    """Write what `cfg.save` names of every input; returns the masks' paths.

    Raises:
        Incomplete: some pictures can't be used, or have other formats; all others are done.
        DataError: there is none that can be used.
    """
    output = Path(cfg.output)
    pictures, base, unused = find(cfg.input, cfg.recursive)
    check_folder(base, output, os.path.isdir(cfg.input), cfg.recursive)
    jobs = plan(pictures, base, output, [text for name in cfg.save for text in ENDINGS[name]])
    mode = {key.name: getattr(cfg, key.name) for key in fields(InferenceModeConfig)}
    mode |= {"long_side": 0} if cfg.tile else {}
    predictor = Predictor(cfg.checkpoint, step=cfg.step, device=cfg.device, **mode)
    if unused:
        say(f"not used of input={cfg.input}: {left_out_text(unused)}")
    if cfg.long_side is None and not cfg.tile and (side := predictor.mode.reduced_to):
        say(
            f"{cfg.checkpoint} was trained on images of at most {side} pixels a side: larger ones are "
            "reduced to that, and the masks enlarged again (long_side=0 takes them as they are)"
        )
    if not there() and any(path.suffix.lower() in (".tif", ".tiff") for path in pictures):
        say(f"TIFFs may be georeferenced, which their masks keep with rasterio: {NEEDED}")
    with writing(f"output={output}"):
        output.mkdir(parents=True, exist_ok=True)
    run, start = _Run(cfg, predictor, len(jobs)), time.monotonic()
    with (
        tables(output, cfg.save, predictor.classes) as table,
        evaluated(len(jobs), lambda line: say(line, file=sys.stderr), "predicted") as advance,
        _threads() as readers,
        _threads() as writers,
    ):
        decoded = ahead(readers, run.decode, jobs, run.batch + 1)
        for job, done in ahead(writers, run.write, run.predicted(decoded), run.batch + 1):
            table.add(done)
            run.finish(job, done)
            advance(1)
    _summary(run, unused, time.monotonic() - start)
    return run.masks


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode or write; what waits when the block raises isn't begun."""
    pool = ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _summary(run: _Run, unused: LeftOut, seconds: float) -> None:
    """How much is done; what is raised where something is not."""
    total = run.done + len(run.refused)
    if not run.done and run.refused:
        what = f"none of the {total} pictures of input={run.cfg.input} can be used; the first: "
        raise DataError(f"{what if total > 1 else ''}{run.refused[0]}")
    *most, last = run.cfg.save
    kinds = f"{', '.join(most)} and {last}" if most else last
    rate = f"{run.done / seconds:.1f} img/s"
    say(f"predictions: {run.cfg.output} ({run.done} picture{'s' * (run.done > 1)}: {kinds} of each; {rate})")
    others = {kind: found for kind, found in unused.items() if kind in (*SUFFIXES, *OTHER_PICTURES)}
    parts = [f"{len(run.refused)} of {total} pictures can't be used and were skipped"] * bool(run.refused)
    if others:
        parts.append(
            f"there are pictures that can't be read, {left_out_text(others)}: save these as PNG or JPEG, or "
            "take them away"
        )
    if parts:
        raise Incomplete(f"input={run.cfg.input}: {'; '.join(parts)}; all others are done")
