"""Supervisely: meta.json with the classes; for each data set a folder of images and one of their JSON files.

    meta.json         {"classes": [{"title": "leaf", "shape": "polygon"}, ...], "tags": [...]}
    ds0/img/a.jpg     ds0/ann/a.jpg.json     data sets in others: ds0/datasets/ds1/img/, ds0/datasets/ds1/ann/
    {"size": {"height": 480, "width": 640}, "tags": [...], "objects": [{"classTitle": "leaf", "geometryType":
     "polygon", "points": {"exterior": [[x, y], ...], "interior": [[[x, y], ...], ...]}}, ...]}

    polygon      an outline and its holes. Whole numbers are pixels, as the SDK exports them, and a point is
                 the center of its pixel; numbers with decimals, as the labeling tool has them, are places
    rectangle    two corners; as whole numbers the first and the last pixel
    bitmap       {"data": base64 of zlib of a PNG, "origin": [column, row] of its first pixel}
    point, line, graph, cuboid, cuboid_2d, tags    no areas: counted, not drawn

A split is the data set of its name (`data.split_dirs`); without one all data sets are one pool."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.formats.base import Found, Labeled, Outline, key_of, need, read_labels
from segformer.data.formats.outlines import box, numbers, picture_size, png_mask, rings, run_lengths
from segformer.data.sources.folder import files_below, is_hidden

NO_AREAS = ("point", "line", "graph", "cuboid", "cuboid_2d")
META = "meta.json"


def detect(found: Found) -> bool:
    """A project with a data set lies there."""
    return (found.root / META).is_file() and any(found.root.glob("*/ann"))


def read(found: Found) -> None:
    """The images of the data sets of a split."""
    for one in need(read_labels(found.root / META), "classes", list, META):
        if need(one, "shape", str, META) not in NO_AREAS:
            found.categories.append(need(one, "title", str, META))
    place = found.folder()
    folder = found.below(place)
    names = {f"/{name}" for name in files_below(str(place)) if not is_hidden(name)}
    images = {name for name in names if "/img/" in name and name.lower().endswith(found.cfg.ends("image"))}
    for name in sorted(name for name in names if "/ann/" in name and name.endswith(".json")):
        path = f"{place}{name}"
        before, _, file = name.removesuffix(".json").rpartition("/ann/")
        image = f"{before}/img/{file}"
        with found.refusing(repr(path), "export the project with its images again"):
            content = read_labels(Path(path))
            if image not in images:
                raise ValueError(f"there is no image {f'{place}{image}'!r}")
            images.remove(image)
            sides = need(content, "size", dict, path)
            size = picture_size(sides.get("height"), sides.get("width"))
            shapes = tuple(_shapes(found, folder, content, path, image[1:], size))
            key = key_of(f"{before}/{file}"[1:])
            found.labeled.append(Labeled(key, f"{place}{image}", shapes, size=size))
    found.unlabeled(folder, (name[1:] for name in images))


def _shapes(
    found: Found, folder: str, content: Any, path: str, image: str, size: tuple[int, int]
) -> Iterator[tuple[str, Outline]]:
    for _ in need(content, "tags", list, path) if "tags" in content else ():
        found.skip(folder, "tag", image)
    for one in need(content, "objects", list, path):
        label = need(one, "classTitle", str, path)
        kind = need(one, "geometryType", str, path)
        if kind in NO_AREAS:
            found.skip(folder, kind, image)
        elif kind == "bitmap":
            bitmap = need(one, "bitmap", dict, path)
            mask = png_mask(need(bitmap, "data", str, path), packed=True)
            x, y = map(int, numbers(bitmap.get("origin"), (2,)))
            yield label, run_lengths(mask, x, y, size)
        elif kind in ("polygon", "rectangle"):
            points = need(one, "points", dict, path)
            outlines = [need(points, "exterior", list, path)]
            outlines += need(points, "interior", list, path)
            yield label, _rings(kind, outlines)
        else:
            raise ValueError(f"the geometry {kind!r} is unknown")


def _rings(kind: str, outlines: list[Any]) -> tuple[np.ndarray, ...]:
    """Of a polygon or rectangle; whole numbers are pixels."""
    pairs = [numbers(points, (-1, 2)) for points in outlines]
    pixels = all(np.asarray(points).dtype.kind == "i" for points in outlines)
    if kind == "polygon":
        return rings(*(own + pixels / 2 for own in pairs))
    (x0, y0), (x1, y1) = np.sort(numbers(pairs[0], (2, 2)), axis=0)
    return box(x0, y0, x1 + pixels, y1 + pixels)
