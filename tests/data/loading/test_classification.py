import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from segformer.data.loading.classification import (
    OPERATIONS,
    ClassificationAugment,
    ClassificationGeometry,
    mix,
)
from segformer.data.loading.samples import sample_rng
from segformer.errors import ConfigError

FILL = np.array([124, 116, 104], np.uint8)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Smooth and rough regions, dark on one side, 120 x 160."""
    rng = np.random.default_rng(2)
    coarse = cv2.resize(
        rng.integers(20, 230, (8, 10, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC
    )
    noise = rng.integers(-20, 20, (120, 160, 3)) * (np.arange(160) > 80)[:, None]
    return (coarse * np.linspace(0.4, 1, 120)[:, None, None] + noise).clip(3, 250).astype(np.uint8)


def test_areas_and_ratios_stay_inside_their_bounds_and_fill_them() -> None:
    cfg = ClassificationAugment(scale=[0.1, 0.5], ratio=[0.5, 2.0])
    geometry = ClassificationGeometry(cfg)
    regions = np.array([geometry.region(400, 500, sample_rng(0, 0, number)) for number in range(3000)])
    top, left, height, width = regions.T
    area, ratio = height * width / 200_000, np.log(width / height)
    assert (regions >= 0).all()
    assert (top + height).max() <= 400
    assert (left + width).max() <= 500
    assert 0.099 < area.min() < area.max() < 0.502
    assert np.abs(ratio).max() < math.log(2) + 0.02
    # uniform area, and uniform logarithm of the ratio: quarters of equal weight (chi square, 0.1 % = 16.3)
    for values, low, high in ((area, 0.1, 0.5), (ratio, -math.log(2), math.log(2))):
        counts = np.bincount(((values - low) / (high - low) * 4).astype(int).clip(0, 3), minlength=4)
        assert ((counts - 750) ** 2 / 750).sum() < 16.3
    assert abs((top / np.maximum(400 - height, 1)).mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("shape", "expected"), [((10, 1000), (10, 13)), ((1000, 10), (13, 10)), ((1, 1), (1, 1))]
)
def test_an_image_that_no_region_fits_gives_its_centre(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    geometry = ClassificationGeometry(ClassificationAugment(scale=[1.0, 1.0]))
    top, left, height, width = geometry.region(*shape, sample_rng(0, 0, 0))
    assert (height, width) == expected
    assert abs(2 * top + height - shape[0]) <= 1
    assert abs(2 * left + width - shape[1]) <= 1


def test_a_growing_region_equals_opencvs_warp_of_it(image: np.ndarray) -> None:
    cfg = ClassificationAugment(size=200, eval_resize=200, scale=[0.2, 0.6])
    geometry = ClassificationGeometry(cfg)
    flipped = 0
    for number in range(20):
        ours = geometry(image, sample_rng(0, 0, number))
        rng = sample_rng(0, 0, number)
        top, left, height, width = geometry.region(120, 160, rng)
        flip = rng.random() < 0.5
        scale_x, scale_y = width / 200 * (-1 if flip else 1), height / 200
        start = left + (199.5 if flip else 0.5) * width / 200 - 0.5
        matrix = np.array([[scale_x, 0, start], [0, scale_y, top + 0.5 * scale_y - 0.5]])
        flags, border = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REPLICATE
        expected = cv2.warpAffine(image, matrix, (200, 200), flags=flags, borderMode=border)
        inner = np.s_[4:-4, 4:-4]  # at its edge the region repeats itself, the warp of the image goes on
        assert (np.abs(ours.astype(int) - expected)[inner] <= 2).mean() > 0.99
        flipped += flip
    assert 0 < flipped < 20


def test_a_shrinking_region_is_averaged() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    geometry = ClassificationGeometry(
        ClassificationAugment(size=16, eval_resize=16, scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0)
    )
    expected = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(geometry(image, sample_rng(0, 0, 0)) - expected).max() <= 1
    assert np.abs(geometry.eval_view(image) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (50, 60), (256, 256)])
def test_evaluation_sees_the_centre(shape: tuple[int, int]) -> None:
    row, column = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([row * 255 / shape[0], column * 255 / shape[1], row * 0], 2).astype(np.uint8)
    view = ClassificationGeometry(ClassificationAugment()).eval_view(image)
    assert view.shape == (224, 224, 3)
    covered = 224 / 256 * min(shape) / np.array(shape)  # of each side
    for channel, share in enumerate(covered):
        profile = view[..., channel].mean(1 - channel) / 255
        assert abs(profile.mean() - 0.5) < 0.02
        assert abs(profile[-1] - profile[0] - share) < 0.03


def enhanced(kind: str):
    return lambda picture, level: getattr(ImageEnhance, kind)(picture).enhance(1 + 0.9 * level)


def warped(picture: Image.Image, linear: np.ndarray, shift: tuple[float, float] = (0, 0)) -> Image.Image:
    centre = np.array([picture.width / 2, picture.height / 2])
    offset = centre - linear @ centre + shift
    data = (*linear[0], offset[0], *linear[1], offset[1])
    fill = tuple(int(value) for value in FILL)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=fill
    )


def turned(picture: Image.Image, level: float) -> Image.Image:
    angle = math.radians(30 * level)
    return warped(
        picture, np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    )


BY_PILLOW = {
    "brightness": enhanced("Brightness"),
    "contrast": enhanced("Contrast"),
    "saturation": enhanced("Color"),
    "sharpness": enhanced("Sharpness"),
    "posterize": lambda picture, level: ImageOps.posterize(picture, 8 - round(4 * abs(level))),
    "solarize": lambda picture, level: ImageOps.solarize(picture, math.ceil(256 * (1 - abs(level)))),
    "autocontrast": lambda picture, level: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level: ImageOps.equalize(picture),
    "identity": lambda picture, level: picture,
    "rotate": turned,
    "shear_x": lambda picture, level: warped(picture, np.array([[1, 0.3 * level], [0, 1]])),
    "shear_y": lambda picture, level: warped(picture, np.array([[1, 0], [0.3 * level, 1]])),
    "shift_x": lambda picture, level: warped(picture, np.eye(2), (round(0.45 * level * 160), 0)),
    "shift_y": lambda picture, level: warped(picture, np.eye(2), (0, round(0.45 * level * 120))),
}
GEOMETRIC = ("rotate", "shear_x", "shear_y", "shift_x", "shift_y")


@pytest.mark.parametrize("level", [-1.0, -0.55, 0.0, 0.3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_pillow(name: str, level: float, image: np.ndarray) -> None:
    ours = OPERATIONS[name](image, level, FILL)
    expected = np.asarray(BY_PILLOW[name](Image.fromarray(image), level))
    assert ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - expected)
    if level == 0 and name not in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(ours, image)
    if name in GEOMETRIC:  # at the edge of the image Pillow cuts where OpenCV fades
        assert (difference <= 2).mean() > 0.97
    else:
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.9


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_flat_image_and_one_of_a_pixel_survive_each_operation(name: str, value: int) -> None:
    for shape in ((9, 7, 3), (1, 1, 3)):
        flat = np.full(shape, value, np.uint8)
        ours = OPERATIONS[name](flat, 0.7, FILL)
        assert ours.shape == shape
        if name not in (*GEOMETRIC, "brightness", "solarize", "posterize"):
            np.testing.assert_array_equal(ours, flat)


def test_magnitude_zero_switches_randaugment_off(image: np.ndarray) -> None:
    image = image.copy()
    image.setflags(write=False)  # nothing may write to it
    plain = ClassificationGeometry(ClassificationAugment(ops=0, magnitude=9.0))
    off = ClassificationGeometry(ClassificationAugment(ops=5, magnitude=0.0))
    strong = ClassificationGeometry(ClassificationAugment(ops=2, magnitude=9.0))
    different = 0
    for number in range(30):
        crops = [geometry(image, sample_rng(0, 0, number)) for geometry in (plain, off, strong, strong)]
        np.testing.assert_array_equal(crops[0], crops[1])
        np.testing.assert_array_equal(crops[2], crops[3])
        different += (crops[2] != crops[0]).any()
    assert different >= 27  # the identity twice comes once in 196 times


def batch(count: int = 6, size: tuple[int, int] = (12, 15)) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat images, each of its own colour, and labels 0, 1, 2 in turn."""
    colours = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1) * 10
    return colours.expand(-1, 3, *size).clone(), torch.arange(count) % 3


