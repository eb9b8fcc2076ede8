"""Masks with colors or ids that no class has: a missing class and a blend are told apart, for any colors."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.masks import Defect, mask_ids
from segformer.errors import DataError

PALETTES = {
    "black and red": [[0, 0, 0], [255, 0, 0]],
    "voc": [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]],
    "pastel": [[200, 180, 220], [90, 120, 200], [250, 250, 120]],
}


def regions(classes: int, seed: int) -> np.ndarray:
    """Rectangles of ids, uint8 (48, 60); each class at least once."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((48, 60), np.uint8)
    for ident in rng.permutation(np.arange(1, classes).repeat(2)):
        row, column = rng.integers(0, 36), rng.integers(0, 48)
        mask[row : row + 12, column : column + 14] = ident
    return mask


def smooth(image: Image.Image, kind: str) -> Image.Image:
    """The picture as a tool that does not know of ids would save it."""
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return Image.open(buffer)
    return image.resize((45, 36), Image.Resampling[kind.upper()])


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "lanczos", "box", "jpeg"])
@pytest.mark.parametrize("name", PALETTES)
def test_blends_are_told_to_be_exported_again(name: str, kind: str, tmp_path: Path) -> None:
    palette = PALETTES[name]
    for seed in range(4):
        mask = Image.fromarray(np.array(palette, np.uint8)[regions(len(palette), seed)])
        smooth(mask, kind).save(tmp_path / "mask.png")
        with pytest.raises(
            Defect, match=r"a blend of those in data\.mask_colours, as after a smooth"
        ) as found:
            mask_ids(DatasetConfig(classes=["a", "b"], mask_colours=palette), tmp_path / "mask.png")
        assert "nearest" in str(found.value)
        assert "add it" not in str(found.value)


@pytest.mark.parametrize("name", PALETTES)
def test_a_class_without_a_color_is_to_be_added_and_then_it_works(name: str, tmp_path: Path) -> None:
    palette = PALETTES[name]
    ids = regions(len(palette), 1)
    missing = [*palette[:1], *palette[2:]]
    Image.fromarray(np.array(palette, np.uint8)[ids]).save(tmp_path / "mask.png")
    with pytest.raises(Defect) as found:
        mask_ids(DatasetConfig(classes=["a", "b"], mask_colours=missing), tmp_path / "mask.png")
    row, column = np.argwhere(ids == 1)[0]
    assert f"has the color {palette[1]} at row {row}, column {column}" in str(found.value)
    assert "add it" in str(found.value)
    got = mask_ids(
        DatasetConfig(classes=["a", "b"], mask_colours=[*missing, palette[1]]), tmp_path / "mask.png"
    )
    np.testing.assert_array_equal(got == len(missing), ids == 1)


@pytest.fixture
def refused(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """(function of ids 0, 1, 2 and 255, classes) -> what sharding says of masks so changed."""

    def run(change: Callable[[np.ndarray], np.ndarray], classes: int) -> str:
        root = make_folder(tmp_path / "set", {"train": 5, "val": 3})
        for path in root.glob("masks/*/*.png"):
            cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
        cfg = DatasetConfig(classes=[f"c{k}" for k in range(classes)])
        with pytest.raises(DataError) as found:
            write_shards(cfg, root, tmp_path / "out", seed=0, samples_per_shard=4, workers=1)
        assert "\n" not in str(found.value)
        return str(found.value)

    return run


def table(*ids: int) -> Callable[[np.ndarray], np.ndarray]:
    """0, 1, 2 and 255 -> other ids."""
    lookup = np.zeros(256, np.uint16)
    lookup[[0, 1, 2, 255]] = ids
    return lambda mask: lookup[mask].astype(np.uint8 if max(ids) < 256 else np.uint16)


@pytest.mark.parametrize(
    ("ids", "classes", "proposed"),
    [
        ((0, 127, 255, 0), 3, "{0: 0, 127: 1, 255: 2}"),
        ((0, 128, 128, 0), 2, "{0: 0, 128: 1}"),
        ((0, 65535, 65535, 0), 2, "{0: 0, 65535: 1}"),
        ((1, 2, 3, 255), 3, "{1: 0, 2: 1, 3: 2}"),
        ((1, 2, 3, 0), 3, "{0: 255, 1: 0, 2: 1, 3: 2}"),
        ((0, 1000, 2000, 255), 3, "{0: 0, 1000: 1, 2000: 2}"),
    ],
)
def test_scaled_and_shifted_ids_are_refused_with_their_map(
    ids: tuple[int, ...], classes: int, proposed: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    text = refused(table(*ids), classes)
    assert shlex.quote(f"data.label_map={proposed}") in text
    label_map = eval(proposed)
    cfg = DatasetConfig(classes=[f"c{k}" for k in range(classes)], label_map=label_map)
    write_shards(cfg, tmp_path / "set", tmp_path / "out", seed=0, samples_per_shard=4, workers=1)


def test_ids_without_an_order_and_smoothed_ids_get_no_map(refused: Callable[..., str]) -> None:
    assert "label_map=" not in refused(table(0, 7, 9, 255), 2)


def test_smoothed_ids_are_to_be_exported_again(refused: Callable[..., str]) -> None:
    def blur(mask: np.ndarray) -> np.ndarray:
        return cv2.resize(np.where(mask == 1, 255, 0).astype(np.uint8), None, fx=0.7, fy=0.7)

    assert "as after a smooth resize or a lossy format" in refused(
        lambda m: cv2.resize(blur(m), m.shape[::-1]), 2
    )


def test_masks_in_colors_are_refused_with_the_colors_to_paste(refused: Callable[..., str]) -> None:
    colors = np.zeros((256, 3), np.uint8)
    colors[[1, 2]] = [[0, 0, 200], [40, 0, 0]]  # BGR
    text = refused(lambda mask: colors[mask], 3)
    assert "mask_colours=[[" in text
    assert all(color in text for color in ("[0,0,0]", "[200,0,0]", "[0,0,40]"))
