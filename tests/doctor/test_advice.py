"""What would waste the hour: named with settings that mend it; nothing where a recipe chose for itself."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nano import SIZE

from segformer.data.shards.format import ShardSet
from segformer.data.sources.content import FAIL, WARN
from segformer.doctor.advice import judge_recipe
from segformer.doctor.doctor import DoctorConfig, as_json, look
from segformer.doctor.measure import judge_measured, measure
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, compose
from segformer.training.sizing import RULES, Facts, with_values
from segformer.training.task import Segmentation

STREET = Facts(
    images=482,
    side=(360, 480),
    eval_pixels=101 * 360 * 480,
    eval_side=360 * 480,
    class_pixels=np.array([5000, 4940, 60]),
    classes=["road", "sky", "pole"],
    gpu=False,
    world_size=1,
)


@pytest.fixture(scope="module")
def default() -> RunConfig:
    """What the command for own data has without a recipe."""
    return compose(RunConfig, "config", ["data=folder", "model=b2"])


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    """A run of STREET with nothing to remark."""
    given = ["optim.lr=6e-4", "augment.resize=[]", "augment.crop=[256,256]", "steps=4000", "eval_every=400"]
    weighted = ["loss.class_weighting=auto", "optim.warmup_steps=200"]
    return compose(RunConfig, "config", ["data=folder", "model=b2", *given, *weighted])


def warned(cfg: RunConfig, facts: Facts = STREET) -> dict[str, str]:
    return {finding.about: finding.text for finding in judge_recipe(cfg, facts) if finding.level == WARN}


def settings_of(text: str) -> list[str]:
    """The overrides that a finding ends in."""
    return shlex.split(text.rpartition("; ")[2])


def test_the_defaults_on_a_small_set_are_warned_of_and_all_remedies_together_leave_nothing(
    default: RunConfig,
) -> None:
    found = warned(default)
    expected = ["resize", "crop", "length", "learning rate", "warm-up", "evaluation", "rare classes"]
    assert list(found) == expected
    assert "160000 steps are 5,311 epochs of 482 images" in found["length"]
    assert "pole 0.60%" in found["rare classes"]
    taken = [setting for text in found.values() for setting in settings_of(text)]
    mended = compose(RunConfig, "config", ["data=folder", "model=b2", *taken])
    assert warned(mended) == {}
    assert not mended.augment.resize


@pytest.mark.parametrize(
    ("about", "change", "words"),
    [
        ("learning rate", {"optim.lr": 6e-5}, "random ones hardly learn"),
        ("learning rate", {"optim.lr": 6e-4, "model.pretrained": "x.pth"}, "optim.lr=6e-05"),
        ("length", {"steps": 20000}, "664 epochs of 482"),
        ("length", {"steps": 50, "optim.warmup_steps": 2, "eval_every": 10}, "1.66 epochs"),
        ("warm-up", {"optim.warmup_steps": 401}, "10% of 4000 steps; optim.warmup_steps=200"),
        ("evaluation", {"eval_every": 4000}, "nothing is scored before the end"),
        ("evaluation", {"eval_every": 801}, "20% of the run"),
        ("evaluation", {"eval_every": 5}, "an evaluation takes 1.1 times as long as the eval_every=5 steps"),
        ("resize", {"augment.resize": [2048, 512]}, "360x480, 1.4 times"),
        ("crop", {"augment.crop": [512, 512]}, "34% padding; 'augment.crop=[256,256]'"),
        ("crop", {"augment.crop": [64, 64]}, "is 2.4% of it"),
        ("rare classes", {"loss.class_weighting": ""}, "1 of 3 classes have under 1% of the pixels"),
    ],
)
def test_one_setting_is_one_warning(sound: RunConfig, about: str, change: dict[str, Any], words: str) -> None:
    assert warned(sound) == {}
    found = warned(with_values(sound, change))
    assert next(iter(found)) == about
    assert len(found) == 1 or about == "length", "fewer steps need a shorter warm-up, too"
    assert words in found[about]


@pytest.mark.parametrize("variant", ["b0", "b5"])
def test_a_recipe_that_sizes_itself_is_not_warned_of(variant: str) -> None:
    given = ["experiment=scratch", "data=folder", f"model={variant}"]
    recipe = replace(compose(RunConfig, "config", given), auto=[])
    for images in (3, 60, 482, 20_000, 2_000_000):
        for height, width in ((40, 48), (360, 480), (1024, 2048)):
            for gpu in (False, True):
                size = {"side": (height, width), "eval_pixels": images * height * width}
                facts = replace(STREET, **size, images=images, eval_side=height * width, gpu=gpu)
                cfg = recipe
                for _, rule in RULES:
                    cfg = with_values(cfg, rule(cfg, facts)[0])
                found = warned(cfg, facts)
                if height == 1024 and not gpu:
                    assert "long_side=" in found.pop("crop"), "a crop for a CPU sees too little of them"
                assert found == {}, (images, height, gpu)


def test_huge_images_are_to_be_sharded_smaller(sound: RunConfig) -> None:
    huge = replace(STREET, side=(3000, 4000))
    assert warned(sound, huge)["crop"].endswith("shard it reduced: data_prep/shard.py long_side=896")


def test_the_published_recipe_is_only_warned_of_random_weights(tmp_path: Path) -> None:
    ade = replace(
        STREET, images=20210, side=(512, 683), eval_pixels=2000 * 350_000, class_pixels=np.array([40, 60, 50])
    )
    given = ["experiment=ade20k_160k", "model=b2"]
    assert list(warned(compose(RunConfig, "config", given), ade)) == ["learning rate"]
    started = compose(RunConfig, "config", [*given, "model.pretrained=mit_b2.pth"])
    assert warned(started, ade) == {}


@pytest.fixture
def planned(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a doctor that looks at the sample's shards, for a tiny network."""
    monkeypatch.setitem(VARIANTS, *SIZE)
    given = [
        "data=sample",
        f"data.shards={tiny_shards}",
        "root=-",
        "pictures=0",
        "read=0",
        "loader.workers=0",
    ]
    return [*given, "model.variant=nano", "augment.crop=[64,64]"]


