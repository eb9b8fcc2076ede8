"""Files of every format: what is found in them, and that tensors come back bit for bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import NAMES, State, bare, bundle, hf_config, mmseg_names, randomize, same
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SegformerModel,
)

from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.bundle import Arch, Metadata, find_arch
from segformer.models.weights.key_maps import ALIGNED
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import write_export, write_hf, write_pth


def logits(path: Path) -> Callable[[Tensor], Tensor]:
    model, info = SegformerForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    return lambda images: model.eval()(images).logits


def test_hugging_face_there_and_back_is_bit_identical_with_the_same_logits(hf: Path, tmp_path: Path) -> None:
    weights = read_weights(hf)
    assert (weights.format, weights.metadata.classes) == ("hf", NAMES)
    assert weights.arch == Arch(
        variant="b0", kind="segmentation", num_classes=3, decoder_dim=256, norm_profile="hf"
    )
    write_hf(weights, tmp_path / "back")
    assert same(load_file(hf / "model.safetensors"), load_file(tmp_path / "back/model.safetensors"))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "back")(images), logits(hf)(images))


def test_a_directory_says_classes_and_normalization_to_transformers(hf: Path, tmp_path: Path) -> None:
    weights = read_weights(hf)
    weights.metadata.mean, weights.metadata.std = [127.5, 100.0, 51.0], [51.0, 63.75, 127.5]
    write_hf(weights, tmp_path / "back")
    assert SegformerConfig.from_pretrained(tmp_path / "back").id2label == dict(enumerate(NAMES))
    assert json.loads((tmp_path / "back/preprocessor_config.json").read_text())["image_mean"][0] == 0.5
    assert read_weights(tmp_path / "back").metadata == weights.metadata
    try:
        processor = SegformerImageProcessorPil.from_pretrained(tmp_path / "back")
    except ImportError:
        pytest.skip("the rest passed; this transformers needs torchvision to prepare images, 5.23 does not")
    assert processor.image_std == (0.2, 0.25, 0.5)


@pytest.mark.parametrize(
    ("network", "kind"),
    [(SegformerForImageClassification, "classification"), (SegformerModel, "encoder")],
)
def test_classifiers_and_bare_encoders_come_back_to_transformers(
    network: type, kind: str, tmp_path: Path
) -> None:
    model = network(hf_config(classes=10)).eval()
    randomize(model.state_dict())
    model.save_pretrained(tmp_path / "there")
    weights = read_weights(tmp_path / "there")
    assert (weights.arch.kind, weights.metadata.classes) == (kind, [])
    write_hf(weights, tmp_path / "back")
    there, back = (load_file(tmp_path / place / "model.safetensors") for place in ("there", "back"))
    assert same(there, back)
    _, info = network.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    if kind == "classification":
        ours = MiTClassifier.from_pretrained(tmp_path / "there")
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), model(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["shards", "bin", "bin shards"])
def test_the_same_model_is_read_from_every_layout_of_transformers(
    hf: Path, tmp_path: Path, layout: str
) -> None:
    whole = load_file(hf / "model.safetensors")
    if layout == "shards":
        model = SegformerForSemanticSegmentation.from_pretrained(hf)
        model.save_pretrained(tmp_path, max_shard_size="4MB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
        torch.save(whole, tmp_path / "pytorch_model.bin")
    if layout == "bin shards":
        (tmp_path / "pytorch_model.bin").unlink()
        files = [f"pytorch_model-0000{k + 1}-of-00002.bin" for k in range(2)]
        weight_map = {name: files[index % 2] for index, name in enumerate(whole)}
        for file in files:
            torch.save({n: t for n, t in whole.items() if weight_map[n] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = read_weights(tmp_path)
    assert same(weights.state, read_weights(hf).state)
    assert (weights.arch.norm_profile, weights.metadata.classes) == ("hf", NAMES)


@pytest.mark.parametrize(("wrapper", "legacy"), [("", True), ("module.", False)])
def test_nvlabs_there_and_back_is_bit_identical_without_the_dead_parameter(
    state: State, tmp_path: Path, wrapper: str, legacy: bool
) -> None:
    dead = {
        "decode_head.conv_seg.weight": torch.ones(3, 128, 1, 1),
        "decode_head.conv_seg.bias": torch.ones(3),
    }
    shuffled = list((state | dead).items())
    random.Random(0).shuffle(shuffled)
    meta = {"CLASSES": tuple(NAMES), "PALETTE": [[0, 0, 0], [1, 2, 3], [4, 5, 6]], "epoch": 16}
    content = {"meta": meta, "state_dict": {wrapper + k: v for k, v in shuffled}, "optimizer": {"step": [1]}}
    torch.save(content, tmp_path / "there.pth", _use_new_zipfile_serialization=not legacy)
    weights = read_weights(tmp_path / "there.pth")
    assert (weights.format, weights.arch.norm_profile) == ("nvlabs", "original")
    assert weights.metadata == Metadata(classes=NAMES, palette=[[0, 0, 0], [1, 2, 3], [4, 5, 6]])
    assert sorted(weights.dropped) == sorted(wrapper + name for name in dead)
    write_pth(weights, tmp_path / "back.pth", "nvlabs")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same(back["state_dict"], state)
    assert back["meta"]["CLASSES"] == NAMES


def test_an_imagenet_encoder_of_nvlabs_comes_back_under_its_bare_names(tmp_path: Path) -> None:
    torch.manual_seed(2)
    full = MiTClassifier(build_encoder(ModelConfig()), 7).state_dict()
    theirs = {name.removeprefix("backbone."): tensor for name, tensor in full.items()}
    torch.save(theirs, tmp_path / "mit_b0.pth")
    weights = read_weights(tmp_path / "mit_b0.pth")
    assert (weights.arch.kind, weights.arch.num_classes) == ("classification", 7)
    write_pth(weights, tmp_path / "back.pth", "nvlabs")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], theirs)
    encoder = read_weights(tmp_path / "mit_b0.pth", encoder_only=True)
    assert sorted(encoder.dropped) == ["head.bias", "head.weight"]
    assert encoder.arch.kind == "encoder"


def smp_names(state: State) -> State:
    """Written out here: what segmentation_models_pytorch calls the tensors."""
    head = {f"linear_c{s}.proj": f"decoder.mlp_stage.{4 - s}.linear" for s in (1, 2, 3, 4)}
    head |= {"linear_fuse.conv": "decoder.fuse_stage.0", "linear_fuse.bn": "decoder.fuse_stage.1"}
    head["linear_pred"] = "segmentation_head.0"
    out = {f"encoder.{name}": tensor for name, tensor in bare(state).items()}
    for name, tensor in bare(state, "decode_head.").items():
        module, _, parameter = name.rpartition(".")
        out[f"{head[module]}.{parameter}"] = tensor
    return out


def test_weights_of_smp_with_their_head_say_that_smp_enlarges_otherwise(state: State, tmp_path: Path) -> None:
    torch.save(smp_names(state), tmp_path / "smp.pth")
    with pytest.warns(UserWarning, match=r"smp\.pth: .* enlarges logits with align_corners=True"):
        SegFormer.from_pretrained(tmp_path / "smp.pth")
    assert build_model(ModelConfig(pretrained=str(tmp_path / "smp.pth")), 3).pretrained.endswith(ALIGNED)
    assert ALIGNED not in build_model(ModelConfig(pretrained=str(tmp_path / "smp.pth")), 4).pretrained


def test_smp_there_and_back_is_bit_identical_from_file_and_directory(state: State, tmp_path: Path) -> None:
    torch.save(smp_names(state), tmp_path / "there.pth")
    save_file(smp_names(state), tmp_path / "model.safetensors")
    config = {"_model_class": "Segformer", "encoder_name": "mit_b0", "classes": 3, "in_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place in (tmp_path / "there.pth", tmp_path):
        weights = read_weights(place)
        assert (weights.format, weights.arch.norm_profile) == ("smp", "original")
        assert same(weights.state, state)
        assert weights.notes == [ALIGNED]
    write_pth(weights, tmp_path / "back.pth", "smp")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), smp_names(state))


def test_an_mmseg_encoder_there_and_back_is_bit_identical(state: State, tmp_path: Path) -> None:
    torch.save(mmseg_names(state), tmp_path / "there.pth")
    weights = read_weights(tmp_path / "there.pth")
    assert (weights.format, weights.arch.norm_profile, weights.arch.kind) == ("mmseg", "mmseg", "encoder")
    assert same(bare(weights.state), bare(state))
    write_pth(weights, tmp_path / "back.pth", "mmseg")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert same(back, mmseg_names(state))


@pytest.mark.parametrize("profile", ["original", "hf", "mmseg"])
def test_an_export_keeps_everything_and_its_own_epsilons(state: State, tmp_path: Path, profile: str) -> None:
    metadata = Metadata(classes=NAMES, palette=[[1, 2, 3]] * 3, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    metadata.image_range = [0, 4095]
    write_export(bundle(state, profile, metadata), tmp_path / "export", step=7)
    back = read_weights(tmp_path / "export")
    assert (back.format, back.arch.norm_profile, back.metadata) == ("ours", profile, metadata)
    assert back.provenance == {"step": 7}
    assert same(back.state, state)
    lone = tmp_path / "weights.safetensors"
    lone.write_bytes((tmp_path / "export/model.safetensors").read_bytes())
    assert read_weights(lone).arch.norm_profile == profile
    write_pth(back, tmp_path / "nvlabs.pth", "nvlabs")
    again = read_weights(tmp_path / "nvlabs.pth")
    assert (again.format, again.arch.norm_profile, again.metadata) == ("nvlabs", profile, metadata)


def test_an_export_that_transformers_saved_again_is_read_as_theirs(state: State, tmp_path: Path) -> None:
    write_export(bundle(state, metadata=Metadata(classes=NAMES)), tmp_path / "export")
    tuned = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        tuned.decode_head.classifier.bias.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    back = read_weights(tmp_path / "tuned")
    assert (back.format, back.arch.norm_profile, back.metadata.classes) == ("hf", "hf", NAMES)
    bias = "decode_head.linear_pred.bias"
    assert torch.equal(back.state[bias], state[bias] + 1)


def test_half_precision_becomes_float32_without_loss_and_is_said(state: State, tmp_path: Path) -> None:
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    weights = read_weights(tmp_path / "half.pth")
    assert same(weights.state, {n: t.float() if t.is_floating_point() else t for n, t in half.items()})
    assert "bfloat16" in weights.notes[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sizes_of_every_variant_are_found(variant: str) -> None:
    with torch.device("meta"):
        state = build_model(ModelConfig(variant=variant, decoder_dim=128), 19).state_dict()
    assert find_arch(state) == Arch(variant=variant, kind="segmentation", num_classes=19, decoder_dim=128)
    assert bundle(state).config().decoder_dim == 128
