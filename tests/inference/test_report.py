"""The report of a run and its pictures: what they show, and that they show it without the network."""

import html.parser
import json
import resource

import numpy as np
import pytest
from browser import open_page
from checkpoints import make_run
from PIL import Image

from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.errors import CheckpointError, ConfigError
from segformer.evaluation.drawing import PANEL
from segformer.inference.pictures import (
    comparison,
    history,
    mean_iou,
    series,
    smoothed,
    write_class_curves,
    write_curve,
    write_overlays,
)
from segformer.inference.predictor import Predictor
from segformer.inference.report import ReportConfig, report
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig, compose, save_config

PALETTE = np.array([[0, 0, 0], [0, 200, 80]], np.uint8)
CLASSES = ["background", "nucleus"]
OVERLAYS = ("overlays", "overlays/worst")
CONFUSION = [[750, 250], [0, 250]]


class References(html.parser.HTMLParser):
    """Collects everything that a browser would fetch, and the text it would show."""

    def __init__(self, page):
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.text += data


def page_of(run, **options):
    return References(report(ReportConfig(checkpoint=str(run), device="cpu", **options)).read_text("utf-8"))


def write_metrics(run, steps=60, evaluations=(30, 60)):
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-3 / step, "images_per_s": 8.0}
            row["step_s"] = 0.5
            file.write(json.dumps(row) + "\n")
        for step in evaluations:
            row = {"kind": "eval", "step": step, "miou": step / 100, "macc": 0.7, "aacc": 0.9}
            lists = {"iou": [0.75, 0.5], "acc": [0.75, 1.0], "confusion": CONFUSION}
            file.write(json.dumps(row | lists) + "\n")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", {}, "data=sample")


@pytest.fixture
def trained(tmp_path, tiny_shards):
    """A run with a checkpoint, on a few images of the shipped sample."""
    overrides = ("experiment=sample", f"data.shards={tiny_shards}")
    folder = make_run(tmp_path / "trained", {60: build_model(ModelConfig(), 2).state_dict()}, *overrides)
    write_metrics(folder)
    return folder


def test_a_run_gets_curve_overlays_and_a_report_of_them(trained):
    page = page_of(trained, overlays=3)
    assert len(list((trained / "overlays").glob("*.jpg"))) == 2
    assert len(list((trained / "overlays/worst").glob("*.jpg"))) == 1
    assert page.tags.count("img") == 6  # three overlays, curve, curves of the classes, confusion matrix
    for shown in ("60.00mIoU, step 60", "nucleus50.00100.0050.0066.67", "sample", "global_batch: 8"):
        assert shown in page.text
    text = (trained / "report.html").read_text("utf-8")
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links), "it fetches nothing"
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_the_figures_of_the_classes_are_those_of_counted_pixels(trained):
    """CONFUSION as two lists of pixels, scored as sets."""
    label = np.repeat([0, 0, 1, 1], np.ravel(CONFUSION))
    prediction = np.repeat([0, 1, 0, 1], np.ravel(CONFUSION))
    text = page_of(trained, overlays=0).text
    for k, name in enumerate(CLASSES):
        true, found = set(np.flatnonzero(label == k)), set(np.flatnonzero(prediction == k))
        both = len(true & found)
        figures = (both / len(true | found), both / len(true), both / len(found))
        f1 = 2 * both / (len(true) + len(found))
        assert name + "".join(f"{100 * value:.2f}" for value in (*figures, f1)) in text
    with Image.open(trained / "confusion.png") as matrix:
        assert matrix.width == 320


def test_the_report_says_how_its_scores_came_about(trained, tiny_shards):
    start = {
        "kind": "start",
        "step": 0,
        "time": "2026-03-01T12:00:00+00:00",
        "command": "train.py a=1",
    }
    start |= {"devices": "2 x H200", "python": "3.12.1", "torch": "2.11", "deepspeed": None, "commit": "abc1"}
    end = {"kind": "end", "step": 60, "time": "2026-03-01T13:30:00+00:00", "reason": "early stop at step 60"}
    with (trained / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in (start, end)))
    text = page_of(trained, overlays=0).text
    shards = ShardSet.open(tiny_shards)
    for shown in (
        "digest d",
        f"split train, {shards.split('train').num_samples} images",
        f"split val, {shards.split('val').num_samples} images; whole images, each at its own size",
        "random weights",
        "best mIoU 60.00 at step 60, last mIoU 60.00 at step 60",
        "30s in 60 steps, 2026-03-01 12:00 to 2026-03-01 13:30 UTC, 1 start",
        "early stop at step 60",
        "2 x H200; torch 2.11, Python 3.12.1",
        "commit abc1",
        "train.py a=1",
    ):
        assert shown in text
    pixels = shards.split("train").class_pixels
    assert f"{100 * pixels[1] / pixels.sum():.2f}" in text


