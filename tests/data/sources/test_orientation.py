"""The EXIF orientation of images: read from the header, never applied to data, and said aloud."""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.shards.sharding import find_turned, write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.picture import image_orientation
from segformer.data.sources.sample import Sample, inspect_sample, load_sample
from segformer.doctor.doctor import DoctorConfig, look
from segformer.errors import DataError
from segformer.training.config import compose


def encoded(kind: str, orientation: int | None, size: tuple[int, int] = (40, 20), **options: object) -> bytes:
    """A picture of one colour, with an orientation beside other EXIF entries."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x010E], exif[0x0112], exif[0x0131] = "a picture", orientation, "a camera"
        options["exif"] = exif
    Image.new("RGB", size, (90, 120, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def turn(path: Path, orientation: int) -> None:
    """Write the JPEG again with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_orientation_is_what_was_written_or_upright_where_that_is_unknown(kind: str) -> None:
    for orientation in (*range(1, 9), None, 0, 9, 65535):
        known = orientation if orientation in range(1, 9) else 1
        assert image_orientation(encoded(kind, orientation)) == known


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_or_damaged_header_has_some_orientation_and_no_error(kind: str) -> None:
    data = encoded(kind, 6)
    rng = np.random.default_rng(0)
    for length in range(len(data)):
        assert image_orientation(data[:length]) in (1, 6)
    for _ in range(500):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        assert 1 <= image_orientation(bytes(broken)) <= 8


@pytest.fixture
def turned_set(make_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A set of 5 and 3 pairs in which two images have an orientation of 3 and one of 2."""
    root = make_folder(tmp_path / "set", {"train": 5, "val": 3})
    turn(root / "images/train/003.jpg", 3)
    turn(root / "images/train/001.jpg", 2)
    turn(root / "images/val/002.jpg", 3)
    turn(root / "images/val/000.jpg", 1)
    return root


def test_sharding_counts_the_images_that_exif_would_turn(
    turned_set: Path, config: DatasetConfig, tmp_path: Path
) -> None:
    for _ in range(2):  # written, and found there
        write_shards(config, turned_set, tmp_path / "out", seed=0, samples_per_shard=2, workers=1)
        assert find_turned(tmp_path / "out") == (3, "images/train/001.jpg", 2)
    assert "turned" not in (tmp_path / "out/dataset.json").read_text()


def test_a_set_without_turned_images_has_none_to_report(shard_dir: Path, tmp_path: Path) -> None:
    assert find_turned(shard_dir) is None
    assert find_turned(tmp_path) is None


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_command_warns_of_turned_images_in_one_line(
    task: str, turned_set: Path, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    settings = ["data=folder", f"root={turned_set}", f"output={tmp_path / 'out'}", "workers=1"]
    if task == "segmentation":
        settings.append("data.classes=[sky,road,tree]")
    else:
        settings += ["data.task=classification", "data.image_dir='{split}'", "data.splits=[images]"]
    (line,) = (line for line in command("shard", *settings) if line.startswith("WARNING"))
    assert "3 of 8 images are stored rotated (EXIF orientation 2, first 'images/train/001.jpg')" in line
    assert "turn the files (mogrify -auto-orient) and shard again" in line
    assert ("their masks must fit the stored pixels" in line) == (task == "segmentation")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_mask_of_another_size_names_the_orientation(
    config: DatasetConfig, tmp_path: Path, orientation: int
) -> None:
    image, mask = tmp_path / "a.jpg", tmp_path / "a.png"
    image.write_bytes(encoded("JPEG", orientation))
    cv2.imwrite(str(mask), np.zeros((40, 20), np.uint8))
    sample = Sample("a", str(image), str(mask))
    with pytest.raises(DataError, match="20 x 40 pixels, its image 40 x 20; they must agree") as error:
        load_sample(config, sample)
    hint = "; the image is stored rotated (EXIF orientation 6), which is not applied: the mask must fit"
    assert (hint in str(error.value)) == (orientation == 6)
    _, (defect,) = inspect_sample(config, sample)
    assert (defect.kind, defect.text) == ("size", str(error.value))


def test_the_doctor_says_of_turned_images_what_sharding_says(turned_set: Path, tmp_path: Path) -> None:
    given = ["data=folder", f"root={turned_set}", "data.classes=[sky,road,tree]", "augment.crop=[32,32]"]
    report = look(compose(DoctorConfig, "doctor", [*given, "pictures=0"]))
    (found,) = (finding for finding in report.findings if finding.about == "EXIF")
    assert (found.level, found.text[:30]) == ("WARN", "3 of 8 images are stored rotat")
    assert (
        "images/train/001.jpg'), which is not applied: their masks must fit the stored pixels" in found.text
    )
