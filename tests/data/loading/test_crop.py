import hashlib
import math

import cv2
import numpy as np
import pytest

from segformer.data.loading.crop import (
    AugmentConfig,
    Placement,
    RandomCrop,
    cut,
    cut_mask,
    scaled_size,
)
from segformer.data.loading.photometric import draw_distortion
from segformer.data.loading.samples import sample_rng
from segformer.errors import ConfigError

Picture = tuple[np.ndarray, np.ndarray]


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
    ("settings", "apart"),
    [
        ({"resize": []}, 1),
        ({"resize": [400, 96], "crop": [96, 96]}, 1),
        ({"resize": [150, 150], "crop": [64, 128]}, 1),
        ({"resize": [], "crop": [200, 90], "scale": [0.3, 3.0]}, 1),
        ({"resize": [], "vflip": 0.5, "rot90": 0.7}, 1),
        ({"resize": [], "crop": [130, 170], "scale": [0.5, 1.8], "vflip": 0.5}, 0),  # resized whole
    ],
)
def test_one_resampling_of_the_region_equals_opencvs_resize_then_crop(
    settings: dict, apart: int, picture: Picture
) -> None:
    cfg = AugmentConfig(**{"crop": [80, 100], "cat_max_ratio": 1.0, **settings})
    geometry = RandomCrop(cfg)
    close = total = 0
    for number in range(30):
        image, mask, _ = geometry(*picture, sample_rng(0, 0, number))
        expected_image, expected_mask = resize_then_crop(cfg, picture, sample_rng(0, 0, number))
        np.testing.assert_array_equal(mask, expected_mask)
        assert image.shape == (*cfg.crop, 3)
        close += (np.abs(image.astype(int) - expected_image) <= apart).sum()
        total += image.size
    assert close >= (0.999 if apart else 1) * total


