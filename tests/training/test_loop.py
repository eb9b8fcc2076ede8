"""Whole runs through launch/train.py: what a run leaves, what it learns, what it refuses before it starts."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.loading.loader import LoaderConfig
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.inference.export import ExportConfig, export, open_checkpoint
from segformer.inference.predictor import Predictor
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.models.segformer import build_classifier
from segformer.models.variants import ModelConfig


@pytest.fixture(scope="module")
def finished(tiny_in, tmp_path_factory, run_ranks):
    """A finished run of 6 steps with evaluations, its directory and its output."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["steps=6", "eval_every=2", "checkpoint.save_every=1", "checkpoint.keep_last=2", "overlays=2"]
    overrides = tiny_in(folder)("finished", *options, "telemetry.log_every=2", "telemetry.wandb=offline")
    output = run_ranks(1, "launch/train.py", *overrides, env={"WANDB_API_KEY": "canary" * 7})[0]
    return folder / "finished", overrides, output


def refused(overrides, monkeypatch, capsys):
    """The one line that launch/train.py prints before it exits with code 2."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("launch/train.py", run_name="__main__")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_leaves_metrics_checkpoints_export_and_report(finished, metrics):
    run_dir, _, output = finished
    assert [line["step"] for line in metrics(run_dir)] == [2, 4, 6]
    assert [line["step"] for line in metrics(run_dir, "eval")] == [2, 4]
    final = metrics(run_dir, "final")
    assert len(final) == 1
    wanted = {"loss", "lr", "grad_norm", "images_per_s", "step_s", "data_wait", "memory_gib"}
    assert all(wanted <= line.keys() for line in metrics(run_dir))
    steps = list_steps(run_dir / "checkpoints")
    assert steps[-2:] == [5, 6]
    state = load_checkpoint(run_dir / "checkpoints").state
    assert state.best_step in steps
    assert state.long_side == 0, "of the shards, which are not reduced"
    for name in ("config.yaml", "log.txt", "train_batch.jpg", "report.html", "export/model.safetensors"):
        assert (run_dir / name).stat().st_size > 0, name
    assert len(list((run_dir / "overlays").rglob("*.jpg"))) == 2, "one of them in worst"
    assert f"{100 * final[0]['miou']:.2f}" in output
    assert "report.html" in output
    best, exported = open_checkpoint(run_dir, "best"), open_checkpoint(run_dir / "export_best")
    assert all(torch.equal(exported.state[name], value) for name, value in best.state.items())
    assert f"exported step {state.best_step} of {run_dir} to {run_dir}/export_best, mIoU" in output
    told = f"best mIoU {100 * state.best_score:.2f}% at step {state.best_step}, last"
    assert told in (run_dir / "log.txt").read_text()


def test_wandb_offline_keeps_one_run_id_and_no_secret_reaches_any_file(finished):
    run_dir, _, _ = finished
    assert len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    identifier = (run_dir / "wandb_id.txt").read_text().split()[0]
    assert list(run_dir.glob(f"wandb/offline-run-*-{identifier}"))
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    recorded = next(iter(run_dir.glob("wandb/offline-run-*/run-*.wandb"))).read_bytes()
    assert b"eval/miou" in recorded
    assert sys.executable.encode() not in recorded, "what wandb knows of the machine stays here"
    assert not list(run_dir.rglob("requirements.txt"))
    assert not [path for path in files if b"canarycanary" in path.read_bytes()]


def test_evaluating_the_run_gives_the_final_table(finished, capsys):
    run_dir, _, output = finished
    table = output[output.index("class ") : output.index("best ")].strip().splitlines()
    config = run_dir / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.partition("augment:")[0])  # mean and std are gone, and the epsilons
    evaluate_checkpoint(EvaluateConfig(checkpoint=str(run_dir), loader=LoaderConfig(workers=0), batch=2))
    config.write_text(whole)
    printed = capsys.readouterr().out
    assert [line for line in table if line not in printed.splitlines()] == [], printed


@pytest.mark.slow
def test_a_damaged_config_yaml_gives_the_same_table_or_one_line(finished, tmp_path, run_ranks):
    run_dir, _, output = finished
    table = output[output.index("class ") : output.index("best ")].strip()
    folder = tmp_path / "copy"
    shutil.copytree(run_dir, folder)
    text = (folder / "config.yaml").read_bytes()
    arguments = ("launch/evaluate.py", f"checkpoint={folder}", "loader.workers=0")
    for damaged in (text.partition(b"augment:")[0], text.replace(b"model:", b"mod%l:")):
        (folder / "config.yaml").write_bytes(damaged)
        assert table in run_ranks(1, *arguments)[0]
    (folder / "config.yaml").write_bytes(text.replace(b"steps:", b"st\xe5ps:"))
    (line,) = run_ranks(1, *arguments, code=2)[0].splitlines()
    assert "config.yaml can't be read" in line


@pytest.mark.slow
def test_other_settings_start_as_the_refusal_says(finished, tmp_path, monkeypatch, capsys, run_ranks):
    run_dir, overrides, _ = finished
    folder = tmp_path / "copy"
    shutil.copytree(run_dir, folder)
    given = [*overrides, f"run_dir={folder}", "steps=1", "telemetry.wandb=disabled", "overlays=0"]
    for weights in ("export of this project", "run"):
        remedy = refused(given, monkeypatch, capsys).partition("from its weights: ")[2].split()
        assert [one.partition("=")[0] for one in remedy] == ["run_dir", "model.pretrained"]
        run_ranks(1, "launch/train.py", *given, *remedy)
        log = Path(remedy[0].partition("=")[2], "log.txt").read_text()
        assert re.search(f"weights of b0 of .*{weights}", log), log
        shutil.rmtree(folder / "export", ignore_errors=True)


def write_boxes(folder):
    """Shards of four dark images with a bright box each."""
    generator = np.random.default_rng(0)
    for index in range(4):
        mask = np.zeros((64, 64), np.uint8)
        y, x = generator.integers(4, 24, 2)
        mask[y : y + 32, x : x + 32] = 1
        image = generator.integers(0, 60, (64, 64, 3), np.uint8) + 120 * mask[..., None]
        for kind, pixels in (("images", image), ("masks", mask)):
            (folder / "data" / kind / "train").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"data/{kind}/train/{index}.png"), pixels)
    cfg = DatasetConfig(name="four", image_suffix=".png", classes=["dark", "bright"], splits=["train"])
    write_shards(cfg, folder / "data", folder / "shards", seed=0, samples_per_shard=4, workers=1)


@pytest.fixture(scope="module")
def others(finished, tiny_in, tmp_path_factory, train_many):
    """(folder, outcomes by name) of further runs on one rank; "again" is the finished one."""
    folder = tmp_path_factory.mktemp("others")
    tiny = tiny_in(folder)
    write_boxes(folder)
    build_classifier(ModelConfig(), 3).save_pretrained(folder / "classifier")
    # The first step of a warm-up from nearly 0 leaves the weights where they were.
    still = ("steps=1", "optim.lr=1e-12", "optim.weight_decay=0")
    runs = {
        "again": [*finished[1], f"run_dir={folder / 'again'}", "telemetry.wandb=disabled"],
        "from": tiny("from", f"model.pretrained={folder / 'classifier'}", *still),
        "heart": tiny(
            *("heart", f"data.shards={folder / 'shards'}", "data.name=four", "data.classes=[dark,bright]"),
            *("data.palette=[]", "eval_split=train", "steps=60", "optim.warmup_steps=5", "optim.lr=2e-3"),
            *("augment.scale=[1,1]", "augment.rot90=0", "augment.photometric=false", "augment.hflip=0"),
            *("augment.vflip=0", "augment.cat_max_ratio=1"),
        ),
        "best": tiny("best", "steps=3", "eval_every=2"),
        "diverged": tiny("diverged", "optim.lr=1e30", "optim.warmup_steps=0"),
    }
    copy = {"cut": str(finished[0]), "to": str(folder / "again"), "step": 6}
    return folder, dict(zip(runs, train_many(1, [copy, *runs.values()], failing=True), strict=True))


def test_a_finished_run_starts_again_without_training(finished, others, metrics):
    again, outcomes = others[0] / "again", others[1]
    assert not any(outcomes["again"])
    log = (again / "log.txt").read_text()
    assert "continuing from step 6" in log.rpartition("step 6/6")[2]
    assert "nucleus" in log.rpartition("continuing")[2]
    assert metrics(again) == []
    place = "checkpoints/step-00000006/model.safetensors"
    assert (again / place).read_bytes() == (finished[0] / place).read_bytes()
    assert (again / place).stat().st_mtime_ns == (finished[0] / place).stat().st_mtime_ns, "not written"


def test_a_segmentation_run_starts_from_an_exported_classifier(others):
    source = others[0] / "classifier"
    wanted = f"weights of b0 of {source} (export of this project): encoder"
    assert wanted in (others[0] / "from/log.txt").read_text()
    before, after = open_checkpoint(source).state, load_checkpoint(others[0] / "from/checkpoints").model
    encoder = [name for name in before if name.startswith("backbone.")]
    assert len(encoder) > 100
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in encoder)


def test_four_images_are_learned_by_heart(others, metrics):
    assert metrics(others[0] / "heart", "final")[0]["miou"] > 0.95


def test_the_best_step_is_saved_between_the_regular_checkpoints(others):
    steps = list_steps(others[0] / "best" / "checkpoints")
    assert steps == [2, 3], "the first evaluation is the best so far"


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(others, metrics):
    folder, outcomes = others
    (message,) = outcomes["diverged"]
    assert message.startswith("Diverged: there is no checkpoint yet to go back to: ")
    assert "lower optim.lr" in message
    assert list_steps(folder / "diverged" / "checkpoints") == []
    skipped = metrics(folder / "diverged", "skipped")
    assert len(skipped) == 3
    assert all(len(line["samples"]) == 4 for line in skipped)


def test_wrong_settings_are_one_line_before_the_first_step(finished, tiny, monkeypatch, capsys, tmp_path):
    run_dir, overrides, _ = finished
    other = [item for item in overrides if not item.startswith("steps=")]
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "belongs to a run of another configuration (steps: 6 -> 7)": [*other, "steps=7"],
        "world_size": tiny("batch", "global_batch=6", "micro_batch=4"),
        "/nowhere": tiny("missing", "data.shards=/nowhere"),
        str(empty): tiny("empty", f"data.shards={empty}"),
        "has 3 classes": tiny("classes", "data.classes=[a,b,c]", "data.palette=[]"),
        "model.num_classes=5": tiny("model", "model.num_classes=5"),
        "dev": tiny("split", "eval_split=dev"),
        "can't be used": [*tiny("file"), "run_dir=/dev/null/x"],
    }
    for expected, arguments in cases.items():
        line = refused(arguments, monkeypatch, capsys)
        assert expected in line, line
    assert list_steps(run_dir / "checkpoints")[-1] == 6


@pytest.mark.slow
def test_a_run_with_the_head_of_mmseg_goes_on_where_it_stopped(tiny_in, tmp_path, train_many):
    tiny, head = tiny_in(tmp_path), ("model.head=mmseg", "steps=4", "checkpoint.save_every=2")
    head += ("optim.ema=0.9",)
    whole, part = tmp_path / "whole", tmp_path / "part"
    cut = {"cut": str(whole), "to": str(part), "step": 2}
    outcomes = train_many(1, [tiny("whole", *head), cut, tiny("part", *head)])
    other = train_many(1, [tiny("part", *head[1:])], failing=True)[-1][0]
    assert "model.head: mmseg -> segformer" in other, other
    assert not any(map(any, outcomes))
    ended = [load_checkpoint(run / "checkpoints") for run in (whole, part)]
    assert ended[0].model.keys() == ended[1].model.keys()
    assert all(torch.equal(ended[0].model[name], value) for name, value in ended[1].model.items())
    assert all(torch.equal(ended[0].ema[name], value) for name, value in ended[1].ema.items())
    export(ExportConfig(checkpoint=str(whole)))
    assert open_checkpoint(whole / "export").arch.head == open_checkpoint(whole).arch.head == "mmseg"
    assert Predictor(whole / "export")(np.zeros((64, 64, 3), np.uint8)).mask.shape == (64, 64)
    evaluate_checkpoint(EvaluateConfig(checkpoint=str(whole / "export"), loader=LoaderConfig(workers=0)))


def test_other_data_under_an_old_run_is_refused(finished, tiny_root, tmp_path, monkeypatch, capsys):
    run_dir, overrides, _ = finished
    cfg = DatasetConfig(name="sample", classes=["background", "nucleus"])
    write_shards(cfg, tiny_root, tmp_path / "other", seed=1, samples_per_shard=6, workers=1)
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    options = [f"run_dir={copy}", f"data.shards={tmp_path / 'other'}", "telemetry.wandb=disabled"]
    assert "is not the data that" in refused([*overrides, *options], monkeypatch, capsys)
