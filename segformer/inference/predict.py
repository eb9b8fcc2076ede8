"""Prediction: a trained model and a photograph -> a class per pixel, and a picture of that.

    Predictor(image (H, W, 3) uint8 RGB) -> mask (H, W) uint8, class ids, at the size of the image

`predict` reads one picture, or those of a folder (not of its sub-folders), and writes for each, whole or not
at all,
    <output>/<stem>.png           indexed PNG: pixel values are class ids, colors are the palette
    <output>/<stem>_overlay.jpg   the photograph under the colors of its classes

JPEG and PNG are decoded as in training, TIFF, WebP, BMP and GIF by Pillow; then they are turned upright as
their EXIF orientation says (training leaves them as they are stored): masks and overlays are upright, and of
the size of the upright picture.

Refuses damaged files, several pictures in one file, more than MAX_PIXELS or MAX_FILE_BYTES, two inputs with
one output name, an output that would overwrite an input, and the folder of the inputs as output. The
headers of all files are checked before the first is predicted. What else a folder holds is counted and named;
where there are pictures of other formats among it, the command ends with an error once all others are done.

Shapes: H W image, K classes.
"""

import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from segformer.data.loading.photometric import Normalize
from segformer.data.sources.dataset import IMAGE_SUFFIXES, MAX_PIXELS
from segformer.data.sources.decode import (
    PNG_MAGIC,
    image_header,
    image_orientation,
    read_file,
    upright,
    whole_image,
)
from segformer.data.sources.folder import LeftOut, is_hidden, left_out, left_out_text
from segformer.errors import ConfigError, DataError, reported, reraise_as, say, within
from segformer.evaluation.drawing import overlay, write_picture
from segformer.evaluation.inference_mode import InferenceMode, InferenceModeConfig, check_images, trained_at
from segformer.inference.export import build, check_output, open_checkpoint
from segformer.models.ops.argmax import upsample_argmax
from segformer.models.weights.bundle import Weights

if TYPE_CHECKING:
    from PIL import Image

