"""Prediction of files: what is written, and the inputs that are refused."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from segformer.data.loading.photometric import Normalize
from segformer.data.sources.decode import decode_image
from segformer.errors import ConfigError, DataError, Incomplete
from segformer.evaluation.inference_mode import InferenceMode
from segformer.inference.export import build, open_checkpoint
from segformer.inference.photograph import read_image
from segformer.inference.predict import PredictConfig, predict
from segformer.inference.predictor import Predictor
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata
from segformer.training.config import compose

PALETTE = [[0, 0, 0], [0, 200, 80], [250, 120, 10]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    model = build_model(ModelConfig(), 3).eval()
    classes = ["background", "nucleus", "debris"]
    out = tmp_path_factory.mktemp("model") / "export"
    model.save_pretrained(out, Metadata(classes=classes, palette=PALETTE))
    return out


@pytest.fixture
def photos(tmp_path):
    """A folder with a JPEG that its EXIF data turns, a gray PNG, and a file that is no picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    Image.fromarray(generator.integers(0, 256, (70, 50, 3), np.uint8)).save(folder / "b.JPG", exif=exif)
    Image.fromarray(generator.integers(0, 256, (33, 21), np.uint8)).save(folder / "a.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def config(checkpoint, source, output):
    return PredictConfig(checkpoint=str(checkpoint), input=str(source), output=str(output), device="cpu")


def test_the_mask_is_an_indexed_png_of_class_ids_at_the_size_of_the_image(checkpoint, photos, tmp_path):
    (path,) = predict(config(checkpoint, photos / "b.JPG", tmp_path / "out"))
    predictor = Predictor(checkpoint, device="cpu")
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert picture.getpalette()[:9] == [value for color in PALETTE for value in color]
        assert np.array_equal(np.array(picture), predictor(photos / "b.JPG").mask)
        assert picture.size == (70, 50)


def test_a_folder_gives_mask_and_overlay_of_each_picture_in_it(checkpoint, photos, tmp_path, capsys):
    predict(config(checkpoint, photos, tmp_path / "deep/out"))
    names = sorted(path.name for path in (tmp_path / "deep/out").iterdir())
    assert names == ["a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg"]
    for name, size in (("a", (21, 33)), ("b", (70, 50))):
        with Image.open(tmp_path / f"deep/out/{name}_overlay.jpg") as picture:
            assert picture.size == size
    said = capsys.readouterr().out
    assert "b.JPG" in said
    assert " 0%" not in said
    last = f"predictions: {tmp_path}/deep/out (2 pictures: mask and overlay of each; "
    assert re.fullmatch(re.escape(last) + r"[\d.]+ img/s\)", said.splitlines()[-1])


def test_a_prediction_does_not_depend_on_the_memory_layout_of_the_image(checkpoint):
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    predictor = Predictor(checkpoint, device="cpu")
    turned = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert np.array_equal(predictor(image).mask, predictor(turned).mask)


def pictures():
    """Smooth pictures of every mode that a JPEG or PNG may have."""
    small = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    color = Image.fromarray(small).resize((70, 50), Image.Resampling.BICUBIC)
    deep = np.linspace(0, 65535, 70 * 50).astype(np.uint16).reshape(50, 70)
    found = {f"{mode}.png": color.convert(mode) for mode in ("L", "LA", "RGB", "RGBA", "P", "1")}
    found |= {f"{mode}.jpg": color.convert(mode) for mode in ("L", "RGB", "CMYK")}
    return found | {"I;16.png": Image.fromarray(deep)}


@pytest.mark.parametrize("name", pictures())
def test_a_photograph_is_decoded_as_in_training(tmp_path, name):
    pictures()[name].save(tmp_path / name)
    decoded = read_image(tmp_path / name)
    np.testing.assert_array_equal(decoded, decode_image((tmp_path / name).read_bytes()))
    assert decoded.std() > 20  # and not one color, as 16 bits clipped at 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_photograph_is_turned_as_its_exif_orientation_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    pictures()["RGB.png"].save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    decoded = read_image(path)
    assert decoded.flags.c_contiguous
    assert np.abs(decoded.astype(int) - expected).max() <= (4 if suffix == "jpg" else 0)


STILLS = {
    "lzw.tif": {"compression": "tiff_lzw"},
    "grey.TIFF": {"mode": "L"},
    "cmyk.tif": {"mode": "CMYK"},
    "index.gif": {"mode": "P"},
    "lossless.webp": {"lossless": True},
    "alpha.webp": {"mode": "RGBA", "lossless": True},
    "plain.bmp": {},
    "bits.bmp": {"mode": "1"},
}


def test_a_folder_is_predicted_whole_and_what_is_left_is_named(checkpoint, photos, tmp_path, capsys):
    for name, options in STILLS.items():
        settings = dict(options)
        pictures()["RGB.png"].convert(settings.pop("mode", "RGB")).save(photos / name, **settings)
    (photos / "deep").mkdir()
    for name in ("deep/x.jpg", "phone.HEIC", "._b.JPG", "nowhere.png"):
        (photos / name).write_bytes(b"?") if name != "nowhere.png" else (photos / name).symlink_to("gone")
    out = tmp_path / "out"
    with pytest.raises(
        Incomplete, match=r"can't be read, 1 x \.png \(nowhere\.png\), 1 x \.heic \(phone\.HEIC\):"
    ):
        predict(config(checkpoint, photos, out))
    predictor = Predictor(checkpoint, device="cpu")
    for name in STILLS:
        with Image.open(photos / name) as picture:
            expected = predictor(np.array(picture.convert("RGB"))).mask
        with Image.open((out / name).with_suffix(".png")) as mask:
            np.testing.assert_array_equal(np.array(mask), expected)
    assert {path.stem for path in out.glob("*.png")} == {"a", "b", *(name.split(".")[0] for name in STILLS)}
    said = capsys.readouterr().out.splitlines()[0]
    for kind in ("1 x sub-folder (deep/)", "1 x hidden (._b.JPG)", "1 x .heic (phone.HEIC)", "1 x .txt"):
        assert kind in said


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("suffix", ["tif", "webp"])
def test_other_stills_are_turned_as_well(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, stored = tmp_path / f"turned.{suffix}", pictures()["RGB.png"]
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path), np.rot90(np.array(stored), 2 if orientation == 3 else 3))


