from collections.abc import Callable

import cv2
import numpy as np
import pytest

from segformer.data.loading.crop import AugmentConfig, RandomCrop, scaled_size
from segformer.data.loading.samples import Samples, sample_rng
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig

Picture = tuple[np.ndarray, np.ndarray]
Load = Callable[[int], Picture]
CLASSES = 5
PLAIN = {"resize": [], "scale": [1.0, 1.0], "cat_max_ratio": 1.0}  # no resampling: colours stay exact


def painted(number: int) -> Picture:
    """Image `number`, whose colour tells its number (red) and label (green); class 4 in two images only."""
    rng = np.random.default_rng(number)
    mask = np.kron(rng.choice([0, 0, 1, 2, 255], (6, 8)), np.ones((10 + number % 3, 10))).astype(np.uint8)
    if number % 7 == 3:
        mask[20:24, 30:37] = 4
    image = np.stack([np.full_like(mask, 10 * number + 5), label_colour(mask), mask // 2], 2)
    return image, mask


def label_colour(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 255, 250, mask * 40 + 10).astype(np.uint8)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Split]:
    """14 painted images, sharded with so many samples a shard."""
    root = tmp_path_factory.mktemp("painted")
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    for number in range(14):
        image, mask = painted(number)
        cv2.imwrite(str(root / "images/train" / f"{number:03d}.png"), image[..., ::-1])
        cv2.imwrite(str(root / "masks/train" / f"{number:03d}.png"), mask)
    names = [f"class {label}" for label in range(CLASSES)]
    cfg = DatasetConfig(
        name="painted", classes=names, splits=["train"], image_suffix=".png", allow_unseen=["*"]
    )

    def write(samples: int) -> Split:
        write_shards(cfg, root, root / f"out-{samples}", seed=1, samples_per_shard=samples, workers=1)
        return ShardSet.open(root / f"out-{samples}").split("train")

    return write


@pytest.fixture(scope="module")
def split(shard: Callable[[int], Split]) -> Split:
    """The images in three shards."""
    return shard(5)


@pytest.fixture(scope="module")
def load(split: Split) -> Load:
    """Sample id -> its picture, read-only as a cache would hand it out."""
    pictures = [painted(int(split.key(sample_id))) for sample_id in range(split.num_samples)]
    for picture in pictures:
        for array in picture:
            array.setflags(write=False)
    return pictures.__getitem__


def naive_part(
    picture: Picture, cfg: AugmentConfig, crop: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """A crop that is filled, with OpenCV's resize of the whole image, drawing the same random numbers."""
    image, mask = picture
    rng.random()  # no quarter turn
    size = scaled_size(mask.shape, cfg.resize, rng.uniform(*cfg.scale))
    if size[0] < crop[0] or size[1] < crop[1]:
        factor = max(crop[0] / mask.shape[0], crop[1] / mask.shape[1])
        size = tuple(max(crop[side], int(mask.shape[side] * factor + 0.5)) for side in range(2))
    top, left = (int(rng.integers(0, size[side] - crop[side] + 1)) for side in range(2))
    flip_x, flip_y = rng.random() < cfg.hflip, rng.random() < cfg.vflip
    part = np.s_[top : top + crop[0], left : left + crop[1]]
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[part]
    mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)[part]
    turn = np.s_[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return image[turn], mask[turn]


def augmented(cfg: AugmentConfig, split: Split, load: Load, seed: int = 0) -> Callable[..., tuple]:
    """(sample id, epoch) -> image, mask and valid size, without the shards being read."""
    samples = Samples(split, cfg, seed=seed)
    samples.picture = load

    def make(sample_id: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        sample = samples.sample(sample_id, epoch)
        assert sample.valid is not None
        return sample.image, sample.target, sample.valid

    return make


def test_a_mosaic_is_four_filled_crops_of_one_shard(split: Split, load: Load) -> None:
    cfg = AugmentConfig(crop=[50, 44], resize=[], scale=[0.3, 1.5], cat_max_ratio=1.0, mosaic=1.0, vflip=0.5)
    sample, close, total = augmented(cfg, split, load), 0, 0
    for sample_id in range(split.num_samples):
        image, mask, valid = sample(sample_id, total)
        rng = sample_rng(0, total, sample_id)
        rng.random()
        row, column = int(rng.integers(12, 50 - 12 + 1)), int(rng.integers(11, 44 - 11 + 1))
        shard = [n for n in range(split.num_samples) if split.shard_of(n) == split.shard_of(sample_id)]
        after = shard[shard.index(sample_id) :] + shard[: shard.index(sample_id)]
        sources = [after[step] for step in rng.integers(1, len(shard), 3)]
        sources.insert(int(rng.integers(4)), sample_id)
        sizes = [(h, w) for h in (row, 50 - row) for w in (column, 44 - column)]
        parts = [naive_part(load(i), cfg, size, rng) for i, size in zip(sources, sizes, strict=True)]
        one, two, three, four = parts
        expected = [
            np.vstack([np.hstack([one[k], two[k]]), np.hstack([three[k], four[k]])]) for k in range(2)
        ]
        np.testing.assert_array_equal(mask, expected[1])
        assert valid == (50, 44)
        close += (np.abs(image.astype(int) - expected[0]) <= 1).sum()
        total += image.size
    assert close >= 0.999 * total


def naive_paste(
    base: Picture, valid: tuple[int, int], split: Split, load: Load, cfg: AugmentConfig, rng
) -> int:
    """Copy-paste pixel by pixel onto `base`, drawing the same random numbers; the label that was drawn."""
    masks = [load(sample_id)[1] for sample_id in range(split.num_samples)]
    pixels = [sum(int((mask == label).sum()) for mask in masks) for label in range(CLASSES)]
    point, label = rng.random() * sum(1 / count for count in pixels if count), 0
    while point >= (1 / pixels[label] if pixels[label] else 0):
        point -= 1 / pixels[label] if pixels[label] else 0
        label += 1
    holders = [sample_id for sample_id, mask in enumerate(masks) if (mask == label).any()]
    image, mask = load(holders[int(rng.integers(len(holders)))])
    rng.random()
    rng.uniform(*cfg.scale)
    crop = (min(valid[0], mask.shape[0]), min(valid[1], mask.shape[1]))
    places = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j] == label]
    held = places[int(rng.integers(len(places)))]
    ends = [min(held[side], mask.shape[side] - crop[side]) + 1 for side in range(2)]
    corner = [int(rng.integers(max(0, held[side] - crop[side] + 1), ends[side])) for side in range(2)]
    flip_x, flip_y = rng.random() < cfg.hflip, rng.random() < cfg.vflip
    for i in range(crop[0]):
        for j in range(crop[1]):
            y = corner[0] + (crop[0] - 1 - i if flip_y else i)
            x = corner[1] + (crop[1] - 1 - j if flip_x else j)
            if mask[y, x] == label and base[1][i, j] != 255:
                base[0][i, j], base[1][i, j] = image[y, x], label
    return label


@pytest.mark.parametrize("crop", [(40, 50), (75, 100)])
def test_copy_paste_changes_the_pixels_of_one_class_and_nothing_else(
    crop: tuple[int, int], split: Split, load: Load
) -> None:
    cfg = AugmentConfig(crop=list(crop), copy_paste=1.0, vflip=0.5, **PLAIN)
    sample, labels, pasted = augmented(cfg, split, load), [], 0
    for sample_id in list(range(split.num_samples)) * 2:
        epoch = len(labels)
        image, mask, valid = sample(sample_id, epoch)
        rng = sample_rng(0, epoch, sample_id)
        plain_image, plain_mask, _ = RandomCrop(cfg)(*load(sample_id), rng)
        base = plain_image.copy(), plain_mask.copy()
        rng.random()
        labels.append(naive_paste(base, valid, split, load, cfg, rng))
        np.testing.assert_array_equal(image, base[0])
        np.testing.assert_array_equal(mask, base[1])
        changed = (mask != plain_mask) | (image != plain_image).any(2)
        assert (mask[changed] == labels[-1]).all()
        np.testing.assert_array_equal(mask == 255, plain_mask == 255)
        pasted += changed.any()
    assert pasted > len(labels) // 2
    assert labels.count(4) > len(labels) // 2  # 56 of about 60,000 pixels


def test_every_pixel_keeps_its_own_label_through_mosaic_and_copy_paste(split: Split, load: Load) -> None:
    cfg = AugmentConfig(
        crop=[40, 48], mosaic=0.5, copy_paste=0.5, class_balanced_crop=0.5, rot90=0.5, vflip=0.5, **PLAIN
    )
    sample, sources = augmented(cfg, split, load), []
    for number in range(150):
        image, mask, _ = sample(number % split.num_samples, number)
        np.testing.assert_array_equal(image[..., 1], label_colour(mask))
        np.testing.assert_array_equal(image[..., 2], mask // 2)
        sources.append(len(np.unique(image[..., 0])))
    assert min(sources) == 1
    assert max(sources) >= 4


def test_padding_survives_copy_paste_and_blur(split: Split, load: Load) -> None:
    cfg = AugmentConfig(crop=[100, 120], copy_paste=1.0, blur=1.0, rotate=30.0, **PLAIN)
    sample = augmented(cfg, split, load)
    for sample_id in range(split.num_samples):
        image, mask, (height, width) = sample(sample_id)
        assert (height, width) == load(sample_id)[1].shape
        for part in (np.s_[height:], np.s_[:, width:]):
            assert (mask[part] == 255).all()
            assert (image[part] == 0).all()


def test_blur_comes_last(split: Split, load: Load) -> None:
    options = {"crop": [40, 50], "resize": [], "mosaic": 0.5, "copy_paste": 0.5}
    sharp = augmented(AugmentConfig(**options), split, load)
    blurred = augmented(AugmentConfig(**options, blur=1.0, blur_sigma=[1.2, 1.2]), split, load)
    for sample_id in range(split.num_samples):
        image, mask, valid = sharp(sample_id)
        ours, ours_mask, _ = blurred(sample_id)
        expected = image.copy()
        expected[: valid[0], : valid[1]] = cv2.GaussianBlur(image[: valid[0], : valid[1]].copy(), (0, 0), 1.2)
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(ours_mask, mask)


def test_samples_depend_on_seed_epoch_and_id_and_not_on_the_calls_before(split: Split, load: Load) -> None:
    options = {"rotate": 45.0, "blur": 0.5, "class_balanced_crop": 0.3, "mosaic": 0.5, "copy_paste": 0.5}
    cfg = AugmentConfig(crop=[40, 50], resize=[], **options)
    places = [(seed, epoch, i) for seed in range(2) for epoch in range(2) for i in range(split.num_samples)]
    found = []
    for order in (places, places[::-1]):
        samples = [augmented(cfg, split, load, seed) for seed in range(2)]
        crops = {(seed, epoch, i): samples[seed](i, epoch) for seed, epoch, i in order}
        found.append({place: image.tobytes() + mask.tobytes() for place, (image, mask, _) in crops.items()})
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(places)


def test_a_shard_of_one_sample_makes_mosaics_of_itself(shard: Callable[[int], Split]) -> None:
    split = shard(1)
    cfg = AugmentConfig(crop=[40, 50], mosaic=1.0, **PLAIN)
    sample = augmented(cfg, split, lambda one: painted(int(split.key(one))))
    for sample_id in range(split.num_samples):
        number = int(split.key(sample_id))
        assert (sample(sample_id)[0][..., 0] == 10 * number + 5).all()


@pytest.mark.parametrize("crop", [[1, 1], [1, 40], [3, 2]])
def test_tiny_crops_can_be_mosaics(crop: list[int], split: Split, load: Load) -> None:
    sample = augmented(AugmentConfig(crop=crop, mosaic=1.0, copy_paste=1.0, resize=[]), split, load)
    for sample_id in range(split.num_samples):
        image, mask, _ = sample(sample_id)
        assert image.shape == (*crop, 3)
        assert mask.shape == tuple(crop)
        assert np.isin(mask, [0, 1, 2, 4, 255]).all()


def test_the_options_come_as_often_as_configured(split: Split, load: Load) -> None:
    def sources(**options: float) -> np.ndarray:
        sample = augmented(AugmentConfig(crop=[40, 50], **PLAIN, **options), split, load)
        crops = [sample(n % split.num_samples, n)[0] for n in range(400)]
        return np.array([len(np.unique(crop[..., 0])) for crop in crops])

    assert (sources() == 1).all()
    assert abs((sources(mosaic=0.3) > 1).mean() - 0.3) < 0.07
    always = (sources(copy_paste=1.0) > 1).mean()  # below 1: what is drawn may meet ignored pixels only
    assert always > 0.6
    assert abs((sources(copy_paste=0.3) > 1).mean() - 0.3 * always) < 0.07