STILLS = ("TIFF", "WEBP", "BMP", "GIF")  # read by Pillow, beside JPEG and PNG
SUFFIXES = (*IMAGE_SUFFIXES, ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif")
OTHER_PICTURES = (
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jpe", ".svg", ".psd", ".ico", ".tga", ".exr"),
    *(".ppm", ".pgm", ".pbm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw"),
)
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")  # 8 bits a channel
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


class Predictor:
    """A model with everything it needs to be used on photographs."""

    def __init__(
        self, trained: Weights, device: str = "auto", mode: InferenceModeConfig | None = None
    ) -> None:
        metadata = trained.metadata
        self.mode = trained_at(mode or InferenceModeConfig(), metadata.long_side)
        self.classes = metadata.classes
        self.palette = np.array(metadata.palette, np.uint8)
        self.image_range = metadata.image_range
        self.device = _device(device)
        self.model: nn.Module = InferenceMode(build(trained).to(self.device), self.mode)
        self._normalize = Normalize(metadata.mean, metadata.std).to(self.device)

    @classmethod
    def from_export(
        cls,
        path: str | Path,
        device: str = "auto",
        step: str = "newest",
        mode: InferenceModeConfig | None = None,
    ) -> "Predictor":
        """Open an export directory, or the checkpoint of a run that `step` names (see `open_checkpoint`).

        Images larger than those of its training, which sharding reduced, are reduced alike unless `mode` says
        otherwise. ConfigError where it is a classifier.
        """
        trained = open_checkpoint(path, step)
        if trained.arch.kind != "segmentation":
            raise ConfigError(
                f"{path} is a classifier of {trained.arch.num_classes} classes: it names a whole image and "
                "draws no mask; score it with launch/evaluate.py, or give a segmentation model"
            )
        return cls(trained, device, mode)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image (H, W, 3) uint8 RGB -> class ids (H, W) uint8; ConfigError where the mode leaves nothing."""
        check_images(self.mode, [image.shape[:2]])
        pixels = torch.from_numpy(np.array(image, order="C")).to(self.device).permute(2, 0, 1)[None]
        logits = self.model(self._normalize(pixels, None))
        prediction = upsample_argmax(logits, (image.shape[0], image.shape[1]))
        return prediction[0].to(torch.uint8).cpu().numpy()


def writing(place: object) -> AbstractContextManager[None]:
    """ConfigError that names the place where it can't be written."""
    return reraise_as(ConfigError, f"{place} can't be written", "choose another folder")


def predict(cfg: PredictConfig) -> list[Path]:
    """Write mask and overlay of every input image; returns the masks' paths.

    DataError also where pictures of other formats were left out, once all others are done.
    """
    output = Path(cfg.output)
    images, unused = _pictures(Path(cfg.input))
    plan = _plan(images, Path(cfg.input), output)
    _check_headers(images, cfg.input)
    if unused:
        say(f"not used of input={cfg.input}: {left_out_text(unused)}")
    predictor = Predictor.from_export(cfg.checkpoint, cfg.device, cfg.step, cfg)
    if cfg.long_side is None and (side := predictor.mode.reduced_to):
        say(
            f"{cfg.checkpoint} was trained on images of at most {side} pixels a side: larger ones are "
            "reduced to that, and the masks enlarged again (long_side=0 takes them as they are)"
        )
    with writing(f"output={output}"):
        output.mkdir(parents=True, exist_ok=True)
    for source, target in plan:
        image = read_image(source, predictor.image_range)
        mask = predictor(image)
        with writing(target):
            _write(target, mask, predictor.palette, overlay(image, mask, predictor.palette, cfg.alpha))
        say(f"{source} -> {target}: {_shares(mask, predictor.classes)}")
    pictures = {kind: found for kind, found in unused.items() if kind in (*SUFFIXES, *OTHER_PICTURES)}
    if pictures:
        raise DataError(
            f"input={cfg.input} holds pictures that can't be read, {left_out_text(pictures)}; all others are "
            "done: save these as PNG or JPEG, or take them away"
        )
    return [target for _, target in plan]


def read_image(path: Path, image_range: Sequence[int] = ()) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB: decoded as in training, then turned as its EXIF orientation says.

    image_range: as `data.image_range` of the run.

    Raises:
        DataError: not one whole picture of a format that is read, or above MAX_PIXELS or MAX_FILE_BYTES.
    """
    from PIL import ImageOps

    data = read_file(path)
    if _trained_on(data):
        return upright(whole_image(path, data, image_range), image_orientation(data))
    with _still(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def _trained_on(data: bytes) -> bool:
    """The file begins as JPEG or PNG, or with nothing."""
    return data[:8] == PNG_MAGIC or data[:2] == b"\xff\xd8" or not data


@contextmanager
def _still(path: Path) -> Iterator["Image.Image"]:
    """A picture of one of STILLS, opened; DataError for all else, and for what the block can't decode."""
    from PIL import Image

    damaged = (OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error)  # as Image.open has
    unread = (*damaged, Image.DecompressionBombError)
    what = f"{str(path)!r} is not a whole picture of a format that is read (JPEG, PNG, {', '.join(STILLS)})"
    with (
        reraise_as(DataError, what, "replace, shrink or remove it", on=unread),
        warnings.catch_warnings(action="ignore"),  # of odd entries beside the pixels
        Image.open(path, formats=STILLS) as picture,
    ):
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, the limit is {MAX_PIXELS}")
        if getattr(picture, "is_animated", False):
            raise ValueError("it holds several pictures")
        if picture.mode not in _MODES:
            raise ValueError(f"its pixels ({picture.mode}) are not of 8 bits a channel")
        yield picture


def _check_headers(images: list[Path], source: str) -> None:
    """DataError where a file is no picture within the limits, as far as its first bytes show."""
    errors: list[DataError] = []
    for path in images:
        with reported(errors.append, on=DataError):
            first = read_file(path, HEADER_BYTES)
            if not _trained_on(first):
                with _still(path):
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
        raise DataError(f"input={source} holds no picture ({', '.join(SUFFIXES)}){there}; give their folder")
    return [source / name for name in used], unused


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


def _write(target: Path, mask: np.ndarray, palette: np.ndarray, picture: np.ndarray) -> None:
    from PIL import Image

    indexed = Image.fromarray(mask)
    indexed.putpalette(np.pad(palette, ((0, 256 - len(palette)), (0, 0))).tobytes())  # "L" becomes "P"
    write_picture(target, indexed, optimize=True)
    write_picture(_overlay_path(target), Image.fromarray(picture), quality=90, subsampling=0)


def _shares(mask: np.ndarray, classes: list[str], shown: int = 4) -> str:
    """The largest classes of a mask with their share of the pixels."""
    counts = np.bincount(mask.ravel(), minlength=len(classes)) / mask.size
    largest = np.argsort(-counts, kind="stable")[:shown]
    return ", ".join(f"{classes[k]} {counts[k]:.0%}" for k in largest if counts[k] > 0)


def _device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *["cuda"][:count], *(f"cuda:{index}" for index in range(count))]
    if name != "auto" and name not in known:
        raise ConfigError(f"device={name!r} is not there; use auto or one of {', '.join(known)}")
    return torch.device(("cuda" if count else "cpu") if name == "auto" else name)