def test_cutmix_targets_are_the_pixel_shares() -> None:
    cfg = ClassificationAugment(cutmix=1.0)
    images, labels = batch()
    shares = set()
    for position in range(60):
        mixed, targets = mix(images, labels, 3, cfg, 7, position)
        for k in range(6):
            own, other = (mixed[k] == images[k]).all(0), (mixed[k] == images[k - 1]).all(0)
            assert (own ^ other).all()
            expected = torch.zeros(3)
            expected[labels[k]] += own.float().mean()
            expected[labels[k - 1]] += other.float().mean()
            torch.testing.assert_close(targets[k], expected, rtol=0, atol=1e-7)
            rows, columns = other.nonzero().unbind(1)
            if len(rows):  # one box
                box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert box == len(rows)
        shares.add(round(float(targets[0].max()), 4))
    assert len(shares) > 10


def test_mixup_blends_images_and_targets_by_one_weight() -> None:
    images, labels = batch()
    weights = []
    for position in range(400):
        mixed, targets = mix(images, labels, 3, ClassificationAugment(mixup=0.4), 1, position)
        weight = targets[1, 1]
        torch.testing.assert_close(mixed, images * weight + images.roll(1, 0) * (1 - weight))
        expected = torch.eye(3)[labels] * weight + torch.eye(3)[labels.roll(1)] * (1 - weight)
        torch.testing.assert_close(targets, expected)
        weights.append(float(weight))
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert abs(np.mean(weights) - 0.5) < 0.06
    assert abs(np.var(weights) - 1 / (4 * 1.8)) < 0.02


