"""Whole models of mmsegmentation 1.2.2: their head is another function, under names of its own."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_files import NAMES, State, mmseg_names, same

from segformer.errors import CheckpointError, ConfigError
from segformer.inference.convert import ConvertConfig, convert
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import write_hf, write_pth

DIMS = (32, 64, 160, 256)


@pytest.fixture(scope="module")
def theirs(state: State) -> State:
    """The state dict of mmseg's SegFormer B0 for 3 classes, with random weights and statistics."""
    generator = torch.Generator().manual_seed(3)

    def conv_module(name: str, channels: int) -> State:
        weight = torch.randn(256, channels, 1, 1, generator=generator) / channels**0.5
        bn = {key: torch.randn(256, generator=generator) for key in ("weight", "bias", "running_mean")}
        bn["running_var"] = torch.rand(256, generator=generator) + 0.5
        bn["num_batches_tracked"] = torch.tensor(160_000)
        return {f"{name}.conv.weight": weight} | {f"{name}.bn.{key}": value for key, value in bn.items()}

    head = {
        "conv_seg.weight": torch.randn(3, 256, 1, 1, generator=generator) / 16,
        "conv_seg.bias": torch.randn(3, generator=generator),
    }
    for index, channels in enumerate(DIMS):
        head |= conv_module(f"convs.{index}", channels)
    head |= conv_module("fusion_conv", 4 * 256)
    encoder = {f"backbone.{name}": tensor for name, tensor in mmseg_names(state).items()}
    return encoder | {f"decode_head.{name}": tensor for name, tensor in head.items()}


@pytest.fixture(scope="module")
def file(theirs: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmseg") / "segformer_mit-b0.pth"
    meta = {"dataset_meta": {"classes": NAMES, "palette": [[0, 0, 0], [1, 2, 3], [4, 5, 6]]}}
    torch.save({"state_dict": theirs, "meta": meta, "message_hub": {}}, path)
    return path


def restated(state: State, maps: list[torch.Tensor]) -> torch.Tensor:
    """SegformerHead of mmseg in eval mode: ConvModules, resizes, concatenation from the first stage on."""

    def conv_module(name: str, x: torch.Tensor) -> torch.Tensor:
        bn = [state[f"decode_head.{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(F.conv2d(x, state[f"decode_head.{name}.conv.weight"]), *bn, eps=1e-5))

    levels = [
        F.interpolate(conv_module(f"convs.{i}", x), maps[0].shape[2:], mode="bilinear", align_corners=False)
        for i, x in enumerate(maps)
    ]
    hidden = conv_module("fusion_conv", torch.cat(levels, dim=1))
    return F.conv2d(hidden, state["decode_head.conv_seg.weight"], state["decode_head.conv_seg.bias"])


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_the_logits_of_a_whole_model_are_those_of_the_head_as_mmseg_writes_it(
    theirs: State, file: Path, ops: str
) -> None:
    model = SegFormer.from_pretrained(file, ops=ops)
    for size in ((64, 96), (66, 53)):
        images = torch.randn(2, 3, *size)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(
                    model(images), restated(theirs, model.backbone(images)), atol=1e-5, rtol=1e-5
                )


def test_a_whole_model_comes_back_bit_for_bit_through_an_export_of_ours(
    theirs: State, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertConfig(checkpoint=str(file), output=str(tmp_path / "ours")))
    printed = capsys.readouterr().out
    assert "b0, segmentation, 3 classes, decoder_dim 256, head of mmsegmentation" in printed
    assert "transformers has no such network and can't run this export" in printed
    assert "use        model.head=mmseg model.pretrained=" in printed
    convert(ConvertConfig(checkpoint=str(tmp_path / "ours"), output=str(tmp_path / "back.pth"), to="mmseg"))
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], theirs)
    weights = read_weights(tmp_path / "back.pth")
    assert (weights.format, weights.arch.norm_profile, weights.metadata.classes) == ("mmseg", "mmseg", NAMES)
    assert weights.config().head == "mmseg"
    assert weights.config().decoder_dim is None


def test_what_transformers_and_others_have_no_head_for_is_said_and_refused(
    file: Path, tmp_path: Path
) -> None:
    SegFormer.from_pretrained(file).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config.keys() == {"segformer"}  # nothing that transformers takes for a model of its own
    assert config["segformer"]["head"] == "mmseg"
    assert config["segformer"]["exact_in_transformers"] is False
    assert config["segformer"]["note"].startswith("segformer alone runs it")
    weights = read_weights(file)
    message = "can't hold the head of this model.*its decode head is another network.*encoder_only=true"
    with pytest.raises(ConfigError, match=message):
        write_hf(weights, tmp_path / "hf")
    for format_ in ("nvlabs", "smp"):
        with pytest.raises(ConfigError, match=message):
            write_pth(weights, tmp_path / "x.pth", format_)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_training_starts_from_the_head_where_it_is_asked_for(theirs: State, file: Path) -> None:
    kept = build_model(ModelConfig(head="mmseg", pretrained=str(file)), 3)
    assert torch.equal(
        kept.state_dict()["decode_head.conv_seg.weight"], theirs["decode_head.conv_seg.weight"]
    )
    assert "encoder and head; LayerNorm" in kept.pretrained
    other = build_model(ModelConfig(pretrained=str(file)), 3)
    assert "the head, which is that of model.head=mmseg there, is new, for 3 classes" in other.pretrained
    mapped = SegFormer.from_pretrained(file, class_map={0: 2, 1: None})
    assert mapped.num_classes == 2
    assert torch.equal(mapped.decode_head.conv_seg.bias[0], theirs["decode_head.conv_seg.bias"][2])


def test_other_heads_of_mmseg_are_refused_and_their_encoder_taken(
    theirs: State, file: Path, tmp_path: Path
) -> None:
    auxiliary = {"auxiliary_head.conv_seg.weight": torch.ones(3, 8, 1, 1)}
    torch.save(theirs | auxiliary, tmp_path / "auxiliary.pth")
    assert read_weights(tmp_path / "auxiliary.pth").dropped == [*auxiliary]
    head = {"decode_head.psp_modules.0.1.conv.weight": torch.ones(3, 3, 1, 1)}
    torch.save(theirs | head, tmp_path / "uper.pth")
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors have no place.*encoder_only=true"):
        read_weights(tmp_path / "uper.pth")
    encoder = read_weights(tmp_path / "uper.pth", encoder_only=True)
    assert (encoder.arch.kind, encoder.arch.head) == ("encoder", "segformer")
    assert [*head] == [name for name in encoder.dropped if "psp" in name]
    assert same(encoder.state, read_weights(file).encoder().state)


def test_counters_that_are_missing_are_zero(theirs: State, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert sum(name.endswith("num_batches_tracked") for name in weights.state) == 5
    assert "convs.0.bn.num_batches_tracked" in weights.notes[0]
    SegFormer.from_pretrained(tmp_path / "x.pth")
