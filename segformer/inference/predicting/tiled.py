"""Pictures that are predicted in tiles: read, and written where they are above MAX_PIXELS.

Those have a mask, which is a TIFF, areas, and as overlay a picture of every n-th pixel of at most LONGEST
pixels a side. They are seen as they are stored, and refused where EXIF says that they are to be turned.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segformer.data.shards.tiling import Size
from segformer.data.sources.dataset import MAX_PIXELS, DatasetConfig
from segformer.data.sources.decode import FileBytes, larger
from segformer.data.sources.large import Rows, image_rows, image_size
from segformer.data.sources.picture import image_orientation
from segformer.errors import DataError, listed
from segformer.evaluation.drawing import displayed, overlay, write_picture
from segformer.inference.photograph import read_image
from segformer.inference.predicting.geotiff import reference, write_strips, writing
from segformer.inference.predicting.outputs import LARGE, Done, ending
from segformer.inference.predicting.tiles import Blending
from segformer.inference.predictor import Prediction, Predictor

LONGEST = 4096
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Tiled:
    """A picture that is larger than a tile."""

    shape: tuple[int, ...]
    rows: Rows
    image: np.ndarray | None
    "Where it is not above MAX_PIXELS."


def read(path: Path, predictor: Predictor, tile: int, save: Sequence[str]) -> np.ndarray | Tiled:
    """The pixels of a picture, or, where there are tiles (not 0), what gives them; DataError as there."""
    size: Size = (0, 0)
    with suppress(DataError):  # `read_image` says what is wrong with it
        size = image_size(path)
    if size[0] * size[1] <= MAX_PIXELS:
        image = read_image(path, predictor.image_range, predictor.pixels)
        small = not tile or max(image.shape[:2]) <= tile
        return image if small else Tiled(image.shape, lambda top, bottom: image[top:bottom], image)
    what = f"{str(path)!r} has {size[1]} x {size[0]} pixels, above the {MAX_PIXELS} that are predicted whole"
    if not tile:
        raise DataError(f"{what}; give tile=1024")
    if unfit := [name for name in save if name not in LARGE]:
        raise DataError(f"{what}: there is no {listed(unfit)} of it; give save=[{','.join(LARGE)}]")
    with larger():
        turned = image_orientation(FileBytes(path))
    if turned != 1:
        do = "turn it: mogrify -auto-orient"
        raise DataError(f"{what}, and is stored turned (EXIF orientation {turned}); {do}")
    channels, dtype = predictor.pixels
    cfg = DatasetConfig(channels=channels, dtype=dtype, image_range=list(predictor.image_range))
    return Tiled((*size, channels), image_rows(cfg, path), None)


def predict_whole(image: np.ndarray, blending: Blending, advance: Advance) -> Prediction:
    """The prediction of an image of at most MAX_PIXELS, from its blended tiles; `advance` counts these."""
    strips = [*blending.strips(lambda top, band: advance(blending.tiles[1]))]
    whole = {name: np.concatenate([strip[name] for strip in strips], axis=-2) for name in strips[0]}
    predictor = blending.predictor
    return Prediction(displayed(image), classes=predictor.classes, palette=predictor.palette, **whole)


def predict_large(
    blending: Blending, source: Path, target: Path, save: Sequence[str], alpha: float, advance: Advance
) -> Done:
    """Predict and write an image above MAX_PIXELS, by rows."""
    from PIL import Image

    height, width = blending.size
    step = -(-max(blending.size) // LONGEST)
    small: dict[int, np.ndarray] = {}
    classes: list[np.ndarray] = []

    def seen(top: int, band: np.ndarray) -> None:
        advance(blending.tiles[1])
        for row in range(-(-top // step) * step, min(top + len(band), height), step):
            small[row] = band[row - top, :width:step].copy()

    pixels = np.zeros(len(blending.predictor.classes), np.int64)

    def masks() -> Iterator[np.ndarray]:
        top = 0
        for strip in (found["mask"] for found in blending.strips(seen)):
            pixels[:] += np.bincount(strip.ravel(), minlength=len(pixels))
            classes.append(strip[-top % step :: step, ::step].copy())
            top += len(strip)
            yield strip

    palette, mask, place = blending.predictor.palette, None, reference(source)
    if "mask" in save:
        with writing(mask := ending(target, ".tif")):
            write_strips(masks(), blending.size, palette, mask, place)
    else:
        deque(masks(), maxlen=0)
    if "overlay" in save:
        image = displayed(np.stack([small[row] for row in range(0, height, step)]))
        picture = Image.fromarray(overlay(image, np.concatenate(classes), palette, alpha))
        with writing(path := ending(target, "_overlay.jpg")):
            write_picture(path, picture, quality=90, subsampling=0)
    area = place.area if place else None
    return Done(source=str(source), size=blending.size, pixels=pixels, mask=mask, area=area)
