"""The seam of backbones: another encoder trains, is saved, loaded and used without a change elsewhere."""

import pytest
import torch
from convnext import ROW, SIZE
from torch.utils.flop_counter import FlopCounterMode

from segformer.data.loading.order import BatchShape
from segformer.doctor.memory import forecast
from segformer.errors import CheckpointError
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.export import open_checkpoint
from segformer.inference.predictor import Predictor
from segformer.models.encoders import BACKBONES
from segformer.models.macs import macs_per_image
from segformer.models.segformer import MiTClassifier, SegFormer, build_classifier, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.training.config import RunConfig
from segformer.training.optim import OptimConfig, freeze_stages, parameter_groups


@pytest.fixture(autouse=True)
def another_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, *ROW)
    monkeypatch.setitem(VARIANTS, *SIZE)


def test_it_trains_by_the_command_and_its_run_and_export_are_used(tiny, run_ranks, tmp_path, root) -> None:
    steps = ("model.variant=pico", "steps=3", "optim.layer_decay=0.8", "optim.frozen_stages=1", "overlays=0")
    (output,) = run_ranks(1, str(root / "tests/convnext.py"), *tiny("pico", *steps))
    assert "ConvNeXt-PICO" in output
    run = tmp_path / "pico"
    models = [SegFormer.from_pretrained(path).state_dict() for path in (run, run / "export")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    mask = Predictor(run / "export")(torch.randint(256, (3, 50, 70), dtype=torch.uint8)).mask
    assert mask.shape == (50, 70)
    assert open_checkpoint(run).provenance["step"] == 3


def test_its_classifier_is_saved_and_its_encoder_starts_a_segmentation(tmp_path) -> None:
    classifier = build_classifier(ModelConfig(variant="pico"), 5)
    classifier.save_pretrained(tmp_path / "saved")
    loaded = MiTClassifier.from_pretrained(tmp_path / "saved")
    model = build_model(ModelConfig(variant="pico", pretrained=str(tmp_path / "saved")), 3)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert name.startswith("head.") or torch.equal(tensor, model.state_dict()[name])
    with pytest.raises(CheckpointError, match="tensors that no Hugging Face SegFormer has"):
        convert(ConvertConfig(checkpoint=str(tmp_path / "saved"), output=str(tmp_path / "hf"), to="hf"))


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


def test_operations_and_memory_are_known() -> None:
    cfg = ModelConfig(variant="pico", ops="reference")
    with torch.device("meta"):
        model = build_model(cfg, 3).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 90, 70, device="meta"))
    assert 2 * macs_per_image(cfg, (90, 70), 3) == counter.get_total_flops()
    expected = 4 * sum(p.numel() for p in model.parameters())
    assert forecast(RunConfig(model=cfg), 3, BatchShape(2, 2, 1))["parameters"] == expected
