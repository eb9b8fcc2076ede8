"""The exports of labeling tools, written from shapes or masks.

A split is a list of Item; a shape is (category, outline), where the outline is a list of rings [(x, y), ...]
or a bool (H, W) mask. A format without holes gets one ring that goes through all of them and back; one
without bitmaps gets the traced borders of a mask's pixels.
"""

import base64
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np

Ring = list[tuple[float, float]]
Outline = list[Ring] | np.ndarray


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a split and what is drawn on it."""

    key: str
    image: np.ndarray
    """uint8 (H, W, 3)"""
    shapes: Sequence[tuple[str, Outline]]
    jpeg: bytes = b""
    """The file, where the image is not to be written as PNG."""

    @property
    def file(self) -> str:
        return f"{self.key}.{'jpg' if self.jpeg else 'png'}"


Splits = Mapping[str, Sequence[Item]]


def traced(mask: np.ndarray) -> list[Ring]:
    """The borders of the pixels of a bool (H, W) mask, as rings of corners."""
    height, width = mask.shape
    field = np.zeros((height + 2, width + 2), bool)
    field[1:-1, 1:-1] = mask
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in np.argwhere(field[:-1] != field[1:]).tolist():  # between rows y - 1 and y of the mask
        a, b = (x - 1, y), (x, y)
        ends.setdefault(a if field[y + 1, x] else b, []).append(b if field[y + 1, x] else a)
    for y, x in np.argwhere(field[:, :-1] != field[:, 1:]).tolist():
        a, b = (x, y - 1), (x, y)
        ends.setdefault(a if field[y, x] else b, []).append(b if field[y, x] else a)
    rings = []
    while ends:
        start = at = next(iter(ends))
        ring: Ring = []
        while at in ends:
            ring.append(at)
            following = ends[at].pop()
            if not ends[at]:
                del ends[at]
            at = following
        assert at == start
        rings.append(ring)
    return rings


def joined(outline: Outline) -> Ring:
    """One ring along all of them, with ways there and back between them."""
    first, *others = traced(outline) if isinstance(outline, np.ndarray) else outline
    return [*first, *itertools.chain(*([first[0], *ring, ring[0]] for ring in others)), *first[:1]]


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def _image(path: Path, item: Item) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(item.jpeg or png(item.image))


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _json(path: Path, content: Any) -> None:
    _text(path, json.dumps(content, ensure_ascii=False))


def yolo(root: Path, splits: Splits, classes: Sequence[str]) -> None:
    """data.yaml, images/<split>/ and labels/<split>/, as ultralytics has them."""
    names = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(classes))
    _text(root / "data.yaml", "".join(f"{s}: images/{s}\n" for s in splits) + f"names:\n{names}")
    for split, items in splits.items():
        for item in items:
            _image(root / f"images/{split}/{item.file}", item)
            height, width = item.image.shape[:2]
            lines = [
                f"{classes.index(name)} " + " ".join(f"{x / width} {y / height}" for x, y in joined(outline))
                for name, outline in item.shapes
            ]
            _text(root / f"labels/{split}/{item.key}.txt", "\n".join(lines))


def labelme(root: Path, splits: Splits, classes: Sequence[str] = ()) -> None:
    """A folder for each split with a JSON file beside every image; masks as masks."""
    for split, items in splits.items():
        for item in items:
            path = root / split / item.file
            _image(path, item)
            height, width = item.image.shape[:2]
            content = {"version": "5.5.0", "flags": {}, "shapes": [_labelme(*shape) for shape in item.shapes]}
            content |= {"imagePath": path.name, "imageData": None, "imageHeight": height, "imageWidth": width}
            _json(path.with_suffix(".json"), content)


def _labelme(name: str, outline: Outline) -> dict[str, Any]:
    shape = {"label": name, "group_id": None, "description": "", "flags": {}, "mask": None}
    if not isinstance(outline, np.ndarray):
        return shape | {"shape_type": "polygon", "points": joined(outline)}
    left, top, part = cut(outline)
    last = (left + part.shape[1] - 1, top + part.shape[0] - 1)
    mask = base64.b64encode(png(part.astype(np.uint8))).decode()
    return shape | {"shape_type": "mask", "points": [(left, top), last], "mask": mask}


def cut(mask: np.ndarray) -> tuple[int, int, np.ndarray]:
    """(left, top, the part of a mask within its box)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return int(columns[0]), int(rows[0]), part


