"""Names of other people's files <-> ours, against tables written out here."""

import pytest
import torch
from model_files import hf_config
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from segformer.errors import CheckpointError
from segformer.models.segformer import MiTClassifier, build_encoder, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.key_maps import KeyFormat, detect, from_ours, to_ours

BOTH = ("weight", "bias")
OUT = "attn.attn.out_proj"
# Written out here: what each repository calls a module, with s = stage 1..4, i = s - 1, j = block.
NAMES = {
    "embed": ("patch_embed{s}.proj", "patch_embeddings.{i}.proj", "{i}.0.projection"),
    "embed norm": ("patch_embed{s}.norm", "patch_embeddings.{i}.layer_norm", "{i}.0.norm"),
    "stage norm": ("norm{s}", "layer_norm.{i}", "{i}.2"),
    "norm1": ("block{s}.{j}.norm1", "block.{i}.{j}.layer_norm_1", "{i}.1.{j}.norm1"),
    "norm2": ("block{s}.{j}.norm2", "block.{i}.{j}.layer_norm_2", "{i}.1.{j}.norm2"),
    "q": ("block{s}.{j}.attn.q", "block.{i}.{j}.attention.self.query", "{i}.1.{j}.attn.attn.in_proj"),
    "k": ("block{s}.{j}.attn.kv", "block.{i}.{j}.attention.self.key", "{i}.1.{j}.attn.attn.in_proj"),
    "v": ("block{s}.{j}.attn.kv", "block.{i}.{j}.attention.self.value", "{i}.1.{j}.attn.attn.in_proj"),
    "proj": (
        "block{s}.{j}.attn.proj",
        "block.{i}.{j}.attention.output.dense",
        "{i}.1.{j}.attn.attn.out_proj",
    ),
    "sr": ("block{s}.{j}.attn.sr", "block.{i}.{j}.attention.self.sr", "{i}.1.{j}.attn.sr"),
    "sr norm": ("block{s}.{j}.attn.norm", "block.{i}.{j}.attention.self.layer_norm", "{i}.1.{j}.attn.norm"),
    "fc1": ("block{s}.{j}.mlp.fc1", "block.{i}.{j}.mlp.dense1", "{i}.1.{j}.ffn.layers.0"),
    "dw": ("block{s}.{j}.mlp.dwconv.dwconv", "block.{i}.{j}.mlp.dwconv.dwconv", "{i}.1.{j}.ffn.layers.1"),
    "fc2": ("block{s}.{j}.mlp.fc2", "block.{i}.{j}.mlp.dense2", "{i}.1.{j}.ffn.layers.4"),
}


def encoder(variant: str, column: int, prefix: str = "") -> set[str]:
    """Names of all tensors of the encoder: nvlabs (column 0), hf (1) or mmseg (2)."""
    names = set()
    for what, columns in NAMES.items():
        for s, depth in enumerate(VARIANTS[variant].depths, start=1):
            if what.startswith("sr") and s == 4:
                continue
            for j in range(depth if "{j}" in columns[0] else 1):
                module = columns[column].format(s=s, i=s - 1, j=j)
                names |= {f"{prefix}{module}.{p}".replace("in_proj.", "in_proj_") for p in BOTH}
    return names


def head(linear: list[str], conv: str, norm: str, predictor: str) -> set[str]:
    names = {f"{module}.{p}" for module in (*linear, norm, predictor) for p in BOTH}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return names | {f"{conv}.weight"} | {f"{norm}.{b}" for b in buffers}


NVLABS_HEAD = head(
    [f"decode_head.linear_c{s}.proj" for s in (1, 2, 3, 4)],
    "decode_head.linear_fuse.conv",
    "decode_head.linear_fuse.bn",
    "decode_head.linear_pred",
)
HF_HEAD = head(
    [f"decode_head.linear_c.{i}.proj" for i in range(4)],
    "decode_head.linear_fuse",
    "decode_head.batch_norm",
    "decode_head.classifier",
)
SMP_HEAD = head(
    [f"decoder.mlp_stage.{i}.linear" for i in range(4)],
    "decoder.fuse_stage.0",
    "decoder.fuse_stage.1",
    "segmentation_head.0",
)


def meta_state(variant: str, kind: str = "segmentation") -> dict[str, Tensor]:
    """Our names and shapes without memory."""
    with torch.device("meta"):
        if kind == "classification":
            return MiTClassifier(build_encoder(ModelConfig(variant=variant)), 10).state_dict()
        state = build_model(ModelConfig(variant=variant), 5).state_dict()
    return {k: v for k, v in state.items() if kind == "segmentation" or k.startswith("backbone.")}


