"""The documented Python use: one photograph or many, of every kind -> mask, shares, overlay."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer.data.loading.photometric import Normalize
from segformer.errors import CheckpointError, ConfigError, DataError
from segformer.evaluation.drawing import overlay
from segformer.inference.export import build, open_checkpoint
from segformer.inference.predictor import Predictor
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata

CLASSES, PALETTE = ["road", "tree", "sky"], [[0, 0, 0], [0, 200, 80], [250, 120, 10]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("model") / "export"
    metadata = Metadata(classes=CLASSES, palette=PALETTE, image_range=[1000, 9000])
    build_model(ModelConfig(), 3).eval().save_pretrained(out, metadata)
    return out


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu")


def smooth(height=48, width=64, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def logits(checkpoint, image):
    """The network on one image, enlarged, by torch alone."""
    trained = open_checkpoint(checkpoint)
    normalize = Normalize(trained.metadata.mean, trained.metadata.std)
    images = normalize(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], None)
    with torch.no_grad():
        return torch.nn.functional.interpolate(build(trained)(images), image.shape[:2], mode="bilinear")[0]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90 degrees, clockwise, to view
    return exif


def test_an_image_of_any_kind_has_one_prediction(checkpoint, predictor, tmp_path):
    image = smooth()
    expected = logits(checkpoint, image).argmax(0).numpy()
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned())
    kinds = (
        *(
            image,
            tmp_path / "turned.png",
            Image.open(tmp_path / "turned.png"),
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            Image.fromarray(image),
        ),
        *(torch.from_numpy(image.copy()), torch.from_numpy(image.copy()).permute(2, 0, 1)),
    )
    for kind in kinds:
        found = predictor(kind)
        assert found.mask.dtype == np.uint8
        assert (found.mask == expected).mean() > 0.999  # ties may round apart
        np.testing.assert_array_equal(found.image, image)


def test_gray_and_16_bits_are_seen_as_training_sees_them(predictor, tmp_path):
    gray = smooth()[..., 0]
    np.testing.assert_array_equal(predictor(gray).mask, predictor(np.stack([gray] * 3, -1)).mask)
    deep = (gray.astype(np.float64) * 8000 / 255 + 1000).round().astype(np.uint16)
    cv2.imwrite(str(tmp_path / "gray.png"), deep)
    cv2.imwrite(str(tmp_path / "color.png"), np.stack([deep] * 3, -1))
    for kind in (
        deep,
        np.stack([deep] * 3, -1),
        Image.fromarray(deep),
        tmp_path / "gray.png",
        tmp_path / "color.png",
    ):
        np.testing.assert_array_equal(predictor(kind).image, np.stack([gray] * 3, -1))
    predictor_of_any, predictor.image_range = predictor.image_range, []
    try:
        for kind in (deep, tmp_path / "gray.png"):  # the upper 8 bits
            np.testing.assert_array_equal(predictor(kind).image[..., 0], deep >> 8)
    finally:
        predictor.image_range = predictor_of_any


def test_a_list_is_predicted_as_its_images_one_by_one_in_their_order(predictor):
    images = [smooth(seed=1), smooth(40, 80, seed=2), smooth(seed=3), smooth(seed=4), smooth(33, 35, seed=5)]
    sizes, forward = [], predictor.model.forward
    predictor.model.forward = lambda batch: sizes.append(tuple(batch.shape)) or forward(batch)
    try:
        found = predictor(images, probabilities=True, batch=2)
    finally:
        del predictor.model.forward
    assert sizes == [(2, 3, 48, 64), (1, 3, 48, 64), (1, 3, 40, 80), (1, 3, 33, 35)]
    for image, one in zip(images, found, strict=True):
        alone = predictor(image, probabilities=True)
        assert (one.mask == alone.mask).mean() > 0.999
        np.testing.assert_allclose(one.probabilities, alone.probabilities, atol=1e-5)
    assert predictor([]) == []


@pytest.mark.parametrize("mode", [{}, {"flip": True}, {"scales": [0.5, 1.0]}, {"window": [32, 32]}])
def test_probabilities_belong_to_the_mask(checkpoint, mode):
    image = smooth()
    found = Predictor(checkpoint, device="cpu", **mode)(image, probabilities=True)
    assert (found.probabilities.shape, found.probabilities.dtype) == ((3, 48, 64), np.float32)
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
    assert (found.probabilities.argmax(0) == found.mask).mean() > 0.999
    if not mode:
        expected = logits(checkpoint, image).softmax(0).numpy()
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
        assert Predictor(checkpoint, device="cpu")(image).probabilities is None


def test_shares_overlay_and_file_are_those_of_the_mask(predictor, tmp_path):
    found = predictor(smooth())
    counts = {CLASSES[k]: (found.mask == k).mean() for k in np.unique(found.mask)}
    assert found.shares == pytest.approx(counts)
    assert list(found.shares.values()) == sorted(counts.values(), reverse=True)
    np.testing.assert_array_equal(
        found.overlay(alpha=0.3), overlay(smooth(), found.mask, np.array(PALETTE), 0.3)
    )
    told = ", ".join(f"{name} {100 * share:.0f}%" for name, share in found.shares.items())
    assert repr(found) == f"Prediction(48x64: {told})"
    found.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        np.testing.assert_array_equal(np.array(picture), found.mask)
        assert picture.getpalette()[:9] == [value for color in PALETTE for value in color]
    for place, words in (("mask.jpg", "end the name in .png"), ("none/mask.png", "choose another place")):
        with pytest.raises(ConfigError, match=words):
            found.save(tmp_path / place)


def test_big_endian_arrays_are_read_and_floats_of_any_kind_refused_in_words(predictor):
    deep = smooth().astype(np.uint16) * 257
    np.testing.assert_array_equal(predictor(deep.astype(">u2")).mask, predictor(deep).mask)
    with pytest.raises(DataError, match="float32"):
        predictor(torch.zeros(3, 40, 48, dtype=torch.bfloat16))


def test_a_run_that_is_not_there_names_those_beside_it(tmp_path):
    for name in ("mine", "lr"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"an export, such as \S+/lr, \S+/mine$"):
        Predictor(tmp_path / "nope")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3)), r"float64 \(8, 8, 3\); of values from 0 to 1 make \(image \* 255\)"),
        (np.full((8, 8, 3), 9.0), r"float64 \(8, 8, 3\); give uint8"),
        (np.zeros((8, 8), np.int64), r"int64 \(8, 8\); give uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"channels come last: image\.transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), r"leave the fourth out: image\[\.\.\., :3\]"),
        (np.zeros((8, 8, 1), np.uint8), r"use image\[\.\.\., 0\]"),
        (np.zeros((1, 8, 8), np.uint8), r"use image\[0\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"give a list: list\(images\)"),
        (np.zeros((0, 8, 3), np.uint8), "it must have from 1 to"),
        (np.zeros(8, np.uint8), r"give \(height, width, 3\)"),
        (3, "not a int"),
        ("absent.png", r"'absent.png' cannot be read"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused_with_what_to_do(predictor, image, message):
    with pytest.raises(DataError, match=message):
        predictor(image)
    with pytest.raises(DataError, match=f"image 1 of 2: .*{message}"):
        predictor([smooth(), image])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 48}, r"^window=48 must be a list of whole numbers"),
        ({"flip": "yes"}, r"^flip=yes must be true or false$"),
        ({"nope": 1}, r"^nope is not a setting"),
        ({"long_side": "x"}, r"^long_side=x must be a whole number or null"),
    ],
)
def test_a_wrong_setting_is_refused_as_on_the_command_line(checkpoint, given, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(checkpoint, **given)


def test_a_device_of_torch_and_a_batch_of_nothing(checkpoint):
    for device in (torch.device("cpu"), "cpu:0"):
        found = Predictor(checkpoint, device=device, window=(32, 32))
        assert found.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="batch=0 must be 1 or more"):
        found([smooth()], batch=0)


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    out = tmp_path_factory.mktemp("bands") / "export"
    metadata = Metadata(
        classes=CLASSES,
        palette=PALETTE,
        mean=[500.0, 600, 700, 800, 9],
        std=[90.0, 80, 70, 60, 2],
        dtype="uint16",
    )
    torch.manual_seed(1)
    build_model(ModelConfig(in_channels=5), 3).eval().save_pretrained(out, metadata)
    return Predictor(out, device="cpu")


def test_arrays_and_tensors_of_the_channels_and_type_of_the_training_have_one_prediction(bands):
    image = np.random.default_rng(0).integers(0, 1500, (48, 64, 5)).astype(np.uint16)
    metadata = bands.model.model.metadata
    pixels = torch.from_numpy((image - np.array(metadata.mean)) / np.array(metadata.std)).float()
    with torch.no_grad():
        logits = bands.model.model(pixels.permute(2, 0, 1)[None])
    expected = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear")[0].argmax(0).numpy()
    tensor = torch.from_numpy(image.copy())
    for kind in (image, image.astype(">u2"), tensor, tensor.permute(2, 0, 1)):
        found = bands(kind)
        assert (found.mask == expected).mean() > 0.999
        assert (found.image.shape, found.image.dtype) == ((48, 64, 3), np.uint8)
    assert found.overlay().shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint16), r"uint16 \(8, 8, 3\); give \(height, width, 5\) of uint16"),
        (np.zeros((8, 8), np.uint16), r"give \(height, width, 5\) of uint16"),
        (np.zeros((5, 8, 8), np.uint16), r"channels come last: image\.transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 5), np.uint8), "its values must be those of the training, of uint16"),
        (np.zeros((8, 8, 5)), "its values must be those of the training, of uint16"),
        (Image.new("RGB", (8, 8)), r"give \(height, width, 5\) of uint16"),
    ],
)
def test_other_channels_and_types_are_refused_in_one_line(bands, image, message):
    with pytest.raises(DataError, match=message) as caught:
        bands(image)
    assert "\n" not in str(caught.value)


def test_a_model_of_colors_says_how_more_channels_are_trained(predictor):
    with pytest.raises(DataError, match=r"7 channels are trained on with data\.channels=7"):
        predictor(np.zeros((8, 8, 7), np.uint16))


def test_one_channel_of_floats_takes_height_and_width(tmp_path):
    torch.manual_seed(1)
    metadata = Metadata(classes=CLASSES, palette=PALETTE, mean=[0.1], std=[2.0], dtype="float32")
    build_model(ModelConfig(in_channels=1), 3).eval().save_pretrained(tmp_path / "x", metadata)
    floats = Predictor(tmp_path / "x", device="cpu")
    image = np.random.default_rng(0).normal(size=(40, 48)).astype(np.float32)
    np.testing.assert_array_equal(floats(image).mask, floats(image[..., None]).mask)
    image[3, 4] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        floats(image)
