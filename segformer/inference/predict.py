"""Prediction: a trained model and a photograph -> a class per pixel, and a picture of that.

    Predictor(image (H, W, 3) uint8 RGB) -> mask (H, W) uint8, class ids, at the size of the image

`predict` reads one JPEG or PNG file, or those of a folder (not of its sub-folders), and writes for each
    <output>/<stem>.png           indexed PNG: pixel values are class ids, colors are the palette
    <output>/<stem>_overlay.jpg   the photograph under the colors of its classes

Photographs are decoded as in training, then turned upright as their EXIF orientation says (training leaves
them as they are stored): masks and overlays are upright, and of the size of the upright picture.

Refuses files that are no whole JPEG or PNG or are larger than MAX_PIXELS or MAX_FILE_BYTES, two inputs with
one output name, an output that would overwrite an input, and the folder of the inputs as output. The
headers of all files are checked before the first is predicted.

Shapes: H W image, K classes.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segformer.data.loading.photometric import Normalize
from segformer.data.sources.dataset import IMAGE_SUFFIXES
from segformer.data.sources.decode import image_header, image_orientation, read_file, upright, whole_image
from segformer.errors import ConfigError, DataError, reported, reraise_as, within
from segformer.evaluation.drawing import overlay
from segformer.inference.export import build, open_checkpoint
from segformer.models.ops.argmax import upsample_argmax
from segformer.models.weights.bundle import Weights

HEADER_BYTES = 2**18  # EXIF, color profile and previews that come before the size of most JPEGs
MIN_SIDE = 32  # smaller images are padded with their edge pixels: the encoder reduces by 32


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    """A model and photographs for it."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    input: str = "???"
    "A JPEG or PNG file, or a folder of them."
    output: str = "???"
    "Folder to write to, not that of the input; made if it does not exist."
    device: str = "auto"
    "cpu, cuda, cuda:1, or auto: the first GPU where there is one."
    alpha: float = 0.5
    "Share of the class color in the overlay, 0 to 1."

    def __post_init__(self) -> None:
        within(self, "", alpha=(0, 1))


class Predictor:
    """A model with everything it needs to be used on photographs."""

    def __init__(self, trained: Weights, device: str = "auto") -> None:
        metadata = trained.metadata
        self.classes = metadata.classes
        self.palette = np.array(metadata.palette, np.uint8)
        self.device = _device(device)
        self.model: nn.Module = build(trained).to(self.device)
        self._normalize = Normalize(metadata.mean, metadata.std).to(self.device)

    @classmethod
    def from_export(cls, path: str | Path, device: str = "auto", step: str = "newest") -> "Predictor":
        """Open an export directory, or the checkpoint of a run that `step` names (see `open_checkpoint`).

        ConfigError where it is a classifier.
        """
        trained = open_checkpoint(path, step)
        if trained.arch.kind != "segmentation":
            raise ConfigError(
                f"{path} is a classifier of {trained.arch.num_classes} classes: it names a whole image and "
                "draws no mask; score it with launch/evaluate.py, or give a segmentation model"
            )
        return cls(trained, device)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Image (H, W, 3) uint8 RGB -> class ids (H, W) uint8."""
        height, width = image.shape[:2]
        missing = ((0, max(0, MIN_SIDE - height)), (0, max(0, MIN_SIDE - width)), (0, 0))
        padded = np.ascontiguousarray(np.pad(image, missing, mode="edge"))
        pixels = torch.from_numpy(padded).to(self.device).permute(2, 0, 1)[None]
        logits = self.model(self._normalize(pixels, None))
        prediction = upsample_argmax(logits, (padded.shape[0], padded.shape[1]))
        return prediction[0, :height, :width].to(torch.uint8).cpu().numpy()


def writing(place: object) -> AbstractContextManager[None]:
    """ConfigError that names the place where it can't be written."""
    return reraise_as(ConfigError, f"{place} can't be written", "choose another folder")


def predict(cfg: PredictConfig) -> list[Path]:
    """Write mask and overlay of every input image; returns the masks' paths."""
    output = Path(cfg.output)
    plan = _plan(Path(cfg.input), output)
    _check_headers([source for source, _ in plan], cfg.input)
    predictor = Predictor.from_export(cfg.checkpoint, cfg.device, cfg.step)
    with writing(f"output={output}"):
        output.mkdir(parents=True, exist_ok=True)
    for source, target in plan:
        image = read_image(source)
        mask = predictor(image)
        with writing(target):
            _write(target, mask, predictor.palette, overlay(image, mask, predictor.palette, cfg.alpha))
        print(f"{source} -> {target}: {_shares(mask, predictor.classes)}")
    return [target for _, target in plan]


def read_image(path: Path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB: decoded as in training, then turned as its EXIF orientation says.

    Raises:
        DataError: not a whole JPEG or PNG file, or above MAX_PIXELS or MAX_FILE_BYTES.
    """
    data = read_file(path)
    return upright(whole_image(path, data), image_orientation(data))


def _check_headers(images: list[Path], source: str) -> None:
    """DataError where a file is no JPEG or PNG within the limits, as far as its first bytes show."""
    errors: list[DataError] = []
    for path in images:
        with reported(errors.append, on=DataError):
            try:
                image_header(read_file(path, HEADER_BYTES))
            except ValueError:  # it is no image, or its size comes later
                read_image(path)
    if errors:
        what = f"{len(errors)} of the {len(images)} images in input={source} can't be used; the first: "
        raise DataError(f"{what if len(images) > 1 else ''}{errors[0]}")


def _plan(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """(image, mask to write) for a file or folder, sorted by name."""
    if not (source.is_dir() or source.is_file()):
        raise DataError(f"input={source} is no file or folder; give an image file or a folder of images")
    images = [source]
    if source.is_dir():
        images = sorted(p for p in source.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(
            f"input={source} holds no {', '.join(IMAGE_SUFFIXES)} file; sub-folders are not searched"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file; give a folder")
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
    indexed.save(target, optimize=True)
    Image.fromarray(picture).save(_overlay_path(target), quality=90, subsampling=0)


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