def test_half_of_the_overlays_are_the_worst_of_the_images_that_were_looked_at(trained, tiny_shards):
    page_of(trained, overlays=3)
    split, predictor = ShardSet.open(tiny_shards).split("val"), Predictor(trained, device="cpu")
    scores = {}
    for raw in map(ShardReader(split).read, range(split.num_samples)):
        prediction = predictor(decode_image(raw.image)).mask
        scores[raw.key] = mean_iou(decode_mask(raw.target), prediction)
    worst = sorted(scores, key=scores.get)[:1]
    drawn = {folder: {p.stem[5:] for p in (trained / folder).glob("*.jpg")} for folder in OVERLAYS}
    assert drawn["overlays/worst"] == {key.replace("/", "_") for key in worst}
    assert len(drawn["overlays"]) == 2
    assert not drawn["overlays"] & drawn["overlays/worst"]


def test_a_class_of_any_name_has_a_curve(run):
    write_metrics(run)
    assert write_class_curves(run, ["$x_{1$", "\u6c34\x1b[2J"]) == run / "classes.png"
    write_metrics(run, evaluations=(30,))
    assert write_class_curves(run, CLASSES) is None, "one point is no curve"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_report_without_complaint(trained, width):
    page_of(trained, overlays=2)
    assert open_page(trained / "report.html", trained / "page.png", width) == []
    with Image.open(trained / "page.png") as picture:
        assert picture.width == width, "nothing sticks out at the right"


def test_the_browser_complains_of_an_error_and_of_what_is_not_there(tmp_path):
    (tmp_path / "page.html").write_text("<img src=missing.png><script>console.error('no'); f()</script>")
    complaints = " ".join(open_page(tmp_path / "page.html"))
    for complaint in ("no", "f is not defined", "missing.png"):
        assert complaint in complaints


def test_a_classifier_gets_its_curve_and_classes_and_no_overlays(run, capsys):
    overrides = ["data=folder", "data.task=classification", "data.classes=[cat,dog]", "data.shards=nowhere"]
    save_config(compose(RunConfig, "config", [*overrides, "classification.size=96"]), run / "config.yaml")
    write_metrics(run, evaluations=())
    row = {"kind": "final", "step": 60, "top1": 0.625, "top5": 0.875, "macc": 0.55, "acc": [0.7, None]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row, "step": 30, "top1": 0.75, "kind": "eval"}) + "\n")
        file.write(json.dumps({**row, "counts": [[1000, 700, 900], [0, 0, 0]]}) + "\n")
    page = page_of(run)
    assert page.tags.count("img") == 1
    scores = ("62.50top-1, step 60", "75.00best top-1, step 30", "87.50top-5", "cat70.0090.001,000", "dog--0")
    for shown in (*scores, "crops of 96 x 96"):
        assert shown in page.text
    assert "mIoU" not in page.text
    assert "overlays" not in capsys.readouterr().out


def test_the_classes_of_a_run_that_leaves_them_to_its_shards_are_numbers_without_these(run):
    overrides = ["data=folder", "data.task=classification", "data.shards=nowhere"]
    save_config(compose(RunConfig, "config", overrides), run / "config.yaml")
    counts = [[4, 2, 4]] * 300
    row = {"kind": "final", "step": 1, "top1": 0.5, "top5": 1.0, "macc": 0.5, "counts": counts}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(run)
    assert "class 299" in page.text
    assert page.tags.count("details") == 2, "a long table is folded away, as the configuration"


def test_text_of_the_run_is_escaped(run):
    cfg = compose(RunConfig, "config", ["data=sample"])
    cfg.data.classes = ["<script>alert(1)</script>", "b&b"]
    cfg.data.name = '"><img src=x>'
    save_config(cfg, run / "config.yaml")
    write_metrics(run)
    (run / "overlays").mkdir()
    Image.new("RGB", (4, 4)).save(run / "overlays/00_<b onload=x>&.jpg")
    page = page_of(run, overlays=0)
    assert "script" not in page.tags
    assert page.tags.count("img") == 4, "curve, curves of the classes, confusion matrix and overlay"
    assert "b" not in page.tags[page.tags.index("figure") :]
    assert "<script>alert(1)</script>" in page.text


