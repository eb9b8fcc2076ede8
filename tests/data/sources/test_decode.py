import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.sources.decode import decode_image, decode_label, decode_mask, image_header
from segformer.data.sources.picture import whole_image
from segformer.errors import DataError


def png_header(width: int, height: int) -> bytes:
    """The start of a grey PNG of 8 bits."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


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
    assert image_header(png_header(5000, 5000)) == ("png", 5000, 5000)
    with pytest.raises(ValueError, match="20000 x 20000 pixels"):
        image_header(png_header(20000, 20000))


def test_every_cut_of_a_header_is_refused_or_gives_the_true_size() -> None:
    for data in (cv2.imencode(".jpg", np.zeros((9, 7, 3)))[1].tobytes(), png_header(7, 9)):
        for length in range(60):
            try:
                assert image_header(data[:length])[1:] == (9, 7)
            except ValueError:
                continue


def test_the_film_behind_a_photograph_is_not_scanned(tmp_path: Path) -> None:
    data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    assert whole_image(tmp_path, data + b"ftypmp42" + b"\xff\xda" * 100).shape == (8, 8, 3)
    scan = data[data.index(b"\xff\xda") : -2]
    many = data[:-2] + scan * 100 + data[-2:]
    with pytest.raises(DataError, match="101 scans"):
        whole_image(tmp_path, many)


def test_a_photograph_decodes_to_what_pillow_sees_before_any_turning() -> None:
    pixels = cv2.resize(np.random.default_rng(2).integers(0, 256, (5, 7, 3), np.uint8), (70, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees": masks belong to the stored pixels
    for kind, options in (("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, exif=exif, **options)
        expected = np.asarray(Image.open(buffer)).astype(int)
        decoded = decode_image(buffer.getvalue())
        assert decoded.shape == (50, 70, 3)
        assert np.abs(decoded - expected).max() <= 1


def test_bytes_that_are_no_picture_are_refused() -> None:
    png = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    colour = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    for data in (b"", b"GIF89a", png[:40], colour):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_mask(data)


def test_a_class_id_is_a_whole_number() -> None:
    assert decode_label(b"17") == 17
    for data in (b"", b"-1", b"1.5", b"cat", b"1234567890"):
        with pytest.raises(DataError, match="not a whole number"):
            decode_label(data)
