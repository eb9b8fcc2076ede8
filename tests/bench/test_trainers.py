"""The trainer that ours is compared with follows the same recipe, and both really train."""

import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import trainers
from segformer.data.loading.crop import AugmentConfig
from segformer.errors import ConfigError
from segformer.models.segformer import SegFormer, build_model
from segformer.training.config import RunConfig, compose
from segformer.training.optim import lr_factor, parameter_groups

STEPS = 300


@pytest.fixture
def huggingface() -> ModuleType:
    """The other side; it imports transformers' Trainer, which takes seconds."""
    return importlib.import_module("bench.huggingface")


@pytest.fixture
def sample() -> RunConfig:
    """The run of both sides."""
    return compose(RunConfig, "config", ["experiment=sample", f"steps={STEPS}", "optim.head_lr_factor=10"])


@pytest.fixture
def request_of(sample, tmp_path) -> Any:
    """What the other side is asked for."""
    wanted = trainers.request(sample, tmp_path, tmp_path / "out", workers=0)
    assert wanted.augment["crop"] == [256, 256]
    return wanted


def test_both_draw_their_weights_from_the_same_distributions(huggingface, sample, request_of, tmp_path):
    torch.manual_seed(1)
    huggingface.build_model(request_of).save_pretrained(tmp_path / "theirs")
    theirs = SegFormer.from_pretrained(tmp_path / "theirs").state_dict()
    torch.manual_seed(2)
    for name, ours in build_model(sample.model, 2).state_dict().items():
        if name == "backbone.patch_embed1.proj.bias":  # the one that ours draws (mit.py)
            assert not theirs[name].any()
        elif ours.ndim == 1 and not name.startswith("decode_head.linear_c"):
            if not name.startswith("decode_head.linear_pred"):
                assert torch.equal(theirs[name], ours), name
        elif ours.numel() >= 1000:
            assert float(theirs[name].std()) == pytest.approx(float(ours.std()), rel=0.1), name
            assert not torch.equal(theirs[name], ours), name
            assert abs(float(theirs[name].mean())) < 4 * float(ours.std()) / math.sqrt(ours.numel()), name


def test_both_have_the_same_groups_and_schedule(huggingface, sample, request_of):
    optimizer, schedule = huggingface.build_optimizer(huggingface.build_model(request_of), request_of)
    wanted = parameter_groups(build_model(sample.model, 2), sample.optim)
    for step in range(STEPS):
        factor = lr_factor(sample.optim, step, STEPS)
        found = [
            (sum(p.numel() for p in group["params"]), group["weight_decay"], group["lr"])
            for group in optimizer.param_groups
        ]
        assert found == [
            (sum(p.numel() for p in group["params"]), group["weight_decay"], pytest.approx(
                group["base_lr"] * factor, rel=1e-9)) for group in wanted
        ], step  # fmt: skip
        optimizer.step()
        schedule.step()
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_images_and_masks_of_the_other_side_are_turned_alike(huggingface, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    mask = np.random.default_rng(0).integers(0, 2, (6, 6)).astype(np.uint8)
    Image.fromarray(np.repeat(mask[..., None] * 255, 3, 2)).save(tmp_path / "images/train/a.png")
    Image.fromarray(mask).save(tmp_path / "masks/train/a.png")
    cfg = AugmentConfig(
        crop=[6, 6], resize=[], scale=[1.0, 1.0], hflip=0.5, vflip=0.5, rot90=0.5, photometric=False
    )
    cfg.mean, cfg.std = [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]
    folder = huggingface.Folder(tmp_path, cfg)
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        sample = folder[0]
        assert sample["pixel_values"].dtype == torch.float32
        assert torch.equal(sample["pixel_values"], sample["labels"].float().expand(3, -1, -1))
        seen.add(sample["labels"].numpy().tobytes())
    turned = [np.rot90(side, turns) for side in (mask, mask[:, ::-1]) for turns in range(4)]
    assert seen == {np.ascontiguousarray(view).astype(np.int64).tobytes() for view in turned}


@pytest.mark.slow
def test_both_trainers_train_and_are_scored(tiny_root, tmp_path, rows_of):
    small = ["augment.crop=[64,64]", "global_batch=4", "loader.workers=0", "optim.warmup_steps=0"]
    cfg = trainers.TrainersBench(steps=40, seeds=[0, 1], ways=["2+0", "1+1"], trial=10, overrides=small)
    trainers.measure(cfg, str(tiny_root), tmp_path)
    rows = rows_of(tmp_path / "trainers.csv")
    assert [(row["seed"], row["first"]) for row in rows] == [
        ("0", "ours"), ("1", "theirs"), ("median", ""), ("least", ""), ("most", "")
    ]  # fmt: skip
    assert len({row["their_way"] for row in rows} & {"2+0", "1+1"}) == 1
    for row in rows[:2]:
        for side in trainers.SIDES:
            assert float(row[f"{side}_loss"]) < float(row[f"{side}_first_loss"]), side
            assert 0.3 < float(row[f"{side}_miou"]) <= 1, side
            assert 0 < float(row[f"{side}_train_s"]) < float(row[f"{side}_command_s"]), side
        for name in ("train", "command"):
            ratio = float(row[f"theirs_{name}_s"]) / float(row[f"ours_{name}_s"])
            assert float(row[f"times_{name}"]) == pytest.approx(ratio, rel=0.05)
    assert rows[0]["ours_miou"] != rows[1]["ours_miou"], "the seed reaches our side"
    assert rows[0]["theirs_loss"] != rows[1]["theirs_loss"], "the seed reaches the other side"


def test_settings_are_checked():
    for wrong in ({"seeds": []}, {"ways": []}, {"ranks": 0}, {"trial": 3}):
        with pytest.raises(ConfigError, match=r"trainers\.steps, ranks"):
            trainers.TrainersBench(**wrong)
    with pytest.raises(ConfigError, match=r"trainers\.ways has '2'; write processes\+workers"):
        trainers.TrainersBench(ways=["2"])