@pytest.mark.parametrize("options", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_targets_sum_to_one_and_are_smoothed(options: dict) -> None:
    cfg = ClassificationAugment(label_smoothing=0.1, **options)
    images, labels = batch()
    for position in range(20):
        mixed, targets = mix(images, labels, 4, cfg, 0, position)
        assert mixed.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(targets.amin(1), torch.full((6,), 0.025))  # class 3 never comes
        if not options:
            torch.testing.assert_close(targets.amax(1), torch.full((6,), 0.925))
            assert torch.equal(mixed, images)


def test_mixing_is_a_function_of_seed_and_position() -> None:
    cfg = ClassificationAugment(mixup=0.8, cutmix=1.0)
    images, labels = batch()
    before = images.clone()
    places = [(seed, position) for seed in range(3) for position in range(20)]
    first = {place: mix(images, labels, 3, cfg, *place) for place in places}
    for place in places[::-1]:
        assert all(map(torch.equal, mix(images, labels, 3, cfg, *place), first[place]))
    assert len({targets.numpy().tobytes() for _, targets in first.values()}) > 50
    assert torch.equal(images, before)


def test_batches_are_mixed_as_often_as_configured() -> None:
    cfg = ClassificationAugment(mixup=1.0, cutmix=1.0, mix_prob=0.6)
    images, labels = batch()
    kinds = {"none": 0, "cut": 0, "blend": 0}
    for position in range(500):
        mixed, _ = mix(images, labels, 3, cfg, 0, position)
        values = len(mixed[1].unique())
        changed = not torch.equal(mixed, images)
        kinds["none" if not changed else "cut" if values == 2 or mixed[1, 0, 0, 0] == 0 else "blend"] += 1
    assert abs(kinds["blend"] / 500 - 0.3) < 0.06
    assert abs(kinds["none"] / 500 - 0.4) < 0.08  # a few boxes are empty


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "classification.size=0"),
        ({"eval_resize": 200}, "eval_resize=200"),
        ({"scale": [0.5, 1.5]}, "classification.scale"),
        ({"ratio": [2.0, 1.0]}, "classification.ratio"),
        ({"magnitude": 11.0}, "classification.magnitude=11.0 must be from 0 to 10"),
        ({"label_smoothing": 1.0}, "classification.label_smoothing"),
        ({"std": [1.0, 1.0]}, "classification.std"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassificationAugment(**settings)
