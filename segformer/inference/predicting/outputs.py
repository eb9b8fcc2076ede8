"""What is written of a prediction, by the names of `save=`; a file is there whole or not at all.

    mask            <name>.png                 indexed PNG: pixel values are class ids, colors the palette;
                    <name>.tif                 the same of a georeferenced image, and above MAX_PIXELS
    overlay         <name>_overlay.jpg         the photograph under the colors of its classes
    probabilities   <name>_probabilities.npy   float16 (K, H, W)
    confidence      <name>_confidence.png      of the class of the mask: 8 bits, 255 x probability
    entropy         <name>_entropy.png         8 bits, 255 x entropy / log(K): 0 = one class, 255 = all alike
    polygons        polygons.json              of all images: COCO, an annotation for each connected region
    areas           areas.csv                  of all images: image, class, pixels, share, area_m2

Polygons run along the edges of the pixels, in pixels from the top left corner: pycocotools draws the exact
mask of them. A region with holes is a run-length code, which COCO has no rings for.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from segformer.errors import DataError
from segformer.evaluation.drawing import write_picture
from segformer.files import staged, write_atomic
from segformer.inference.predicting.geotiff import reference, write_strips, writing
from segformer.inference.predictor import Prediction

ENDINGS = {
    "mask": (".png", ".tif"),
    "overlay": ("_overlay.jpg",),
    "probabilities": ("_probabilities.npy",),
    "confidence": ("_confidence.png",),
    "entropy": ("_entropy.png",),
    "polygons": (),
    "areas": (),
}
LARGE = ("mask", "overlay", "areas")
"What there is of an image above MAX_PIXELS; its overlay is a picture of every n-th pixel."
TABLES = {"areas": "areas.csv", "polygons": "polygons.json"}
MAX_PROBABILITIES = 2**30  # values of one image: 4 GiB while they are made


@dataclass(kw_only=True, slots=True)
class Done:
    """A picture whose files are written, and its part of the tables."""

    source: str
    size: tuple[int, int]
    pixels: np.ndarray
    "Of every class, int64."
    area: float | None = None
    "Square meters of a pixel, where the image says so."
    mask: Path | None = None
    "Where the mask is."
    regions: list[dict[str, Any]] = field(default_factory=list)


def ending(target: Path, text: str) -> Path:
    """The path of an output: a name may hold dots, so that no suffix is replaced."""
    return target.with_name(target.name + text)


def write(found: Prediction, source: Path, target: Path, save: Sequence[str], alpha: float) -> Done:
    """Write the files of a prediction; `target` is their path without ending."""
    from PIL import Image

    def picture(name: str, values: np.ndarray, **options: Any) -> None:
        with writing(path := ending(target, name)):
            write_picture(path, Image.fromarray(values), **options)

    place = reference(source)
    mask, area = None, place.area if place else None
    if "mask" in save and place:
        write_strips([found.mask], found.mask.shape, found.palette, mask := ending(target, ".tif"), place)
    elif "mask" in save:
        found.save(mask := ending(target, ".png"))
    if "overlay" in save:
        picture("_overlay.jpg", found.overlay(alpha), quality=90, subsampling=0)
    if found.confidence is not None:
        picture("_confidence.png", eight_bits(found.confidence))
    if found.entropy is not None:
        picture("_entropy.png", eight_bits(found.entropy))
    if found.probabilities is not None:
        data = io.BytesIO()
        np.save(data, found.probabilities.astype(np.float16), allow_pickle=False)
        with writing(path := ending(target, "_probabilities.npy")):
            write_atomic(path, data.getvalue(), durable=False)
    pixels = np.bincount(found.mask.ravel(), minlength=len(found.classes))
    shapes = [*regions(found.mask)] if "polygons" in save else []
    return Done(
        source=str(source), size=found.mask.shape, pixels=pixels, regions=shapes, mask=mask, area=area
    )


def eight_bits(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 as uint8."""
    return np.rint(shares * 255).astype(np.uint8)


