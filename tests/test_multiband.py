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
from transformers import SegformerForSemanticSegmentation

from segformer import DataError, Predictor, SegFormer
from segformer.data.shards.format import ShardSet
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig

tifffile = pytest.importorskip("tifffile")
ROOT = Path(__file__).parents[1]
BANDS = 5
LAYOUT = {"photometric": "minisblack", "planarconfig": "contig"}
SCALE = np.array([3000, 2500, 2000, 12000, 400])  # of the bands
pytestmark = pytest.mark.slow


def scene(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Five bands and a mask of a disc that only the fourth one shows."""
    rng = np.random.default_rng(index)
    rows, columns = np.mgrid[:96, :128]
    center = rng.integers(30, 66), rng.integers(30, 98)
    mask = ((rows - center[0]) ** 2 + (columns - center[1]) ** 2 < rng.integers(14, 26) ** 2).astype(np.uint8)
    relief = cv2.resize(rng.random((6, 8, BANDS)), (128, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    relief[..., 3] = 0.25 + 0.1 * relief[..., 3] + 0.5 * mask
    return (relief * SCALE + rng.normal(0, 20, relief.shape)).clip(0, 65535).astype(np.uint16), mask


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bands")
    for split, count in (("train", 24), ("val", 6)):
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


def command(script: str, *arguments: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


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
