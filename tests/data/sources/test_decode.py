import io

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.sources.decode import decode_image, decode_label, decode_mask
from segformer.errors import DataError


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
