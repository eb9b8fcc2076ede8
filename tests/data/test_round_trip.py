"""The sample written in each format and read again: its masks, pixel by pixel."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import writers as tools
from labels import counted
from PIL import Image
from writers import Item, traced

from segformer.data.formats.table import FORMATS, label_format, resolved
from segformer.data.sources.dataset import DatasetConfig, voc_palette
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import load_sample

SAMPLE = Path(__file__).resolve().parents[2] / "data_prep/sample"
CLASSES = ["background", "nucleus"]
FEW = 3  # images of a split in the fast set

Split = list[tuple[str, bytes, np.ndarray]]
"""Key, bytes of the JPEG, class of each pixel (H, W)."""


def sample(few: int | None) -> dict[str, Split]:
    """The pairs that come with the repository."""
    found = {}
    for split in ("train", "val"):
        images = sorted((SAMPLE / "images" / split).glob("*.jpg"))[:few]
        masks = [np.asarray(Image.open(SAMPLE / "masks" / split / f"{path.stem}.png")) for path in images]
        found[split] = [
            (path.stem, path.read_bytes(), mask) for path, mask in zip(images, masks, strict=True)
        ]
    return found


def put(path: Path, data: bytes | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else cv2.imencode(".png", data)[1].tobytes())


def outlines(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The rings around a mask (H, W) along the borders of its pixels; by even-odd they give it again."""
    padded = np.pad(mask.astype(np.int8), 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in np.argwhere(np.diff(padded, axis=0)[:, 1:-1]).tolist():
        steps.setdefault((column, row), []).append((column + 1, row))
        steps.setdefault((column + 1, row), []).append((column, row))
    for row, column in np.argwhere(np.diff(padded, axis=1)[1:-1]).tolist():
        steps.setdefault((column, row), []).append((column, row + 1))
        steps.setdefault((column, row + 1), []).append((column, row))
    rings = []
    while steps:
        here = start = next(iter(steps))
        ring = []
        while not ring or here != start:
            there = steps[here].pop()
            steps[there].remove(here)
            if len(ring) > 1 and (
                ring[-1][0] == ring[-2][0] == there[0] or ring[-1][1] == ring[-2][1] == there[1]
            ):
                ring.pop()
            ring.append(there)
            here = there
        rings.append(ring)
        steps = {place: ends for place, ends in steps.items() if ends}
    return rings


def write_voc(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    for split, pairs in sets.items():
        for key, image, ids in pairs:
            put(root / f"JPEGImages/{key}.jpg", image)
            picture = Image.fromarray(ids)
            picture.putpalette(voc_palette(256).tobytes())
            (root / "SegmentationClass").mkdir(exist_ok=True)
            picture.save(root / f"SegmentationClass/{key}.png")
        put(root / f"ImageSets/Segmentation/{split}.txt", "".join(f"{key}\n" for key, *_ in pairs).encode())
    return {"classes": CLASSES}


def write_cvat_masks(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    """CVAT's `Segmentation mask 1.1`: VOC's layout with masks in the colors of labelmap.txt."""
    write_voc(root, sets)
    put(root / "labelmap.txt", b"# label:color_rgb:parts:actions\nbackground:0,0,0::\nnucleus:250,50,83::\n")
    colors = np.array([[0, 0, 0], [250, 50, 83]], np.uint8)
    for pairs in sets.values():
        for key, _, ids in pairs:
            Image.fromarray(colors[ids]).save(root / f"SegmentationClass/{key}.png")
    return {}


def write_binary(root: Path, sets: dict[str, Split], form: str) -> dict[str, Any]:
    for split, pairs in sets.items():
        for key, image, ids in pairs:
            put(root / f"images/{split}/{key}.jpg", image)
            put(root / "masks" / form.format(key=key, name="nucleus"), (ids == 1) * np.uint8(255))
    return {"format": "binary_masks"}


def write_csv(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    with open((root / "pairs.csv"), "w", encoding="utf-8-sig", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", "mask", "split", "group"])
        for split, pairs in sets.items():
            for key, image, ids in pairs:
                put(root / f'my "photos", all/{key}.jpg', image)
                put(root / f"labels/{key}_mask.png", ids)
                table.writerow([f'my "photos", all/{key}.jpg', f"labels/{key}_mask.png", split, key[0]])
    return {"classes": CLASSES}


def write_parquet(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    import datasets

    features = datasets.Features({"pixel_values": datasets.Image(), "label": datasets.Image()})
    for split, name in (("train", "train"), ("val", "validation")):
        masks = [cv2.imencode(".png", ids)[1].tobytes() for *_, ids in sets[split]]
        rows = {
            "pixel_values": [{"bytes": image, "path": f"{key}.jpg"} for key, image, _ in sets[split]],
            "label": [{"bytes": mask, "path": None} for mask in masks],
        }
        (root / "data").mkdir(parents=True, exist_ok=True)
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(root / f"data/{name}-00000-of-00001.parquet")
    put(root / "id2label.json", json.dumps(dict(enumerate(CLASSES))).encode())
    return {}


def write_imagefolder(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    for split, pairs in sets.items():
        lines = ["file_name,mask_file_name"]
        for key, image, ids in pairs:
            put(root / split / f"{key}.jpg", image)
            put(root / split / f"masks/{key}.png", ids)
            lines.append(f"{key}.jpg,masks/{key}.png")
        put(root / split / "metadata.csv", "\n".join(lines).encode())
    return {"classes": CLASSES}


def coco_shape(ids: np.ndarray, how: str) -> Any:
    if how == "contours":  # through the centers of the outermost pixels, as many exporters have them
        found, _ = cv2.findContours((ids == 1).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return [(ring.reshape(-1) + 0.5).tolist() for ring in found if len(ring) > 2]
    if how == "polygons":  # parts are united, so that holes need one ring that goes through all and back
        first, *others = outlines(ids == 1)
        way = [*first, *(point for ring in others for point in (first[0], *ring, ring[0])), first[0]]
        return [[float(value) for point in way for value in point]]
    if how == "rle":
        return {"size": list(ids.shape), "counts": counted(ids == 1)}
    from pycocotools import mask

    encoded = mask.encode(np.asfortranarray(ids == 1, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write_coco(root: Path, sets: dict[str, Split], how: str) -> dict[str, Any]:
    for split, pairs in sets.items():
        images, shapes = [], []
        for number, (key, image, ids) in enumerate(pairs, 1):
            put(root / f"images/{split}/{key}.jpg", image)
            size = {"height": ids.shape[0], "width": ids.shape[1]}
            images.append({"id": number, "file_name": f"{key}.jpg", **size})
            if (ids == 1).any():
                about = {"id": number, "image_id": number, "category_id": 7, "iscrowd": int(how == "rle")}
                shapes.append({**about, "segmentation": coco_shape(ids, how)})
        names = [{"id": 7, "name": "nucleus"}]
        content = {"images": images, "annotations": shapes, "categories": names}
        put(root / f"annotations/instances_{split}.json", json.dumps(content).encode())
    return {}


def write_panoptic(root: Path, sets: dict[str, Split]) -> dict[str, Any]:
    for split, pairs in sets.items():
        images, notes = [], []
        for number, (key, image, ids) in enumerate(pairs, 1):
            put(root / f"images/{split}/{key}.jpg", image)
            segments = (ids + 1).astype(np.int64) * 70_000
            rgb = np.stack([segments & 255, segments >> 8 & 255, segments >> 16], 2).astype(np.uint8)
            place = root / f"annotations/panoptic_{split}/{key}.png"
            put(place, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
            images.append({"id": number, "file_name": f"{key}.jpg", "height": len(ids), "width": len(ids[0])})
            found = [{"id": (i + 1) * 70_000, "category_id": i + 1} for i in np.unique(ids).tolist()]
            notes.append({"image_id": number, "file_name": f"{key}.png", "segments_info": found})
        names = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": notes, "categories": names}
        put(root / f"annotations/panoptic_{split}.json", json.dumps(content).encode())
    return {}


def write_tool(root: Path, sets: dict[str, Split], name: str, bitmaps: bool) -> dict[str, Any]:
    """The export of a labeling tool: bitmaps, or polygons along the borders of the pixels."""
    made = {}
    for split, pairs in sets.items():
        made[split] = []
        for key, image, ids in pairs:
            mask = ids == 1
            shapes = [("nucleus", mask if bitmaps else traced(mask))] if mask.any() else []
            made[split].append(Item(key, np.empty((*ids.shape, 3), np.uint8), shapes, image))
    tools.WRITERS[name](root, made, CLASSES[1:])
    return {}


WRITERS: dict[str, tuple[str, Callable[[Path, dict[str, Split]], dict[str, Any]]]] = {
    "voc": ("voc", write_voc),
    "voc of CVAT": ("voc", write_cvat_masks),
    "a folder a class": ("binary_masks", lambda r, s: write_binary(r, s, "{name}/{key}.png")),
    "a folder an image": ("binary_masks", lambda r, s: write_binary(r, s, "{key}/{name}.png")),
    "a name a class": ("binary_masks", lambda r, s: write_binary(r, s, "{key}_{name}.png")),
    "csv": ("csv", write_csv),
    "parquet": ("huggingface", write_parquet),
    "imagefolder": ("huggingface", write_imagefolder),
    "coco polygons": ("coco", lambda r, s: write_coco(r, s, "polygons")),
    "coco run lengths": ("coco", lambda r, s: write_coco(r, s, "rle")),
    "coco packed run lengths": ("coco", lambda r, s: write_coco(r, s, "packed")),
    "coco panoptic": ("coco_panoptic", write_panoptic),
} | {
    f"{name} {kind}": (name, partial(write_tool, name=name, bitmaps=kind == "bitmaps"))
    for name in tools.WRITERS
    for kind in ("polygons", "bitmaps")
    if (name, kind) != ("yolo", "bitmaps")  # it has none
}


def wrong_pixels(root: Path, cfg: DatasetConfig, sets: dict[str, Split], form: str) -> int:
    """Pixels that differ from the sample's; the format must be found, and every image be there once."""
    assert label_format(cfg, root) == form
    cfg = resolved(cfg, root)
    assert cfg.classes == CLASSES
    wrong = 0
    for split, pairs in sets.items():
        samples, defects, _ = find_samples(cfg, root, split)
        assert not defects
        masks = {image: ids for _, image, ids in pairs}
        assert len(samples) == len(masks) == len(pairs)
        for one in samples:
            loaded = load_sample(cfg, one)
            assert loaded.mask is not None
            wrong += int((loaded.mask != masks.pop(loaded.image)).sum())
    return wrong


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves files open
@pytest.mark.parametrize("few", [FEW, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, (form, _) in WRITERS.items() if form in FORMATS])
def test_the_sample_has_the_masks_of_its_folder_in_every_format(
    name: str, few: int | None, tmp_path: Path
) -> None:
    form, write = WRITERS[name]
    sets = sample(few)
    root = tmp_path / "set"
    root.mkdir()
    assert wrong_pixels(root, DatasetConfig(**write(root, sets)), sets, form) == 0


def test_polygons_through_the_outermost_pixels_are_within_one_pixel_of_the_outline(tmp_path: Path) -> None:
    sets = {"train": sample(FEW)["train"]}
    write_coco(tmp_path, sets, "contours")
    cfg = resolved(DatasetConfig(splits=["train"]), tmp_path)
    samples, defects, _ = find_samples(cfg, tmp_path, "train")
    assert not defects
    wrong = total = 0
    for one, (_, _, mask) in zip(samples, sets["train"], strict=True):
        rings, _ = cv2.findContours((mask == 1).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        ids = cv2.drawContours(np.zeros_like(mask), rings, -1, 1, cv2.FILLED)  # they have no holes
        differ = load_sample(cfg, one).mask != ids
        thick = np.ones((3, 3), np.uint8)
        outline = cv2.dilate(ids, thick) != cv2.erode(
            ids, thick, borderType=cv2.BORDER_CONSTANT, borderValue=0
        )
        wrong, total = wrong + int(differ.sum()), total + int((ids == 1).sum())
        assert not (differ & ~outline).any()
    assert 0 < wrong < 0.1 * total  # a pixel at the right and lower borders