def test_a_16_bit_tiff_is_seen_as_a_png_of_16_bits_is(tmp_path):
    deep = pictures()["I;16.png"]
    for suffix in ("png", "tif"):
        deep.save(tmp_path / f"deep.{suffix}")
    for values in ([], [100, 9000]):
        png, tiff = (read_image(tmp_path / f"deep.{suffix}", values) for suffix in ("png", "tif"))
        np.testing.assert_array_equal(tiff, png)


def hostile_stills():
    """Files that claim to be a still, and what is wrong with them."""
    picture, buffer = pictures()["RGB.png"], io.BytesIO()
    picture.save(buffer, "BMP")
    bmp = buffer.getvalue()
    yield "huge.bmp", bmp[:18] + struct.pack("<ii", 9000, 9000) + bmp[26:], "9000 x 9000 pixels, the limit"
    yield "vast.bmp", bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:], "exceeds limit"
    yield "cut.bmp", bmp[:-100], "truncated"
    for kind, save in (("gif", "GIF"), ("tif", "TIFF"), ("webp", "WEBP")):
        frames, moving = [picture, picture.rotate(90)], io.BytesIO()
        frames[0].save(moving, save, save_all=True, append_images=frames[1:])
        yield f"moving.{kind}", moving.getvalue(), "it holds several pictures"
    floats = io.BytesIO()
    pictures()["RGB.png"].convert("F").save(floats, "TIFF")
    message = "floats.tif' holds float32, the model takes uint8; give images of 3 x uint8"
    yield "floats.tif", floats.getvalue(), message


