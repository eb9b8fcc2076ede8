"""A classifier from class folders to its score, by the scripts of launch/."""

import html
import re

import pytest
import shapes

from segformer.data.loading.loader import LoaderConfig
from segformer.errors import ConfigError
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint

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


@pytest.mark.slow
def test_the_shapes_are_learned(finished, metrics):
    run, output = finished
    (final,) = metrics(run, "final")
    assert final["top1"] > 0.9
    assert sum(images for images, *_ in final["counts"]) == 31
    assert f"validation top-1 {100 * final['top1']:.2f}%" in output
    assert re.search(r"^all 3 .*\s31$", output, re.M)


@pytest.mark.slow
def test_the_report_shows_curve_scores_and_classes_without_overlays(finished):
    run, output = finished
    page = html.unescape((run / "report.html").read_text())
    for shown in ("MiT-B0 on shapes", "crops of 48 x 48", "top-1", "best top-1", "stripes", "data:image/png"):
        assert shown in page
    assert "mIoU" not in page.split("<details>")[0]
    assert "overlays" not in output
    assert not (run / "overlays").exists()


@pytest.mark.slow
def test_the_export_scores_as_the_run_did(finished, capsys):
    """On several ranks: training/test_task.py."""
    run, output = finished
    table = output[output.index("class ") : output.index("best ")].strip().splitlines()
    config = EvaluateConfig(checkpoint=str(run / "export"), loader=LoaderConfig(workers=0), batch=4)
    evaluate_checkpoint(config)
    printed = "".join(capsys.readouterr())
    assert [line for line in table if line not in printed.splitlines()] == [], printed
    assert "(short side 56, center 48x48)" in printed


@pytest.mark.slow
def test_shards_with_masks_do_not_score_a_classifier(finished, tiny_shards):
    config = EvaluateConfig(checkpoint=str(finished[0] / "export"), shards=str(tiny_shards))
    with pytest.raises(ConfigError, match=r"is a model for classification, .* was sharded for segmentation"):
        evaluate_checkpoint(config)
