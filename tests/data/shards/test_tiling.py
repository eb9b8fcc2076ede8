"""Large images as tiles: what sharding cuts, against slices of the whole; scores, against sliding windows."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from nano import SIZE

from segformer.data.loading.loader import LoaderConfig, eval_batches
from segformer.data.loading.photometric import Normalize
from segformer.data.shards import cutting
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.tiling import Tiling
from segformer.data.sources import decode
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.data.sources.large import image_rows, label_rows
from segformer.data.sources.sample import Sample
from segformer.data.sources.shapes import Shape, draw, ring
from segformer.distributed.world import World
from segformer.errors import ConfigError, DataError
from segformer.evaluation.evaluate import evaluate
from segformer.evaluation.inference_mode import InferenceModeConfig
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig

SIZES = {"a": (131, 170), "sub/b.x": (64, 64), "c": (50, 200), "d": (200, 41), "e": (33, 40), "f": (97, 65)}
CLASSES = ["sky", "road", "tree"]
TILING = Tiling((64, 64), (48, 48))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of odd sizes in two splits, no two alike."""
    root, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(5)
    for split in ("train", "val"):
        for key, (height, width) in SIZES.items():
            for kind in ("images", "masks"):
                (root / kind / split / key).parent.mkdir(parents=True, exist_ok=True)
            image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height))
            mask = cv2.resize(
                rng.choice([0, 1, 2, 255], (5, 6)).astype(np.uint8),
                (width, height),
                interpolation=cv2.INTER_NEAREST,
            )
            cv2.imwrite(str(root / "images" / split / f"{key}.{'png' if key < 'c' else 'jpg'}"), image)
            cv2.imwrite(str(root / "masks" / split / f"{key}.png"), mask)
    return root


@pytest.fixture(scope="module")
def cfg() -> DatasetConfig:
    return DatasetConfig(classes=CLASSES)


def write(cfg: DatasetConfig, root: Path, out: Path, **settings: Any) -> ShardSet:
    given = {"seed": 3, "samples_per_shard": 7, "workers": 1, "tiling": TILING} | settings
    write_shards(cfg, root, out, **given)
    return ShardSet.open(out)


