"""Image files of every format against Pillow's and tifffile's own arrays, and what is refused of them."""

import io
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segformer.data.sources.dataset import RGB, DatasetConfig, Pixels
from segformer.data.sources.masks import mask_ids
from segformer.data.sources.picture import image_orientation, whole_image
from segformer.errors import DataError

RNG = np.random.default_rng(0)
FILE = Path("a")


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
        options.pop("planarconfig", None)
    if options.get("planarconfig") == "separate":
        pixels = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    form = {"planarconfig": "contig"} if pixels.ndim == 3 else {}
    tifffile.imwrite(out, pixels, **{"photometric": "minisblack", "metadata": None} | form | options)
    return out.getvalue()


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 32)}, {"rowsperstrip": 7}])
def test_tiffs_are_read_as_they_were_written(dtype: str, options: dict[str, object]) -> None:
    for channels in (1, 3, 4, 5, 32):
        pixels = (RNG.random((37, 53, channels)) * 250).astype(dtype)
        for compression in (None, "lzw", "deflate", "packbits", "zstd"):
            for form in ({}, {"bigtiff": True}, {"byteorder": ">"}, {"planarconfig": "separate"}):
                predictor = {"predictor": True} if compression in ("lzw", "deflate") else {}
                data = tiff(pixels, compression=compression, **options, **form, **predictor)
                found = whole_image(FILE, data, (), Pixels(channels, dtype))
                assert found.dtype == dtype
                assert np.array_equal(found, pixels)


def test_webp_bmp_and_png_are_read_as_pillow_does() -> None:
    colors = RNG.integers(0, 256, (21, 34, 4), np.uint8)
    for kind, options in (("WEBP", {"lossless": True, "exact": True}), ("BMP", {}), ("PNG", {})):
        rgb = saved(Image.fromarray(colors[..., :3]), kind, **options)
        assert np.array_equal(whole_image(FILE, rgb), colors[..., :3])
        if kind != "BMP":
            rgba = saved(Image.fromarray(colors), kind, **options)
            assert np.array_equal(whole_image(FILE, rgba, (), Pixels(4)), colors)
            assert np.array_equal(whole_image(FILE, rgba), colors[..., :3])
    grey = saved(Image.fromarray(colors[..., 0]), "PNG")
    assert np.array_equal(whole_image(FILE, grey, (), Pixels(1))[..., 0], colors[..., 0])
    assert np.array_equal(whole_image(FILE, grey), np.repeat(colors[..., :1], 3, axis=2))
    deep = RNG.integers(0, 65536, (9, 8), np.uint16)
    assert np.array_equal(
        whole_image(FILE, saved(Image.fromarray(deep), "PNG"), (), Pixels(1, "uint16"))[..., 0], deep
    )
    assert np.array_equal(whole_image(FILE, tiff(deep))[..., 0], deep >> 8)  # as a PNG of 16 bits


def test_what_does_not_fit_is_one_line_that_names_the_setting() -> None:
    five = tiff(np.ones((4, 6, 5), np.uint16))
    holes = np.zeros((4, 6, 1), np.float32)
    holes[2, 3] = np.nan
    for data, pixels, message in (
        (five, RGB, r"'a' has 5 channels, the set 3; give data.channels=5 or leave it out"),
        (five, Pixels(5, "float32"), ""),
        (tiff(np.ones((4, 6), np.uint8)), Pixels(1, "uint16"), "give data.dtype=uint8 or convert it"),
        (tiff(np.ones((4, 6), np.int16)), Pixels(1), "holds int16, the set uint8; give data.dtype=float32"),
        (tiff(np.ones((4, 6), np.float64)), Pixels(1), "holds float64, the set uint8; save it as float32"),
        (tiff(holes), Pixels(1, "float32"), r"NaN or infinite values \(row 2, column 3, channel 0\)"),
        (tiff(np.ones((3, 4, 6, 1), np.uint8)), RGB, "it holds 12 images; save each as a file of its own"),
    ):
        if not message:
            assert whole_image(FILE, data, (), pixels).dtype == np.float32
            continue
        with pytest.raises(DataError, match=message):
            whole_image(FILE, data, (), pixels)


def test_overviews_of_a_tiff_are_not_its_image() -> None:
    pixels, out = RNG.integers(0, 256, (32, 32, 3), np.uint8), io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(pixels, photometric="rgb", metadata=None)
        writer.write(pixels[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    assert np.array_equal(whole_image(FILE, out.getvalue()), pixels)


def test_hostile_tiffs_are_refused() -> None:
    """Truncated at every byte, loops, tables without end, strips outside, more inside than said."""
    sound = tiff(RNG.integers(0, 256, (16, 16, 3), np.uint8), compression="deflate", rowsperstrip=4)
    for length in range(len(sound)):
        with pytest.raises(DataError, match="is not a whole"):
            whole_image(FILE, sound[:length])
    at = struct.unpack_from("<I", sound, 4)[0]
    count = struct.unpack_from("<H", sound, at)[0]
    end = at + 2 + 12 * count
    loop = sound[:end] + struct.pack("<I", at) + sound[end + 4 :]
    many = sound[:at] + struct.pack("<H", 65535) + sound[at + 2 :]
    for data, message in ((loop, "its directories loop"), (many, "a directory of 65535 tags")):
        with pytest.raises(DataError, match=message):
            whole_image(FILE, data)
    for entry in range(at + 2, end, 12):
        for value in (0, 2**31, 2**32 - 1):
            for place in (entry + 4, entry + 8):
                broken = sound[:place] + struct.pack("<I", value) + sound[place + 4 :]
                with suppress(DataError):
                    assert whole_image(FILE, broken).size <= 3 * 50_000_000


def test_masks_may_be_tiffs_of_one_band(tmp_path: Path) -> None:
    ids, path = RNG.integers(0, 300, (9, 7), np.uint16), tmp_path / "m.tif"
    path.write_bytes(tiff(ids, compression="lzw"))
    assert np.array_equal(mask_ids(DatasetConfig(classes=["a", "b"]), path), ids)
    path.write_bytes(tiff(ids.astype(np.float32)))
    with pytest.raises(DataError, match="holds 1 x float32; save 1 channels of uint8 or uint16"):
        mask_ids(DatasetConfig(classes=["a", "b"]), path)


def test_the_orientation_of_a_tiff_is_read() -> None:
    assert image_orientation(tiff(np.ones((4, 6), np.uint8), extratags=[(274, 3, 1, 6, True)])) == 6
