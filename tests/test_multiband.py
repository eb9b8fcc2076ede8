"""Images of five channels of 16 bits, from TIFF files to masks, by the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import SegformerForSemanticSegmentation

import segformer
from segformer import DataError, Predictor, SegFormer
from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.distributed.world import World
from segformer.evaluation.evaluate import evaluate
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig

tifffile = pytest.importorskip("tifffile")
ROOT = Path(__file__).parents[1]
BANDS = 5
LAYOUT = {"photometric": "minisblack", "planarconfig": "contig"}
SCALE = np.array([3000, 2500, 2000, 12000, 400])  # of the bands


def scene(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Five bands and a mask of a disc that only the fourth one shows."""
    rng = np.random.default_rng(index)
    rows, columns = np.mgrid[:96, :128]
    center = rng.integers(30, 66), rng.integers(30, 98)
    mask = ((rows - center[0]) ** 2 + (columns - center[1]) ** 2 < rng.integers(14, 26) ** 2).astype(np.uint8)
    relief = cv2.resize(rng.random((6, 8, BANDS)), (128, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    relief[..., 3] = 0.25 + 0.1 * relief[..., 3] + 0.5 * mask
    return (relief * SCALE + rng.normal(0, 20, relief.shape)).clip(0, 65535).astype(np.uint16), mask


def written(root: Path, counts: dict[str, int]) -> Path:
    """A folder of scenes, images as TIFF."""
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, mask = scene(index + 100 * (split == "val"))
            place = root / "images" / split / f"{index:02d}.tif"
            tifffile.imwrite(
                place, image, photometric="minisblack", planarconfig="contig", compression="zlib"
            )
            cv2.imwrite(str(root / "masks" / split / f"{index:02d}.png"), mask)
    return root


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bands"), {"train": 24, "val": 6})


def test_a_rank_that_has_no_image_gives_the_network_as_many_channels(tmp_path: Path) -> None:
    """Under ZeRO-3 each forward is a collective, so that it repeats one that doesn't count."""
    cfg = DatasetConfig(classes=["ground", "disc"], channels=BANDS)
    root = written(tmp_path / "root", {"train": 2, "val": 1})
    write_shards(cfg, root, tmp_path / "out", seed=0, samples_per_shard=8, workers=1)
    shards, seen = ShardSet.open(tmp_path / "out"), []

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(tuple(images.shape))
            return images[:, :2, ::4, ::4]

    assert shards.mean is not None
    assert shards.std is not None
    for rank in (0, 1):
        evaluate(
            Network(),
            Normalize(shards.mean, shards.std),
            shards.split("val"),
            LoaderConfig(workers=0),
            World(rank=rank, local_rank=rank, size=2, local_size=2, device=torch.device("cpu")),
            num_classes=2,
            batch_size=1,
            bf16=False,
            should_stop=lambda: False,
            on_error=pytest.fail,
        )
    assert sorted(seen) == [(1, BANDS, 64, 64), (1, BANDS, 96, 128)]


@pytest.mark.slow
def test_arrays_of_five_bands_are_trained_on_from_python(tmp_path: Path) -> None:
    pairs = [scene(index) for index in range(6)]
    settings = {"classes": ["ground", "disc"], "steps": 2, "run_dir": str(tmp_path / "run")}
    quick = ("experiment=scratch", "augment.crop=[64,64]", "loader.workers=0", "overlays=0")
    with pytest.raises(DataError, match=r"train\[0\]: .*5 channels are trained on with data\.channels=5"):
        segformer.train(*quick, train=pairs[2:], val=pairs[:2], **settings)
    wrong = [pairs[0], (pairs[1][0][..., :4], pairs[1][1])]
    with pytest.raises(DataError, match=r"val\[1\]: .*\(96, 128, 4\); give \(height, width, 5\) of uint16"):
        segformer.train(*quick, "data.channels=5", train=pairs[2:], val=wrong, **settings)
    result = segformer.train(*quick, "data.channels=5", train=pairs[2:], val=pairs[:2], **settings)
    assert Predictor(result.export, device="cpu")(pairs[0][0]).mask.shape == (96, 128)
    shards = ShardSet.open(result.run / "data")
    assert shards.pixels == (BANDS, "uint16")


def command(script: str, *arguments: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_five_bands_of_16_bits_from_tiff_to_masks_by_the_commands(bands: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rgb = build_model(ModelConfig(), 150)
    rgb.save_pretrained(tmp_path / "rgb")
    classes = "data.classes=[ground,disc]"
    command(
        "data_prep/shard.py", "data=folder", f"root={bands}", "output=shards", classes, "data.channels=5",
        cwd=tmp_path,
    )  # fmt: skip
    stacked = np.stack([scene(index)[0] for index in range(24)]).reshape(-1, BANDS).astype(np.float64)
    shards = ShardSet.open(tmp_path / "shards")
    assert shards.pixels == (BANDS, "uint16")
    np.testing.assert_allclose(shards.mean, stacked.mean(0), rtol=1e-6)
    np.testing.assert_allclose(shards.std, stacked.std(0), rtol=1e-5)
    said = command(
        "launch/train.py", "experiment=scratch", "name=bands", "data.shards=shards", classes,
        "model.pretrained=rgb", "model.stem=mean", "steps=60", "augment.crop=[64,64]", "optim.lr=1e-3",
        "loader.workers=0", "eval_every=60", cwd=tmp_path,
    )  # fmt: skip
    assert "images of 5 x uint16, normalized by the mean and std of the shards" in said
    assert "its kernels for RGB are adapted to 5 channels (mean)" in said
    run = tmp_path / "runs/bands"
    for picture in ("train_batch.jpg", "report.html", "curve.png"):
        assert (run / picture).stat().st_size > 1000
    table = command("launch/evaluate.py", "checkpoint=runs/bands", "loader.workers=0", cwd=tmp_path)
    scores = json.loads((run / "scores/val.json").read_text())["scores"]
    assert scores["iou"][1] > 0.6, table  # only the fourth band shows it
    said = command("launch/export.py", "checkpoint=runs/bands", "output=export", cwd=tmp_path)
    assert "no preprocessor_config.json" in said
    assert not (tmp_path / "export/preprocessor_config.json").exists()

    said = command(
        "launch/predict.py", "checkpoint=export", f"input={bands}/images/val", "output=masks", cwd=tmp_path
    )
    assert re.search(r"disc \d+%", said)
    predictor, ours = (
        Predictor(tmp_path / "export", device="cpu"),
        SegFormer.from_pretrained(tmp_path / "export"),
    )
    theirs = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "export").eval()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (ours.metadata.mean, ours.metadata.std))
    for index in range(6):
        image, mask = scene(100 + index)
        written = cv2.imread(str(tmp_path / f"masks/{index:02d}.png"), cv2.IMREAD_UNCHANGED)
        indexed = predictor(image).mask
        assert (mask == indexed).mean() > 0.9
        if written.ndim == 2:
            assert np.array_equal(written, indexed)
        images = (torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] - mean) / std
        with torch.no_grad():
            torch.testing.assert_close(theirs(images).logits, ours(images), rtol=0, atol=2e-2)

    other = tmp_path / "other.tif"
    tifffile.imwrite(other, scene(0)[0][..., :4], **LAYOUT)
    said = command(
        "launch/predict.py", "checkpoint=export", f"input={other}", "output=never", cwd=tmp_path, code=2
    )
    assert "has 4 channels, the model takes 5" in said
    assert len(said.strip().splitlines()) == 1
    with pytest.raises(
        DataError, match=r"array of uint16 \(96, 128, 3\); give \(height, width, 5\) of uint16"
    ):
        predictor(scene(0)[0][..., :3])
    with pytest.raises(DataError, match="its values must be those of the training, of uint16"):
        predictor(scene(0)[0].astype(np.float32))
