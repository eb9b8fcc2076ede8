"""A classifier from class folders to a segmentation run that starts from it, by the scripts of launch/."""

import html
import re

import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from safetensors.torch import load_file

STEPS = 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_ranks):
    """The directory and the output of a run of 40 steps on three shapes."""
    folder = tmp_path_factory.mktemp("classification")
    shards = shapes.write_set(folder, {"train": 120, "val": 31})
    overrides = [
        *("data=folder", "data.task=classification", "data.name=shapes", f"data.shards={shards}"),
        *("name=shapes", f"run_dir={folder / 'run'}", f"steps={STEPS}", "global_batch=16", "eval_every=20"),
        *("eval_batch=8", "classification.size=48", "classification.eval_resize=56"),
        *("classification.scale=[0.5,1]", "classification.mixup=0.2", "classification.label_smoothing=0.1"),
        *("model.drop_path_rate=0", "optim.lr=1e-3", "optim.head_lr_factor=1", "optim.warmup_steps=5"),
        *("optim.schedule=cosine", "loader.workers=0", "telemetry.log_every=5", "checkpoint.save_every=20"),
    ]
    return folder / "run", run_ranks(1, "launch/train.py", *overrides)[0]


def test_the_shapes_are_learned(finished, metrics):
    run, output = finished
    (final,) = metrics(run, "final")
    assert final["top1"] > 0.9
    assert sum(images for images, *_ in final["counts"]) == 31
    assert f"validation top-1 {final['top1']:.4f}" in output
    assert re.search(r"^all 3 .*\s31$", output, re.M)


def test_the_report_shows_curve_scores_and_classes_without_overlays(finished):
    run, output = finished
    page = html.unescape((run / "report.html").read_text())
    for shown in ("MiT-B0 on shapes", "crops of 48 x 48", "top-1", "best top-1", "stripes", "data:image/png"):
        assert shown in page
    assert "mIoU" not in page.split("<details>")[0]
    assert "overlays" not in output
    assert not (run / "overlays").exists()


def test_the_export_scores_on_two_ranks_as_the_run_did(finished, run_ranks):
    run, output = finished
    table = output[output.index("class ") : output.index("exported")].strip().splitlines()
    place = f"checkpoint={run / 'export'}"
    printed = run_ranks(2, "launch/evaluate.py", place, "loader.workers=0", "batch=4")[0]
    assert [line for line in table if line not in printed.splitlines()] == [], printed
    assert "short side to 56, center 48 x 48" in printed


def test_predicting_is_one_line_and_code_2(finished, run_ranks, tmp_path):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    place = [f"checkpoint={finished[0]}", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}"]
    (output,) = run_ranks(1, "launch/predict.py", *place, code=2)
    assert output.count("\n") == 1
    assert output.startswith("ConfigError: ")


def test_shards_with_masks_do_not_score_a_classifier(finished, tiny_shards, run_ranks):
    options = [f"checkpoint={finished[0] / 'export'}", f"shards={tiny_shards}"]
    (output,) = run_ranks(1, "launch/evaluate.py", *options, code=2)
    assert output.count("\n") == 1
    assert "is a model for classification" in output
    assert "was sharded for segmentation" in output


def test_a_segmentation_run_starts_from_its_export(finished, tiny, tmp_path, run_ranks):
    source = finished[0] / "export"
    # The first step of a warm-up from nearly 0 leaves the weights where they were.
    overrides = tiny(
        "from", f"model.pretrained={source}", "steps=1", "optim.lr=1e-12", "optim.weight_decay=0"
    )
    (output,) = run_ranks(1, "launch/train.py", *overrides)
    assert f"weights of b0 of {source} (export of this project): encoder" in output
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "from/export"))
    encoder = [name for name in before if name.startswith("segformer.encoder.")]
    assert len(encoder) > 100
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in encoder)