def check_probabilities(classes: int, size: Sequence[int]) -> None:
    """DataError where the probabilities of an image are too many."""
    if classes * size[0] * size[1] > MAX_PROBABILITIES:
        what = f"probabilities of {classes} classes for {size[1]} x {size[0]} pixels are too many values"
        raise DataError(f"{what} (the limit is {MAX_PROBABILITIES}); leave save=probabilities out")


def regions(mask: np.ndarray) -> Iterator[dict[str, Any]]:
    """The connected regions (4 neighbors) of each class of a mask as COCO annotations without their ids."""
    for k in np.unique(mask).tolist():
        own = (mask == k).astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(own, connectivity=4)
        for index, (left, top, width, height, area) in enumerate(stats[1:].tolist(), 1):
            region = labels[top : top + height, left : left + width] == index
            yield {
                "category_id": k,
                "bbox": [left, top, width, height],
                "area": area,
                "iscrowd": 0,
                "segmentation": _segmentation(region, top, left, mask.shape),
            }


def _segmentation(own: np.ndarray, top: int, left: int, size: tuple[int, ...]) -> Any:
    """A region, whose box has its corner at (top, left) of an image of `size`, as rings or run lengths."""
    # In twice the size the outermost centers 2x and 2x + 1 of a pixel x stand for its edges x and x + 1.
    twice = own.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    rings, _ = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(rings) == 1:
        ring = (rings[0][:, 0].astype(np.int64) + 1) // 2 + (left, top)
        steps = np.diff(ring, axis=0, append=ring[:1])
        ring, steps = ring[steps.any(axis=1)], steps[steps.any(axis=1)]
        corners = (steps != np.roll(steps, 1, axis=0)).any(axis=1)
        return [ring[corners].ravel().tolist()]
    whole = np.zeros(size, bool)
    whole[top : top + own.shape[0], left : left + own.shape[1]] = own
    flat = np.concatenate([[False], whole.ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], ends, [whole.size]])).tolist()
    return {"size": list(size), "counts": counts}


class Tables:
    """The files of all images, a picture at a time: nothing but the list of images is held."""

    def __init__(self, classes: list[str], files: dict[str, TextIO]) -> None:
        self._classes, self._json = classes, files.get("polygons")
        self._areas = csv.writer(files["areas"], lineterminator="\n") if "areas" in files else None
        self._images: list[str] = []
        self._regions = itertools.count(1)
        if self._areas:
            self._areas.writerow(["image", "class", "pixels", "share", "area_m2"])
        if self._json:
            named = [{"id": k, "name": name} for k, name in enumerate(classes)]
            self._json.write(f'{{"categories": {json.dumps(named)},\n"annotations": [')

    def add(self, done: Done) -> None:
        """The next picture."""
        height, width = done.size
        for k in np.flatnonzero(done.pixels).tolist():
            if not self._areas:
                break
            count = int(done.pixels[k])
            area = "" if done.area is None else f"{count * done.area:.10g}"
            share = f"{count / (height * width):.6g}"
            self._areas.writerow([done.source, self._classes[k], count, share, area])
        if self._json:
            image = {"id": len(self._images) + 1, "file_name": done.source, "height": height, "width": width}
            self._images.append(json.dumps(image))
            for region in done.regions:
                number = next(self._regions)
                entry = json.dumps({"id": number, "image_id": image["id"], **region})
                self._json.write(f"{',' * (number > 1)}\n{entry}")

    def end(self) -> None:
        """All pictures are done."""
        if self._json:
            self._json.write(f'],\n"images": [{", ".join(self._images)}]}}\n')


@contextmanager
def tables(output: Path, save: Sequence[str], classes: list[str]) -> Iterator[Tables]:
    """The tables that `save` asks for, which are written where the block ends well."""
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for name in (name for name in TABLES if name in save):
            place = stack.enter_context(staged(output / TABLES[name], durable=False))
            file = place.open("x", newline="", encoding="utf-8", errors="surrogateescape")
            files[name] = stack.enter_context(file)
        yield (found := Tables(classes, files))
        found.end()
