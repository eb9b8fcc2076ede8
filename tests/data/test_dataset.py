import io
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.dataset import (
    DatasetConfig,
    Sample,
    class_palette,
    image_header,
    label_table,
    list_samples,
    load_sample,
)
from segformer.errors import ConfigError, DataError

IDS = np.array([[0, 1, 2, 2], [1, 1, 0, 2], [2, 0, 0, 1]], np.uint8)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A grey PNG written chunk by chunk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed(ids: np.ndarray, bits: int) -> bytes:
    """Rows of a grey PNG of 1 to 16 bits, filter type 0."""
    rows = b""
    for row in ids:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    return rows


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[bytes], Sample]:
    """A sample of a 4 x 3 image and the given mask file."""

    def make(mask: bytes) -> Sample:
        image = tmp_path / "a.png"
        cv2.imwrite(str(image), np.zeros((3, 4, 3), np.uint8))
        (tmp_path / "m.png").write_bytes(mask)
        return Sample("a", image, tmp_path / "m.png")

    return make


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_grey_mask_of_any_depth_gives_the_ids_it_stores(
    bits: int, pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    _, mask = load_sample(config, pair(png(4, 3, bits, packed(IDS, bits))))
    np.testing.assert_array_equal(mask, IDS)


def test_a_one_bit_mask_gives_zero_and_one(pair: Callable[[bytes], Sample], config: DatasetConfig) -> None:
    _, mask = load_sample(config, pair(png(4, 3, 1, packed(IDS % 2, 1))))
    np.testing.assert_array_equal(mask, IDS % 2)


def test_an_indexed_mask_gives_indices_and_not_colours(
    pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    picture = Image.fromarray(IDS).convert("P")
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.putdata(IDS.reshape(-1).tolist())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    _, mask = load_sample(config, pair(buffer.getvalue()))
    np.testing.assert_array_equal(mask, IDS)


def test_a_label_map_renames_merges_and_ignores_ids_above_255(pair: Callable[[bytes], Sample]) -> None:
    raw = np.array([[7, 900, 0, 8], [255, 7, 8, 8], [7, 7, 900, 0]], np.uint16)
    cfg = DatasetConfig(classes=["thing", "stuff"], label_map={7: 0, 8: 1, 900: 1, 0: 255})
    _, mask = load_sample(cfg, pair(png(4, 3, 16, packed(raw, 16))))
    expected = [[{7: 0, 8: 1, 900: 1}.get(int(value), 255) for value in row] for row in raw]
    np.testing.assert_array_equal(mask, expected)


def test_the_image_bytes_are_those_of_the_file(folder: Path, config: DatasetConfig) -> None:
    sample = list_samples(config, folder, "val")[3]
    image, mask = load_sample(config, sample)
    assert image == sample.image.read_bytes()
    np.testing.assert_array_equal(mask, np.asarray(Image.open(sample.mask)))


def test_samples_are_sorted_and_found_in_sub_folders_by_long_suffixes(tmp_path: Path) -> None:
    cfg = DatasetConfig(
        image_dir="left/{split}",
        mask_dir="fine/{split}",
        image_suffix="_left.png",
        mask_suffix="_ids.png",
        classes=["a"],
    )
    for key in ("bonn/b_2", "bonn/b_10", "aachen/a.1"):
        for kind, end in (("left", "_left.png"), ("fine", "_ids.png"), ("fine", "_colour.png")):
            path = tmp_path / kind / "train" / f"{key}{end}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    samples = list_samples(cfg, tmp_path, "train")
    assert [sample.key for sample in samples] == ["aachen/a.1", "bonn/b_10", "bonn/b_2"]
    assert samples[0].mask == tmp_path / "fine/train/aachen/a.1_ids.png"


def _resize(path: Path) -> None:
    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:-1])


def _colour(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((40, 56, 3), np.uint8))


