"""Operations of one image: as published, and as a counter finds them on the real model."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segformer.models.macs import macs_per_image, training_flops
from segformer.models.segformer import MiTClassifier, build_encoder, build_model
from segformer.models.variants import ModelConfig

# Multiply-accumulates in G at 512 x 512 with 150 classes (arXiv 2105.15203).
PUBLISHED = {"b0": 8.4, "b1": 15.9, "b2": 62.3, "b3": 79.0, "b4": 95.6, "b5": 111.5}


def counted(model, size):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_network_as_written_has_the_published_operations(variant):
    cfg = ModelConfig(variant=variant, ops="reference")
    assert macs_per_image(cfg, (512, 512), 150) / 1e9 == pytest.approx(PUBLISHED[variant], abs=0.05)


@pytest.mark.parametrize(
    "settings", [{}, {"decoder_dim": 96}, {"variant": "b2"}, {"variant": "b2", "head": "mmseg"}]
)
def test_a_counter_on_the_real_model_finds_the_same(settings):
    cfg = dataclasses.replace(ModelConfig(ops="reference"), **settings)
    with torch.device("meta"):
        model = build_model(cfg, 19)
    assert 2 * macs_per_image(cfg, (96, 160), 19) == counted(model, (96, 160))


@pytest.mark.parametrize("variant", ["b0", "b5"])
def test_a_counter_on_the_real_classifier_finds_the_same(variant):
    cfg = ModelConfig(variant=variant, ops="reference")
    with torch.device("meta"):
        model = MiTClassifier(build_encoder(cfg), 10)
    assert 2 * macs_per_image(cfg, (64, 96), 10, task="classification") == counted(model, (64, 96))


def test_the_folded_head_is_counted_as_what_it_does():
    folded, written = (macs_per_image(ModelConfig(variant="b2", ops=o), (512, 512), 150)
                       for o in ("fused", "reference"))  # fmt: skip
    assert 0.3 < folded / written < 0.4


def test_the_head_of_mmseg_fuses_each_stage_at_its_own_resolution():
    folded, written = (macs_per_image(ModelConfig(variant="b2", head="mmseg", ops=o), (512, 512), 150)
                       for o in ("fused", "reference"))  # fmt: skip
    assert written - folded == 256 * 256 * (4 * 128**2 - 128**2 - 64**2 - 32**2 - 16**2)


def test_training_takes_three_forwards_of_two_operations_each():
    cfg = ModelConfig()
    assert training_flops(cfg, (64, 64), 5) == 6 * macs_per_image(cfg, (64, 64), 5)


def test_an_unknown_task_is_a_mistake():
    with pytest.raises(ValueError, match="detection"):
        macs_per_image(ModelConfig(), (64, 64), 5, task="detection")
