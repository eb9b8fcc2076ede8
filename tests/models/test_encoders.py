"""The seam of backbones: another encoder trains, is saved, loaded and used without a change elsewhere."""

import pytest
import torch
from convnext import ROW, SIZE
from torch.utils.flop_counter import FlopCounterMode

from segformer.doctor.memory import forecast
from segformer.models.encoders import BACKBONES
from segformer.models.macs import macs_per_image
from segformer.models.segformer import build_model, initialize
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.training.optim import OptimConfig, freeze_stages, parameter_groups


@pytest.fixture(autouse=True)
def another_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, *ROW)
    monkeypatch.setitem(VARIANTS, *SIZE)


def test_layers_and_frozen_stages_are_those_that_it_names() -> None:
    model = build_model(ModelConfig(variant="pico"), 3)
    freeze_stages(model, 2)
    groups = parameter_groups(model, OptimConfig(lr=1.0, head_lr_factor=1.0, layer_decay=0.5))
    lr = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    backbone = model.backbone
    assert lr[id(model.decode_head.linear_pred.weight)] == 1
    assert lr[id(backbone.norms[3].weight)] == lr[id(backbone.blocks[3][0].gamma)] == 0.5
    assert lr[id(backbone.embeds[3].proj.weight)] == lr[id(backbone.blocks[2][1].gamma)] == 0.25
    assert lr[id(backbone.embeds[2].proj.weight)] == 0.5**4
    frozen = [name for name, parameter in model.named_parameters() if id(parameter) not in lr]
    assert {name.split(".")[2] for name in frozen} == {"0", "1"}


def test_operations_and_memory_are_known_and_a_meta_model_is_initialized() -> None:
    cfg = ModelConfig(variant="pico", ops="reference")
    with torch.device("meta"):
        model = build_model(cfg, 3).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 90, 70, device="meta"))
    assert 2 * macs_per_image(cfg, (90, 70), 3) == counter.get_total_flops()
    initialize(model)
    assert all(tensor.isfinite().all() for tensor in model(torch.randn(1, 3, 90, 70)))
    plan = {"crop": (64, 64), "micro_batch": 2, "world_size": 1, "zero_stage": 0, "precision": "fp32"}
    assert forecast(cfg, 3, **plan).num_parameters == sum(p.numel() for p in model.parameters())
