"""A trained model used on photographs, one or many, from Python.

    predictor = Predictor("runs/sample")              a run, one of its checkpoints, or an export
    found = predictor("photo.jpg")                    anything that photograph.py takes, or a list of it
    found.mask          (H, W) uint8, class ids, at the size of the image
    found.shares        {"background": 0.93, "nucleus": 0.07}
    found.overlay()     (H, W, 3) uint8, the image under the colors of its classes

A model of other images than 8-bit RGB takes files of them, and arrays (H, W, C) of its own dtype.

Images of a list that have one size go through the network together; the results are those of single ones,
but for rounding.

Shapes: B batch, H W image, K classes.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from segformer.data.loading.photometric import Normalize
from segformer.data.shards.tiling import Size
from segformer.data.sources.dataset import Pixels
from segformer.errors import ConfigError, DataError, listed, reraise_as
from segformer.evaluation.drawing import displayed, overlay, write_picture
from segformer.evaluation.inference_mode import InferenceMode, InferenceModeConfig, check_images, trained_at
from segformer.inference.export import build, open_checkpoint
from segformer.inference.photograph import Photograph, to_pixels
from segformer.models.ops.argmax import upsample_argmax
from segformer.models.ops.native import keep_freed_memory
from segformer.models.ops.resize import Enlargement
from segformer.models.weights.write import images_of
from segformer.training.overrides import check_values, type_of

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a model sees in one photograph."""

    image: np.ndarray
    "(H, W, 3) uint8 RGB, the photograph; of other images, a picture of them."
    mask: np.ndarray
    "(H, W) uint8, class ids."
    classes: list[str]
    palette: np.ndarray
    "(K, 3) uint8 RGB, the colors of the classes."
    probabilities: np.ndarray | None = None
    "(K, H, W) float32, where they were asked for: K floats for each pixel."
    confidence: np.ndarray | None = None
    "(H, W) float32, the probability of the class of the mask, where it was asked for."
    entropy: np.ndarray | None = None
    "(H, W) float32, that of the probabilities over log(K): 0 = one class alone, 1 = all alike."

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Prediction({height}x{width}: {listed([f'{k} {v:.0%}' for k, v in self.shares.items()])})"

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of every class that is there, the largest first."""
        shares = np.bincount(self.mask.ravel(), minlength=len(self.classes)) / self.mask.size
        order = np.argsort(-shares, kind="stable").tolist()
        return {self.classes[k]: float(shares[k]) for k in order if shares[k] > 0}

    def overlay(self, alpha: float = 0.5) -> np.ndarray:
        """The photograph under the colors of its classes, regions outlined, (H, W, 3) uint8."""
        return overlay(self.image, self.mask, self.palette, alpha)

    def save(self, path: str | Path) -> None:
        """Write the mask as an indexed PNG: pixel values are class ids, colors the palette.

        Raises:
            ConfigError: the name ends in something else than .png, or can't be written.
        """
        if Path(path).suffix.lower() != ".png":
            raise ConfigError(f"{path}: class ids stay what they are in PNG only; end the name in .png")
        with reraise_as(ConfigError, f"{path} can't be written", "choose another place"):
            write_picture(Path(path), self.indexed())

    def indexed(self) -> "Image.Image":
        """The mask as a picture whose values are class ids, and whose palette has their colors."""
        from PIL import Image

        indexed = Image.fromarray(self.mask)
        indexed.putpalette(np.pad(self.palette, ((0, 256 - len(self.palette)), (0, 0))).tobytes())
        return indexed


class Predictor:
    """A model with everything it needs to be used on photographs."""

    def __init__(
        self,
        path: str | Path,
        *,
        step: str | int = "newest",
        device: str | torch.device = "auto",
        **mode: Any,
    ) -> None:
        """Open an export directory, or the checkpoint of a run that `step` names (see `open_checkpoint`).

        mode: settings of InferenceModeConfig, such as flip=True, long_side=1024 or window=[512, 512]. Images
        larger than those of the training, which sharding reduced, are reduced alike unless it says otherwise.

        Raises:
            CheckpointError: there is no such model.
            ConfigError: it is a classifier, the device is not there, or a setting is wrong.
        """
        given: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in mode.items()
        }
        for name in given:
            type_of(InferenceModeConfig, name)
        check_values(InferenceModeConfig, asdict(InferenceModeConfig()) | given)
        settings, self.device = InferenceModeConfig(**given), _device(str(device))
        trained = open_checkpoint(path, str(step))
        if trained.arch.kind != "segmentation":
            raise ConfigError(
                f"{path} is a classifier of {trained.arch.num_classes} classes: it names a whole image and "
                "draws no mask; score it with launch/evaluate.py, or give a segmentation model"
            )
        metadata = trained.metadata
        self.mode = trained_at(settings, metadata.long_side)
        self.classes = metadata.classes
        self.palette = np.array(metadata.palette, np.uint8)
        self.image_range = metadata.image_range
        self.pixels = Pixels(*images_of(trained))
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = InferenceMode(build(trained).to(self.device), self.mode)
        self._normalize = Normalize(metadata.mean, metadata.std).to(self.device)

    @overload
    def __call__(self, images: Photograph, *, probabilities: bool = ..., batch: int = ...) -> Prediction: ...
    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], *, probabilities: bool = ..., batch: int = ...
    ) -> list[Prediction]: ...
    def __call__(
        self, images: Photograph | list[Any] | tuple[Any, ...], *, probabilities: bool = False, batch: int = 8
    ) -> Prediction | list[Prediction]:
        """The prediction of a photograph, or those of a list of them.

        probabilities: keep those of every class and pixel. batch: most images that go through the network
        at a time.

        Raises:
            DataError: an image is refused (photograph.py); of a list, it says which one.
            ConfigError: the mode leaves nothing of an image.
        """
        if batch < 1:
            raise ConfigError(f"batch={batch} must be 1 or more")
        keep = ("probabilities",) if probabilities else ()
        if not isinstance(images, list | tuple):
            pixels = to_pixels(images, self.image_range, self.pixels)
            return self.of_one_size([pixels], keep)[0]
        found: list[np.ndarray] = []
        for index, image in enumerate(images):
            with reraise_as(DataError, f"image {index} of {len(images)}", on=DataError):
                found.append(to_pixels(image, self.image_range, self.pixels))
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, pixels in enumerate(found):
            sizes.setdefault(pixels.shape, []).append(index)
        predictions: dict[int, Prediction] = {}
        for same in sizes.values():
            for start in range(0, len(same), batch):
                part = same[start : start + batch]
                predictions |= zip(part, self.of_one_size([found[i] for i in part], keep), strict=True)
        return [predictions[index] for index in range(len(found))]

    @torch.inference_mode()
    def of_one_size(self, images: list[np.ndarray], keep: Collection[str] = ()) -> list[Prediction]:
        """The predictions of images (H, W, C) of one size, as `to_pixels` gives them.

        keep: what else than the mask, of probabilities, confidence and entropy.
        """
        size = (images[0].shape[0], images[0].shape[1])
        check_images(self.mode, [size])
        found = self.read_out(self.logits(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)), size, keep)
        return [
            Prediction(displayed(image), classes=self.classes, palette=self.palette, **one)
            for image, one in zip(images, found, strict=True)
        ]

    def logits(self, pixels: Tensor) -> Tensor:
        """What the network, in its inference mode, gives of images (B, C, H, W) of the training's type."""
        return self.model(self._normalize(pixels.to(self.device), None))

    def read_out(self, logits: Tensor, size: Size, keep: Collection[str] = ()) -> list[dict[str, np.ndarray]]:
        """Mask, and what else is to be kept, of each image of `size` of which `logits` are (B, K, h, w)."""
        masks = upsample_argmax(logits, size).to(torch.uint8).cpu().numpy()
        return [
            {"mask": mask, **self._shares(one, size, keep)} for mask, one in zip(masks, logits, strict=True)
        ]

    def _shares(self, out: Tensor, size: Size, keep: Collection[str]) -> dict[str, np.ndarray]:
        """Probabilities, confidence and entropy, where they are to be kept, of one image (K, h, w)."""
        shapes = {"probabilities": (len(out), *size), "confidence": size, "entropy": size}
        found = {name: np.empty(shapes[name], np.float32) for name in keep}
        for rows, columns, shares in self._enlarged(out, size) if keep else ():
            if "probabilities" in found:
                found["probabilities"][:, rows, columns] = shares.transpose(0, 1).cpu().numpy()
            if "confidence" in found:
                found["confidence"][rows, columns] = shares.amax(1).cpu().numpy()
            if "entropy" in found:
                bits = torch.special.entr(shares).sum(1) / math.log(max(len(out), 2))
                found["entropy"][rows, columns] = bits.cpu().numpy()
        return found

    def _enlarged(self, out: Tensor, size: Size) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, probabilities (rows, K, columns)) of the tiles of an image."""
        small = out.float().permute(1, 0, 2).contiguous()
        if self.mode.flip or len(self.mode.scales) > 1:  # the mean of several views
            yield slice(0, size[0]), slice(0, size[1]), small
            return
        enlargement = Enlargement(out[None], size, torch.float32)
        for row, column in enlargement.tiles():
            yield row.rows, column.rows, enlargement.tile(small, row, column).softmax(1)


def _device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = "cpu" if name == "cpu:0" else name
    known = ["cpu", *["cuda"][:count], *(f"cuda:{index}" for index in range(count))]
    if name != "auto" and name not in known:
        raise ConfigError(f"device={name!r} is not there; use auto or one of {', '.join(known)}")
    return torch.device(("cuda" if count else "cpu") if name == "auto" else name)
