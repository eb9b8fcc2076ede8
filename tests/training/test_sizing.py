"""Recipes that work out their settings: the rules against closed forms on made-up indexes, what a command
line gives, and a run that keeps its numbers on another device."""

import functools
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import nano
import numpy as np
import pytest
import yaml

from segformer.data.shards.format import ShardSet
from segformer.distributed.world import init_world
from segformer.errors import ConfigError
from segformer.models.macs import training_flops
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.slurm.script import JobFolder
from segformer.slurm.settings import SlurmConfig
from segformer.slurm.submission import describe, progress, with_batch
from segformer.training import losses
from segformer.training.config import SIZED, RunConfig, compose, load_config, save_config
from segformer.training.directory import settled
from segformer.training.loop import train
from segformer.training.losses import balanced_weights
from segformer.training.sizing import sized, with_values, written


def index(count: int, height: int | list[int], width: int | list[int], pixels=(60, 40), held: int = 10):
    """A stand-in for shards: `count` training and `held` validation images."""

    def split(images: int) -> SimpleNamespace:
        sides = [np.resize(np.array(side, np.int32), images) for side in (height, width)]
        return SimpleNamespace(
            num_samples=images, heights=sides[0], widths=sides[1], class_pixels=np.array(pixels)
        )

    splits = {"train": split(count), "val": split(held)}
    classes = [f"c{k}" for k in range(len(pixels))]
    return SimpleNamespace(task="segmentation", classes=classes, channels=3, split=splits.__getitem__)


@functools.cache
def scratch(*more: str) -> RunConfig:
    return compose(RunConfig, "config", ["experiment=scratch", "data.shards=none", *more])


def settings(cfg: RunConfig) -> dict:
    found = {"crop": cfg.augment.crop, "resize": cfg.augment.resize, "scale": cfg.augment.scale}
    return found | {"steps": cfg.steps, "batch": cfg.global_batch, "warmup": cfg.optim.warmup_steps}


# images, height, width, device, ranks -> crop, batch, epochs
CASES = {
    "a handful of tiny images": ((10, 28, 500, "cuda", 1), ([64, 500], 8, 300)),
    "the same for 8 ranks": ((10, 28, 500, "cuda", 8), ([64, 500], 8, 300)),
    "photographs of two sizes": ((600, [480, 360, 480], [640, 480, 640], "cuda", 1), ([480, 512], 16, 300)),
    "20,000 of them": ((20_000, 1024, 2048, "cuda", 8), ([512, 512], 16, 128)),
    "a million": ((1_281_167, 1024, 2048, "cuda", 24), ([512, 512], 24, 1)),
    "very wide on a CPU": ((400, 90, 4000, "cpu", 1), ([90, 256], 8, None)),
    "many on a CPU of 3 ranks": ((20_000, 90, 4000, "cpu", 3), ([90, 256], 9, 10)),
    "few on a CPU": ((12, 256, 256, "cpu", 1), ([256, 256], 8, 300)),
}


