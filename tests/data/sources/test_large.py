"""Rows of large images and masks: equal to those of the whole file, in memory that is bounded, or refused."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from segformer.data.sources import decode
from segformer.data.sources.dataset import DatasetConfig, Pixels
from segformer.data.sources.large import image_rows, image_size, label_rows
from segformer.data.sources.masks import mask_ids
from segformer.data.sources.picture import whole_image
from segformer.data.sources.sample import Sample
from segformer.errors import DataError

RNG = np.random.default_rng(0)
SIZE = (97, 131)
CALLS = ((0, 40), (30, 60), (30, 60), (59, 97), (5, 7), (96, 97))


def config(pixels: Pixels, **given: object) -> DatasetConfig:
    return DatasetConfig(classes=["a", "b"], channels=pixels.channels, dtype=pixels.dtype, **given)


def smooth(channels: int, dtype: str = "uint8") -> np.ndarray:
    """A picture that filters and predictors suit, (H, W, channels)."""
    few = RNG.random((9, 11, channels))
    many = (
        np.stack([cv2.resize(few[..., c], SIZE[::-1]) for c in range(channels)], 2)
        + RNG.random((*SIZE, 1)) / 20
    )
    return (many * (200 if dtype == "uint8" else 50_000)).astype(dtype)


def agree(rows: Callable[[int, int], np.ndarray], expected: np.ndarray) -> None:
    for top, bottom in CALLS:
        found = rows(top, bottom)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected[top:bottom])


def outcome(read: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return read()
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 7}, {"rowsperstrip": 97}])
def test_rows_of_a_tiff_are_those_that_tifffile_reads(layout: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    for pixels in (Pixels(1), Pixels(3), Pixels(2, "uint16"), Pixels(5, "uint16"), Pixels(4, "float32")):
        image = smooth(*pixels)
        for compression in (None, "lzw", "deflate", "packbits", "zstd"):
            for form in ({}, {"bigtiff": True}, {"byteorder": ">"}, {"planarconfig": "separate"}):
                stored = image[..., 0] if pixels.channels == 1 else image
                how = (
                    {"planarconfig": "contig"} | form
                    if pixels.channels > 1
                    else dict(form, planarconfig=None)
                )
                if how["planarconfig"] == "separate":
                    stored = np.moveaxis(image, 2, 0)
                predictor = {"predictor": True} if compression in ("lzw", "deflate") else {}
                options = {"photometric": "minisblack", "compression": compression} | how | predictor | layout
                tifffile.imwrite(file, stored, metadata=None, **options)
                assert np.array_equal(tifffile.imread(file), stored)
                assert image_size(file) == SIZE
                agree(image_rows(config(pixels), file), image)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "1", "P"])
def test_rows_of_a_png_are_those_of_the_whole_file(mode: str, tmp_path: Path) -> None:
    file, colors = tmp_path / "x.png", smooth(4)
    if mode == "I;16":
        picture = Image.fromarray(smooth(1, "uint16")[..., 0])
    elif mode in ("1", "P"):
        picture = Image.fromarray(colors[..., :3]).convert(mode)
    else:
        picture = Image.fromarray(colors[..., : len(mode)].squeeze())
    for options in ({}, {"optimize": True}, {"compress_level": 0}):
        picture.save(file, **options)
        for pixels in (Pixels(), Pixels(1), Pixels(4)):
            expected = outcome(lambda pixels=pixels: whole_image(file, file.read_bytes(), (), pixels))
            if isinstance(expected, str):
                assert outcome(lambda pixels=pixels: image_rows(config(pixels), file)(0, 40)) == expected
            else:
                agree(image_rows(config(pixels), file), expected)


def test_a_png_of_16_bit_colors_and_every_filter_is_read_by_rows(tmp_path: Path) -> None:
    file, image = tmp_path / "x.png", smooth(3, "uint16")
    for name in ("NONE", "SUB", "UP", "AVG", "PAETH"):
        cv2.imwrite(
            str(file), image[..., ::-1], [cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{name}")]
        )
        agree(image_rows(config(Pixels(3, "uint16")), file), image)


def test_rows_of_masks_are_those_of_the_whole_file(tmp_path: Path) -> None:
    ids = RNG.integers(0, 16, SIZE, np.uint8)
    indexed = Image.fromarray(ids, "P")
    indexed.putpalette([7] * 48)
    for bits in (4, 8):
        indexed.save(tmp_path / f"p{bits}.png", bits=bits)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    Image.fromarray(ids > 7).save(tmp_path / "bits.png")
    tifffile.imwrite(tmp_path / "m.tif", ids, compression="deflate", tile=(32, 32))
    for file in tmp_path.iterdir():
        rows = label_rows(config(Pixels()), Sample("x", str(file), str(file)), SIZE)
        agree(rows, mask_ids(config(Pixels()), file))
    colors = np.zeros((*SIZE, 3), np.uint8)
    colors[50, 9] = 1, 2, 3
    cfg = config(Pixels(), mask_colours=[[0, 0, 0], [9, 9, 9]])
    for file, save in (
        ("c.png", Image.fromarray(colors).save),
        ("c.tif", lambda to: tifffile.imwrite(to, colors)),
    ):
        save(tmp_path / file)
        rows = label_rows(cfg, Sample("x", str(tmp_path / file), str(tmp_path / file)), SIZE)
        assert not rows(0, 50).any()
        with pytest.raises(DataError, match=r"has the color \[1, 2, 3\] at row 50, column 9"):
            rows(48, 97)
        with pytest.raises(DataError, match="they must agree"):
            label_rows(cfg, Sample("x", str(tmp_path / file), str(tmp_path / file)), (97, 130))


def test_a_mask_of_another_format_is_named_as_that_of_a_small_image_is(tmp_path: Path) -> None:
    jpeg = cv2.imencode(".jpg", np.zeros(SIZE, np.uint8))[1].tobytes()
    for name, data in (("m.jpg", jpeg), ("m.png", b"no")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="is no PNG or TIFF; ids do not survive other formats"):
            label_rows(config(Pixels()), Sample("x", "x", str(tmp_path / name)), SIZE)


def test_a_damaged_file_is_refused_by_the_time_its_rows_are_there(tmp_path: Path) -> None:
    """Cut off anywhere, or a byte of its pixels changed; a PNG also where a chunk is longer than said."""
    png, tif = io.BytesIO(), io.BytesIO()
    Image.fromarray(smooth(3)).save(png, "PNG")
    tifffile.imwrite(tif, smooth(3), compression="deflate", tile=(48, 48), metadata=None)
    file = tmp_path / "x"
    for data in (png.getvalue(), tif.getvalue()):
        file.write_bytes(data)
        assert image_rows(config(Pixels()), file)(0, 97).shape == (*SIZE, 3)
        for length in range(0, len(data), 211):
            file.write_bytes(data[:length])
            with pytest.raises(DataError, match="is not a whole JPEG"):
                image_rows(config(Pixels()), file)(0, 97)
        for at in range(len(data) // 3, len(data) * 2 // 3, 997):
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            with pytest.raises(DataError, match="is not a whole JPEG"):
                image_rows(config(Pixels()), file)(0, 97)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"\5" + bytes(30), "a line has an unknown filter"),
        (bytes(31 * 8), "holds more pixels than its header says"),
        (bytes(31 * 6), "it is truncated or damaged"),
        (bytes(2**24), "holds more pixels than its header says"),
    ],
)
def test_hostile_lines_of_a_png_are_refused(lines: bytes, message: str, tmp_path: Path) -> None:
    header, file = struct.pack(">2I5B", 10, 7, 8, 2, 0, 0, 0), tmp_path / "x.png"
    lines += bytes(31 * 6) if len(lines) == 31 else b""
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    file.write_bytes(decode.PNG_MAGIC + b"".join(parts))
    with pytest.raises(DataError, match=message):
        image_rows(config(Pixels()), file)(0, 7)


def test_strips_that_are_too_large_are_refused_and_images_of_many_bytes_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_TILED_PIXELS", 97 * 131)
    image, five = smooth(5, "uint16"), config(Pixels(5, "uint16"))
    for name, layout in (("a.tif", {"rowsperstrip": 16}), ("b.tif", {"rowsperstrip": 97})):
        how = {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"} | layout
        tifffile.imwrite(tmp_path / name, image, **how)
    rows = image_rows(five, tmp_path / "a.tif")
    assert np.array_equal(np.concatenate([rows(top, min(top + 20, 97)) for top in range(0, 97, 20)]), image)
    with pytest.raises(DataError, match=r"97 rows of 5 x uint16, take 127070 bytes.*save it with smaller"):
        image_rows(five, tmp_path / "b.tif")


PEAK = """
import sys
from pathlib import Path
import cv2, tifffile, imagecodecs, PIL.Image
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.large import image_rows, image_size, label_rows
from segformer.data.sources.sample import Sample
path = sys.argv[1]
cfg = DatasetConfig(classes=["a"])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def read(how):
    for top in range(0, 6000, 192):
        how(top, min(top + 256, 6000))
