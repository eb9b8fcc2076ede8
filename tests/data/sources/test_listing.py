import errno
import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from samples import list_samples

from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image
from segformer.data.sources.listing import class_folders, find_samples
from segformer.data.sources.sample import Sample, load_sample
from segformer.errors import DataError

IDS = np.array([[0, 1, 2, 2], [1, 1, 0, 2], [2, 0, 0, 1]], np.uint8)
COLOURS = [[0, 0, 0], [200, 10, 10], [10, 200, 255]]
GREYS = [[0, 0, 0], [7, 7, 7], [9, 9, 9]]
CLASSES = DatasetConfig(task="classification", image_dir="{split}", image_suffix=".JPEG")


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
        return Sample("a", str(image), str(tmp_path / "m.png"))

    return make


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_mask_of_any_depth_gives_the_ids_it_stores(
    bits: int, pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    ids = IDS % min(2**bits, 3)
    np.testing.assert_array_equal(load_sample(config, pair(png(4, 3, bits, packed(ids, bits)))).mask, ids)


def test_an_indexed_mask_gives_indices_and_not_colours(
    pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    picture = Image.fromarray(IDS).convert("P")
    picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    picture.putdata(IDS.reshape(-1).tolist())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    mask = load_sample(config, pair(buffer.getvalue())).mask
    np.testing.assert_array_equal(mask, IDS)


def test_a_label_map_renames_merges_and_ignores_ids_above_255(pair: Callable[[bytes], Sample]) -> None:
    raw = np.array([[7, 900, 0, 8], [255, 7, 8, 8], [7, 7, 900, 0]], np.uint16)
    cfg = DatasetConfig(classes=["thing", "stuff"], label_map={7: 0, 8: 1, 900: 1, 0: 255})
    mask = load_sample(cfg, pair(png(4, 3, 16, packed(raw, 16)))).mask
    expected = [[{7: 0, 8: 1, 900: 1}.get(int(value), 255) for value in row] for row in raw]
    np.testing.assert_array_equal(mask, expected)


def test_the_image_bytes_are_those_of_the_file(folder: Path, config: DatasetConfig) -> None:
    sample = list_samples(config, folder, "val")[3]
    loaded = load_sample(config, sample)
    mask = np.asarray(Image.open(sample.mask))
    assert loaded.image == sample.image.read_bytes()
    np.testing.assert_array_equal(loaded.mask, mask)
    assert (loaded.height, loaded.width) == mask.shape
    assert loaded.raw_ids == {value: int((mask == value).sum()) for value in np.unique(mask)}


def painted(mode: str, colours: list[list[int]]) -> bytes:
    """IDS in these colors, as a PNG of the mode."""
    picture = Image.fromarray(np.array(colours, np.uint8)[IDS])
    picture = picture.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "colours"), [*((mode, COLOURS) for mode in ("RGB", "RGBA", "P")), ("L", GREYS)]
)
def test_a_mask_painted_in_colours_gives_their_positions(
    mode: str, colours: list[list[int]], pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    loaded = load_sample(replace(config, mask_colours=colours), pair(painted(mode, colours)))
    np.testing.assert_array_equal(loaded.mask, IDS)
    assert loaded.raw_ids == {0: 4, 1: 4, 2: 4}


def test_a_mask_that_cannot_be_understood_is_an_error_that_says_why(
    pair: Callable[[bytes], Sample], config: DatasetConfig
) -> None:
    two, three = replace(config, mask_colours=COLOURS[:2]), replace(config, mask_colours=COLOURS)
    jpeg = cv2.imencode(".jpg", np.zeros((3, 4), np.uint8))[1].tobytes()
    for cfg, data, message in (
        (two, painted("RGB", COLOURS), r"color \[10, 200, 255\] at row 0, column 2"),
        (three, png(4, 3, 16, packed(IDS, 16)), "16 bits a channel"),
        (config, jpeg, "no PNG or TIFF"),
    ):
        with pytest.raises(DataError, match=message):
            load_sample(cfg, pair(data))


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


def test_every_file_is_used_or_counted_and_suffixes_have_no_case(tmp_path: Path) -> None:
    """One folder per kind, and one for both: what ends as a mask is one, what is left is named."""
    files = {
        "images/train": [
            "a.jpg",
            "b.JPG",
            "sub/c.Jpeg",
            "d.PNG",
            "._a.jpg",
            ".git/e.png",
            "f.gif",
            "g.GIF",
            "N",
        ],
        "masks/train": ["a.png", "b.PNG", "sub/c.png", "d.png", "d_color.txt", "Thumbs.db"],
        "both": ["a.png", "a_mask.PNG", "b.jpg", "b_mask.png", "b.webp", ".ipynb_checkpoints/b.jpg"],
    }
    for folder, names in files.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    apart = DatasetConfig(classes=["a", "b"])
    samples, defects, left = find_samples(apart, tmp_path, "train")
    assert (defects, [sample.key for sample in samples]) == ([], ["a", "b", "d", "sub/c"])
    assert [sample.image_file[len(str(tmp_path)) :] for sample in samples] == [
        f"/images/train/{name}" for name in ("a.jpg", "b.JPG", "d.PNG", "sub/c.Jpeg")
    ]
    assert left == {
        "images/train": {"hidden": (2, "._a.jpg"), "other": (1, "N"), ".gif": (2, "f.gif")},
        "masks/train": {"hidden": (1, "Thumbs.db"), ".txt": (1, "d_color.txt")},
    }
    whole = sum(len(names) for folder, names in files.items() if folder != "both")
    assert whole == 2 * len(samples) + sum(count for kinds in left.values() for count, _ in kinds.values())
    together = replace(apart, image_dir="both", mask_dir="both", mask_suffix="_mask.png")
    samples, defects, left = find_samples(together, tmp_path, "train")
    assert (defects, [sample.image.name for sample in samples]) == ([], ["a.png", "b.jpg"])
    assert left == {"both": {"hidden": (1, ".ipynb_checkpoints/b.jpg"), ".webp": (1, "b.webp")}}
    (tmp_path / "list").write_text("a\n")
    _, _, left = find_samples(replace(apart, split_lists={"train": "list"}), tmp_path, "train")
    assert left["images/train"]["unlisted image"] == (3, "b.JPG")
    assert left["masks/train"]["unlisted mask"] == (3, "b.PNG")
    with pytest.raises(DataError, match=r"2 pictures .* \(d.PNG, .*; data.image_suffix='' reads"):
        list_samples(replace(apart, image_suffix=".jpg"), tmp_path, "train")


def _resize(path: Path) -> None:
    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:-1])


