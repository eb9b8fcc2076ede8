"""Names of other people's files <-> ours, against tables written out here."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segformer.errors import CheckpointError
from segformer.models.segformer import MiTClassifier, build_encoder, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.names import Naming, detect, from_ours, to_ours

BOTH = ("weight", "bias")
NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def parts(variant: str) -> Iterator[tuple[str, int, int]]:
    """(what, stage, block) of every module of the encoder."""
    for stage, depth in enumerate(VARIANTS[variant].depths, start=1):
        yield from ((what, stage, 0) for what in ("embed", "embed norm", "stage norm"))
        for block in range(depth):
            names = ["norm1", "norm2", "q", "k", "v", "proj", "fc1", "dw", "fc2"]
            yield from ((what, stage, block) for what in names + ["sr", "sr norm"] * (stage < 4))


def nvlabs(variant: str) -> set[str]:
    names = set()
    for what, s, j in parts(variant):
        module = {
            "embed": f"patch_embed{s}.proj",
            "embed norm": f"patch_embed{s}.norm",
            "stage norm": f"norm{s}",
            "norm1": f"block{s}.{j}.norm1",
            "norm2": f"block{s}.{j}.norm2",
            "q": f"block{s}.{j}.attn.q",
            "k": f"block{s}.{j}.attn.kv",
            "v": f"block{s}.{j}.attn.kv",
            "proj": f"block{s}.{j}.attn.proj",
            "sr": f"block{s}.{j}.attn.sr",
            "sr norm": f"block{s}.{j}.attn.norm",
            "fc1": f"block{s}.{j}.mlp.fc1",
            "dw": f"block{s}.{j}.mlp.dwconv.dwconv",
            "fc2": f"block{s}.{j}.mlp.fc2",
        }[what]
        names |= {f"{module}.{p}" for p in BOTH}
    return names


def hugging_face(variant: str) -> set[str]:
    names = set()
    for what, s, j in parts(variant):
        i = s - 1
        module = {
            "embed": f"patch_embeddings.{i}.proj",
            "embed norm": f"patch_embeddings.{i}.layer_norm",
            "stage norm": f"layer_norm.{i}",
            "norm1": f"block.{i}.{j}.layer_norm_1",
            "norm2": f"block.{i}.{j}.layer_norm_2",
            "q": f"block.{i}.{j}.attention.self.query",
            "k": f"block.{i}.{j}.attention.self.key",
            "v": f"block.{i}.{j}.attention.self.value",
            "proj": f"block.{i}.{j}.attention.output.dense",
            "sr": f"block.{i}.{j}.attention.self.sr",
            "sr norm": f"block.{i}.{j}.attention.self.layer_norm",
            "fc1": f"block.{i}.{j}.mlp.dense1",
            "dw": f"block.{i}.{j}.mlp.dwconv.dwconv",
            "fc2": f"block.{i}.{j}.mlp.dense2",
        }[what]
        names |= {f"encoder.{module}.{p}" for p in BOTH}
    return names


def mmseg(variant: str) -> set[str]:
    names = set()
    for what, s, j in parts(variant):
        i = s - 1
        if what in ("q", "k", "v"):
            names |= {f"layers.{i}.1.{j}.attn.attn.in_proj_{p}" for p in BOTH}
            continue
        module = {
            "embed": f"{i}.0.projection",
            "embed norm": f"{i}.0.norm",
            "stage norm": f"{i}.2",
            "norm1": f"{i}.1.{j}.norm1",
            "norm2": f"{i}.1.{j}.norm2",
            "proj": f"{i}.1.{j}.attn.attn.out_proj",
            "sr": f"{i}.1.{j}.attn.sr",
            "sr norm": f"{i}.1.{j}.attn.norm",
            "fc1": f"{i}.1.{j}.ffn.layers.0",
            "dw": f"{i}.1.{j}.ffn.layers.1",
            "fc2": f"{i}.1.{j}.ffn.layers.4",
        }[what]
        names |= {f"layers.{module}.{p}" for p in BOTH}
    return names


def head(linear: list[str], conv: str, norm: str, predictor: str) -> set[str]:
    names = {f"{module}.{p}" for module in (*linear, norm, predictor) for p in BOTH}
    return names | {f"{conv}.weight"} | {f"{norm}.{b}" for b in NORM_BUFFERS}


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


def under(prefix: str, names: set[str]) -> set[str]:
    return {prefix + name for name in names}


def meta_state(variant: str, kind: str = "segmentation") -> dict[str, Tensor]:
    """Our names and shapes without memory."""
    with torch.device("meta"):
        if kind == "classification":
            return MiTClassifier(build_encoder(ModelConfig(variant=variant)), 10).state_dict()
        state = build_model(ModelConfig(variant=variant), 5).state_dict()
    return {k: v for k, v in state.items() if kind == "segmentation" or k.startswith("backbone.")}


CASES = {
    "nvlabs": (lambda v: under("backbone.", nvlabs(v)) | NVLABS_HEAD, "segmentation", False),
    "nvlabs classifier": (lambda v: nvlabs(v) | {"head.weight", "head.bias"}, "classification", True),
    "hf": (lambda v: under("segformer.", hugging_face(v)) | HF_HEAD, "segmentation", False),
    "hf classifier": (
        lambda v: under("segformer.", hugging_face(v)) | {"classifier.weight", "classifier.bias"},
        "classification",
        False,
    ),
    "hf encoder": (hugging_face, "encoder", True),
    "smp": (lambda v: under("encoder.", nvlabs(v)) | SMP_HEAD, "segmentation", False),
    "mmseg": (lambda v: under("backbone.", mmseg(v)), "encoder", False),
    "mmseg bare": (mmseg, "encoder", True),
}


@pytest.mark.parametrize("variant", ["b0", "b2", "b5", "b5_w4"])
@pytest.mark.parametrize("case", CASES)
def test_every_name_is_that_of_the_format_and_comes_back(case: str, variant: str) -> None:
    names, kind, bare = CASES[case]
    naming = Naming(format=case.split()[0], bare=bare)
    state = meta_state(variant, kind)
    theirs = from_ours(state, naming.format, bare=bare)
    assert theirs.keys() == names(variant)
    assert detect(theirs) == naming
    back, dropped = to_ours(theirs, naming)
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    assert dropped == []


def test_names_of_a_live_transformers_model_are_read_and_give_ours() -> None:
    sizes = VARIANTS["b2"]
    config = SegformerConfig(
        hidden_sizes=list(sizes.embed_dims), depths=list(sizes.depths), decoder_hidden_size=768, num_labels=5
    )
    with torch.device("meta"):
        live = SegformerForSemanticSegmentation(config).state_dict()
    naming = detect(live)
    back, _ = to_ours(live, naming)
    assert naming == Naming(format="hf5")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in meta_state("b2").items()}


def test_mmseg_has_q_then_k_then_v_in_one_tensor_and_convolutions_for_linears() -> None:
    state = {k: torch.randn(v.shape) for k, v in meta_state("b0", "encoder").items()}
    theirs = from_ours(state, "mmseg")
    joined = theirs["backbone.layers.2.1.1.attn.attn.in_proj_weight"]
    assert torch.equal(joined[:160], state["backbone.block3.1.attn.q.weight"])
    assert torch.equal(joined[160:], state["backbone.block3.1.attn.kv.weight"])
    assert theirs["backbone.layers.2.1.1.ffn.layers.4.weight"].shape == (160, 640, 1, 1)
    assert theirs["backbone.layers.2.1.1.ffn.layers.1.weight"].shape == (640, 1, 3, 3)


def test_hugging_face_has_the_first_rows_of_kv_as_keys_and_the_last_as_values() -> None:
    kv = torch.randn(320, 160)
    theirs = from_ours({"backbone.block3.1.attn.kv.weight": kv}, "hf")
    prefix = "segformer.encoder.block.2.1.attention.self."
    assert torch.equal(theirs[f"{prefix}key.weight"], kv[:160])
    assert torch.equal(theirs[f"{prefix}value.weight"], kv[160:])


def test_the_first_linear_of_smp_is_that_of_the_last_stage() -> None:
    theirs = from_ours(meta_state("b2"), "smp")
    assert [theirs[f"decoder.mlp_stage.{i}.linear.weight"].shape[1] for i in range(4)] == [512, 320, 128, 64]


@pytest.mark.parametrize("wrapper", ["module.", "module._orig_mod.", "model."])
def test_a_wrapper_before_every_name_is_taken_off(wrapper: str) -> None:
    theirs = from_ours(meta_state("b0"), "nvlabs")
    wrapped = {wrapper + name: tensor for name, tensor in theirs.items()}
    naming = detect(wrapped)
    assert naming.wrapper == wrapper
    assert to_ours(wrapped, naming)[0].keys() == theirs.keys()


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
    ],
    ids=["resnet", "vit", "head only"],
)
def test_names_of_another_network_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"none of its {len(names)} tensors has a name of a SegFormer"):
        detect(names)


def test_a_format_without_a_place_for_a_tensor_refuses_it_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"no Hugging Face SegFormer has: neck\.weight"):
        from_ours({"neck.weight": torch.zeros(1)}, "hf")
    with pytest.raises(CheckpointError, match=r"no mmsegmentation SegFormer has: decode_head"):
        from_ours(meta_state("b0"), "mmseg")
