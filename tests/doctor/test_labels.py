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
from checkpoints import make_run

import segformer
from segformer.data.loading.mixture import LabelMap
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.doctor.labels import Doubt, LabelsConfig, flat_sides, judge, rank_labels, tiny_regions
from segformer.errors import ConfigError
from segformer.inference.predictor import Predictor
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig
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


def test_labels_of_a_set_of_a_mixture_are_judged_as_what_they_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_shards: Path
) -> None:
    """`background` may be paper or glass, and is believed by the sum of both among what is annotated."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    torch.manual_seed(0)
    weights = build_model(ModelConfig(variant="nano"), 4).state_dict()
    given = ["data=folder", "model.variant=nano", "data.classes=[paper,glass,nucleus,sea]"]
    given += [f"mixture.sets.{name}.shards={tiny_shards}" for name in ("one", "two")]
    given += [
        "mixture.sets.one.classes={background: [glass, paper]}",
        "mixture.sets.two.classes={background: [sea]}",
    ]
    run = make_run(tmp_path / "run", {10: weights}, *given)

    def ranked(*more: str) -> list[Doubt]:
        fixed = [f"checkpoint={run}", f"output={tmp_path}/doctor", "loader.workers=0", "splits=[val]"]
        return rank_labels(compose(LabelsConfig, "labels", [*fixed, *more]))

    with pytest.raises(ConfigError, match=r"several data sets; give data\.shards=one or data\.shards=two"):
        ranked()
    found = {one.key: one for one in ranked("data.shards=one", "pictures=0")}
    split = ShardSet.open(str(tiny_shards)).split("val")
    for number in range(split.num_samples):
        raw = ShardReader(split).read(number)
        probabilities = Predictor(run, device="cpu")(
            decode_image(raw.image), probabilities=True
        ).probabilities
        paper, glass, nucleus, _ = np.asarray(probabilities, np.float64)
        target, known = decode_mask(raw.target), paper + glass + nucleus
        trust = [((paper + glass) / known)[target == 0].mean(), (nucleus / known)[target == 1].mean()]
        doubt = found[split.key(number)]
        assert doubt.disagreement == pytest.approx(1 - np.mean(trust), abs=1e-5)
        assert doubt.worst == ["background", "nucleus"][int(np.argmin(trust))]


def test_a_label_that_a_mixture_leaves_out_is_neither_believed_nor_doubted() -> None:
    one = LabelMap.of(
        "classes", {"road": ["ignore"], "sky": ["blue", "gray"]}, CLASSES, ["tree", "blue", "gray"]
    )
    shares = torch.tensor([0.5, 0.2, 0.3])[None, :, None, None]
    assert one.probabilities(shares).flatten().tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert one.known(torch.tensor([0, 1, 2, 255], dtype=torch.uint8)).tolist() == [0, 255, 2, 255]