CLASSIFIER = {"classifier.weight", "classifier.bias"}
CASES = {
    "nvlabs": (lambda v: encoder(v, 0, "backbone.") | NVLABS_HEAD, "segmentation", False),
    "nvlabs classifier": (lambda v: encoder(v, 0) | {"head.weight", "head.bias"}, "classification", True),
    "hf": (lambda v: encoder(v, 1, "segformer.encoder.") | HF_HEAD, "segmentation", False),
    "hf classifier": (
        lambda v: encoder(v, 1, "segformer.encoder.") | CLASSIFIER,
        "classification",
        False,
    ),
    "hf encoder": (lambda v: encoder(v, 1, "encoder."), "encoder", True),
    "smp": (lambda v: encoder(v, 0, "encoder.") | SMP_HEAD, "segmentation", False),
    "mmseg": (lambda v: encoder(v, 2, "backbone.layers."), "encoder", False),
    "mmseg bare": (lambda v: encoder(v, 2, "layers."), "encoder", True),
}


@pytest.mark.parametrize("variant", ["b0", "b2", "b5", "b5_w4"])
@pytest.mark.parametrize("case", CASES)
def test_every_name_is_that_of_the_format_and_comes_back(case: str, variant: str) -> None:
    names, kind, bare = CASES[case]
    naming = KeyFormat(format=case.split()[0], bare=bare)
    state = meta_state(variant, kind)
    theirs = from_ours(state, naming.format, bare=bare)
    assert theirs.keys() == names(variant)
    assert detect(theirs) == naming
    back, dropped = to_ours(theirs, naming)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    assert dropped == []


def test_names_of_a_live_transformers_model_are_read_and_give_ours() -> None:
    with torch.device("meta"):
        live = SegformerForSemanticSegmentation(hf_config("b2", 5)).state_dict()
    naming = detect(live)
    back, _ = to_ours(live, naming)
    assert naming == KeyFormat(format="hf5")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in meta_state("b2").items()}


@pytest.mark.parametrize(
    ("format_", "dead"),
    [("nvlabs", "decode_head.conv_seg.weight"), ("smp", "classification_head.3.weight")],
)
def test_parameters_that_compute_nothing_are_dropped_and_named(format_: str, dead: str) -> None:
    theirs = from_ours(meta_state("b0"), format_) | {dead: torch.empty(5, 128)}
    ours, dropped = to_ours(theirs, detect(theirs))
    assert dropped == [dead]
    assert ours.keys() == meta_state("b0").keys()


def test_names_without_a_place_are_refused_and_the_first_ones_named() -> None:
    theirs = from_ours(meta_state("b0"), "hf")
    extra = {f"neck.{i}.weight": torch.zeros(1) for i in range(9)}
    message = (
        r"9 of \d+ tensors have no place in a SegFormer of Hugging Face names: neck\.0\.weight.*and 3 more"
    )
    with pytest.raises(CheckpointError, match=message):
        to_ours(theirs | extra, detect(theirs))


@pytest.mark.parametrize(("gone", "left"), [("value", "key"), ("key", "value")])
def test_half_a_pair_is_refused_and_named(gone: str, left: str) -> None:
    theirs = from_ours(meta_state("b0"), "hf")
    del theirs[f"segformer.encoder.block.0.1.attention.self.{gone}.bias"]
    with pytest.raises(
        CheckpointError, match=rf"block1\.1\.attn\.kv\.bias: the file has only the {left} half"
    ):
        to_ours(theirs, detect(theirs))


def test_halves_of_unequal_size_are_refused_though_their_sum_would_fit() -> None:
    theirs = from_ours(meta_state("b0"), "hf")
    prefix = "segformer.encoder.block.0.1.attention.self."
    theirs[f"{prefix}key.weight"] = torch.zeros(31, 32)
    theirs[f"{prefix}value.weight"] = torch.zeros(33, 32)
    with pytest.raises(CheckpointError, match=r"halves of shapes \(31, 32\) and \(33, 32\) don't fit"):
        to_ours(theirs, detect(theirs))


def test_an_in_proj_that_is_not_three_parts_is_refused() -> None:
    theirs = from_ours(meta_state("b0", "encoder"), "mmseg")
    theirs["backbone.layers.0.1.0.attn.attn.in_proj_bias"] = torch.zeros(95)
    with pytest.raises(CheckpointError, match=r"in_proj_bias of shape \(95,\) is not three equal parts"):
        to_ours(theirs, detect(theirs))


@pytest.mark.parametrize(
    "names",
    [
        ["conv1.weight", "layer1.0.conv1.weight", "fc.bias"],
        ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"],
        ["head.weight", "head.bias"],
        ["net.blocks.0.norm1.weight", "net.blocks.0.mlp.fc1.weight", "net.patch_embed.proj.weight"],
        ["model.encoder.layer_norm.weight", "model.head.weight"],
    ],
    ids=["resnet", "vit", "head only", "vit behind a prefix", "bert behind a prefix"],
)
def test_names_of_another_network_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"none of its {len(names)} tensors has a name of a SegFormer"):
        detect(names)


def test_a_format_without_a_place_for_a_tensor_refuses_it_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"no Hugging Face SegFormer has: neck\.weight"):
        from_ours({"neck.weight": torch.zeros(1)}, "hf")
    with pytest.raises(CheckpointError, match=r"no mmsegmentation SegFormer has: decode_head"):
        from_ours(meta_state("b0"), "mmseg")
