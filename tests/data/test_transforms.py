import cv2
import numpy as np
import pytest
import torch

from segformer.data.transforms import (
    NUM_PHOTOMETRIC,
    AugmentConfig,
    Normalize,
    TrainGeometry,
    distort,
    draw_photometric,
    nearest_indices,
    sample_rng,
    scaled_size,
)
from segformer.errors import ConfigError

Picture = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def picture() -> Picture:
    """An image with edges and texture at many scales, 137 x 181, and a mask of blobs."""
    rng = np.random.default_rng(5)
    image = np.zeros((137, 181, 3), np.float64)
    for cells in (4, 16, 64):
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        image += cv2.resize(noise, (181, 137), interpolation=cv2.INTER_CUBIC).astype(float) / 3
    mask = cv2.resize(rng.integers(0, 5, (9, 12), np.uint8), (181, 137), interpolation=cv2.INTER_NEAREST)
    mask[mask == 4] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def resize_then_crop(cfg: AugmentConfig, picture: Picture, rng: np.random.Generator) -> Picture:
    """The recipe step by step with OpenCV on the whole image, drawing the same random numbers."""
    image, mask = picture
    turns = int(rng.integers(1, 4)) if rng.random() < cfg.rot90 else 0
    image, mask = np.ascontiguousarray(np.rot90(image, turns)), np.ascontiguousarray(np.rot90(mask, turns))
    height, width = scaled_size(mask.shape, cfg.resize, rng.uniform(*cfg.scale))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    h, w = min(cfg.crop[0], height), min(cfg.crop[1], width)
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    image, mask = image[top : top + h, left : left + w], mask[top : top + h, left : left + w]
    if rng.random() < cfg.hflip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < cfg.vflip:
        image, mask = image[::-1], mask[::-1]
    below, right = cfg.crop[0] - h, cfg.crop[1] - w
    border = (0, below, 0, right, cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(np.ascontiguousarray(image), *border, value=(0, 0, 0))
    return image, cv2.copyMakeBorder(np.ascontiguousarray(mask), *border, value=255)


@pytest.mark.parametrize(
    "settings",
    [
        {"resize": []},
        {"resize": [400, 96], "crop": [96, 96]},
        {"resize": [150, 150], "crop": [64, 128]},
        {"resize": [], "crop": [200, 90], "scale": [0.3, 3.0]},
        {"resize": [], "vflip": 0.5, "rot90": 0.7},
    ],
)
def test_one_resampling_of_the_region_equals_opencvs_resize_then_crop(
    settings: dict, picture: Picture
) -> None:
    cfg = AugmentConfig(**{"crop": [80, 100], "cat_max_ratio": 1.0, **settings})
    geometry = TrainGeometry(cfg)
    close = total = 0
    for number in range(40):
        image, mask, _ = geometry(*picture, sample_rng(0, 0, number))
        expected_image, expected_mask = resize_then_crop(cfg, picture, sample_rng(0, 0, number))
        np.testing.assert_array_equal(mask, expected_mask)
        assert image.shape == (*cfg.crop, 3)
        close += (np.abs(image.astype(int) - expected_image) <= 1).sum()
        total += image.size
    assert close >= 0.999 * total


@pytest.mark.parametrize("source", [7, 64, 360, 683])
def test_nearest_indices_are_those_of_opencv(source: int) -> None:
    row = np.arange(source, dtype=np.float32)[None]
    for scaled in [1, 2, 3, *range(source - 3, source + 4), *range(5, 3 * source, 37)]:
        expected = cv2.resize(row, (scaled, 1), interpolation=cv2.INTER_NEAREST)[0]
        np.testing.assert_array_equal(nearest_indices(source, scaled), expected)


@pytest.mark.parametrize(
    ("shape", "resize", "scale", "expected"),
    [
        ((512, 683), [2048, 512], 1.0, (512, 683)),
        ((512, 683), [2048, 512], 0.5, (256, 342)),
        ((300, 3000), [2048, 512], 1.0, (205, 2048)),  # the long side binds
        ((3000, 300), [2048, 512], 2.0, (4096, 410)),
        ((100, 101), [], 1.5, (150, 152)),
        ((1, 4000), [100, 100], 1.0, (1, 100)),
    ],
)
def test_the_scaled_size_keeps_the_ratio_inside_both_bounds(
    shape: tuple[int, int], resize: list[int], scale: float, expected: tuple[int, int]
) -> None:
    assert scaled_size(shape, resize, scale) == expected


def test_a_crop_is_drawn_again_while_one_class_fills_it() -> None:
    mask = np.zeros((400, 400), np.uint8)
    mask[:, 300:] = 1
    image = np.zeros((400, 400, 3), np.uint8)

    def mixed(ratio: float) -> int:
        cfg = AugmentConfig(crop=[100, 100], resize=[], scale=[1.0, 1.0], cat_max_ratio=ratio)
        crops = [TrainGeometry(cfg)(image, mask, sample_rng(0, 0, number))[1] for number in range(200)]
        return sum(0.25 < (crop == 0).mean() < 0.75 for crop in crops)

    # 50 of 301 places are mixed: 17 % of single draws, 1 - 0.83^11 = 87 % with ten more tries
    assert 15 <= mixed(1.0) <= 55
    assert mixed(0.75) >= 155


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    mask = np.full((64, 64), 255, np.uint8)
    mask[:2] = 0
    mask[2:4] = 1
    cfg = AugmentConfig(crop=[64, 64], resize=[], scale=[1.0, 1.0], hflip=0.0)
    calls: list[int] = []

    class Counting(np.random.Generator):
        def integers(self, *args: int) -> int:
            calls.append(1)
            return int(super().integers(*args))

    TrainGeometry(cfg)(np.zeros((64, 64, 3), np.uint8), mask, Counting(np.random.Philox(1)))
    assert len(calls) == 2  # one corner was enough: half of the labelled pixels each


def test_padding_is_zero_after_normalisation_whatever_the_colours_do() -> None:
    cfg = AugmentConfig(crop=[96, 96], resize=[], scale=[0.3, 0.6])
    image, mask = np.full((100, 120, 3), 200, np.uint8), np.ones((100, 120), np.uint8)
    rows, images, masks = [], [], []
    for number in range(16):
        rng = sample_rng(0, 0, number)
        crop, target, valid = TrainGeometry(cfg)(image, mask, rng)
        images.append(crop)
        masks.append(target)
        rows.append(draw_photometric(cfg, rng, valid))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    normalised = Normalize(cfg)(batch, torch.from_numpy(np.stack(rows)))
    padding = torch.from_numpy(np.stack(masks) == 255)[:, None].expand_as(normalised)
    assert 0.2 < padding.float().mean() < 0.95
    assert (normalised[padding] == 0).all()
    assert (normalised[~padding] != 0).all()


def opencv_photometric(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The recipe's distortion on one RGB image, each step through uint8 as OpenCV pipelines do it."""

    def convert(values: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    brightness, before, saturation, hue, after = (float(value) for value in row[:5])
    image = convert(convert(image, beta=brightness), alpha=before)
    if saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], alpha=saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if hue != 0:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + int(hue)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return convert(image, alpha=after)


def test_device_photometric_equals_opencv_within_two_grey_levels(picture: Picture) -> None:
    cfg = AugmentConfig()
    rows = np.stack([draw_photometric(cfg, sample_rng(1, 0, number)) for number in range(64)])
    images = np.stack([np.roll(picture[0], number, axis=2) for number in range(64)])
    ours = distort(torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(rows))
    expected = np.stack([opencv_photometric(image, row) for image, row in zip(images, rows, strict=True)])
    difference = np.abs(ours.permute(0, 2, 3, 1).numpy() - expected)
    assert (difference <= 2).mean() >= 0.99
    assert ours.min() >= 0
    assert ours.max() <= 255


@pytest.mark.parametrize("column", range(5))
def test_each_distortion_alone_equals_opencv(column: int, picture: Picture) -> None:
    image = picture[0]
    for value in ((-20.0, 25.5), (0.6, 1.4), (0.5, 1.5), (-18.0, 17.0), (0.6, 1.4))[column]:
        row = draw_photometric(AugmentConfig(photometric=False), sample_rng(0, 0, 0))
        row[column] = value
        ours = distort(torch.from_numpy(image).permute(2, 0, 1)[None].float(), torch.from_numpy(row)[None])
        difference = np.abs(ours[0].permute(1, 2, 0).numpy() - opencv_photometric(image, row))
        assert (difference <= 1).mean() >= 0.995


def test_photometric_draws_follow_the_recipe() -> None:
    rows = np.stack([draw_photometric(AugmentConfig(), sample_rng(0, 1, number)) for number in range(4000)])
    identity = np.array([0, 1, 1, 0, 1])
    used = (rows[:, :5] != identity).mean(0)
    np.testing.assert_allclose(used, [0.5, 0.25, 0.5, 0.5 * 35 / 36, 0.25], atol=0.03)
    assert ((rows[:, 1] == 1) | (rows[:, 4] == 1)).all()  # contrast comes before or after, never twice
    low, high = rows[:, :5].min(0), rows[:, :5].max(0)
    np.testing.assert_allclose(low, [-32, 0.5, 0.5, -18, 0.5], atol=0.3)
    np.testing.assert_allclose(high, [32, 1.5, 1.5, 17, 1.5], atol=0.3)


def test_without_photometric_a_batch_is_normalised_and_nothing_else(picture: Picture) -> None:
    cfg = AugmentConfig(photometric=False)
    batch = torch.from_numpy(picture[0]).permute(2, 0, 1)[None]
    row = torch.from_numpy(draw_photometric(cfg, sample_rng(0, 0, 0)))[None]
    expected = (picture[0].astype(np.float32) - np.float32(cfg.mean)) / np.float32(cfg.std)
    for parameters in (row, None):
        ours = Normalize(cfg)(batch, parameters)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_sample_is_distorted_alike_alone_and_in_a_batch(picture: Picture) -> None:
    cfg = AugmentConfig()
    rows = torch.from_numpy(
        np.stack([draw_photometric(cfg, sample_rng(2, 0, number)) for number in range(5)])
    )
    images = torch.from_numpy(np.stack([picture[0]] * 5)).permute(0, 3, 1, 2)
    whole = Normalize(cfg)(images, rows)
    for number in range(5):
        one = slice(number, number + 1)
        assert torch.equal(Normalize(cfg)(images[one], rows[one]), whole[one])


def test_normalise_has_nothing_to_save() -> None:
    module = Normalize(AugmentConfig())
    assert not module.state_dict()
    assert not list(module.parameters())
    assert len(draw_photometric(AugmentConfig(), sample_rng(0, 0, 0))) == NUM_PHOTOMETRIC


def test_random_numbers_belong_to_seed_epoch_and_sample() -> None:
    def first(*place: int) -> float:
        return float(sample_rng(*place).random())

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 + 1, 0, 0)]
    assert len({first(*place) for place in places}) == len(places)
    assert first(3, 4, 5) == first(3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": [512]}, "augment.crop"),
        ({"crop": [0, 512]}, "above 0"),
        ({"resize": [512]}, "augment.resize"),
        ({"scale": [2.0, 0.5]}, "augment.scale"),
        ({"hflip": 1.5}, "augment.hflip=1.5"),
        ({"std": [1.0, 1.0, 0.0]}, "augment.std"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**settings)