@pytest.mark.parametrize(
    ("name", "data", "reason"), list(hostile_stills()), ids=lambda value: str(value)[:20]
)
def test_a_still_that_is_no_whole_picture_is_one_line(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk that is full after `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "left"), [(100, set()), (2500, {"noise.png"})])
def test_on_a_full_disk_an_output_is_whole_or_absent(checkpoint, tmp_path, size, left):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    out = tmp_path / "out"
    message = r"noise(\.png|_overlay\.jpg) can't be written: File too large"
    with files_of_at_most(size), pytest.raises(ConfigError, match=message):
        predict(config(checkpoint, tmp_path / "noise.png", out))
    assert {path.name for path in out.iterdir()} == left


@pytest.mark.parametrize("output", ["mask.png", "a/masks.TIF", "b.zip", "run/checkpoints/step-00000010/x"])
def test_an_output_that_is_no_folder_is_refused_before_anything(checkpoint, tmp_path, output):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    with pytest.raises(ConfigError, match=r"output=.* (is the name of a file|lies among the checkpoints)"):
        config(checkpoint, "nowhere", tmp_path / output)
    (tmp_path / "kept.png").mkdir()  # a folder that is there says itself what it is
    config(checkpoint, "nowhere", tmp_path / "kept.png")


@pytest.mark.parametrize(
    ("source", "output", "error", "message"),
    [
        ("missing.jpg", "out", DataError, "missing.jpg is no file or folder"),
        ("pipe", "out", DataError, "pipe is no file or folder"),
        ("empty", "out", DataError, "holds no picture .*; give a folder of pictures"),
        ("root", "out", DataError, r"holds no picture .*; give input=.*root/images/val \(1 picture\)"),
        ("twins", "out", DataError, "b.JPG and .*b.png would both become"),
        ("photos/a.png", "photos", ConfigError, "would overwrite the input"),
        ("photos", "photos/../photos", ConfigError, "output=.*photos is the input folder: .*choose another"),
        ("photos", "photos/notes.txt", ConfigError, "output=.* is the name of a file"),
        ("photos", "photos/notes.txt/below", ConfigError, "output=.* can't be written"),
    ],
)
def test_places_that_do_not_fit_are_refused_and_nothing_changes(
    checkpoint, photos, tmp_path, source, output, error, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "root/images/val").mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "root/images/val")
    os.mkfifo(tmp_path / "pipe")
    shutil.copytree(photos, tmp_path / "twins")
    shutil.copy(photos / "a.png", tmp_path / "twins/b.png")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(error, match=message):
        predict(config(checkpoint, tmp_path / source, tmp_path / output))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bad_files_are_named_and_skipped_and_all_others_are_done(checkpoint, photos, tmp_path, capsys):
    (photos / "aa.png").write_bytes(b"text")
    Image.new("1", (10_000, 10_000)).save(photos / "ab.png")
    message = r"input=.*photos: 2 of 4 pictures can't be used and were skipped; all others are done"
    with pytest.raises(Incomplete, match=message) as caught:
        predict(config(checkpoint, photos, tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.png", "b.png"}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert [re.search(r"a[ab]\.png", line).group() for line in said] == ["aa.png", "ab.png"]
    for name in ("a.png", "b.JPG"):
        (photos / name).unlink()
    with pytest.raises(DataError, match=r"none of the 2 .*; the first: '.*aa.png' is not a") as caught:
        predict(config(checkpoint, photos, tmp_path / "out"))
    assert caught.value.exit_code == 2


def test_a_photograph_whose_size_comes_after_a_long_profile_is_predicted(checkpoint, tmp_path):
    picture = Image.new("RGB", (40, 40))
    picture.save(tmp_path / "long.jpg", icc_profile=b"\0" * 400_000)
    assert len(predict(config(checkpoint, tmp_path / "long.jpg", tmp_path / "out"))) == 1


@pytest.fixture(scope="module")
def reduced(checkpoint, tmp_path_factory):
    """The same model, trained on images of at most 64 pixels."""
    out = tmp_path_factory.mktemp("reduced") / "export"
    shutil.copytree(checkpoint, out)
    described = json.loads((out / "config.json").read_text())
    described["segformer"]["long_side"] = 64
    (out / "config.json").write_text(json.dumps(described))
    return out


def smooth(height, width):
    return np.asarray(pictures()["RGB.png"].resize((width, height), Image.Resampling.BICUBIC))


def test_a_model_of_reduced_images_sees_a_larger_one_as_sharding_would_make_it(checkpoint, reduced):
    image = smooth(200, 160)
    small = np.asarray(Image.fromarray(image).resize((51, 64), Image.Resampling.BOX))
    predictor, plain = Predictor(reduced, device="cpu"), Predictor(checkpoint, device="cpu")
    mask = predictor(image).mask
    assert mask.shape == (200, 160)
    expected = np.asarray(Image.fromarray(plain(small).mask).resize((160, 200), Image.Resampling.NEAREST))
    assert (mask == expected).mean() > 0.97
    assert (mask == plain(image).mask).mean() < 0.97
    np.testing.assert_array_equal(predictor(small).mask, plain(small).mask)
    for mode in ({"long_side": 0}, {"short_side": 160}):
        given = Predictor(reduced, device="cpu", **mode)
        assert (given(image).mask == plain(image).mask).mean() > 0.999


def test_predict_says_that_it_reduces_and_takes_the_settings_of_an_evaluation(reduced, tmp_path, capsys):
    Image.fromarray(smooth(200, 160)).save(tmp_path / "a.png")
    given = config(reduced, tmp_path / "a.png", tmp_path / "out")
    (path,) = predict(given)
    assert "was trained on images of at most 64 pixels a side" in capsys.readouterr().out
    first = np.array(Image.open(path))
    assert first.shape == (200, 160)
    keys = ["short_side=96", "long_side=120", "window=[64,64]", "flip=true", "scales=[0.75,1]"]
    places = [f"checkpoint={reduced}", f"input={given.input}", f"output={given.output}", "device=cpu"]
    cfg = compose(PredictConfig, "predict", [*places, *keys])
    predict(cfg)
    assert "was trained on" not in capsys.readouterr().out
    trained = open_checkpoint(reduced)
    mode = InferenceMode(build(trained), cfg)
    normalize = Normalize(trained.metadata.mean, trained.metadata.std)
    pixels = torch.from_numpy(smooth(200, 160).copy()).permute(2, 0, 1)[None]
    expected = mode(normalize(pixels, None)).argmax(1)[0].numpy()
    assert (np.array(Image.open(path)) == expected).mean() > 0.999
    with pytest.raises(ConfigError, match=r"scales=\[0.001\]: an image of 200 x 160 .* becomes 0 x 0"):
        predict(compose(PredictConfig, "predict", [*places, "scales=[0.001]"]))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(checkpoint, device):
    with pytest.raises(ConfigError, match="device="):
        Predictor(checkpoint, device=device)


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (31, 33)])
def test_images_smaller_than_the_encoder_takes_are_predicted_at_their_size(checkpoint, size):
    assert Predictor(checkpoint, device="cpu")(np.zeros((*size, 3), np.uint8)).mask.shape == size
