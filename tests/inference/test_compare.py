"""Runs compared: the numbers against the evaluation and plain statistics, and the page in a browser."""

import csv
import json
import runpy
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
from browser import open_page
from checkpoints import write_checkpoint

from segformer.checkpoint.format import TrainState
from segformer.data.loading.mixture import SetConfig
from segformer.data.shards.format import ShardSet
from segformer.errors import CheckpointError, ConfigError
from segformer.evaluation.bootstrap import class_iou, interval, mean_iou, replicates
from segformer.inference.compare import CompareConfig, chosen, compare, run_folders
from segformer.inference.compared import Comparison, common_images, open_entry, scored
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig, as_yaml, compose, frozen, save_config


def make_run(folder, shards, seed, *overrides, score=0.5, weights=True):
    """A run of 20 steps with a log and, where `weights` is set, random weights at its end."""
    folder.mkdir(parents=True)
    place = [f"run_dir={folder}", f"name={folder.name}", f"data.shards={shards}", f"seed={seed}"]
    cfg = compose(RunConfig, "config", ["experiment=sample", *place, "steps=20", *overrides])
    save_config(cfg, folder / "config.yaml")
    if weights:
        torch.manual_seed(seed)
        digest = ShardSet.open(shards).digest
        state = TrainState(step=20, data_digest=digest, settings=as_yaml(frozen(cfg)))
        write_checkpoint(build_model(ModelConfig(), 2).state_dict(), {}, state, folder / "checkpoints")
    rows = [
        {"kind": "train", "step": s, "loss": 1 / s, "images_per_s": 8.0, "step_s": 0.5} for s in range(1, 21)
    ]
    rows += [{"kind": "eval", "step": 10, "miou": score + 0.1, "iou": [0.9, None]}]
    rows += [{"kind": "final", "step": 20, "miou": score, "iou": [0.8, 0.2]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards):
    """Two runs that differ in seed and rate, with weights, on 3 validation images."""
    place = tmp_path_factory.mktemp("runs")
    return [
        make_run(place / name, tiny_shards, seed, f"optim.lr={lr}")
        for name, seed, lr in (("a", 0, 1e-3), ("b", 1, 2e-3))
    ]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The page of the two runs."""
    output = tmp_path_factory.mktemp("compared")
    return compare(CompareConfig(runs=[str(run) for run in runs], output=str(output), images=2, device="cpu"))


def rows_of(output):
    with (output / "comparison.csv").open() as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_evaluation_with_their_intervals(runs, compared, monkeypatch):
    expected = evaluate_checkpoint(EvaluateConfig(checkpoint=str(runs[1])))
    rows = rows_of(compared.parent)
    entries = [open_entry(run) for run in runs]
    _, split = common_images(entries)
    monkeypatch.setattr("segformer.inference.compared.Predictor", None)  # the areas were kept
    areas = [scored(entry, split, "cpu") for entry in entries]
    assert [found.shape for found in areas] == [(3, 3, 2)] * 2
    assert areas[1].sum(0)[0].tolist() == np.diag(expected.confusion).tolist()
    assert class_iou(areas[1].sum(0)) == pytest.approx(expected.iou)
    assert float(rows[0]["miou"]) == mean_iou(areas[0].sum(0))
    assert float(rows[1]["miou"]) == pytest.approx(expected.miou)
    low, high = interval(replicates(areas[1]) - replicates(areas[0]))
    assert (float(rows[1]["difference_low"]), float(rows[1]["difference_high"])) == (low, high)
    assert float(rows[1]["difference"]) == pytest.approx(expected.miou - float(rows[0]["miou"]))
    assert rows[0]["difference"] == ""
    assert float(rows[1]["low"]) <= expected.miou <= float(rows[1]["high"])
    assert (rows[0]["best"], rows[0]["best_step"], rows[0]["seconds"]) == ("0.6", "10", "10.0")
    assert [row["optim.lr"] for row in rows] == ["0.001", "0.002"]


def test_differences_have_two_decimals_no_minus_zero_and_a_mark_where_0_is_excluded(runs):
    found = Comparison([open_entry(run) for run in runs])
    for (low, high), shown in {
        (-0.00004, 0.0142): "+0.00 to +1.42",
        (0.001, 0.0142): "+0.10 to +1.42 *",
        (-0.0142, -0.001): "-1.42 to -0.10 *",
    }.items():
        found.intervals[1], found.differences[1] = (0.5, 0.6), (low, high)
        assert found.table()[1][1][5] == shown
        assert ("* The interval excludes 0" in found.text()) == shown.endswith("*")


def test_a_damaged_cache_is_made_again_and_a_run_in_training_is_taken_where_it_is(
    runs, compared, tmp_path, monkeypatch
):
    class AgainError(Exception):
        """A predictor was asked for."""

    def predictor(path, *, step, device):
        raise AgainError(step)

    monkeypatch.setattr("segformer.inference.compared.Predictor", predictor)
    run = shutil.copytree(runs[0], tmp_path / "run")
    entry = open_entry(run)
    _, split = common_images([entry])
    kept = run / "scores" / f"{split.name}-images.npz"
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]):
        kept.write_bytes(damaged)
        with pytest.raises(AgainError, match="20"):
            scored(entry, split, "cpu")
    (run / "checkpoints/step-00000020").rename(tmp_path / "pruned")
    with pytest.raises(CheckpointError, match=r"step-00000020 can't be read: No such file .*; start the"):
        scored(entry, split, "cpu")
    write_checkpoint({}, {}, TrainState(step=21, data_digest=entry.state.data_digest), run / "checkpoints")
    with pytest.raises(AgainError, match="21"):
        scored(entry, split, "cpu")


def test_the_page_opens_in_a_browser_and_shows_all_of_it(compared):
    text = compared.read_text("utf-8")
    for shown in ("2 runs compared", "Settings that differ", "optim.lr", "nucleus", "Validation images"):
        assert shown in text
    assert text.count("<img") == 3, "curves and two images"
    assert all(part.startswith("data:image/") for part in text.split('src="')[1:])
    assert open_page(compared) == []


def test_the_images_are_those_on_which_runs_disagree_then_others():
    random = np.random.default_rng(0)
    right = random.integers(0, 100, (2, 12, 1))
    areas = np.stack([right, np.full_like(right, 100), right], 2)  # IoU = right / 100
    spread = np.abs(right[0, :, 0] - right[1, :, 0])
    found = chosen(areas, 6)
    assert sorted(spread[found[:3]], reverse=True) == sorted(spread, reverse=True)[:3]
    assert len(set(found)) == 6
    assert chosen(areas, 1) == [int(np.argmax(spread))]
    assert len(chosen(areas, 50)) == 12
    assert mean_iou(areas)[0] == pytest.approx(right[0, :, 0] / 100)


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path, tiny_shards):
    scores = {"a": (0, 1e-3, 0.5), "b": (1, 1e-3, 0.56), "c": (2, 1e-3, 0.53), "d": (0, 2e-3, 0.4)}
    for name, (seed, lr, score) in scores.items():
        make_run(tmp_path / name, tiny_shards, seed, f"optim.lr={lr}", score=score, weights=False)
    found = Comparison([open_entry(tmp_path / name) for name in scores])
    mean, spread = statistics.mean((0.5, 0.56, 0.53)), statistics.stdev((0.5, 0.56, 0.53))
    assert found.seeds()[1] == [
        ["optim.lr=0.001", "3", f"{100 * mean:.2f}", f"{100 * spread:.2f}"],
        ["optim.lr=0.002", "1", "40.00", "-"],
    ]
    assert list(found.settings) == ["seed", "optim.lr"]
    place = make_run(tmp_path / "e", tiny_shards, 3, "optim.lr=1e-3", score=0.1, weights=False)
    rows = [row for row in (place / "metrics.jsonl").read_text().splitlines() if '"step": 20' not in row]
    (place / "metrics.jsonl").write_text("\n".join([*rows, ""]))
    make_run(tmp_path / "f", tiny_shards, 1, "optim.lr=1e-3", score=0.1, weights=False)
    entries = [open_entry(tmp_path / name) for name in (*scores, "e", "f")]
    for entry in entries:
        entry.name = entry.folder.name
    heads, lines = Comparison(entries).seeds()
    assert (heads[-1], lines[0][-1]) == ("left out", "e (step 19), f (seed 1 again)")
    assert [line[:-1] for line in lines] == found.seeds()[1], "neither a third of a run nor a seed twice"
    assert Comparison(found.entries[2:]).seeds()[1] == [], "no two of these differ in the seed alone"


def test_runs_of_other_data_are_compared_by_their_logs(runs, tmp_path, tiny_shards, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    path = other / "checkpoints/step-00000020"
    shutil.rmtree(path)
    write_checkpoint({}, {}, TrainState(step=20, data_digest="another"), path.parent)
    page = compare(CompareConfig(runs=[str(runs[0]), str(other)], output=str(tmp_path / "out")))
    assert "other data (the digest differs)" in capsys.readouterr().out
    assert "Validation images" not in page.read_text("utf-8")
    assert [row["miou"] for row in rows_of(tmp_path / "out")] == ["0.5", "0.5"]


def test_runs_on_mixtures_are_compared_by_their_logs(runs):
    entry = open_entry(runs[0])
    entry.config.mixture.sets["a"] = SetConfig(shards="a")
    note, split = common_images([entry])
    assert split is None
    assert note.startswith("the sets of a mixture have labels of their own")


def test_paths_are_taken_as_they_are_typed(runs, tmp_path, monkeypatch, root, capsys):
    command = ["compare.py", *map(str, runs), f"output={tmp_path}", "images=0"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(root / "launch/compare.py"), run_name="__main__")
    assert [row["run"] for row in rows_of(tmp_path)] == ["a", "b"]
    printed = capsys.readouterr().out
    assert "optim.lr=0.002" in printed
    assert "images=0" in printed
    place = runs[0].parent
    assert run_folders([str(place)]) == run_folders([f"{place}/?", str(runs[1])]) == runs


def test_what_can_not_be_compared_is_refused_in_words(runs, tmp_path):
    def refused(*paths):
        compare(CompareConfig(runs=list(map(str, paths)), output=str(tmp_path / "out"), images=0))

    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"needs two or more runs, not 1"):
        refused(runs[0], runs[0])
    with pytest.raises(CheckpointError, match="is an export, which has neither curve nor settings"):
        refused(runs[0], export)
    with pytest.raises(CheckpointError, match="not a run directory"):
        refused(runs[0], tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.yaml").write_text("steps: [")
    with pytest.raises(CheckpointError, match=r"damaged/config.yaml can't be read"):
        refused(runs[0], damaged)
    assert not (tmp_path / "out").exists()
