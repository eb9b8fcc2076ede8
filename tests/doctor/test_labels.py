"""Labels that a trained model doubts: numbers by hand, and planted errors found by one that learnt them."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import cv2
import nano
import numpy as np
import pytest
import torch

import segformer
from segformer.data.shards.sharding import write_shards
from segformer.doctor.labels import LabelsConfig, flat_sides, judge, rank_labels, tiny_regions
from segformer.errors import ConfigError
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, compose

SAMPLE = Path(__file__).resolve().parents[2] / "data_prep/sample"
CLASSES = ["sky", "road", "tree"]


def test_disagreement_is_the_mean_doubt_of_the_labelled_classes() -> None:
    label = torch.tensor([[0, 0, 0, 1], [0, 0, 255, 1]], dtype=torch.uint8)
    own = torch.tensor([[0.9, 0.8, 0.7, 0.2], [0.6, 1.0, 0.0, 0.4]])
    shares = torch.zeros(3, 2, 4)
    for k in (0, 1):  # tree gets what the label's class doesn't
        shares[k] += torch.where(label == k, own, 0)
    shares[2] = 1 - shares[:2].sum(0)
    found = judge(shares, label, "val", "a", CLASSES)
    assert found.disagreement == pytest.approx(1 - (0.8 + 0.3) / 2)
    assert (found.worst, found.taken_for) == ("road", "tree")
    assert found.worst_disagreement == pytest.approx(0.7)
    assert found.wrong == pytest.approx(2 / 7)
    nothing = judge(shares, torch.full((2, 4), 255, dtype=torch.uint8), "val", "a", CLASSES)
    assert (nothing.disagreement, nothing.worst) == (0, "")


def test_specks_and_frames_are_counted() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 5:30] = 1
    assert (tiny_regions(mask), flat_sides(mask)) == (0, 0)
    mask[30:32, 50:54] = 2  # 8 pixels
    mask[33, 10] = mask[34, 11] = 1  # touch by a corner: one region
    assert tiny_regions(mask) == 2
    whole = np.ones((40, 60), np.uint8)
    whole[10:20] = 0
    assert flat_sides(whole) == 0
    whole[0] = whole[:, -1] = 255
    assert flat_sides(whole) == 2


def plant(root: Path, count: int = 50) -> dict[str, str]:
    """The sample with `count` wrong masks; split/key -> what was done to each."""
    shutil.copytree(SAMPLE / "images", root / "images")
    shutil.copytree(SAMPLE / "masks", root / "masks")
    rng, done = np.random.default_rng(0), {}
    masks = {file: cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in sorted(root.glob("masks/*/*.png"))}
    order = [file for file in rng.permutation(list(masks)) if masks[file].mean() > 0.02]
    for file in order:
        if len(done) >= 18:
            break
        other = next(
            (o for o in order if o not in (file, *done) and masks[o].shape == masks[file].shape), None
        )
        if file not in done and other is not None:
            for one, mask in ((file, masks[other]), (other, masks[file])):
                cv2.imwrite(str(one), mask)
                done[one] = "swapped"
    for number, file in enumerate([file for file in order if file not in done][: count - len(done)]):
        mask, how = np.roll(masks[file], [side // 5 for side in masks[file].shape], (0, 1)), "shifted"
        if number % 2:
            mask, how = 1 - masks[file], "exchanged"
        cv2.imwrite(str(file), mask)
        done[file] = how
    return {f"{file.parent.name}/{file.stem}": how for file, how in done.items()}


@pytest.mark.slow
def test_planted_label_errors_rank_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    planted = plant(tmp_path / "set")
    assert Counter(planted.values()) == {"swapped": 18, "shifted": 16, "exchanged": 16}
    data = compose(RunConfig, "config", ["data=sample"]).data
    shards = tmp_path / "shards"
    write_shards(data, tmp_path / "set", shards, seed=0, samples_per_shard=128, workers=1)
    segformer.train(
        "experiment=sample", f"data.shards={shards}", model="nano", run_dir=tmp_path / "run", steps=100,
        eval_every=100, overlays=0, augment={"crop": [128, 128]}, loader={"workers": 0},
        optim={"lr": 5e-3, "warmup_steps": 5},
    )  # fmt: skip
    given = [f"checkpoint={tmp_path}/run", f"output={tmp_path}/doctor", "loader.workers=0", "pictures=6"]
    ranked = rank_labels(compose(LabelsConfig, "labels", given))
    assert len(ranked) == 372
    first = Counter(planted.get(f"{one.split}/{one.key}", "none") for one in ranked[:60])
    assert sum(first.values()) - first["none"] >= 40, first
    rows = list(csv.DictReader((tmp_path / "doctor/labels.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == [one.key for one in ranked]
    assert cv2.imread(str(tmp_path / "doctor/labels.png")).shape[1] > 1000

    some = rank_labels(
        compose(LabelsConfig, "labels", [*given, f"data.shards={shards}", "splits=[val]", "window=[96,96]"])
    )
    assert {one.split for one in some} == {"val"}
    assert len(some) == 80
    with pytest.raises(ConfigError, match="too small"):
        compose(LabelsConfig, "labels", [*given, "short_side=8"])