def test_the_doctor_judges_a_sized_recipe_by_its_numbers(planned: list[str]) -> None:
    report = look(compose(DoctorConfig, "doctor", ["experiment=scratch", *planned[:-1]]))
    found = {finding.about: finding.level for finding in report.findings}
    assert WARN not in found.values()
    lines = [finding.text for finding in report.findings if finding.about == "recipe"]
    assert any(line.startswith("global_batch=8") for line in lines)
    plain = look(compose(DoctorConfig, "doctor", planned))
    assert {"learning rate", "length", "warm-up"} <= {f.about for f in plain.findings if f.level == WARN}
    assert report.measured is plain.measured is None


def test_three_measured_steps_tell_the_hours_of_the_run(
    planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    own = Segmentation.loss

    def counted(self: Segmentation, model: Any, batch: Any, position: int) -> Any:
        seen.append(len(batch.images))
        return own(self, model, batch, position)

    monkeypatch.setattr(Segmentation, "loss", counted)
    settings = ["measure=true", "ranks=2", "global_batch=8", "micro_batch=2", "steps=1000", "eval_every=300"]
    report = look(compose(DoctorConfig, "doctor", [*planned, *settings]))
    found = report.measured
    assert found is not None
    assert seen == [2] * 2 * (1 + 3), "one rank's two micro batches of two images, of four steps"
    assert found.images_per_s == pytest.approx(8 / found.step_s)
    assert found.train_h == pytest.approx(found.step_s * 1000 / 3600)
    assert 0 < found.memory_gib < 64
    assert as_json(report)["measured"]["hours"] == pytest.approx(found.train_h + found.evaluate_h)
    (text,) = [finding.text for finding in report.findings if finding.about == "measured"]
    assert "on 2 such devices" in text
    assert "4 evaluations" in text
    long = judge_measured(
        compose(RunConfig, "config", ["steps=1000"]), replace(found, train_h=480.0, evaluate_h=0)
    )
    assert (long.level, long.text.endswith("steps=100")) == (WARN, True)


def test_a_step_that_does_not_fit_says_what_to_lower(
    planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Segmentation, "loss", full)
    report = look(compose(DoctorConfig, "doctor", [*planned, "measure=true", "global_batch=4"]))
    (text,) = [finding.text for finding in report.findings if finding.level == FAIL]
    assert "out of memory" in text
    assert "use micro_batch=2" in text


def test_an_evaluation_costs_in_proportion_to_its_pixels(
    planned: list[str], tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances a second at each look, one image takes a second."""
    clock = iter(range(1000))
    monkeypatch.setattr("segformer.doctor.measure._now", lambda device: float(next(clock)))
    cfg = compose(DoctorConfig, "doctor", [*planned, "global_batch=4", "steps=10", "eval_every=5"])
    shards = ShardSet.open(str(tiny_shards))
    found = measure(cfg, shards, cfg.batch_shape(1))
    split = shards.split("val")
    pixels = sorted((split.heights.astype(int) * split.widths).tolist())
    assert found.step_s == pytest.approx(1 / 3)
    assert found.evaluate_h * 3600 == pytest.approx(2 * sum(pixels) / pixels[len(pixels) // 2])
