import cv2
import numpy as np
import pytest
import torch

from segformer.data.loading.crop import AugmentConfig, RandomCrop
from segformer.data.loading.photometric import Distortion, Normalize, distort, draw_distortion
from segformer.data.loading.samples import sample_rng

CFG = AugmentConfig()
IDENTITY = Distortion(0.0, 1.0, 1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def image(picture: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return picture[0]


def planes(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def drawn(count: int, seed: int = 0, strength: float = 1.0) -> torch.Tensor:
    return torch.tensor([draw_distortion(strength, sample_rng(seed, 1, number)) for number in range(count)])


def opencv_distortion(image: np.ndarray, by: Distortion) -> np.ndarray:
    """The recipe's distortion on one RGB image, each step through uint8 as OpenCV pipelines do it."""

    def convert(values: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        return np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    image = convert(convert(image, beta=by.brightness), alpha=by.contrast_before)
    if by.saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], alpha=by.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if by.hue != 0:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + int(by.hue)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return convert(image, alpha=by.contrast_after)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_distortion_on_the_device_equals_opencv_within_two_grey_levels(
    strength: float, image: np.ndarray
) -> None:
    rows = drawn(48, seed=4, strength=strength)
    images = [np.roll(image, number, axis=2) for number in range(48)]
    ours = distort(planes(*images).float(), rows)
    expected = [
        opencv_distortion(one, Distortion(*row)) for one, row in zip(images, rows.tolist(), strict=True)
    ]
    difference = (ours - planes(*expected)).abs()
    assert (difference <= 2).float().mean() >= 0.99
    assert ours.min() >= 0
    assert ours.max() <= 255


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_draws_follow_the_recipe(strength: float) -> None:
    rows, identity = drawn(4000, strength=strength).numpy(), np.array(IDENTITY)
    reach = np.array([32, 0.5, 0.5, 18, 0.5]) * strength
    low, high = identity - reach, identity + reach - np.array([0, 0, 0, strength > 0, 0])  # hue: exclusive
    np.testing.assert_allclose(rows.min(0), low, atol=max(0.01 * strength * 32, 1e-9))
    np.testing.assert_allclose(rows.max(0), high, atol=max(0.01 * strength * 32, 1e-9))
    assert ((rows[:, 1] == 1) | (rows[:, 4] == 1)).all()  # contrast comes before or after, never twice
    if strength == 1:
        used = (rows != identity).mean(0)
        np.testing.assert_allclose(used, [0.5, 0.25, 0.5, 0.5 * 35 / 36, 0.25], atol=0.03)


def test_padding_is_zero_after_normalization_whatever_the_colors_do() -> None:
    cfg = AugmentConfig(crop=[96, 96], resize=[], scale=[0.3, 0.6])
    image, mask = np.full((100, 120, 3), 200, np.uint8), np.ones((100, 120), np.uint8)
    crops = [RandomCrop(cfg)(image, mask, sample_rng(0, 0, number)) for number in range(16)]
    images, masks, valid = zip(*crops, strict=True)
    normalized = Normalize(cfg.mean, cfg.std)(planes(*images), drawn(16), torch.tensor(valid))
    padding = torch.from_numpy(np.stack(masks) == 255)[:, None].expand_as(normalized)
    assert 0.2 < padding.float().mean() < 0.95
    assert (normalized[padding] == 0).all()
    assert (normalized[~padding] != 0).all()


def test_without_distortion_a_batch_is_normalized_and_nothing_else(image: np.ndarray) -> None:
    normalize = Normalize(CFG.mean, CFG.std)
    expected = (image.astype(np.float32) - np.float32(CFG.mean)) / np.float32(CFG.std)
    for photometric in (torch.tensor([IDENTITY]), None):
        ours = normalize(planes(image), photometric)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert not normalize.state_dict()
    assert not list(normalize.parameters())


def test_a_sample_is_distorted_alike_alone_and_in_a_batch(image: np.ndarray) -> None:
    normalize, rows, images = Normalize(CFG.mean, CFG.std), drawn(5, seed=2), planes(*[image] * 5)
    whole = normalize(images, rows)
    for one in (slice(number, number + 1) for number in range(5)):
        assert torch.equal(normalize(images[one], rows[one]), whole[one])
