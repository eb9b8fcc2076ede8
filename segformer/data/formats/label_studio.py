"""Label Studio: the JSON export, a list of tasks; the images lie in a folder beside it.

    [{"id": 1, "data": {"image": "/data/upload/1/3f2a9c11-a.jpg"}, "annotations": [{"was_cancelled": false,
      "ground_truth": false, "result": [{"id": "x1", "type": "polygonlabels", "original_width": 640,
        "original_height": 480, "image_rotation": 0,
        "value": {"points": [[x, y], ...], "polygonlabels": ["leaf"]}}]}]}]

Coordinates are per cent of the width and height.

    polygon       points
    rectangle     x, y of its upper left corner, width, height; turned around that corner, clockwise
    ellipse       x, y of its center, radiusX, radiusY; turned around the center
    brush         rle: pixels of four bytes; the area is where the last, alpha, is above half of its largest
    keypoint, choices, relation and all others    no areas: counted, not drawn

A region's label stands with it (polygonlabels), or in a result of its own with the same id (labels). Of
several annotations of a task the ground truth counts; two others are a defect; cancelled ones and predictions
do not count. An image is found by the end of its address; the 8 signs that an upload puts before a name may
be missing."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from segformer.data.formats.base import Found, Labeled, Outline, head, need, read_entries
from segformer.data.formats.outlines import Pictures, box, ellipse, numbers, picture_size, rings, run_lengths
from segformer.data.sources.dataset import MAX_PIXELS

AREAS = ("polygon", "rectangle", "ellipse", "brush")
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
_PLACE = "{split}.json"


def detect(found: Found) -> bool:
    """One JSON file in the folder is an export."""
    names = _exports(found.root)
    return len(names) == 1 or (bool(names) and found.first(_PLACE) in names)


def _exports(root: Path) -> list[str]:
    found = []
    for path in sorted(root.glob("*.json")):
        start = head(path)
        if start[:1] == b"[" and b'"annotations"' in start and b'"result"' in start:
            found.append(path.name)
    return found


def read(found: Found) -> None:
    """The images of the annotated tasks in the export of a split, or in the one there is."""
    path = found.labels(_PLACE, *_exports(found.root), pooled=True)
    place, pictures = found.below(path), Pictures(found)
    for number, (_, task) in enumerate(read_entries(path), 1):
        where = f"{str(path)!r}, task {task.get('id', number) if isinstance(task, dict) else number}"
        with found.refusing(where, "correct it in Label Studio and export as JSON again"):
            name = _image(need(task, "data", dict, where))
            annotation = _annotation(need(task, "annotations", list, where))
            if annotation is None:
                found.skip(place, "task without an annotation", name)
                continue
            one = _picture(pictures, name)
            results = need(annotation, "result", list, where)
            one.size = _size(results)
            one.shapes = tuple(_shapes(found, place, results, where, name, one.size))
            found.labeled.append(one)
    pictures.count_unused()


def _image(data: dict[str, Any]) -> str:
    """The path of the image that a task is about, as its server has it."""
    texts = [value for value in (data.get("image"), *data.values()) if isinstance(value, str)]
    if not texts:
        raise ValueError("its data names no image")
    with suppress(ValueError):
        address = urlsplit(texts[0])
        return parse_qs(address.query).get("d", [unquote(address.path)])[0]
    raise ValueError(f"its image {texts[0]!r} is no address")


def _picture(pictures: Pictures, path: str) -> Labeled:
    folder, slash, name = path.replace("\\", "/").rpartition("/")
    if not pictures.has(name):
        name = _UPLOADED.sub("", name)
    return pictures.find(f"{folder}{slash}{name}", whole=False)


def _annotation(annotations: list[Any]) -> Any:
    """The one that counts; None where there is none."""
    valid = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
    truth = [one for one in valid if isinstance(one, dict) and one.get("ground_truth")] or valid
    if len(truth) > 1:
        raise ValueError(f"it has {len(truth)} annotations; mark one as the ground truth")
    return truth[0] if truth else None


def _size(results: list[Any]) -> tuple[int, int] | None:
    """The size of the image, which each region says."""
    found = {
        picture_size(one.get("original_height"), one.get("original_width"))
        for one in results
        if isinstance(one, dict) and "original_height" in one
    }
    if len(found) > 1:
        raise ValueError(f"its regions are of images of {len(found)} sizes")
    return found.pop() if found else None


def _shapes(
    found: Found, place: str, results: list[Any], where: str, name: str, size: tuple[int, int] | None
) -> Iterator[tuple[str, Outline]]:
    """The areas in their order. Results with one id are one region."""
    regions: dict[Any, list[tuple[str, Any]]] = {}
    for number, one in enumerate(results):
        kind = need(one, "type", str, where)
        if one.get("image_rotation"):
            raise ValueError("its image was turned in Label Studio; turn the file, and label it as it lies")
        key = one.get("id")
        regions.setdefault(key if isinstance(key, str) else number, []).append((kind, one.get("value")))
    for parts in regions.values():
        kinds = [kind.removesuffix("labels") for kind, _ in parts]
        areas = [kind for kind in kinds if kind in AREAS]
        if len(areas) > 1:
            raise ValueError("two of its regions have one id")
        if not areas:
            if "bitmask" in kinds:
                raise ValueError("it has a bitmask; label with BrushLabels")
            found.skip(place, parts[0][0], name)
            continue
        value: dict[str, Any] = {}
        for part in parts:
            value |= need(dict([part]), part[0], dict, where)
        lists = [need(value, kind, list, where) for kind, _ in parts if kind.endswith("labels")]
        labels = [label for one in lists for label in one]
        if len(labels) != 1 or not isinstance(labels[0], str) or size is None:
            raise ValueError(f"a region has {len(labels)} labels and the size {size}; it needs one of both")
        yield (
            labels[0],
            _brush(value.get("rle"), size) if areas[0] == "brush" else _rings(areas[0], value, size),
        )


def _rings(area: str, value: dict[str, Any], size: tuple[int, int]) -> Outline:
    height, width = size
    scale = np.array([width / 100, height / 100])
    if area == "polygon":
        return rings(numbers(value.get("points"), (-1, 2)) * scale)
    keys = ("x", "y", "width", "height") if area == "rectangle" else ("x", "y", "radiusX", "radiusY")
    x, y, across, down = (numbers([value.get(key) for key in keys], (2, 2)) * scale).reshape(-1).tolist()
    (degrees,) = numbers([value.get("rotation", 0)], (1,))
    if area == "ellipse":
        return ellipse(x, y, across, down, degrees)
    return box(x, y, x + across, y + down, degrees, (x, y))


def _brush(packed: Any, size: tuple[int, int]) -> np.ndarray:
    """Run lengths of a brush region.

    Bits, the highest of a byte first: 32 for the number of bytes, 5 for the bits of a value, 4 each for four
    lengths of a count (all of them less one); then runs: 1 for a repeated value or values one by one, 2 for
    which length, the count less one, and the value or values.
    """
    height, width = picture_size(*size, MAX_PIXELS)
    try:
        data = bytes(packed) if isinstance(packed, list) else b""
    except (TypeError, ValueError) as error:
        raise ValueError("the rle of a brush region is no list of bytes") from error
    at = 0

    def take(bits: int) -> int:
        nonlocal at
        start, at = at, at + bits
        if at > 8 * len(data):
            raise ValueError("the rle of a brush region is truncated")
        return int.from_bytes(data[start // 8 : -(-at // 8)]) >> (-at % 8) & ((1 << bits) - 1)

    total, bits = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width or bits != 8:
        raise ValueError(f"the rle of a brush region has {total} values, its image {width} x {height} pixels")
    pixels = np.empty(total, np.uint8)
    done = 0
    while done < total:
        repeated, number = take(1), take(lengths[take(2)]) + 1
        if done + number > total:
            raise ValueError("the rle of a brush region runs over its end")
        values = take(8) if repeated else np.frombuffer(take(8 * number).to_bytes(number), np.uint8)
        pixels[done : done + number] = values
        done += number
    alpha = pixels.reshape(height, width, 4)[:, :, 3]
    return run_lengths(2 * alpha.astype(np.uint16) > int(alpha.max()), 0, 0, size)
