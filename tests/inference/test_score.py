"""launch/evaluate.py: what it writes and where, and what it says while it runs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_run
from nano import SIZE

from segformer.data.loading.loader import LoaderConfig
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.errors import ConfigError
from segformer.inference.export import ExportConfig, export
from segformer.inference.predict import Predictor
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.training.config import RunConfig, compose


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path):
    """A run of MiT-nano on tiny_shards with checkpoints of two steps, averaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, *SIZE)
        torch.manual_seed(0)
        weights = build_model(ModelConfig(variant="nano"), 2).state_dict()
        names = {name for name, tensor in weights.items() if "running" not in name and tensor.ndim}
        ema = {name: tensor.clone() for name, tensor in weights.items() if name in names}
        place = tmp_path_factory.mktemp("score") / "run"
        given = ["data=sample", f"data.shards={tiny_shards}", "model.variant=nano", "optim.ema=0.9"]
        digest = ShardSet.open(str(tiny_shards)).digest
        yield make_run(place, {10: weights, 20: weights}, *given, ema={10: ema, 20: ema}, digest=digest)


def evaluated(checkpoint: Path, **settings: object):
    given = {"loader": LoaderConfig(workers=0), "precision": "fp32"} | settings
    return evaluate_checkpoint(EvaluateConfig(checkpoint=str(checkpoint), **given))