def test_a_run_without_anything_but_its_configuration_gets_a_report(run, capsys):
    page = page_of(run)
    assert "No evaluation has been made yet" in page.text
    assert not (run / "curve.png").exists()
    printed = capsys.readouterr().out
    assert "nothing has been logged" in printed
    assert "no new overlays" in printed


@pytest.mark.parametrize(("steps", "evaluations"), [(60, ()), (1, (1,))])
def test_a_curve_needs_no_evaluation_one_step_and_no_finite_losses(run, steps, evaluations):
    write_metrics(run, steps, evaluations)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "loss": "nan", "lr": null}\n')
        file.write('{"kind": "train", "step": 62, "loss": "inf", "lr": 0.0}\n')
    with Image.open(write_curve(run)) as picture:
        assert picture.size == (1350, 840)
    steps_of_rates, rates = series(history(run), ("train",), "lr")
    assert (steps_of_rates[-1], rates[-1]) == (62, 0.0), "zero is a value, null and text are none"


def test_a_torn_line_is_left_out_and_a_repeated_step_counts_once(run):
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    assert [(row["step"], row["loss"]) for row in history(run)] == [(1, 3.0), (2, 2.0)]


def test_smoothing_keeps_a_constant_and_a_straight_line_and_reduces_noise():
    line = np.linspace(0, 1, 101)
    assert np.allclose(smoothed(np.full(50, 3.0), 5.0), 3.0)
    assert np.allclose(smoothed(line, 3.0)[20:-20], line[20:-20])
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise, 5.0).std() < 0.5 * noise.std()


def test_the_mean_iou_of_a_picture_is_that_of_sets_of_pixels():
    target = np.array([[0, 0, 1, 1, IGNORE_INDEX]], np.uint8)
    prediction = np.array([[0, 1, 1, 2, 2]], np.uint8)
    ious = []
    for k in (0, 1, 2):
        t = {i for i in range(4) if target[0, i] == k}
        p = {i for i in range(4) if prediction[0, i] == k}
        ious.append(len(t & p) / len(t | p))
    assert mean_iou(target, prediction) == pytest.approx(np.mean(ious))
    assert mean_iou(np.full((2, 2), IGNORE_INDEX, np.uint8), np.zeros((2, 2), np.uint8)) is None


@pytest.mark.parametrize("shape", [(64, 64), (30, 200), (200, 30), (1000, 700)])
def test_a_comparison_colors_the_prediction_at_the_right_for_any_shape(shape):
    image = np.full((*shape, 3), 255, np.uint8)
    target = np.zeros(shape, np.uint8)
    picture = np.array(comparison(image, target, np.ones(shape, np.uint8), classes=CLASSES, palette=PALETTE))
    blend = np.rint(0.45 * 255 + 0.55 * PALETTE[1])
    columns = np.flatnonzero((np.abs(picture - blend) <= 1).all(axis=2).sum(axis=0) > 50)
    assert columns.min() > picture.shape[1] / 2
    assert abs(len(columns) - PANEL * shape[1] / max(shape)) <= 1


def test_overlays_replace_those_of_an_earlier_report_and_leave_other_files(run):
    out = run / "overlays"
    blank = np.zeros((40, 40), np.uint8)
    sample = ("a/b c", np.zeros((40, 40, 3), np.uint8), blank, blank)
    write_overlays([sample, sample], out, classes=CLASSES, palette=PALETTE)
    (out / "mine.txt").touch()
    write_overlays([sample], out, classes=CLASSES, palette=PALETTE)
    assert sorted(p.name for p in out.iterdir()) == ["0000_a_b_c.jpg", "mine.txt"]


def test_on_a_full_disk_pictures_and_report_are_whole_or_absent(run):
    write_metrics(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    blank, noise = (
        np.zeros((90, 90), np.uint8),
        np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8),
    )
    drawings = {"classes": CLASSES, "palette": PALETTE}
    before = sorted(run.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"curve\.png can't be written: File too large"):
            report(ReportConfig(checkpoint=str(run), overlays=0))
        with pytest.raises(ConfigError, match=r"overlays can't be written: File too large"):
            write_overlays([("a", noise, blank, blank)], run / "overlays", **drawings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(run.iterdir()) == sorted([*before, run / "overlays"])
    assert not list((run / "overlays").iterdir())


def test_what_is_no_run_or_can_not_be_written_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        report(ReportConfig(checkpoint=str(tmp_path)))
    (run / "overlays").touch()
    with pytest.raises(ConfigError, match="overlays can't be written"):
        write_overlays([], run / "overlays", classes=CLASSES, palette=PALETTE)