@pytest.fixture(scope="module")
def tiled(pictures: Path, cfg: DatasetConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write(cfg, pictures, tmp_path_factory.mktemp("shards") / "tiled")


@pytest.fixture(scope="module")
def whole(pictures: Path, cfg: DatasetConfig, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write(cfg, pictures, tmp_path_factory.mktemp("shards") / "whole", tiling=None)


def source(root: Path, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    (path,) = (root / "images" / split).glob(f"{key}.*")
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    mask = cv2.imread(str(root / "masks" / split / f"{key}.png"), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert mask is not None
    return image, mask


def naive(length: int, side: int, step: int) -> list[int]:
    """First pixel of each tile of a line: step by step, the last at the border."""
    starts = [0]
    while starts[-1] + side < length:
        starts.append(min(starts[-1] + step, length - side))
    return starts


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiles_are_slices_of_their_images(split: str, tiled: ShardSet, pictures: Path) -> None:
    own = tiled.split(split)
    reader, expected = ShardReader(own), []
    for key, (height, width) in sorted(SIZES.items()):
        image, mask = source(pictures, split, key)
        for top in naive(height, 64, 48):
            for left in naive(width, 64, 48):
                here = slice(top, top + 64), slice(left, left + 64)
                expected.append((f"{key.replace('.', '_')}_r{top}_c{left}", image[here], mask[here]))
    found = [reader.read(sample_id) for sample_id in range(own.num_samples)]
    order = [key for key, _, _ in expected]
    assert sorted(raw.key for raw in found) == sorted(order)
    assert ([raw.key for raw in found] == order) == (split == "val")  # training tiles are shuffled
    by_key = {raw.key: raw for raw in found}
    for key, image, mask in expected:
        assert np.array_equal(decode_image(by_key[key].image), image)
        assert np.array_equal(decode_mask(by_key[key].target), mask)


def test_a_scored_split_names_its_images_and_a_trained_one_has_tiles_alone(tiled: ShardSet) -> None:
    entries = tiled.content["splits"]
    assert "tiled" not in entries["train"]
    assert [(one[0], one[1], one[2]) for one in entries["val"]["tiled"]["images"]] == [
        (key.replace(".", "_"), *size) for key, size in sorted(SIZES.items())
    ]
    assert (tiled.content["tile"], tiled.content["stride"]) == ([64, 64], [48, 48])
    assert tiled.split("val").extent == "6 images in 26 tiles"
    assert tiled.split("train").extent == "26 tiles"


def test_a_small_image_keeps_the_bytes_of_its_file(tiled: ShardSet, pictures: Path) -> None:
    split = tiled.split("val")
    place = split.keys.index("e_r0_c0")
    assert ShardReader(split).read(place).image == (pictures / "images/val/e.jpg").read_bytes()


def test_finished_tiles_are_known_again(
    tiled: ShardSet, pictures: Path, cfg: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(cfg, pictures, tmp_path / "out").digest == tiled.digest
    for path in pictures.rglob("*.*"):
        path.touch()  # other times, the same contents
    write(cfg, pictures, tmp_path / "out")
    assert "already holds exactly these shards" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"differing: .*stride: \[48, 48\] there, \[64, 64\] here"):
        write(cfg, pictures, tmp_path / "out", tiling=Tiling((64, 64), (64, 64)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow  # starts processes
def test_tiles_do_not_depend_on_processes(
    tiled: ShardSet, pictures: Path, cfg: DatasetConfig, tmp_path: Path
) -> None:
    assert write(cfg, pictures, tmp_path / "out", workers=2).digest == tiled.digest


def test_shapes_are_drawn_on_the_rows_of_a_tile_as_on_the_whole_image() -> None:
    rng = np.random.default_rng(1)
    shapes = tuple(
        Shape(number % 3, tuple(ring(rng.uniform(-20, 220, (points, 2))) for _ in range(2)))
        for number, points in enumerate((3, 4, 7, 12, 3, 5))
    )
    sample = Sample("x", "x.jpg", shapes=shapes, uncovered=2)
    rows, expected = (
        label_rows(DatasetConfig(classes=CLASSES), sample, (200, 150)),
        draw(shapes, (200, 150), 2),
    )
    for top, bottom in ((0, 64), (48, 112), (136, 200), (199, 200)):
        assert np.array_equal(rows(top, bottom), expected[top:bottom])


def test_no_image_is_decoded_more_than_once(
    pictures: Path, cfg: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(cutting, "image_rows", lambda cfg, path: seen.append(path) or image_rows(cfg, path))
    write(cfg, pictures, tmp_path / "out", samples_per_shard=2)
    assert len(seen) == len(set(seen)) == 2 * sum(max(size) > 64 for size in SIZES.values())


def test_tiles_that_were_cut_outlive_a_try_that_fails_before_its_first_shard(
    pictures: Path, cfg: DatasetConfig, tiled: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seen = Path(shutil.copytree(pictures, tmp_path / "root")), []
    mask = root / "masks/train/a.png"
    sound = mask.read_bytes()
    cv2.imwrite(str(mask), np.full(SIZES["a"], 9, np.uint8))
    monkeypatch.setattr(cutting, "image_rows", lambda cfg, path: seen.append(path) or image_rows(cfg, path))
    with pytest.raises(DataError, match="holds the ids 9, outside 0 to 2"):
        write(cfg, root, tmp_path / "out")
    assert len(seen) == 8
    mask.write_bytes(sound)
    assert write(cfg, root, tmp_path / "out").digest == tiled.digest
    assert seen[8:] == [root / "images/train/a.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "root"]


def test_training_tiles_with_too_few_labels_are_left_out(
    pictures: Path, cfg: DatasetConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write(cfg, pictures, tmp_path / "out", tiling=Tiling((64, 64), (48, 48), 0.7))
    kept = 0
    for key, (height, width) in SIZES.items():
        _, mask = source(pictures, "train", key)
        for top in naive(height, 64, 48):
            for left in naive(width, 64, 48):
                kept += (mask[top : top + 64, left : left + 64] != 255).mean() >= 0.7
    assert 0 < kept < 26
    assert shards.split("train").num_samples == kept
    assert shards.split("val").num_samples == 26
    line = f"train: {26 - kept} of 26 tiles are left out (less than 70 % of their pixels are labeled)"
    assert line in capsys.readouterr().out


def test_the_limit_of_pixels_is_another_one_for_tiles(
    pictures: Path, cfg: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    with pytest.raises(DataError, match=r"the limit is 4096 \(shard.py cuts larger ones into tiles: tile="):
        write(cfg, pictures, tmp_path / "out", tiling=None)
    assert write(cfg, pictures, tmp_path / "out").split("val").num_samples == 26
    monkeypatch.setattr(decode, "MAX_TILED_PIXELS", 64 * 65)
    with pytest.raises(DataError, match=r"131 pixels, the limit is 4160; replace"):
        write(cfg, pictures, tmp_path / "other")


def test_a_mask_of_another_size_or_with_foreign_ids_is_named(
    pictures: Path, cfg: DatasetConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"mask '.*/masks/train/[a-f].*png' holds the ids 2, outside 0 to 1"):
        write(DatasetConfig(classes=CLASSES[:2]), pictures, tmp_path / "out")
    root = tmp_path / "root"
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
    for split in ("train", "val"):
        cv2.imwrite(str(root / f"images/{split}/x.png"), np.zeros((80, 90, 3), np.uint8))
        cv2.imwrite(str(root / f"masks/{split}/x.png"), np.zeros((90, 80), np.uint8))
    with pytest.raises(DataError, match=r"x.png' is 80 x 90 pixels, its image 90 x 80; they must agree$"):
        write(cfg, root, tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tile=[16,64]"], r"^tile=\[16, 64\] must be \[height,width\], each 32 or more"),
        (["tile=[64]"], "must be"),
        (["tile=[64,64]", "tile_overlap=64"], "^tile_overlap=64; use 0 to below 64, the side of a tile"),
        (["tile=[64,64]", "tile_labeled=2"], "^tile_labeled=2"),
        (["tile_overlap=3"], r"are of tiles; give tile="),
        (["tile=[64,64]", "long_side=64"], "^long_side=64 is about whole images, and tile cuts them; leave"),
        (["tile=[64,64]", "part=0/2"], "^part=0/2: .*leave it out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: list[str], message: str, pictures: Path, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    with pytest.raises(ConfigError, match=message):
        command(
            "shard",
            "data=folder",
            f"root={pictures}",
            f"output={tmp_path}/o",
            "data.classes=[a,b,c]",
            *settings,
        )


def confusion(shards: ShardSet, rank: int = 0, ranks: int = 1, **settings: Any) -> np.ndarray:
    torch.manual_seed(0)
    name, VARIANTS["nano"] = SIZE
    try:
        model = build_model(ModelConfig(variant=name), len(CLASSES))
    finally:
        del VARIANTS[name]
    world = World(rank=rank, size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu"))
    found = evaluate(
        model,
        Normalize([120.0] * 3, [60.0] * 3),
        shards.split("val"),
        LoaderConfig(workers=0),
        world,
        num_classes=len(CLASSES),
        bf16=False,
        should_stop=lambda: False,
        on_error=pytest.fail,
        **{"batch_size": 1} | settings,
    )
    assert found is not None
    return np.array(found.to_dict()["confusion"])


def test_scores_of_tiles_are_to_the_pixel_those_of_windows_over_whole_images(
    tiled: ShardSet, whole: ShardSet
) -> None:
    windows = InferenceModeConfig(window=[64, 64], stride=[48, 48])
    expected = confusion(whole, mode=windows)
    pixels = sum(height * width for height, width in SIZES.values())
    assert 0 < expected.sum() < pixels
    assert np.array_equal(confusion(tiled), expected)
    assert np.array_equal(sum(confusion(tiled, rank, 2) for rank in (0, 1)), expected)
    assert confusion(tiled, batch_size=4).sum() == expected.sum()


def test_a_rank_gets_whole_images_in_order_and_batches_of_one_size(tiled: ShardSet) -> None:
    split, seen = tiled.split("val"), []
    assert split.tiled is not None
    for rank in (0, 1, 2):
        ids: list[int] = []
        for batch in eval_batches(split, LoaderConfig(workers=0), rank=rank, world_size=3, batch_size=4):
            ids += batch.sample_ids.tolist()
        images = [split.tiled.image_of(sample_id) for sample_id in ids]
        assert sum(a != b for a, b in itertools.pairwise(images)) == len(set(images)) - 1
        for image in set(images):
            own = [one for one in ids if split.tiled.image_of(one) == image]
            assert own == sorted(own)
        seen += ids
    assert sorted(seen) == list(range(split.num_samples))


def test_a_list_of_images_that_contradicts_the_index_is_one_line(
    tiled: ShardSet, tmp_path: Path, reseal: Callable[..., None]
) -> None:
    folder = Path(shutil.copytree(tiled.root, tmp_path / "copy"))
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["val"]["tiled"]["images"][0][1] += 64
    reseal(folder, content)
    with pytest.raises(DataError, match=r"split val of '.*json' contradicts its index.*; copy it again"):
        _ = ShardSet.open(folder).split("val").tiled


SCORE = """
import sys
from pathlib import Path
import numpy as np, torch
import test_tiling as t
from segformer.data.sources.dataset import DatasetConfig
t.CLASSES[:] = [f"class {k}" for k in range(16)]
root, tile = Path(sys.argv[1]), sys.argv[2] == "tiled"
tiling = t.Tiling((512, 512), (384, 384))
cfg = DatasetConfig(classes=t.CLASSES, splits=["val"], allow_unseen=["*"])
shards = t.write(cfg, root, root / sys.argv[2], tiling=tiling if tile else None, workers=0)
mode = None if tile else t.InferenceModeConfig(window=[512, 512], stride=[384, 384])
np.save(root / f"{sys.argv[2]}.npy", t.confusion(shards, mode=mode))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
"""


@pytest.mark.slow
def test_large_images_are_cut_and_scored_in_less_memory_than_whole_ones_take(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind, pixels in (
        ("images", cv2.resize(rng.integers(0, 256, (50, 60, 3), np.uint8), (5000, 4000))),
        ("masks", cv2.resize(rng.integers(0, 16, (40, 50)).astype(np.uint8), (5000, 4000), interpolation=0)),
    ):
        (tmp_path / kind / "val").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / kind / "val/scan.png"), pixels)
    peak = {}
    for how in ("tiled", "whole"):
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2]), *sys.path])
        command = [sys.executable, "-c", SCORE, str(tmp_path), how]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True)
        peak[how] = int(done.stdout.split()[-1])
    assert np.array_equal(np.load(tmp_path / "tiled.npy"), np.load(tmp_path / "whole.npy"))
    assert peak["tiled"] < 1.2e9 < peak["whole"], peak