tile = Path(path + "/warm.tif")
image_rows(cfg, tile)(0, 64), image_rows(cfg, tile.with_suffix(".png"))(0, 64)
before = peak()
for name in ("tiles.tif", "plain.tif", "scan.png"):
    read(image_rows(cfg, Path(path, name)))
sample = Sample("x", path + "/plain.tif", path + "/mask.png")
read(label_rows(cfg, sample, image_size(sample.image)))
print(peak() - before)
"""


@pytest.mark.slow
def test_reading_by_rows_takes_the_memory_of_the_rows(tmp_path: Path) -> None:
    """Of 6000 x 6000 pixels, 108 MB decoded, 256 rows are 4.6 MB; PNGs take copies of 16 MB of lines."""
    image = cv2.resize(RNG.integers(0, 256, (60, 60, 3), np.uint8), (6000, 6000))
    for pixels, name in ((image, "tiles"), (image[:64], "warm")):
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, compression="deflate", tile=(256, 256))
    cv2.imwrite(str(tmp_path / "warm.png"), image[:64])
    tifffile.imwrite(tmp_path / "plain.tif", image)
    cv2.imwrite(str(tmp_path / "scan.png"), image)
    cv2.imwrite(str(tmp_path / "mask.png"), image[..., 0] // 255)
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(
        command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, check=True, text=True
    )
    assert int(done.stdout) < 100e6, done.stdout