@pytest.mark.parametrize("name", CASES)
def test_length_batch_and_crop_follow_from_images_and_device(name):
    (images, height, width, device, ranks), (crop, batch, epochs) = CASES[name]
    cfg, lines = sized(scratch(), index(images, height, width), device=device, world_size=ranks)
    if epochs is None:  # six minutes of two cores, by the work of a crop
        epochs = math.floor(360 * 77e9 / training_flops(ModelConfig(), (90, 256), 2) / images)
        assert 10 < epochs < 300
    steps = -(-epochs * images // batch)
    short = device == "cpu" and epochs < 300
    wide = [0.5, 2.0] if epochs >= 50 else [0.7, 1.5]
    expected = {"crop": crop, "resize": [], "scale": wide, "steps": steps, "batch": batch}
    assert settings(cfg) == expected | {"warmup": min(1500, steps // 20)}
    assert (cfg.auto, cfg.epochs) == ([], None)
    assert any(f"{epochs} epochs of {images} images in batches of {batch}" in line for line in lines)
    assert sum("GPU would take epochs=" in line for line in lines) == short
    assert 8 <= len(lines) <= 12
    assert cfg.batch_shape(ranks).world_size == ranks


def test_evaluations_are_about_ten_and_fewer_where_they_cost_a_tenth_of_the_training():
    def intervals(held: int) -> tuple[int, int]:
        shards = index(400, 256, 256, held=held)
        cfg, _ = sized(replace(scratch(), epochs=20), shards, device="cpu", world_size=1)
        return cfg.eval_every, cfg.checkpoint.save_every

    # training: 1000 steps of 8 images, forward and backward = 24,000 forwards of an image
    assert intervals(held=100) == (100, 100)
    assert intervals(held=600) == (250, 250)  # four evaluations
    assert intervals(held=5000) == (500, 500)
    long, _ = sized(replace(scratch(), epochs=4000), index(400, 256, 256), device="cuda", world_size=1)
    assert (long.eval_every, long.checkpoint.save_every) == (10_000, 2000)


def test_saves_follow_the_evaluations_and_checkpoints_that_stay_and_say_so():
    def saves(*given: str) -> tuple[int, str]:
        cfg, lines = sized(scratch("steps=1000", *given), index(400, 256, 256), device="cpu", world_size=1)
        reason = next(line for line in lines if line.startswith("checkpoint.save_every="))
        return cfg.checkpoint.save_every, reason.partition(": ")[2]

    assert saves("eval_every=70") == (70, "at every evaluation")
    assert saves("eval_every=7000") == (2000, "often enough for evaluations this far apart")
    for keep, every in ((150, 75), (160, 80), (997, 997), (7, 7), (10**9 + 7, 10**9 + 7)):
        assert saves("eval_every=80", f"checkpoint.keep_every={keep}")[0] == every
    assert saves("eval_every=80", "checkpoint.keep_every=150")[1].startswith("checkpoint.keep_every=150 is")
    with pytest.raises(ConfigError, match=r"keep_every=150 must be a multiple of checkpoint.save_every=80"):
        scratch("checkpoint.keep_every=150", "checkpoint.save_every=80")
    only, lines = sized(scratch("checkpoint.save_every=9"), index(40, 64, 64), device="cpu", world_size=1)
    assert not any("save_every" in line for line in lines)
    assert only.checkpoint.save_every == 9


def test_a_schedule_that_begins_after_the_steps_that_are_worked_out_is_refused():
    cfg = scratch("epochs=1", "optim.schedule_start=50")
    with pytest.raises(ConfigError, match=r"optim.schedule_start=50 must be below steps=50"):
        sized(cfg, index(400, 64, 64), device="cpu", world_size=1)


def test_a_set_for_classification_is_refused_in_the_words_of_the_command():
    shards = index(40, 64, 64)
    shards.task = "classification"
    with pytest.raises(ConfigError, match=r"^a recipe that sizes itself \(experiment=scratch, f"):
        sized(scratch(), shards, device="cpu", world_size=1)
    cfg = compose(RunConfig, "config", ["experiment=sample", "loss.class_weights=inverse"])
    with pytest.raises(ConfigError, match=r"^loss.class_weights=inverse is for segmentation only, and "):
        sized(cfg, shards, device="cpu", world_size=1)


def test_epochs_are_shown_with_as_many_digits_as_say_something():
    assert [written(e) for e in (0.0137, 13.7, 300, 5311.2)] == ["0.0137", "13.7", "300", "5,311"]


def test_a_reason_is_of_the_keys_that_are_worked_out():
    given = ["steps=100", "optim.lr=0.1", "augment.scale=[1,2]"]
    lines = sized(scratch(*given), index(400, 64, 64), device="cpu", world_size=1)[1]
    assert "optim.head_lr_factor=1: random weights of b0" in lines
    assert "augment.resize=[]: evaluation takes images at their own size" in lines


def test_the_lr_follows_what_is_trained_already_and_what_is_new():
    def rates(change: dict, classes: int = 2) -> tuple[float, float]:
        shards = index(400, 256, 256, pixels=[50] * classes)
        long = {"steps": 20_000} | change
        cfg = with_values(scratch(), {"auto": ["optim.lr", "optim.head_lr_factor"]} | long)
        cfg, _ = sized(cfg, shards, device="cuda", world_size=1)
        return cfg.optim.lr, cfg.optim.head_lr_factor

    plain = rates({"global_batch": 8})
    assert plain[1] == 1
    assert rates({"global_batch": 32})[0] == pytest.approx(2 * plain[0], rel=0.05)
    of = {name: rates({"global_batch": 8, "model.variant": name})[0] for name in ("b1", "b2", "b5")}
    assert rates({"global_batch": 8, "steps": 100})[0] == pytest.approx(2 * plain[0], rel=0.05)
    assert of["b5"] < of["b2"] < of["b1"] < plain[0]
    weights = SimpleNamespace(
        arch=SimpleNamespace(kind="segmentation", num_classes=3), metadata=SimpleNamespace(classes=[])
    )
    trained = {"model.pretrained": "x"}
    with mock.patch("segformer.training.sizing.read_weights", return_value=weights):
        tuned = rates(trained)
        assert tuned[0] < plain[0] / 2
        assert tuned[1] == 10
        assert rates(trained, classes=3)[1] < 10
        weights.metadata.classes = ["other", "names", "here"]
        assert rates(trained, classes=3) == tuned


def test_what_the_command_line_gives_is_taken_as_it_is():
    given = {
        "steps": 77, "global_batch": 6, "eval_every": 5, "eval_batch": 3, "augment.crop": [64, 96],
        "augment.resize": [512, 128], "augment.scale": [1.0, 1.5], "loss.class_weights": [1.0, 2.0],
        "optim.lr": 0.25, "optim.head_lr_factor": 3.0, "optim.warmup_steps": 2, "model.drop_path_rate": 0.3,
        "checkpoint.save_every": 9, "telemetry.log_every": 4,
    }  # fmt: skip
    assert sorted(given) == sorted(SIZED) == sorted(scratch().auto)

    def read(cfg: RunConfig, key: str):
        group, _, name = key.rpartition(".")
        return getattr(getattr(cfg, group) if group else cfg, name)

    shards = index(400, 256, 256)
    for half in (list(given)[::2], list(given)[1::2]):
        cfg = scratch(*(f"{key}={given[key]}" for key in half))
        assert sorted(cfg.auto) == sorted(set(given) - set(half))
        cfg, lines = sized(cfg, shards, device="cpu", world_size=1)
        assert {key: read(cfg, key) for key in half} == {key: given[key] for key in half}
        named = {part.partition("=")[0] for line in lines for part in line.partition(": ")[0].split()}
        assert named == set(given) - set(half)
    whole = scratch("augment={crop: [64,64], resize: [512,64]}", "loss={class_weights: [1,2]}")
    assert set(SIZED) - set(whole.auto) == {"augment.crop", "augment.resize", "loss.class_weights"}


@pytest.mark.parametrize(("epochs", "steps"), [("3", 55), ("0.5", 10), ("0.001", 1), ("16", 292)])
def test_epochs_become_steps_once_rounded_up_with_any_recipe(epochs, steps):
    cfg = compose(RunConfig, "config", ["experiment=sample", "global_batch=16", f"epochs={epochs}"])
    assert cfg.steps == 500
    cfg, lines = sized(cfg, index(292, 256, 256), device="cpu", world_size=1)
    assert (cfg.steps, cfg.epochs) == (steps, None)
    assert lines == [f"steps={steps}: {epochs} epochs of 292 images in batches of 16"]


def test_epochs_and_steps_together_are_refused():
    with pytest.raises(ConfigError, match=r"^epochs and steps decide the same; give one of them$"):
        scratch("epochs=3", "steps=7")
    assert scratch("epochs=3").auto.count("steps") == 1


def naive(pixels: list[int], weighting: str) -> list[float]:
    """Weights of each class before the limit, whose mean over the pixels is 1."""
    total, present = sum(pixels), [n for n in pixels if n]
    beta = 1 - 1 / float(np.median(present))
    raw = [
        0.0 if not n
        else total / n if weighting == "inverse"
        else (1 - beta) / (1 - beta**n) if weighting == "effective"
        else (total / n) ** 0.5
        for n in pixels
    ]  # fmt: skip
    mean = sum(n * w for n, w in zip(pixels, raw, strict=True)) / total
    return [w / mean if n else 1.0 for n, w in zip(pixels, raw, strict=True)]


@pytest.mark.parametrize("weighting", ["auto", "sqrt", "inverse", "effective"])
def test_class_weights_are_those_of_the_pixels_in_the_masks(weighting, tiny_root, tiny_shards):
    masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (tiny_root / "masks/train").iterdir()]
    pixels = [sum(int((mask == k).sum()) for mask in masks) for k in range(2)]
    cfg = compose(RunConfig, "config", ["experiment=sample", f"loss.class_weights={weighting}"])
    cfg, lines = sized(cfg, ShardSet.open(tiny_shards), device="cpu", world_size=1)
    assert cfg.loss.class_weights == pytest.approx(naive(pixels, weighting), rel=1e-3)
    assert cfg.loss.class_weighting == ""
    assert "nucleus" in lines[0]
    assert "background" in lines[0]


@pytest.mark.parametrize("weighting", ["sqrt", "inverse", "effective"])
def test_class_weights_have_a_mean_of_one_over_the_pixels_and_a_limit(weighting):
    pixels = [10**7, 3 * 10**6, 10**5, 0, 500, 3]
    weights = balanced_weights(pixels, weighting)
    assert sum(n * w for n, w in zip(pixels, weights, strict=True)) / sum(pixels) == pytest.approx(
        1, rel=1e-3
    )
    assert max(weights) == losses.MOST_WEIGHT == weights[5]
    assert weights[3] == 1
    assert sorted(weights[:3] + weights[4:]) == weights[:3] + weights[4:]


def test_weights_are_left_out_where_no_class_is_rare():
    for pixels, weighted in (([98, 2], False), ([9950, 50], True), ([100, 0], False)):
        cfg, _ = sized(scratch(), index(50, 64, 64, pixels), device="cpu", world_size=1)
        assert bool(cfg.loss.class_weights) == weighted


def test_slurm_shares_a_batch_that_is_not_worked_out_yet():
    for nodes, gpus, batch in (("1", 8, 16), ("3", 2, 18), ("2-4", 1, 24), ("1", 0, 8)):
        cfg, run = SlurmConfig(nodes=nodes, gpus_per_node=gpus), scratch()
        assert f"global batch {batch} = " in describe(cfg, run)
        ready = with_batch(cfg, run)
        assert ready.global_batch == batch
        assert "global_batch" not in ready.auto


def test_the_status_of_a_job_knows_the_steps_once_the_run_has_begun(tmp_path):
    folder = JobFolder(tmp_path / "slurm/0001")
    folder.path.mkdir(parents=True)
    save_config(scratch(), folder.config)
    assert load_config(folder.config).auto == scratch().auto
    assert progress(tmp_path, folder) == "0 of ?"
    save_config(sized(scratch(), index(40, 64, 64), device="cuda", world_size=1)[0], tmp_path / "config.yaml")
    assert progress(tmp_path, folder) == "0 of 750"


def test_a_run_of_scratch_keeps_its_numbers_on_another_device(tmp_path, tiny_shards, monkeypatch):
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    run_dir = tmp_path / "run"
    cfg = scratch(
        f"data.shards={tiny_shards}", f"run_dir={run_dir}", "model.variant=nano", "epochs=2", "overlays=0",
        "augment.crop=[64,64]", "loader.workers=0",
    )  # fmt: skip
    before, _ = settled(cfg, device="cuda", world_size=8)
    assert before.global_batch == 16  # until the first checkpoint
    world = init_world()
    try:
        train(cfg, world)
    finally:
        world.close()
    saved = load_config(run_dir / "config.yaml")
    assert (saved.steps, saved.global_batch, saved.auto, saved.epochs) == (4, 8, [], None)
    plain = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert plain["optim"]["lr"] == saved.optim.lr != RunConfig().optim.lr
    log = (run_dir / "log.txt").read_text()
    assert "steps=4: 2 epochs of 16 images in batches of 8" in log
    again, _ = settled(cfg, device="cuda", world_size=8)
    assert asdict(again) == asdict(saved)
    on_slurm = SlurmConfig(nodes="1-2", gpus_per_node=4)  # a new run would take 16
    assert with_batch(on_slurm, cfg).global_batch == 8
    with pytest.raises(ConfigError, match="global_batch=8"):
        describe(SlurmConfig(nodes="3", gpus_per_node=1), cfg)
    Path(run_dir / "config.yaml").write_text("damaged: [")
    again, _ = settled(cfg, device="cuda", world_size=8)
    assert (again.steps, again.global_batch, again.optim) == (saved.steps, saved.global_batch, saved.optim)
