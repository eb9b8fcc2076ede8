"""Seeded malformed data sets of small pictures, each of one kind, and an independent count of what they hold.

A kind writes a sound set (three classes, grey PNG masks) and spoils it, with parameters drawn from the seed.
Its outcome: "refused" with one line; "passes" as it is; "repaired" by the settings that the line names.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Array = np.ndarray
Rng = np.random.Generator
Settings = dict[str, Any]
CLASSES = 3
COLORS = np.array([[0, 0, 0], [200, 30, 30], [30, 60, 220]], np.uint8)


class Kind(NamedTuple):
    """What a malformed set is expected to end in, and what makes it: (root, rng) -> settings of `data`."""

    outcome: str
    spoil: Callable[[Path, Rng], Settings]


KINDS: dict[str, Kind] = {}


def kind(outcome: str) -> Callable[[Callable[[Path, Rng], Settings | None]], None]:
    """Enter a function as the kind of its name."""

    def enter(spoil: Callable[[Path, Rng], Settings | None]) -> None:
        def full(root: Path, rng: Rng) -> Settings:
            settings = {"classes": [f"c{k}" for k in range(CLASSES)]}
            return settings | (spoil(root, rng) or {})

        KINDS[spoil.__name__] = Kind(outcome, full)

    return enter


def sound(root: Path, rng: Rng, counts: tuple[int, int] = (5, 3), square: bool = False) -> None:
    """Photographs of noise, masks of rectangles: each holds all classes and some ignored pixels."""
    for split, count in zip(("train", "val"), counts, strict=True):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            height, width = (24, 24) if square else (int(n) for n in rng.integers(16, 40, 2))
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2, : int(rng.integers(3, width - 3))] = 1
            mask[height // 2 :, int(rng.integers(3, width - 3)) :] = 2
            mask[:2, :2] = 255
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(image).save(root / f"images/{split}/{number}.jpg")
            Image.fromarray(mask).save(root / f"masks/{split}/{number}.png")


def chosen(root: Path, rng: Rng, folder: str) -> Path:
    """Any file of the folder, in any split."""
    files = sorted((root / folder).glob("*/*"))
    return files[rng.integers(len(files))]


def every_mask(root: Path, change: Callable[[Array], Array | Image.Image], splits: str = "*") -> None:
    """Write each mask anew."""
    for path in sorted((root / "masks").glob(f"{splits}/*.png")):
        changed = change(np.asarray(Image.open(path)))
        (changed if isinstance(changed, Image.Image) else Image.fromarray(changed)).save(path)


def ids(*values: int, dtype: Any = np.uint8) -> Callable[[Array], Array]:
    """0, 1, 2, 255 -> these ids."""
    table = np.zeros(256, dtype)
    table[[0, 1, 2, 255]] = values
    return lambda mask: table[mask]


def true_counts(
    settings: Settings, root: Path, split: str, predict: Callable[[Path], Array] | None = None
) -> Array:
    """(K, K): pixels of class t that are predicted as p, by Pillow and NumPy from the files alone.

    predict: mask file -> class ids (H, W) of its image; None: a fixed pattern.
    """
    count = len(settings["classes"])
    label_map = settings.get("label_map") or {k: k for k in range(count)}
    colors = {tuple(color): number for number, color in enumerate(settings.get("mask_colours", []))}
    folder = root / settings.get("mask_dir", "masks/{split}").replace("{split}", split)
    names = settings.get("split_lists", {}).get(split)
    listed = None if names is None else set((root / names).read_text("utf-8-sig").split())
    found = np.zeros((count, count), np.int64)
    for path in sorted(folder.rglob("*.png")):
        if path.name.startswith(".") or (listed is not None and path.stem not in listed):
            continue
        with Image.open(path) as picture:
            raw = np.asarray(picture.convert("RGB") if colors else picture)
        predicted = predict(path) if predict else None
        for row in range(raw.shape[0]):
            for column in range(raw.shape[1]):
                value = raw[row, column]
                one = colors[tuple(value.tolist())] if colors else int(value)
                label = label_map.get(one, 255 if one == 255 else None)
                assert label is not None, (path, one)
                if label != 255:
                    pattern = (7 * row + 3 * column) % count
                    found[label, pattern if predicted is None else predicted[row, column]] += 1
    return found


@kind("passes")
def nothing_wrong(root: Path, rng: Rng) -> None:
    sound(root, rng)


@kind("refused")
def missing_mask(root: Path, rng: Rng) -> None:
    sound(root, rng)
    chosen(root, rng, "masks").unlink()


@kind("refused")
def missing_image(root: Path, rng: Rng) -> None:
    sound(root, rng)
    chosen(root, rng, "images").unlink()


@kind("refused")
def mask_of_another_size(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "masks")
    mask = np.asarray(Image.open(path))
    Image.fromarray(mask[1:] if rng.random() < 0.5 else mask.T[: mask.shape[1] - 1]).save(path)


@kind("repaired")
def colored_masks(root: Path, rng: Rng) -> None:
    sound(root, rng)
    colors = np.zeros((256, 3), np.uint8)
    colors[[1, 2]] = rng.choice(200, (2, 3), replace=False) + 1
    every_mask(root, lambda mask: colors[np.where(mask == 255, 0, mask)])


@kind("passes")
def palette_masks(root: Path, rng: Rng) -> None:
    sound(root, rng)

    def indexed(mask: Array) -> Image.Image:
        picture = Image.fromarray(mask)
        picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        return picture

    every_mask(root, indexed)


@kind("passes")
def masks_of_16_bits(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    values = (rng.choice(60000, 3, replace=False) + 300).tolist()
    every_mask(root, ids(*values, 255, dtype=np.uint16))
    return {"label_map": {value: train for train, value in enumerate(values)}}


@kind("passes")
def masks_of_one_bit(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    every_mask(root, lambda mask: Image.fromarray((mask == 1) | (mask == 255)))
    return {"classes": ["a", "b"]}


@kind("refused")
def float_tiff_masks(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for path in (root / "masks").glob("*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.float32)).save(path.with_suffix(".tif"))
        path.unlink()


@kind("passes")
def images_with_alpha(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for path in (root / "images").glob("*/*.jpg"):
        picture = Image.open(path).convert("RGBA")
        picture.putalpha(int(rng.integers(256)))
        picture.save(path.with_suffix(".png"))
        path.unlink()


@kind("refused")
def mask_with_alpha(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "masks")
    Image.open(path).convert("LA").save(path)


@kind("passes")
def grey_and_cmyk_images(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for path in (root / "images").glob("*/*.jpg"):
        Image.open(path).convert("L" if rng.random() < 0.5 else "CMYK").save(path)


@kind("refused")
def empty_file(root: Path, rng: Rng) -> None:
    sound(root, rng)
    chosen(root, rng, "images" if rng.random() < 0.5 else "masks").write_bytes(b"")


@kind("refused")
def truncated_file(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "images" if rng.random() < 0.5 else "masks")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * rng.uniform(0.2, 0.9))])


@kind("refused")
def text_named_png(root: Path, rng: Rng) -> None:
    sound(root, rng)
    chosen(root, rng, "masks").write_text("0 0 1\n" * 40)


@kind("refused")
def lossy_masks(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for path in (root / "masks").glob("*/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


@kind("passes")
def suffixes_in_capitals(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for path in list((root / "images").glob("*/*.jpg")):
        if rng.random() < 0.7:
            path.rename(path.with_suffix(".JPG"))


@kind("passes")
def hidden_files(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for folder in ("images/train", "masks/val"):
        (root / folder / "._1.png").write_bytes(rng.bytes(50))
        (root / folder / ".DS_Store").write_bytes(b"x")


@kind("refused")
def two_files_of_one_key(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "images")
    Image.open(path).save(path.with_suffix(".png"))


@kind("passes")
def nested_folders(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for folder in ("images", "masks"):
        for path in list((root / folder / "train").iterdir()):
            inside = path.parent / f"day{int(path.stem) % 2}"
            inside.mkdir(exist_ok=True)
            path.rename(inside / path.name)


@kind("refused")
def circle_of_links(root: Path, rng: Rng) -> None:
    sound(root, rng)
    (root / "images/train/again").symlink_to(root / "images", target_is_directory=True)


@kind("refused")
def pipe_as_image(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "images" if rng.random() < 0.5 else "masks")
    path.unlink()
    os.mkfifo(path)


@kind("refused")
def unknown_id(root: Path, rng: Rng) -> None:
    sound(root, rng)
    path = chosen(root, rng, "masks")
    mask = np.array(Image.open(path))
    mask[3:5, 3:5] = rng.integers(50, 200)
    Image.fromarray(mask).save(path)


@kind("repaired")
def binary_0_and_255(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    every_mask(root, ids(0, 255, 0, 0))
    return {"classes": ["a", "b"]}


@kind("repaired")
def scaled_ids(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(*([0, 127, 255, 0] if rng.random() < 0.5 else [0, 100, 200, 255])))


@kind("repaired")
def ids_off_by_one(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(1, 2, 3, 0 if rng.random() < 0.5 else 255))


@kind("repaired")
def one_class(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    every_mask(root, ids(0, 255, 255, 255))
    return {"classes": ["leaf"]}


@kind("refused")
def everything_ignored(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(255, 255, 255, 255))


@kind("refused")
def training_ignored(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(255, 255, 255, 255), "train")


@kind("refused")
def validation_ignored(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(255, 255, 255, 255), "val")


@kind("repaired")
def class_never_in_training(root: Path, rng: Rng) -> None:
    sound(root, rng)
    lost = int(rng.integers(3))
    every_mask(root, lambda mask: np.where(mask == lost, (lost + 1) % 3, mask).astype(np.uint8), "train")


@kind("passes")
def class_never_in_validation(root: Path, rng: Rng) -> None:
    sound(root, rng)
    every_mask(root, ids(0, 1, 1, 255), "val")


@kind("repaired")
def one_folder_twice(root: Path, rng: Rng) -> Settings:
    sound(root, rng, counts=(int(rng.integers(4, 12)), 1))
    return {"image_dir": "images/train", "mask_dir": "masks/train"}


@kind("repaired")
def equal_bytes_in_two_splits(root: Path, rng: Rng) -> None:
    sound(root, rng)
    source = rng.integers(5)
    shutil.copy(root / f"images/train/{source}.jpg", root / "images/val/copy.jpg")
    shutil.copy(root / f"masks/train/{source}.png", root / "masks/val/copy.png")


@kind("passes")
def turned_square_images(root: Path, rng: Rng) -> None:
    sound(root, rng, square=True)
    exif = Image.Exif()
    exif[274] = int(rng.integers(2, 9))
    path = chosen(root, rng, "images")
    Image.open(path).save(path, exif=exif)


@kind("refused")
def turned_images_with_upright_masks(root: Path, rng: Rng) -> None:
    sound(root, rng)
    exif = Image.Exif()
    exif[274] = 6
    path = root / "images/train/0.jpg"
    image = rng.integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(image).save(path, exif=exif)
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(root / "masks/train/0.png")


@kind("repaired")
def twelve_bits_in_16(root: Path, rng: Rng) -> None:
    sound(root, rng)
    most = 2 ** int(rng.integers(9, 14)) - 1
    for path in (root / "images").glob("*/*.jpg"):
        with Image.open(path) as picture:
            width, height = picture.size
        pixels = rng.integers(0, most, (height, width), np.uint16, endpoint=True)
        pixels[0, 0] = most
        Image.fromarray(pixels).save(path.with_suffix(".png"))
        path.unlink()


@kind("refused")
def blended_colors(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    method = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]

    def smooth(mask: Array) -> Image.Image:
        picture = Image.fromarray(COLORS[np.where(mask == 255, 0, mask)])
        width, height = picture.size
        return picture.resize((width * 3 // 4, height * 3 // 4), method).resize((width, height), method)

    every_mask(root, smooth)
    return {"mask_colours": COLORS.tolist()}


@kind("refused")
def color_not_listed(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    every_mask(root, lambda mask: COLORS[np.where(mask == 255, 0, mask)])
    return {"mask_colours": COLORS[:2].tolist()}


@kind("refused")
def empty_split(root: Path, rng: Rng) -> None:
    sound(root, rng, counts=(5, 0))


@kind("refused")
def missing_split(root: Path, rng: Rng) -> None:
    sound(root, rng)
    shutil.rmtree(root / ("images", "masks")[rng.integers(2)] / "val")


@kind("refused")
def newline_in_a_name(root: Path, rng: Rng) -> None:
    sound(root, rng)
    (root / "images/train/1.jpg").rename(root / "images/train/1\n2.jpg")
    (root / "masks/train/1.png").rename(root / "masks/train/1\n2.png")


@kind("refused")
def name_that_is_not_utf8(root: Path, rng: Rng) -> None:
    sound(root, rng)
    for folder, suffix in (("images", b".jpg"), ("masks", b".png")):
        place = os.fsencode(root / folder / "train")
        os.rename(place + b"/1" + suffix, place + b"/caf\xe9" + suffix)


def _one_folder(root: Path, rng: Rng) -> Settings:
    sound(root, rng, counts=(8, 0))
    (root / "val.txt").write_text("5\n6\n7\n")
    lists = {"train": "train.txt", "val": "val.txt"}
    return {"image_dir": "images/train", "mask_dir": "masks/train", "split_lists": lists}


@kind("passes")
def list_with_a_byte_order_mark(root: Path, rng: Rng) -> Settings:
    settings = _one_folder(root, rng)
    (root / "train.txt").write_text("0\n1\n2\n3\n", "utf-8-sig")
    return settings


@kind("refused")
def list_with_a_missing_name(root: Path, rng: Rng) -> Settings:
    settings = _one_folder(root, rng)
    (root / "train.txt").write_text(f"0\n1\n{rng.integers(20, 99)}\n")
    return settings


@kind("refused")
def list_with_a_name_twice(root: Path, rng: Rng) -> Settings:
    settings = _one_folder(root, rng)
    (root / "train.txt").write_text("0\n1\n2\n1\n")
    return settings


@kind("repaired")
def lists_with_a_common_name(root: Path, rng: Rng) -> Settings:
    settings = _one_folder(root, rng)
    (root / "train.txt").write_text(f"0\n1\n2\n{rng.integers(5, 8)}\n")
    return settings


@kind("passes")
def label_map_that_merges(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    merged = int(rng.integers(2))
    return {"classes": ["a", "b"], "label_map": {0: 0, 1: 1, 2: merged}}


@kind("refused")
def label_map_to_no_class(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    return {"label_map": {0: 0, 1: 1, 2: int(rng.integers(3, 200))}}


@kind("refused")
def label_map_of_other_masks(root: Path, rng: Rng) -> Settings:
    sound(root, rng)
    return {"label_map": {int(rng.integers(3, 9)): 0, 11: 1, 12: 2}}
