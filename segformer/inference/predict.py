"""Prediction: a trained model and photographs in files -> a class per pixel, and a picture of that.

`predict` reads one picture, or those of a folder (not of its sub-folders), as photograph.py does, and writes
for each, whole or not at all,
    <output>/<stem>.png           indexed PNG: pixel values are class ids, colors are the palette
    <output>/<stem>_overlay.jpg   the photograph under the colors of its classes

Masks and overlays are upright, and of the size of the upright picture.

Refuses two inputs with one output name, an output that would overwrite an input, and the folder of the inputs
as output. The headers of all files are checked before the first is predicted. What else a folder holds is
counted and named; where there are pictures of other formats among it, the command ends with an error once all
others are done.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path

from segformer.data.sources.dataset import RGB
from segformer.data.sources.decode import image_header, read_file
from segformer.data.sources.folder import LeftOut, is_hidden, left_out, left_out_text
from segformer.data.sources.tiff import is_tiff
from segformer.errors import ConfigError, DataError, reported, reraise_as, say, within
from segformer.evaluation.drawing import write_picture
from segformer.evaluation.inference_mode import InferenceModeConfig
from segformer.inference.export import check_output
from segformer.inference.photograph import SUFFIXES, open_still, read_image, trained_on
from segformer.inference.predictor import Predictor

OTHER_PICTURES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jpe", ".svg", ".psd", ".ico", ".tga", ".exr"),
    *(".ppm", ".pgm", ".pbm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"),
)
HEADER_BYTES = 2**18  # EXIF, color profile and previews that come before the size of most JPEGs


@dataclass(kw_only=True, slots=True)
class PredictConfig(InferenceModeConfig):
    """A model, photographs for it, and how it sees them."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    input: str = "???"
    "A picture (JPEG, PNG, TIFF, WebP, BMP, GIF), or a folder of them."
    output: str = "???"
    "Folder to write to, not that of the input; made if it does not exist."
    device: str = "auto"
    "cpu, cuda, cuda:1, or auto: the first GPU where there is one."
    alpha: float = 0.5
    "Share of the class color in the overlay, 0 to 1."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        within(self, "", alpha=(0, 1))
        check_output(self.output, "a mask and an overlay of each picture are written into a folder")


def writing(place: object) -> AbstractContextManager[None]:
    """ConfigError that names the place where it can't be written."""
    return reraise_as(ConfigError, f"{place} can't be written", "choose another folder")


def predict(cfg: PredictConfig) -> list[Path]:
    """Write mask and overlay of every input image; returns the masks' paths.

    DataError also where pictures of other formats were left out, once all others are done.
    """
    from PIL import Image

    output = Path(cfg.output)
    images, unused = _pictures(Path(cfg.input))
    plan = _plan(images, Path(cfg.input), output)
    mode = {key.name: getattr(cfg, key.name) for key in fields(InferenceModeConfig)}
    predictor = Predictor(cfg.checkpoint, step=cfg.step, device=cfg.device, **mode)
    _check_headers(images, cfg.input, predictor)
    if unused:
        say(f"not used of input={cfg.input}: {left_out_text(unused)}")
    if cfg.long_side is None and (side := predictor.mode.reduced_to):
        say(
            f"{cfg.checkpoint} was trained on images of at most {side} pixels a side: larger ones are "
            "reduced to that, and the masks enlarged again (long_side=0 takes them as they are)"
        )
    with writing(f"output={output}"):
        output.mkdir(parents=True, exist_ok=True)
    for source, target in plan:
        found = predictor(source)
        with writing(target):
            found.save(target)
            picture = Image.fromarray(found.overlay(cfg.alpha))
            write_picture(_overlay_path(target), picture, quality=90, subsampling=0)
        shares = [*found.shares.items()][:4]
        largest = ", ".join(f"{name} {f'{share:.0%}' if share >= 0.005 else '<1%'}" for name, share in shares)
        say(f"{source} -> {target}: {largest}")
    say(f"predictions: {output} ({len(plan)} picture{'s' * (len(plan) > 1)}: mask and overlay of each)")
    pictures = {kind: found for kind, found in unused.items() if kind in (*SUFFIXES, *OTHER_PICTURES)}
    if pictures:
        raise DataError(
            f"input={cfg.input} holds pictures that can't be read, {left_out_text(pictures)}; all others are "
            "done: save these as PNG or JPEG, or take them away"
        )
    return [target for _, target in plan]


def _check_headers(images: list[Path], source: str, predictor: Predictor) -> None:
    """DataError where a file is no picture within the limits, as far as its first bytes show; TIFFs and
    all images that are not 8-bit RGB are decoded, for what tells their channels may come last."""
    errors: list[DataError] = []
    for path in images:
        with reported(errors.append, on=DataError):
            first = read_file(path, HEADER_BYTES)
            if predictor.pixels != RGB or is_tiff(first):
                read_image(path, predictor.image_range, predictor.pixels)
                continue
            if not trained_on(first):
                with open_still(path):
                    continue
            try:
                image_header(first)
            except ValueError:  # it is no image, or its size comes later
                read_image(path)
    if errors:
        what = f"{len(errors)} of the {len(images)} images in input={source} can't be used; the first: "
        raise DataError(f"{what if len(images) > 1 else ''}{errors[0]}")


def _pictures(source: Path) -> tuple[list[Path], LeftOut]:
    """The pictures of a file or folder, sorted by name, and what else the folder holds."""
    if not (source.is_dir() or source.is_file()):
        raise DataError(f"input={source} is no file or folder; give a picture or a folder of pictures")
    if source.is_file():
        return [source], {}
    with reraise_as(DataError, f"input={source} cannot be listed", "check its permissions"):
        names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(source))
    used = [
        name
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not is_hidden(name) and (source / name).is_file()
    ]
    unused = left_out(set(names).difference(used))
    if not used:
        there = f", but {left_out_text(unused)}" if unused else ""
        below = [f"input={path} ({count} picture{'s' * (count > 1)})" for path, count in _below(source)]
        do = f"give {' or '.join(below)}" if below else "give a folder of pictures"
        raise DataError(f"input={source} holds no picture ({', '.join(SUFFIXES)}){there}; {do}")
    return [source / name for name in used], unused


def _below(source: Path) -> list[tuple[Path, int]]:
    """The first folders below one that hold pictures, and how many."""
    found = []
    for path, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        used = sum(Path(name).suffix.lower() in SUFFIXES and not is_hidden(name) for name in names)
        found += [(Path(path), used)] if used else []
        if len(found) == 2:
            break
    return found


def _plan(images: list[Path], source: Path, output: Path) -> list[tuple[Path, Path]]:
    """(image, mask to write) for each image of the file or folder `source`."""
    if source.is_dir() and output.resolve() == source.resolve():
        raise ConfigError(
            f"output={output} is the input folder: masks would lie among the images; choose another folder"
        )
    inputs = {path.resolve() for path in images}
    plan: dict[Path, Path] = {}
    for path in images:
        target = output / f"{path.stem}.png"
        if target in plan:
            raise DataError(f"{plan[target].name} and {path.name} would both become {target}; rename one")
        if overwritten := inputs & {target.resolve(), _overlay_path(target).resolve()}:
            raise ConfigError(
                f"output={output} would overwrite the input {overwritten.pop()}; choose another folder"
            )
        plan[target] = path
    return [(path, target) for target, path in plan.items()]


def _overlay_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}_overlay.jpg")
