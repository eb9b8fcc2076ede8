"""labelme, and X-AnyLabeling: a JSON file of shapes for every image, most often beside it.

    {"version": "5.5.0", "flags": {}, "imagePath": "a.jpg", "imageData": null, "imageHeight": 480,
     "imageWidth": 640, "shapes": [{"label": "leaf", "shape_type": "polygon", "points": [[x, y], ...]}, ...]}

    polygon, oriented_rectangle, rotation   their points; a file of an old version names no type
    rectangle                               two corners, or four
    circle                                  its center and a point on it
    mask                                    the first and last pixel of a box, and a PNG of it in base64
    point, points, line, linestrip          no areas: counted, not drawn

They lie in `data.labels`, or in a folder for each split, or anywhere below root; `imagePath` goes from the
folder of its file. An image without a file is not used."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segformer.data.formats.base import Found, Labeled, Outline, head, inside, key_of, need, read_labels
from segformer.data.formats.outlines import box, ellipse, numbers, picture_size, png_mask, rings, run_lengths
from segformer.data.sources.folder import files_below, is_hidden

NO_AREAS = ("point", "points", "line", "linestrip")
_RING = (None, "", "polygon", "oriented_rectangle", "rotation")


def detect(found: Found) -> bool:
    """The first JSON file in or below a folder of labels has shapes."""
    for folder, _, names in os.walk(found.folder()):
        for name in sorted(name for name in names if name.endswith(".json") and not is_hidden(name))[:1]:
            start = head(Path(folder, name))
            return start[:1] == b"{" and b'"shapes"' in start
    return False


def read(found: Found) -> None:
    """The images of a split that have a file of shapes."""
    root, place = found.root, found.folder()
    folder = found.below(place)
    names = sorted(
        f"{folder}/{name}".removeprefix("./") for name in files_below(str(place)) if not is_hidden(name)
    )
    images: set[str] = set()
    for path in (name for name in names if name.endswith(".json")):
        with found.refusing(repr(f"{root}/{path}"), "correct it in labelme, or remove it"):
            content = read_labels(root / path)
            image = _image(root, path, content)
            if image in images:
                raise ValueError(f"the image {image!r} has labels already")
            images.add(image)
            size = picture_size(content.get("imageHeight"), content.get("imageWidth"))
            shapes = tuple(_shapes(found, folder, content, path, image, size))
            key = key_of(image.removeprefix(f"{folder}/"))
            found.labeled.append(Labeled(key, f"{root}/{image}", shapes, size=size))
    there = {name for name in names if name.lower().endswith(found.cfg.ends("image"))}
    found.unlabeled(folder, there - images)


def _image(root: Path, path: str, content: Any) -> str:
    """The path of the image below root."""
    name = need(content, "imagePath", str, path)
    image = inside(str(root), name, path.rpartition("/")[0])
    if not (root / image).is_file():
        raise ValueError(f"there is no image {image!r} below {str(root)!r}")
    return image


def _shapes(
    found: Found, folder: str, content: Any, path: str, image: str, size: tuple[int, int]
) -> Iterator[tuple[str, Outline]]:
    for shape in need(content, "shapes", list, path):
        label = need(shape, "label", str, path)
        kind, points = shape.get("shape_type"), need(shape, "points", list, path)
        if kind in NO_AREAS:
            found.skip(folder, kind, image)
        elif kind in _RING or (kind == "rectangle" and len(points) == 4):
            yield label, rings(points)
        elif kind == "rectangle":
            yield label, box(*numbers(points, (4,)))
        elif kind == "circle":
            x, y, at_x, at_y = numbers(points, (4,)).tolist()
            radius = math.hypot(at_x - x, at_y - y)
            yield label, ellipse(x, y, radius, radius)
        elif kind == "mask":
            x, y, right, lower = map(int, numbers(points, (4,)))
            mask = png_mask(need(shape, "mask", str, path))
            if mask.shape != (lower - y + 1, right - x + 1):
                raise ValueError(f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels does not fit its box")
            yield label, run_lengths(mask, x, y, size)
        else:
            raise ValueError(f"the shape type {kind!r} is unknown")