def _color(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((40, 56, 3), np.uint8))


def _paint(path: Path) -> None:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    mask[0, :2] = 254, 9
    cv2.imwrite(str(path), mask)


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _rename(suffix: str, folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_suffix(suffix))


def _remove_all(root: Path) -> None:
    for path in root.rglob("train/*"):
        path.unlink()


# Defect -> (file below the set, what happens to it, the message).
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing root": ("", shutil.rmtree, "is not a folder"),
    "missing image folder": ("images/train", shutil.rmtree, "image folder .* is not a folder"),
    "missing mask folder": ("masks/train", shutil.rmtree, "mask folder .* is not a folder"),
    "image without mask": ("masks/train/001.png", Path.unlink, r"no file .*masks/train/<key>.png \(001\)"),
    "mask without image": (
        "images/train/001.jpg",
        Path.unlink,
        r"no file .*images/train/<key>.jpg.* \(001\)",
    ),
    "two files of one key": (
        "images/train/001.PNG",
        Path.touch,
        r"train' share .* \(001.\w+ = 001.\w+\)",
    ),
    "images of another format": (
        "images/train",
        partial(_rename, ".GIF"),
        r"2 keys .*; 2 x .gif \(000.GIF, ...\) lie",
    ),
    "masks of a lossy format": (
        "masks/train",
        partial(_rename, ".jpg"),
        r"2 x .jpg .*: save them as PNG",
    ),
    "empty split": ("", _remove_all, "the split is empty"),
    "id outside the classes": ("masks/train/000.png", _paint, "holds the ids 9, 254"),
    "mask of another size": ("masks/train/000.png", _resize, "56 x 39 pixels"),
    "mask in color": ("masks/train/000.png", _color, "3 channels"),
    "image of 0 bytes": ("images/train/000.jpg", lambda path: path.write_bytes(b""), "0 bytes"),
    "truncated image": ("images/train/000.jpg", _halve, "truncated"),
    "truncated mask": ("masks/train/000.png", _halve, "truncated|incomplete|unrecognized"),
    "text as image": (
        "images/train/000.jpg",
        lambda path: path.write_text("<html>"),
        "not a JPEG, .* or BMP file",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_that_names_it(
    name: str, make_folder: Callable[..., Path], tmp_path: Path, config: DatasetConfig
) -> None:
    root = make_folder(tmp_path / "set", {"train": 2})
    place, change, message = WRONG[name]
    change(root / place)
    with pytest.raises(DataError, match=message) as caught:
        [load_sample(config, sample) for sample in list_samples(config, root, "train")]
    assert "\n" not in str(caught.value)


def test_a_png_that_training_cannot_decode_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pillow reads a PNG that lacks up to 22 bytes, OpenCV does not, and says so on standard error."""
    whole = png(40, 30, 8, packed(np.random.default_rng(0).integers(0, 256, (30, 40)), 8))
    cfg, path = replace(CLASSES, image_suffix=".png"), tmp_path / "a.png"
    for cut in (1, 4, 11, 12, 13, 16, 20, 500):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match=r"a.png' is not a whole JPEG, .*: it is truncated"):
            load_sample(cfg, Sample("a", str(path), label=0))
    assert capfd.readouterr().err == ""
    path.write_bytes(png(4, 3, 8, packed(IDS, 8)[:-5]))  # fewer rows than its header says
    with pytest.raises(DataError, match=r"a.png' is not a whole JPEG, .*: image cannot be decoded"):
        load_sample(cfg, Sample("a", str(path), label=0))


def test_a_jpeg_that_opencv_fills_up_is_refused(tmp_path: Path) -> None:
    """Pillow still looks at JPEGs: it sees broken data that OpenCV decodes to something."""
    path, small = tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    data = cv2.imencode(".jpg", cv2.resize(small, (64, 48)))[1].tobytes()
    for at in range(600, len(data)):
        changed = bytearray(data)
        changed[at] ^= 128
        path.write_bytes(changed)
        try:
            decode_image(bytes(changed))
            load_sample(CLASSES, Sample("a", str(path), label=0))
        except DataError as error:
            if "broken data stream" in str(error):
                return
    pytest.fail("no damage was seen by Pillow alone")


def test_a_flipped_bit_in_a_mask_is_refused(pair: Callable[[bytes], Sample], config: DatasetConfig) -> None:
    whole = png(4, 3, 8, packed(IDS, 8))
    for at in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        with pytest.raises(DataError, match=r"m.png'"):
            load_sample(config, pair(bytes(damaged)))


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """Two folders of x, y and z, and a list of the training split with the given text."""
    for kind, end in (("JPEGImages", ".jpg"), ("Labels", ".png")):
        (tmp_path / kind).mkdir()
        for key in "xyz":
            (tmp_path / kind / f"{key}{end}").touch()

    def make(text: str | bytes | None) -> DatasetConfig:
        if text is not None:
            (tmp_path / "train.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        return DatasetConfig(
            image_dir="JPEGImages", mask_dir="Labels", split_lists={"train": "train.txt"}, classes=["a"]
        )

    return make


def test_a_list_chooses_the_samples_of_its_split(
    listed: Callable[..., DatasetConfig], tmp_path: Path
) -> None:
    cfg = listed("\ufeffz\r\n\n  x \n")
    assert [sample.key for sample in list_samples(cfg, tmp_path, "train")] == ["x", "z"]
    assert [sample.key for sample in list_samples(cfg, tmp_path, "val")] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\nq\n", r"1 keys of 'train.txt' have no file .*JPEGImages/<key>.jpg\|.jpeg\|.png\|.tif.* \(q\)"),
        ("x.jpg\n", r"without folder and suffix"),
        ("../x\n", "have no file"),
        ("x\ny\nx\n", r"names x twice"),
        ("\n\n", "is empty"),
        (None, r"train.txt' of the split train cannot be read: No such file"),
        (b"x\n\ny\xe4\n", "cannot be read: line 3 is not UTF-8"),
        ("x\n".encode("utf-16"), "cannot be read: line 1 is not UTF-8"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_the_line(
    text: str | bytes | None, message: str, listed: Callable[..., DatasetConfig], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        list_samples(listed(text), tmp_path, "train")


def test_linked_sub_folders_are_read_and_circles_refused(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 1})
    images = root / "images/train"
    for kind, end in (("images", ".jpg"), ("masks", ".png")):
        for name in ("a/deep", "ab", "c"):
            (root / kind / "train" / name).mkdir(parents=True)
        (root / kind / f"train/000{end}").rename(root / kind / f"train/a/deep/000{end}")
        (root / kind / "train/ab/link").symlink_to("../a")  # a folder beside it: no circle
        (root / kind / "train/c/link").symlink_to("../ab/link")
    keys = ["a/deep/000", "ab/link/deep/000", "c/link/deep/000"]
    assert [sample.key for sample in list_samples(config, root, "train")] == keys
    (images / "again").symlink_to(root / "images")
    with pytest.raises(DataError, match="again' links to a folder that it lies in"):
        list_samples(config, root, "train")
    (images / "again").unlink()
    for name, other in (("x", "y"), ("y", "x")):  # a circle of two links
        (images / name).mkdir()
        (images / name / "onward").symlink_to(f"../{other}")
    with pytest.raises(DataError, match=r"(x|y)/onward/onward' links to a folder that it lies in"):
        list_samples(config, root, "train")


def test_a_link_that_cannot_be_followed_is_an_error(
    make_folder: Callable[..., Path], config: DatasetConfig, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "set", {"train": 1})
    link = root / "images/train/more"
    link.symlink_to(link)
    with pytest.raises(DataError, match="more' cannot be listed: Too many levels of symbolic links"):
        list_samples(config, root, "train")


def test_a_folder_that_cannot_be_listed_is_an_error(
    folder: Path, config: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="images/train' cannot be listed: Permission denied"):
        list_samples(config, folder, "train")


@pytest.fixture
def class_tree(tmp_path: Path) -> Path:
    """Three class folders, of which validation has two."""
    for name in ("train/cat/1", "train/cat/2", "train/ant/1", "train/bee/1", "val/ant/9", "val/cat/8"):
        path = tmp_path / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path.with_suffix(".jpeg")), np.zeros((5, 7, 3), np.uint8))
        path.with_suffix(".jpeg").rename(path)
    return tmp_path


def test_class_folders_or_class_dirs_give_the_labels_of_all_splits_alike(class_tree: Path) -> None:
    (class_tree / "train/.ipynb_checkpoints").mkdir()
    assert class_folders(CLASSES, class_tree) == ["ant", "bee", "cat"]
    train, val = (list_samples(CLASSES, class_tree, split) for split in ("train", "val"))
    assert [(sample.key, sample.label) for sample in train] == [
        *(("ant/1", 0), ("bee/1", 1), ("cat/1", 2), ("cat/2", 2))
    ]
    assert [(sample.key, sample.label) for sample in val] == [("ant/9", 0), ("cat/8", 2)]
    loaded = load_sample(CLASSES, val[0])
    assert (loaded.mask, loaded.raw_ids, loaded.height, loaded.width) == (None, {}, 5, 7)
    assert loaded.image == val[0].image.read_bytes()
    (class_tree / "val/bee").mkdir()
    given = list_samples(replace(CLASSES, class_dirs=["cat", "bee", "ant"]), class_tree, "val")
    assert [(sample.key, sample.label) for sample in given] == [("ant/9", 2), ("cat/8", 0)]


def _nothing(root: Path) -> None:
    """Only the settings are wrong."""


def _empty(root: Path) -> None:
    for path in root.rglob("train/*/*"):
        path.unlink()


CLASS_FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, list[str]], str]] = {
    "folder missing": (_nothing, {"class_dirs": ["ant", "bee", "cat", "dog"]}, r"are missing in .*\(dog\)"),
    "folder unknown": (_nothing, {"class_dirs": ["ant", "cat"]}, r"in no class folder \(bee/1\)"),
    "loose image": (lambda root: (root / "train/x.JPEG").touch(), {}, r"are in no class folder \(x\)"),
    "names that do not fit": (_nothing, {"classes": ["a", "b"]}, "has 3 class folders"),
    "no images": (_empty, {}, "the split is empty"),
}


@pytest.mark.parametrize("name", CLASS_FAULTS)
def test_a_wrong_class_tree_is_an_error_that_names_it(name: str, class_tree: Path) -> None:
    change, settings, message = CLASS_FAULTS[name]
    change(class_tree)
    with pytest.raises(DataError, match=message):
        list_samples(replace(CLASSES, **settings), class_tree, "train")


def test_other_formats_beside_a_whole_set_of_photos_are_left_out(tmp_path: Path) -> None:
    for name in ("images/train/a.jpg", "images/train/b.tif", "images/train/b.bmp", "masks/train/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cfg = DatasetConfig(classes=["x", "y"], splits=["train"], image_dir="images", mask_dir="masks")
    samples, defects, left = find_samples(cfg, tmp_path, "train")
    assert ([sample.key for sample in samples], defects) == (["train/a"], [])
    assert {kind: count for found in left.values() for kind, (count, _) in found.items()} == {
        ".tif": 1,
        ".bmp": 1,
    }
    (tmp_path / "masks/train/c.png").touch()
    (tmp_path / "images/train/c.webp").touch()  # now the photos alone are no set
    samples, defects, _ = find_samples(cfg, tmp_path, "train")
    assert [sample.key for sample in samples] == ["train/a", "train/c"]
    assert len(defects) == 2  # b.tif and b.bmp share a key; b has no mask
