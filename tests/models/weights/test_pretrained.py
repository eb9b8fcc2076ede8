"""SegFormer.from_pretrained, save_pretrained and model.pretrained, over the formats that users own."""

import json
from pathlib import Path

import pytest
import torch
from model_files import randomize, same
from torch import nn

from segformer.errors import CheckpointError, ConfigError
from segformer.models.layers import DropPath
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import write_export, write_hf, write_pth


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet classifier as NVlabs writes it."""
    torch.manual_seed(1)
    state = randomize(MiTClassifier(build_encoder(ModelConfig()), 10).state_dict())
    path = tmp_path_factory.mktemp("mit") / "mit_b0.pth"
    names = {"CLASSES": [f"thing {k}" for k in range(10)]}
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state, "meta": names}, path)
    return path


def test_the_epsilons_can_be_chosen(hf: Path) -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (SegFormer.from_pretrained(hf, norm_profile=p)(images) for p in ("hf", "original"))
    assert not torch.equal(first, second)


def test_what_is_saved_comes_back_bit_for_bit_with_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = build_model(ModelConfig(norm_profile="mmseg", decoder_dim=64), 4).eval()
    randomize(model.state_dict())
    model.save_pretrained(tmp_path / "model")
    back = SegFormer.from_pretrained(tmp_path / "model")
    assert same(model.state_dict(), back.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), back(images))


def test_a_class_map_moves_rows_and_keeps_everything_else(hf: Path) -> None:
    whole = SegFormer.from_pretrained(hf).state_dict()
    model = SegFormer.from_pretrained(hf, class_map={"auto": "car", "new": None, "roof": 0}, num_classes=3)
    for name, tensor in model.state_dict().items():
        if name.startswith("decode_head.linear_pred."):
            assert torch.equal(tensor[0], whole[name][2])
            assert torch.equal(tensor[2], whole[name][0])
            assert not torch.equal(tensor[1], whole[name][1])
        else:
            assert torch.equal(tensor, whole[name]), name
    assert model.metadata.classes == ["auto", "new", "roof"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 19}, r"has 3 classes, num_classes=19; give class_map, such as \{k: None"),
        ({"num_classes": 2, "class_map": {0: 1}}, "has 1 classes, num_classes=2"),
        ({"class_map": {0: "tree"}}, "the file has no class 'tree'"),
        ({"encoder_only": True}, "has no segmentation head; give num_classes"),
        ({"encoder_only": True, "class_map": {0: 0}}, "has no segmentation head"),
        ({"ops": "fast"}, "model.ops=fast is unknown"),
        ({"norm_profile": "batch"}, "norm_profile=batch is unknown"),
    ],
)
def test_options_that_do_not_fit_are_refused(hf: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegFormer.from_pretrained(hf, **options)


def test_an_encoder_gets_a_fresh_head_of_the_classes_asked_for(encoder: Path) -> None:
    with pytest.raises(ConfigError, match="give num_classes for a fresh one"):
        SegFormer.from_pretrained(encoder)
    model = SegFormer.from_pretrained(encoder, num_classes=6)
    wanted = read_weights(encoder).state
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, wanted[f"backbone.{name}"])
    assert (model.num_classes, model.metadata) == (6, Metadata())


def test_a_segmentation_model_is_no_classifier(hf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no classifier \(segmentation\)"):
        MiTClassifier.from_pretrained(hf)


def test_pretrained_takes_every_format_and_says_what_it_loaded(
    hf: Path, encoder: Path, tmp_path: Path
) -> None:
    weights = read_weights(hf)
    write_export(weights, tmp_path / "ours")
    write_pth(weights, tmp_path / "nvlabs.pth", "nvlabs")
    write_pth(weights, tmp_path / "smp.pth", "smp")
    write_pth(weights.encoder(), tmp_path / "mmseg.pth", "mmseg")
    said = {}
    whole = [hf, hf / "model.safetensors", *(tmp_path / name for name in ("ours", "nvlabs.pth", "smp.pth"))]
    for path in (*whole, tmp_path / "mmseg.pth", encoder):
        torch.manual_seed(5)
        expected = build_model(ModelConfig(), 3).state_dict()
        found = read_weights(path).state
        expected |= {name: t for name, t in found.items() if path in whole or name.startswith("backbone.")}
        torch.manual_seed(5)
        model = build_model(ModelConfig(pretrained=str(path)), 3)
        assert same(model.state_dict(), expected)
        said[path] = model.pretrained
    epsilons = "; LayerNorm epsilons are those of original, the weights had those of hf"
    assert said[hf] == f"b0 of {hf} (Hugging Face): encoder and head{epsilons}"
    assert build_model(ModelConfig(pretrained=str(hf), norm_profile="hf"), 3).pretrained.endswith("and head")
    assert said[encoder] == f"b0 of {encoder} (NVlabs): encoder; the head is new, for 3 classes"
    other = build_model(ModelConfig(pretrained=str(hf)), 7)
    assert "encoder; the head, which has 3 classes there, is new, for 7 classes" in other.pretrained
    assert build_model(ModelConfig(), 3).pretrained == ""


@pytest.mark.parametrize(
    ("cfg", "changes", "message"),
    [
        ({"variant": "b1"}, {}, "is b0, this model is b1; use model=b0 or other weights"),
        ({"decoder_dim": 64}, {}, "of another shape: decode_head.*check model.variant and model.decoder_dim"),
        ({}, {"backbone.norm3.bias": None}, r"which is b0, does not fit.*1 missing: backbone\.norm3\.bias"),
        ({}, {"backbone.norm3.bias": torch.zeros(3)}, r"1 of another shape: backbone\.norm3\.bias \(3,\)"),
    ],
)
def test_weights_of_another_architecture_are_refused_by_name(
    hf: Path, tmp_path: Path, cfg: dict, changes: dict, message: str
) -> None:
    state = read_weights(hf).state | changes
    torch.save({name: t for name, t in state.items() if t is not None}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        build_model(ModelConfig(pretrained=str(tmp_path / "x.pth"), **cfg), 3)


def rate_of(backbone: nn.Module) -> float:
    return max(module.rate for module in backbone.modules() if isinstance(module, DropPath))


def test_a_model_keeps_its_metadata_and_its_rates_of_dropping(tmp_path: Path) -> None:
    colors = [[1, 2, 3]] * 3
    metadata = Metadata(classes=list("abc"), palette=colors, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    cfg = ModelConfig(dropout=0.3, drop_path_rate=0.23)
    build_model(cfg, 3).save_pretrained(tmp_path / "a", metadata)
    SegFormer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert read_weights(tmp_path / "b").metadata == metadata
    for name in "ab":
        model = SegFormer.from_pretrained(tmp_path / name)
        assert model.decode_head.dropout == 0.3
        assert rate_of(model.backbone) == pytest.approx(0.23)
    write_hf(read_weights(tmp_path / "b"), tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert (config["classifier_dropout_prob"], config["drop_path_rate"]) == (0.3, 0.23)


@pytest.mark.parametrize("rate", [None, True, "0.2", 1.0])
def test_a_rate_that_is_none_is_left_to_the_default(hf: Path, tmp_path: Path, rate: object) -> None:
    write_export(read_weights(hf), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "drop_path_rate": rate}))
    assert read_weights(tmp_path).config().drop_path_rate == 0.1
