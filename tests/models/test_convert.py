"""Names of Hugging Face files <-> ours."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

from segformer.errors import CheckpointError
from segformer.models.convert import from_hf, load_hf_directory, to_hf
from segformer.models.segformer import MiTClassifier, ModelConfig, build_encoder, build_model, load_strict

B0 = {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    SegformerForSemanticSegmentation(SegformerConfig(**B0, num_labels=3)).save_pretrained(path)
    return path, load_file(path / "model.safetensors")


def test_there_and_back_is_bit_identical(saved):
    _, state = saved
    back = to_hf(from_hf(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_our_names_are_those_of_the_original_repository(saved):
    ours = from_hf(saved[1])
    assert {
        "backbone.patch_embed1.proj.weight",
        "backbone.block1.0.attn.q.weight",
        "backbone.block3.1.attn.kv.bias",
        "backbone.block2.0.attn.sr.weight",
        "backbone.block4.1.mlp.dwconv.dwconv.bias",
        "backbone.norm4.weight",
        "decode_head.linear_c1.proj.weight",
        "decode_head.linear_fuse.conv.weight",
        "decode_head.linear_fuse.bn.running_var",
        "decode_head.linear_fuse.bn.num_batches_tracked",
        "decode_head.linear_pred.bias",
    } <= ours.keys()
    assert ours.keys() == build_model(ModelConfig(), 3).state_dict().keys()


def test_keys_are_the_first_rows_of_kv_and_values_the_last(saved):
    state = saved[1]
    prefix = "segformer.encoder.block.2.1.attention.self."
    kv = from_hf(state)["backbone.block3.1.attn.kv.weight"]
    assert torch.equal(kv[:160], state[prefix + "key.weight"])
    assert torch.equal(kv[160:], state[prefix + "value.weight"])


def test_an_export_under_hugging_face_names_loads_in_transformers_with_equal_logits(tmp_path):
    torch.manual_seed(0)
    ours = build_model(ModelConfig(norm_profile="hf"), 3).eval()
    SegformerConfig(**B0, num_labels=3).save_pretrained(tmp_path)
    save_file(to_hf(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=0)


def test_an_image_classifier_file_gives_the_same_scores_and_serves_as_pretrained_encoder(tmp_path):
    torch.manual_seed(0)
    theirs = SegformerForImageClassification(SegformerConfig(**B0, num_labels=10)).eval()
    theirs.save_pretrained(tmp_path)
    state, config = load_hf_directory(tmp_path)
    assert config["model_type"] == "segformer"
    ours = MiTClassifier(build_encoder(ModelConfig(norm_profile="hf")), num_classes=10).eval()
    load_strict(ours, state, source=str(tmp_path))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=0)
    model = build_model(ModelConfig(pretrained=str(tmp_path)), 4)
    assert torch.equal(model.backbone.norm4.weight, ours.backbone.norm4.weight)


def test_unknown_names_are_refused_and_named(saved):
    with pytest.raises(CheckpointError, match=r"2 of \d+ tensors have no place.*: a\.b, vit\.layer\.weight"):
        from_hf({**saved[1], "vit.layer.weight": torch.zeros(1), "a.b": torch.zeros(1)})


def test_a_key_without_its_value_is_refused_and_named(saved):
    state = dict(saved[1])
    del state["segformer.encoder.block.0.1.attention.self.value.bias"]
    with pytest.raises(CheckpointError, match=r"block1\.1\.attn\.kv\.bias: the file has only the key"):
        from_hf(state)


def test_names_that_hugging_face_has_not_are_refused():
    with pytest.raises(CheckpointError, match=r"no Hugging Face SegFormer has: neck\.weight"):
        to_hf({"neck.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "is no directory"),
        ("no config", "has no config.json"),
        ("bad config", "is not valid JSON"),
        ("list config", "holds a list, not an object"),
        ("no weights", "model.safetensors is missing"),
        ("truncated", "cannot be read as safetensors"),
    ],
)
def test_a_damaged_directory_is_one_clear_error(damage, message, saved, tmp_path):
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text({"bad config": "{", "list config": "[]"}.get(damage, "{}"), encoding="utf-8")
    content = (saved[0] / "model.safetensors").read_bytes()
    weights.write_bytes(content[:10_000] if damage == "truncated" else content)
    if damage == "no config":
        config.unlink()
    if damage == "no weights":
        weights.unlink()
    with pytest.raises(CheckpointError, match=message):
        load_hf_directory(tmp_path / "nowhere" if damage == "no folder" else tmp_path)