def cvat(root: Path, splits: Splits, classes: Sequence[str]) -> None:
    """A project's annotations.xml with subsets, and images/."""
    labels = "".join(f"<label><name>{name}</name><type>any</type></label>" for name in classes)
    head = f"<version>1.1</version><meta><project><labels>{labels}</labels></project></meta>"
    images = []
    pairs = [(split, item) for split, items in splits.items() for item in items]
    for number, (split, item) in enumerate(pairs):
        _image(root / f"images/{split}/{item.file}", item)
        height, width = item.image.shape[:2]
        name = quoteattr(f"{split}/{item.file}")
        shapes = "\n".join(_cvat(*shape) for shape in item.shapes)
        values = f'id="{number}" name={name} subset="{split.title()}" width="{width}" height="{height}"'
        images.append(f"<image {values}>\n{shapes}\n</image>\n")
    text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{head}\n{"".join(images)}</annotations>'
    _text(root / "annotations.xml", text)


def _cvat(name: str, outline: Outline) -> str:
    values = f'label={quoteattr(name)} source="manual" occluded="0" z_order="0"'
    if not isinstance(outline, np.ndarray):
        return f'<polygon {values} points="{";".join(f"{x},{y}" for x, y in joined(outline))}"/>'
    left, top, part = cut(outline)
    runs = ", ".join(str(len([*run])) for _, run in itertools.groupby(part.reshape(-1).tolist()))
    runs = f"0, {runs}" if part[0, 0] else runs
    box = f'left="{left}" top="{top}" width="{part.shape[1]}" height="{part.shape[0]}"'
    return f'<mask {values} rle="{runs}" {box}/>'


def label_studio(root: Path, splits: Splits, classes: Sequence[str] = ()) -> None:
    """An export for each split, and the images by the names of their uploads; masks as brush regions."""
    for split, items in splits.items():
        tasks = []
        for number, item in enumerate(items):
            *folders, name = item.file.split("/")
            path = "/".join([*folders, f"{number:08x}-{name}"])
            _image(root / f"images/{split}/{path}", item)
            result = [_label_studio(item, f"r{n}", *shape) for n, shape in enumerate(item.shapes)]
            one = {"id": 7 * number, "was_cancelled": False, "ground_truth": False, "result": result}
            task = {"id": number, "annotations": [one], "data": {"image": f"/data/upload/1/{path}"}}
            tasks.append(task | {"file_upload": path, "predictions": [], "drafts": []})
        _json(root / f"{split}.json", tasks)


def _label_studio(item: Item, name: str, label: str, outline: Outline) -> dict[str, Any]:
    height, width = item.image.shape[:2]
    region = {"id": name, "original_width": width, "original_height": height, "image_rotation": 0}
    region |= {"from_name": "label", "to_name": "image", "origin": "manual"}
    if isinstance(outline, np.ndarray):
        value: dict[str, Any] = {"format": "rle", "rle": brush(outline), "brushlabels": [label]}
        return region | {"type": "brushlabels", "value": value}
    points = [(x / width * 100, y / height * 100) for x, y in joined(outline)]
    value = {"points": points, "closed": True, "polygonlabels": [label]}
    return region | {"type": "polygonlabels", "value": value}


def brush(mask: np.ndarray) -> list[int]:
    """A brush region: runs of equal values by their lengths, short ones value by value."""
    values = np.repeat(np.where(mask.reshape(-1), 255, 0), 4).tolist()
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for value, run in itertools.groupby(values):
        left = len([*run])
        while left:
            take = min(left, 2**16)
            which = next(n for n, size in enumerate(sizes) if take <= 2**size)
            listed = f"{value:08b}" if take > 4 else f"{value:08b}" * take
            bits += f"{int(take > 4)}{which:02b}{take - 1:0{sizes[which]}b}{listed}"
            left -= take
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def supervisely(root: Path, splits: Splits, classes: Sequence[str]) -> None:
    """A project with a data set for each split; masks as bitmaps."""
    _json(root / "meta.json", {"classes": [{"title": n, "shape": "any"} for n in classes], "tags": []})
    for split, items in splits.items():
        for item in items:
            _image(root / split / f"img/{item.file}", item)
            height, width = item.image.shape[:2]
            content = {"description": "", "tags": [], "size": {"height": height, "width": width}}
            objects = [_supervisely(*shape) for shape in item.shapes]
            _json(root / split / f"ann/{item.file}.json", content | {"objects": objects})


def _supervisely(name: str, outline: Outline) -> dict[str, Any]:
    if not isinstance(outline, np.ndarray):
        outer, *holes = [[(float(x), float(y)) for x, y in ring] for ring in outline]
        points = {"exterior": outer, "interior": holes}
        return {"classTitle": name, "geometryType": "polygon", "tags": [], "points": points}
    left, top, part = cut(outline)
    pixels = np.zeros((*part.shape, 4), np.uint8)
    pixels[part] = 255
    data = base64.b64encode(zlib.compress(png(pixels))).decode()
    bitmap = {"data": data, "origin": [left, top]}
    return {"classTitle": name, "geometryType": "bitmap", "tags": [], "bitmap": bitmap}


WRITERS = {
    "yolo": yolo,
    "labelme": labelme,
    "cvat": cvat,
    "label_studio": label_studio,
    "supervisely": supervisely,
}