def _paint(path: Path) -> None:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    mask[0, :2] = 254, 9
    cv2.imwrite(str(path), mask)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing root": (lambda root: shutil.rmtree(root), "is not a folder"),
    "missing image folder": (lambda root: shutil.rmtree(root / "images/train"), "image folder .* is missing"),
    "missing mask folder": (lambda root: shutil.rmtree(root / "masks/train"), "mask folder .* is missing"),
    "image without mask": (lambda root: (root / "masks/train/001.png").unlink(), r"no mask \(001\)"),
    "mask without image": (lambda root: (root / "images/train/001.jpg").unlink(), r"no image \(001\)"),
    "unread picture": (lambda root: (root / "images/train/x.JPG").touch(), r"do not end in '.jpg' \(x.JPG\)"),
    "empty split": (
        lambda root: [path.unlink() for path in root.rglob("train/*")],
        "the split is empty",
    ),
    "id outside the classes": (lambda root: _paint(root / "masks/train/000.png"), "holds the ids 9, 254"),
    "mask of another size": (lambda root: _resize(root / "masks/train/000.png"), "56 x 39 pixels"),
    "mask in colour": (lambda root: _colour(root / "masks/train/000.png"), "3 channels"),
    "image of 0 bytes": (lambda root: (root / "images/train/000.jpg").write_bytes(b""), "0 bytes"),
    "truncated image": (lambda root: _halve(root / "images/train/000.jpg"), "truncated"),
    "truncated mask": (
        lambda root: _halve(root / "masks/train/000.png"),
        "truncated|incomplete|unrecognized",
    ),
    "text as image": (lambda root: (root / "images/train/000.jpg").write_text("<html>"), "not a JPEG or PNG"),
}


def read_all(config: DatasetConfig, root: Path) -> None:
    """What sharding reads of the training split."""
    for sample in list_samples(config, root, "train"):
        load_sample(config, sample)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_that_names_it(
    name: str, make_folder: Callable[..., Path], tmp_path: Path, config: DatasetConfig
) -> None:
    root = make_folder(tmp_path / "set", {"train": 2})
    change, message = WRONG[name]
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        read_all(config, root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": True}, {"quality": 100, "subsampling": 0}]
)
def test_the_header_of_a_jpeg_gives_its_size(options: dict[str, object]) -> None:
    picture = Image.fromarray(np.zeros((37, 61, 3), np.uint8))
    if options.pop("exif", False):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees: the stored size counts
        options["exif"] = exif.tobytes() + b"\0" * 5000
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    assert image_header(buffer.getvalue()) == ("jpeg", 37, 61)


def test_an_image_above_the_pixel_limit_is_refused_by_its_header() -> None:
    assert image_header(png(5000, 5000, 8, b"")) == ("png", 5000, 5000)
    with pytest.raises(ValueError, match="20000 x 20000 pixels"):
        image_header(png(20000, 20000, 8, b""))


def test_every_cut_of_a_header_is_refused_or_gives_the_true_size() -> None:
    for data in (cv2.imencode(".jpg", np.zeros((9, 7, 3)))[1].tobytes(), png(7, 9, 8, b"")):
        for length in range(60):
            try:
                assert image_header(data[:length])[1:] == (9, 7)
            except ValueError:
                continue


def test_generated_colours_are_those_of_pascal_voc() -> None:
    palette = class_palette(DatasetConfig(classes=[str(index) for index in range(22)]))
    known = {
        0: [0, 0, 0],
        1: [128, 0, 0],
        2: [0, 128, 0],
        3: [128, 128, 0],
        15: [192, 128, 128],
        20: [0, 64, 128],
    }
    assert {index: palette[index].tolist() for index in known} == known


def test_given_colours_are_used(config: DatasetConfig) -> None:
    palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert class_palette(replace(config, palette=palette)).tolist() == palette


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_suffix": ".tif"}, "data.image_suffix='.tif'"),
        ({"mask_suffix": ".jpg"}, "data.mask_suffix='.jpg'"),
        ({"splits": ["../train"]}, "data.splits"),
        ({"classes": ["a", "b", "a"]}, "names a twice"),
        ({"classes": [str(index) for index in range(256)]}, "256 names"),
        ({"classes": ["a"], "palette": [[0, 0, 0], [1, 1, 1]]}, "2 colours for 1 classes"),
        ({"classes": ["a"], "palette": [[0, 0, 256]]}, "0 to 255"),
        ({"classes": ["a"], "label_map": {3: 1}}, "maps 3 to 1"),
        ({"classes": ["a"], "label_map": {70000: 0}}, "70000"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(**settings)


def test_no_classes_are_an_error_only_when_they_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"data.classes is empty"):
        label_table(DatasetConfig())
