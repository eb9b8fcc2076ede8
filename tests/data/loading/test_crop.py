import hashlib
import math

import cv2
import numpy as np
import pytest

from segformer.data.loading import crop as crop_module
from segformer.data.loading.crop import (
    AugmentConfig,
    Placement,
    RandomCrop,
    cut,
    cut_mask,
    nearest_indices,
    scaled_size,
)
from segformer.data.loading.photometric import draw_distortion
from segformer.data.loading.samples import sample_rng
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
    for number in range(40):
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


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("turns", range(4))
def test_resizing_the_whole_and_warping_the_region_agree(
    turns: int, flips: tuple[bool, bool], picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (201, 230)
    place = Placement(turns, size, 0.0, 37, 11, (90, 110), flip_y=flips[0], flip_x=flips[1])
    monkeypatch.setattr(crop_module, "_WHOLE_UP_TO", 0)
    warped, warped_mask = cut(*picture, place)
    monkeypatch.setattr(crop_module, "_WHOLE_UP_TO", math.inf)
    resized, resized_mask = cut(*picture, place)
    np.testing.assert_array_equal(warped_mask, resized_mask)
    assert (np.abs(warped.astype(int) - resized) <= 1).all()


def test_the_result_shares_no_memory_with_the_image(picture: Picture) -> None:
    shape = picture[1].shape
    image, mask = cut(*picture, Placement(0, shape, 0.0, 0, 0, shape))
    np.testing.assert_array_equal(image, picture[0])
    assert not np.shares_memory(image, picture[0])
    assert not np.shares_memory(mask, picture[1])


ANGLES = [7.0, -33.5, 90.0, 179.0]


@pytest.mark.parametrize("angle", ANGLES)
def test_rotation_equals_opencvs_rotation_of_the_whole_image_then_the_crop(
    angle: float, picture: Picture
) -> None:
    image = picture[0]
    height, width = image.shape[:2]
    centre = ((width - 1) / 2, (height - 1) / 2)
    whole = cv2.warpAffine(
        image,
        cv2.getRotationMatrix2D(centre, angle, 1),
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    ours, _ = cut(*picture, Placement(0, (height, width), angle, 20, 31, (90, 100), flip_x=True))
    expected = whole[20:110, 31:131][:, ::-1]
    difference = np.abs(ours.astype(int) - expected)
    assert (difference <= 1).mean() >= 0.99
    assert (difference <= 3).all()


@pytest.mark.parametrize("size", [(137, 181), (74, 98), (250, 330)])
def test_rotation_after_scaling_equals_both_steps_of_opencv(size: tuple[int, int]) -> None:
    row, column = np.mgrid[:137, :181]
    waves = [np.sin(row / 17 + channel) + np.cos(column / 23 - channel) for channel in range(3)]
    image = (np.stack(waves, 2) * 60 + 128).astype(np.uint8)  # smooth, so that resampling twice costs little
    scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    matrix = cv2.getRotationMatrix2D(((size[1] - 1) / 2, (size[0] - 1) / 2), 21.0, 1)
    whole = cv2.warpAffine(scaled, matrix, size[::-1], borderMode=cv2.BORDER_REPLICATE)
    ours, _ = cut(image, np.zeros((137, 181), np.uint8), Placement(0, size, 21.0, 5, 9, (60, 70)))
    difference = np.abs(ours.astype(int) - whole[5:65, 9:79])
    assert (difference <= 2).mean() >= 0.999


def rotated_labels(mask: np.ndarray, place: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The rotated crop pixel by pixel, and which pixels are clear of a border between source pixels."""
    labels, clear = np.empty(place.valid, np.uint8), np.empty(place.valid, bool)
    cos, sin = math.cos(math.radians(place.angle)), math.sin(math.radians(place.angle))
    for i in range(place.valid[0]):
        for j in range(place.valid[1]):
            y = place.top + (place.valid[0] - 1 - i if place.flip_y else i) + 0.5 - place.size[0] / 2
            x = place.left + (place.valid[1] - 1 - j if place.flip_x else j) + 0.5 - place.size[1] / 2
            row = (sin * x + cos * y + place.size[0] / 2) * mask.shape[0] / place.size[0]
            column = (cos * x - sin * y + place.size[1] / 2) * mask.shape[1] / place.size[1]
            inside = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
            labels[i, j] = mask[int(row), int(column)] if inside else 255
            clear[i, j] = max(abs(row - round(row)), abs(column - round(column))) > 0.002 and (
                min(abs(row - round(row)), abs(column - round(column))) > 0.002
            )
    return labels, clear


@pytest.mark.parametrize("size", [(137, 181), (60, 80), (250, 330)])
@pytest.mark.parametrize("angle", ANGLES)
def test_the_rotated_mask_is_nearest_and_ignored_outside(
    angle: float, size: tuple[int, int], picture: Picture
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
    geometry = RandomCrop(cfg, np.array([60000, 1, 0]))
    for number in range(60):
        _, crop, _ = geometry(np.zeros((200, 300, 3), np.uint8), mask, sample_rng(0, 0, number))
        assert (crop == 1).any()
    wanted = RandomCrop(cfg, np.array([60000, 37, 1]))
    seen = [
        (wanted(np.zeros((200, 300, 3), np.uint8), mask, sample_rng(0, 0, number))[1] == 2).any()
        for number in range(60)
    ]
    assert sum(seen) > (50 if scale[0] > 1 else 1)


def test_a_crop_for_one_class_holds_it_wherever_it_lies(picture: Picture) -> None:
    geometry = RandomCrop(AugmentConfig(resize=[], hflip=0.0))
    for number in range(60):
        mask = np.zeros((90, 130), np.uint8)
        mask[number % 90, (number * 37) % 130] = 7
        place = geometry.place(mask, sample_rng(0, 0, number), (30, 40), label=7)
        if place.size[0] >= 90:
            assert (cut(np.zeros((90, 130, 3), np.uint8), mask, place)[1] == 7).any()
    assert geometry.place(mask, sample_rng(0, 0, 0), (30, 40), label=9)  # a class that is not there


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


def test_a_crop_that_must_be_filled_has_no_padding(picture: Picture) -> None:
    geometry = RandomCrop(AugmentConfig(resize=[], scale=[0.2, 0.6], rot90=0.5))
    for number in range(30):
        place = geometry.place(picture[1], sample_rng(0, 0, number), (150, 60), fill=True)
        turned = picture[1].shape[:: -1 if place.turns % 2 else 1]
        assert place.valid == (150, 60)
        assert place.size[0] >= 150
        assert abs(place.size[0] / turned[0] - place.size[1] / turned[1]) < 0.02


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
        ({"hflip": 1.5}, "augment.hflip=1.5"),
        ({"std": [1.0, 1.0, 0.0]}, "augment.std"),
        ({"rotate": 181.0}, "augment.rotate=181.0 must be from 0 to 180"),
        ({"rotate_prob": -0.1}, "augment.rotate_prob"),
        ({"photometric_strength": 2.5}, "augment.photometric_strength=2.5"),
        ({"blur": 2.0}, "augment.blur=2.0"),
        ({"blur_sigma": [2.0, 1.0]}, "augment.blur_sigma"),
        ({"mosaic": 1.1}, "augment.mosaic"),
        ({"copy_paste": -1.0}, "augment.copy_paste"),
        ({"class_balanced_crop": 3.0}, "augment.class_balanced_crop"),
        ({"rotate": float("nan")}, "augment.rotate=nan"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**settings)