def test_the_scores_are_written_into_the_run_with_what_they_are_of(run, tiny_shards, capsys):
    scores = evaluated(run)
    out, err = capsys.readouterr()
    assert "(EMA) on 3 images of val (whole images) in " in err
    assert f"scores: {run}/scores/val.json, .csv and .md" in err
    found = json.loads((run / "scores/val.json").read_text())
    shards, predictor = ShardSet.open(str(tiny_shards)), Predictor(run, device="cpu")
    raws = [ShardReader(shards.split("val")).read(k) for k in range(3)]
    confusion = np.zeros((2, 2), int)
    for raw in raws:
        mask = decode_mask(raw.target)
        known = mask < 2
        np.add.at(confusion, (mask[known], predictor(decode_image(raw.image)).mask[known]), 1)
    assert found["scores"]["confusion"] == confusion.tolist()
    hits, predicted = np.diag(confusion), confusion.sum(0)
    precision = [float(h / p) if p else None for h, p in zip(hits, predicted, strict=True)]
    assert found["scores"]["precision"] == pytest.approx(precision)
    assert found["scores"]["recall"] == pytest.approx((hits / confusion.sum(1)).tolist())
    said = {"step": 20, "averaged": True, "split": "val", "images": 3, "protocol": "whole images"}
    said |= {"digest": shards.digest, "classes": shards.classes, "device": "cpu", "ranks": 1, "dtype": "fp32"}
    assert {key: found[key] for key in said} == said
    assert found["checkpoint"] == str(run)
    with open(run / "scores/val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*shards.classes, "mean"]
    assert float(rows[-1]["IoU"]) == pytest.approx(scores.miou)
    text = (run / "scores/val.md").read_text()
    for line in out.partition("\n\n")[0].splitlines()[2:]:
        cells = line.split()
        assert set(line) == {"-"} or f"| {' | '.join(cells)} |" in text


def test_what_differs_from_the_plain_evaluation_is_in_the_name(run, tiny_shards, tiny_root, tmp_path):
    evaluated(run, short_side=64, flip=True)
    evaluated(run, step="10", split="train")
    evaluated(run / "checkpoints/step-00000020", shards=str(tiny_shards))
    found = {path.name for path in (run / "scores").glob("*.json")}
    assert {"val-short-side-64-flip.json", "train-step-10.json", "val-step-20.json"} <= found
    for place in ("a/tiny", "b/tiny"):  # other images in folders of one name
        data = compose(RunConfig, "config", ["data=sample"]).data
        write_shards(data, tiny_root, tmp_path / place, seed=ord(place[0]), samples_per_shard=6, workers=1)
        evaluated(run, shards=str(tmp_path / place))
    assert len(list((run / "scores").glob("val-tiny-*.json"))) == 2
    evaluated(run, precision="bf16")
    assert (run / "scores/val-bf16.json").is_file()
    record = json.loads((run / "scores/val-short-side-64-flip.json").read_text())
    assert (record["protocol"], record["settings"]) == ("short side 64, flip", ["short_side=64", "flip=True"])


def test_an_export_stays_a_model_and_another_folder_takes_its_scores(run, tmp_path, capsys):
    out = export(ExportConfig(checkpoint=str(run), output=str(tmp_path / "export")))
    before = sorted(out.iterdir())
    evaluated(out)
    assert "output=<folder>" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before
    evaluated(out, output=str(tmp_path / "deep/scores"))
    record = json.loads((tmp_path / "deep/scores/val.json").read_text())
    assert (record["step"], record["averaged"]) == (20, True)


def test_a_place_that_takes_no_file_never_costs_the_table(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^output=.*can't be written"):
        evaluated(run, output=str(tmp_path / "file/x"))
    assert not capsys.readouterr().out, "known before the first image"

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segformer.inference.score.write_atomic", full)
    assert evaluated(run) is not None
    out, err = capsys.readouterr()
    assert "mean" in out
    assert "scores can't be written" in err
    assert "No space left" in err
    with pytest.raises(ConfigError, match="No space left"):
        evaluated(run, output=str(tmp_path / "there"))
    assert "mean" in capsys.readouterr().out


def test_the_export_of_a_mixture_is_scored_on_a_set_by_its_name(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, *SIZE)
    torch.manual_seed(0)
    weights = build_model(ModelConfig(variant="nano"), 3).state_dict()
    given = ["data=folder", "model.variant=nano", "data.classes=[paper,glass,nucleus]"]
    given += [f"mixture.sets.{name}.shards={tiny_shards}" for name in ("one", "two")]
    given += [
        "mixture.sets.one.classes.background=[glass,paper]",
        "mixture.sets.two.classes.background=[paper]",
    ]
    place = make_run(tmp_path / "run", {10: weights}, *given)
    place = export(ExportConfig(checkpoint=str(place), output=str(tmp_path / "export")))
    ways = r"give shards=one or shards=two$"
    for wrong, said in {
        "": "several data sets",
        "three": "none of them",
        str(tiny_shards): "the shards have 2",
    }.items():
        with pytest.raises(ConfigError, match=f"{said}.*{ways}"):
            evaluated(place, shards=wrong)
    predictor, split = Predictor(place, device="cpu"), ShardSet.open(str(tiny_shards)).split("val")
    for name, known in {"one": [0, 1, 2], "two": [0, 2]}.items():
        scores = evaluated(place, shards=name)
        confusion = np.zeros((2, 2), int)
        for number in range(split.num_samples):
            raw = ShardReader(split).read(number)
            shares = predictor(decode_image(raw.image), probabilities=True).probabilities
            label = (np.array(known)[np.asarray(shares)[known].argmax(0)] == 2).astype(int)
            np.add.at(confusion, (decode_mask(raw.target), label), 1)
        assert scores.confusion == confusion.tolist()


def test_everything_that_can_be_measured_is_printed_and_written(run, tmp_path, capsys):
    asked = {"boundary": True, "calibration": True, "worst": 2, "against": str(run), "output": str(tmp_path)}
    scores = evaluated(run, ignore_classes=["background"], **asked)
    out, _ = capsys.readouterr()
    name = f"val-without-background-against-{run.name}"
    record = json.loads((tmp_path / f"{name}.json").read_text())
    low, high = record["miou_interval"]
    span = f"{100 * low:.2f} to {100 * high:.2f}"
    assert f"mIoU {100 * scores.miou:.2f}% (95% over 3 images: {span}), fwIoU " in out
    assert low <= scores.miou == scores.iou[1] <= high
    assert "the means leave out background" in out
    assert f"boundary IoU {100 * record['boundary']['iou'][1]:.2f}%" in out
    assert f"expected calibration error {100 * record['calibration']['ece']:.2f}% (15 bins)" in out
    assert f"{run} less {run}: mIoU +0.00 points (95% over the same images: +0.00 to +0.00; it incl" in out
    assert np.sum(record["calibration"]["counts"][0]) == np.sum(scores.confusion)
    first, second = (row["mIoU"] for row in record["worst"])
    assert first <= second
    names = {path.name.removeprefix(name) for path in tmp_path.iterdir()}
    tables = {f"-{table}.csv" for table in ("boundary", "calibration", "worst", "against", "differ")}
    assert names == {".json", ".csv", ".md", "-calibration.png", "-worst.jpg"} | tables


def test_what_cannot_be_measured_is_refused_before_the_first_image(run, capsys):
    with pytest.raises(ConfigError, match="no class is named sky; the classes are background"):
        evaluated(run, ignore_classes=["sky"])
    with pytest.raises(ConfigError, match="ignore_classes names every class"):
        evaluated(run, ignore_classes=["background", "nucleus"])
    assert not capsys.readouterr().out