def test_options_that_are_off_draw_nothing() -> None:
    """Golden: a change here gives every run other crops and colours."""
    cfg, digest = AugmentConfig(crop=[64, 96], resize=[400, 96], vflip=0.5, rot90=0.7), hashlib.sha256()
    for number in range(40):
        height, width = 137 + number, 181 + 3 * number
        row, column = np.mgrid[:height, :width]
        mask = ((column // 11 + row // 13) % 5).astype(np.uint8)
        mask[mask == 4] = 255
        rng = sample_rng(3, number % 4, number)
        _, crop, valid = RandomCrop(cfg)(np.zeros((height, width, 3), np.uint8), mask, rng)
        digest.update(np.ascontiguousarray(crop).tobytes())
        columns = np.array([*draw_distortion(1.0, rng), *valid], np.float32)
        digest.update(columns.tobytes() + repr(rng.random()).encode())
    assert digest.hexdigest()[:16] == "4a21f5739ea54377"


def test_the_result_shares_no_memory_with_the_image(picture: Picture) -> None:
    shape = picture[1].shape
    image, mask = cut(*picture, Placement(0, shape, 0.0, 0, 0, shape))
    np.testing.assert_array_equal(image, picture[0])
    assert not np.shares_memory(image, picture[0])
    assert not np.shares_memory(mask, picture[1])


@pytest.mark.parametrize(
    ("size", "angle"), [((137, 181), 7.0), ((74, 98), -33.5), ((250, 330), 90.0), ((137, 181), 179.0)]
)
def test_a_rotated_crop_equals_opencvs_resize_and_rotation_of_the_whole(
    size: tuple[int, int], angle: float
) -> None:
    row, column = np.mgrid[:137, :181]
    waves = [np.sin(row / 17 + channel) + np.cos(column / 23 - channel) for channel in range(3)]
    image = (np.stack(waves, 2) * 60 + 128).astype(np.uint8)  # smooth, so that resampling twice costs little
    scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    matrix = cv2.getRotationMatrix2D(((size[1] - 1) / 2, (size[0] - 1) / 2), angle, 1)
    whole = cv2.warpAffine(scaled, matrix, size[::-1], borderMode=cv2.BORDER_REPLICATE)
    place = Placement(0, size, angle, 5, 9, (60, 70), flip_x=True)
    ours, _ = cut(image, np.zeros((137, 181), np.uint8), place)
    difference = np.abs(ours.astype(int) - whole[5:65, 9:79][:, ::-1])
    assert (difference <= 2).mean() >= 0.999


def rotated_labels(mask: np.ndarray, place: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The rotated crop by its formula, and which pixels are clear of a border between source pixels."""
    (height, width), (rows, columns) = place.valid, place.size
    i, j = np.mgrid[:height, :width]
    y = place.top + (height - 1 - i if place.flip_y else i) + 0.5 - rows / 2
    x = place.left + (width - 1 - j if place.flip_x else j) + 0.5 - columns / 2
    cos, sin = math.cos(math.radians(place.angle)), math.sin(math.radians(place.angle))
    row = (sin * x + cos * y + rows / 2) * mask.shape[0] / rows
    column = (cos * x - sin * y + columns / 2) * mask.shape[1] / columns
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    labels = np.full(place.valid, 255, np.uint8)
    labels[inside] = mask[row[inside].astype(int), column[inside].astype(int)]
    clear = np.minimum(abs(row - row.round()), abs(column - column.round())) > 0.002
    return labels, clear


@pytest.mark.parametrize(
    ("size", "angle"), [((137, 181), 7.0), ((60, 80), -33.5), ((250, 330), 90.0), ((60, 80), 179.0)]
)
def test_the_rotated_mask_is_nearest_and_ignored_outside(
    size: tuple[int, int], angle: float, picture: Picture
) -> None:
    place = Placement(0, size, angle, 3, 5, (48, 56), flip_y=angle > 0)
    _, ours = cut(*picture, place)
    expected, clear = rotated_labels(picture[1], place)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours[clear], expected[clear])


@pytest.mark.parametrize("angle", [0.0, 21.0, -140.0])
def test_the_coarse_grid_of_a_crop_is_its_every_nth_pixel(angle: float, picture: Picture) -> None:
    place = Placement(0, (190, 240), angle, 17, 40, (100, 90))
    whole, grid = cut_mask(picture[1], place), cut_mask(picture[1], place, (3, 7))
    assert grid.shape == whole[::3, ::7].shape
    assert (grid == whole[::3, ::7]).mean() > 0.995  # a pixel between two sources may fall to either


def test_angles_follow_the_configuration(picture: Picture) -> None:
    geometry = RandomCrop(AugmentConfig(rotate=30.0, rotate_prob=0.4, cat_max_ratio=1.0))
    angles = [geometry.place(picture[1], sample_rng(0, 0, n), (64, 64)).angle for n in range(2000)]
    drawn = np.array([angle for angle in angles if angle])
    assert abs(len(drawn) / 2000 - 0.4) < 0.04
    assert np.abs(drawn).max() <= 30
    assert abs(np.abs(drawn).mean() - 15) < 1
    assert abs(drawn.mean()) < 2


@pytest.mark.parametrize("rotate", [0.0, 40.0])
@pytest.mark.parametrize("scale", [[0.3, 0.4], [1.5, 3.0]])
def test_a_balanced_crop_holds_the_drawn_class(scale: list[float], rotate: float) -> None:
    mask = np.zeros((200, 300), np.uint8)
    mask[60, 70] = 2  # may vanish when scaled down, and then is not drawn
    mask[120:126, 200:206] = 1
    cfg = AugmentConfig(
        crop=[40, 50], resize=[], scale=scale, class_balanced_crop=1.0, rotate=rotate, cat_max_ratio=1.0
    )
    image = np.zeros((200, 300, 3), np.uint8)

    def seen(label: int, class_pixels: list[int]) -> int:
        """Crops of 60 that hold a class."""
        geometry = RandomCrop(cfg, np.array(class_pixels))
        crops = [geometry(image, mask, sample_rng(0, 0, number))[1] for number in range(60)]
        return sum((crop == label).any() for crop in crops)

    assert seen(1, [60000, 1, 0]) == 60
    assert seen(2, [60000, 37, 1]) > (50 if scale[0] > 1 else 1)


def test_classes_of_balanced_crops_follow_the_inverse_frequency() -> None:
    """Classes far apart, so that a crop holds one of them; chi square with 2 degrees, 0.1 % = 13.8."""
    mask = np.full((40, 400), 255, np.uint8)
    for label in range(3):
        mask[:, 150 * label : 150 * label + 10] = label
    cfg = AugmentConfig(
        crop=[40, 40], resize=[], scale=[1.0, 1.0], class_balanced_crop=1.0, cat_max_ratio=1.0
    )
    pixels = np.array([100, 200, 400, 1])  # the rarest class is in other images only
    geometry, counts = RandomCrop(cfg, pixels), np.zeros(3)
    draws = 1400
    for number in range(draws):
        _, crop, _ = geometry(np.zeros((40, 400, 3), np.uint8), mask, sample_rng(5, 0, number))
        found = np.unique(crop[crop != 255])
        assert len(found) == 1
        counts[found[0]] += 1
    expected = draws * np.array([4, 2, 1]) / 7
    assert ((counts - expected) ** 2 / expected).sum() < 13.8


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
        crops = [RandomCrop(cfg)(image, mask, sample_rng(0, 0, number))[1] for number in range(200)]
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

    RandomCrop(cfg)(np.zeros((64, 64, 3), np.uint8), mask, Counting(np.random.Philox(1)))
    assert len(calls) == 2  # one corner was enough: half of the labelled pixels each


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": [512]}, "augment.crop"),
        ({"crop": [0, 512]}, "above 0"),
        ({"resize": [512]}, "augment.resize"),
        ({"scale": [2.0, 0.5]}, "augment.scale"),
        ({"std": [1.0, 1.0, 0.0]}, "augment.std"),
        ({"rotate": 181.0}, "augment.rotate=181.0 must be from 0 to 180"),
        ({"rotate": float("nan")}, "augment.rotate=nan"),
        ({"copy_paste": -1.0}, "augment.copy_paste"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**settings)
