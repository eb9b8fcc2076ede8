"""Whole runs through launch/train.py: what a run leaves, what it learns, what it refuses before it starts."""

import json
import runpy
import shutil
import sys

import pytest
import torch

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory, run_ranks):
    """A finished run of 6 steps with evaluations, its directory and its output."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    overrides = [
        *(
            "experiment=sample",
            f"run_dir={run_dir}",
            f"data.shards={tiny_shards}",
            "steps=6",
            "global_batch=4",
        ),
        *("augment.crop=[64,64]", "eval_every=2", "checkpoint.save_every=1", "checkpoint.keep_last=2"),
        *("telemetry.log_every=2", "telemetry.wandb=offline", "overlays=2", "loader.workers=0"),
    ]
    output = run_ranks(1, "launch/train.py", *overrides, env={"WANDB_API_KEY": "canary" * 7})[0]
    return run_dir, overrides, output


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
    assert load_checkpoint(run_dir / "checkpoints").state.best_step in steps
    for name in ("config.yaml", "log.txt", "curve.png", "report.html", "export/model.safetensors"):
        assert (run_dir / name).stat().st_size > 0, name
    assert len(list((run_dir / "overlays").glob("*.jpg"))) == 2
    assert f"{100 * final[0]['miou']:.2f}" in output
    assert "report.html" in output


def test_wandb_offline_keeps_one_run_id_and_no_secret_reaches_any_file(finished):
    run_dir, _, _ = finished
    assert len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    identifier = (run_dir / "wandb_id.txt").read_text()
    assert list(run_dir.glob(f"wandb/offline-run-*-{identifier}"))
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    recorded = next(iter(run_dir.glob("wandb/offline-run-*/run-*.wandb"))).read_bytes()
    assert b"eval/miou" in recorded
    assert sys.executable.encode() not in recorded, "what wandb knows of the machine stays here"
    assert not list(run_dir.rglob("requirements.txt"))
    assert not [path for path in files if b"canarycanary" in path.read_bytes()]


def test_a_finished_run_starts_again_without_training(finished, run_ranks, metrics, tmp_path):
    run_dir, overrides, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("wandb*"))
    before = (copy / "checkpoints/step-00000006/model.safetensors").read_bytes()
    changed = [f"run_dir={copy}", "telemetry.wandb=disabled", "overlays=0"]
    output = run_ranks(1, "launch/train.py", *overrides, *changed)[0]
    assert "continuing from step 6" in output
    assert "nucleus" in output
    assert len(metrics(copy)) == 3
    assert (copy / "checkpoints/step-00000006/model.safetensors").read_bytes() == before


def test_evaluating_run_and_export_on_one_and_two_ranks_gives_the_final_table(finished, run_ranks):
    run_dir, _, output = finished
    table = output[output.index("class ") : output.index("exported")].strip().splitlines()
    for ranks, checkpoint in ((1, run_dir / "export"), (2, run_dir)):
        options = ["loader.workers=0", "batch=2"]
        printed = run_ranks(ranks, "launch/evaluate.py", f"checkpoint={checkpoint}", *options)[0]
        assert [line for line in table if line not in printed.splitlines()] == [], printed


def test_four_images_are_learnt_by_heart(tmp_path, run_ranks, metrics):
    import cv2
    import numpy as np

    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
    for index in range(4):
        image = generator.integers(0, 60, (96, 96, 3), np.uint8)
        mask = np.zeros((96, 96), np.uint8)
        for _ in range(3):
            x, y, size = (int(value) for value in generator.integers(12, 72, 3))
            mask[y : y + size // 2 + 8, x : x + size // 2 + 8] = 1
        image[mask == 1] += 120
        for split in ("train", "val"):
            cv2.imwrite(str(tmp_path / f"data/images/{split}/{index}.png"), image)
            cv2.imwrite(str(tmp_path / f"data/masks/{split}/{index}.png"), mask)
    cfg = DatasetConfig(name="four", image_suffix=".png", classes=["dark", "bright"], splits=["train", "val"])
    write_shards(cfg, tmp_path / "data", tmp_path / "shards", seed=0, samples_per_shard=4, workers=1)
    run_dir = tmp_path / "run"
    run_ranks(
        1,
        "launch/train.py",
        *("experiment=sample", f"run_dir={run_dir}", f"data.shards={tmp_path / 'shards'}", "data.name=four"),
        *("data.classes=[dark,bright]", "data.palette=[]", "steps=150", "global_batch=4", "eval_every=1000"),
        *("augment.crop=[96,96]", "augment.scale=[1,1]", "augment.rot90=0", "augment.photometric=false"),
        *("augment.hflip=0", "augment.vflip=0", "augment.cat_max_ratio=1", "model.drop_path_rate=0"),
        *("loader.workers=0", "overlays=0", "optim.warmup_steps=10"),
    )
    assert metrics(run_dir, "final")[0]["miou"] > 0.95


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


def test_a_refused_start_can_be_corrected_under_the_same_name(tiny, tmp_path, run_ranks):
    outputs = run_ranks(2, "launch/train.py", *tiny("same", "global_batch=3", "steps=2"), code=2)
    assert "use a world size of 1, 3 or global_batch=2 or 4" in outputs[0]
    assert "ConfigError" not in outputs[1]
    run_ranks(2, "launch/train.py", *tiny("same", "steps=2"))
    assert list_steps(tmp_path / "same" / "checkpoints") == [2]


def test_the_best_step_is_saved_also_between_the_regular_checkpoints(tiny, tmp_path, run_ranks):
    run_ranks(1, "launch/train.py", *tiny("best", "steps=3", "eval_every=2", "checkpoint.save_every=1000"))
    assert list_steps(tmp_path / "best" / "checkpoints") == [2, 3], "the first evaluation is the best so far"


def test_other_data_under_an_old_run_is_refused(finished, tiny_root, tmp_path, monkeypatch, capsys):
    run_dir, overrides, _ = finished
    cfg = DatasetConfig(name="sample", classes=["background", "nucleus"])
    write_shards(cfg, tiny_root, tmp_path / "other", seed=1, samples_per_shard=6, workers=1)
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    options = [f"run_dir={copy}", f"data.shards={tmp_path / 'other'}", "telemetry.wandb=disabled", "steps=6"]
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides, *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("launch/train.py", run_name="__main__")
    assert stop.value.code == 2
    assert "is not the data that" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tiny, tmp_path, run_ranks):
    output = run_ranks(
        1, "launch/train.py", *tiny("diverged", "optim.lr=1e30", "optim.warmup_steps=0"), code=2
    )[0]
    assert "lower optim.lr" in output
    assert "Traceback" not in output
    assert list_steps(tmp_path / "diverged" / "checkpoints") == []
    lines = [json.loads(line) for line in (tmp_path / "diverged/metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert len(skipped) == 3
    assert all(len(line["samples"]) == 4 for line in skipped)


def test_a_checkpoint_damaged_after_the_run_is_passed_over(finished, tmp_path):
    run_dir, _, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    path = copy / "checkpoints/step-00000006/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    model, _, _, state = load_checkpoint(copy / "checkpoints", warn=lambda text: None)
    assert state.step == 5
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())
