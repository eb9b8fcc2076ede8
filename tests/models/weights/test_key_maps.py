"""Names of other people's files <-> ours: every format there and back, prefixes of wrappers, and refusals.

Whole files with names written out by others, or here, are read in test_formats.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import State, same
from torch import Tensor
from transformers import SegformerForSemanticSegmentation

from segformer.errors import CheckpointError
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.key_maps import KeyFormat, detect, from_ours, to_ours
from segformer.models.weights.read import read_weights


def meta_state(variant: str = "b0", kind: str = "segmentation") -> State:
    """Our names and shapes without memory."""
    with torch.device("meta"):
        if kind == "classification":
            return MiTClassifier(build_encoder(ModelConfig(variant=variant)), 10).state_dict()
        state = build_model(ModelConfig(variant=variant), 5).state_dict()
    return state if kind == "segmentation" else only_encoder(state)


def only_encoder(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize("variant", ["b0", "b5"])
@pytest.mark.parametrize(
    ("format_", "kind", "bare"),
    [
        ("nvlabs", "segmentation", False),
        ("nvlabs", "classification", True),
        ("hf", "segmentation", False),
        ("hf", "classification", False),
        ("hf", "encoder", True),
        ("smp", "segmentation", False),
        ("mmseg", "encoder", False),
        ("mmseg", "encoder", True),
    ],
)
def test_every_format_is_detected_and_comes_back(format_: str, kind: str, bare: bool, variant: str) -> None:
    state = meta_state(variant, kind)
    theirs = from_ours(state, format_, bare=bare)
    assert detect(theirs) == KeyFormat(format_, bare)
    back, dropped = to_ours(theirs, KeyFormat(format_, bare))
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    assert dropped == []


def test_names_of_a_live_transformers_model_are_read_and_give_ours(hf: Path) -> None:
    live = SegformerForSemanticSegmentation.from_pretrained(hf).state_dict()
    assert detect(live) == KeyFormat(format="hf5")
    assert same(to_ours(live, detect(live))[0], read_weights(hf).state)


@pytest.mark.parametrize(
    ("format_", "dead"),
    [("nvlabs", "decode_head.conv_seg.weight"), ("smp", "classification_head.3.weight")],
)
def test_parameters_that_compute_nothing_are_dropped_and_named(format_: str, dead: str) -> None:
    theirs = from_ours(meta_state(), format_) | {dead: torch.empty(5, 128)}
    ours, dropped = to_ours(theirs, detect(theirs))
    assert dropped == [dead]
    assert ours.keys() == meta_state().keys()


def behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "prefix", ["net.", "_orig_mod.module.", "trainer.model.net.", "backbone.net.", "module.layers."]
)
@pytest.mark.parametrize(
    ("format_", "bare"), [("nvlabs", False), ("nvlabs", True), ("hf", False), ("smp", False), ("mmseg", True)]
)
def test_any_prefix_is_taken_off_and_what_is_not_below_it_is_dropped(
    state: State, format_: str, bare: bool, prefix: str
) -> None:
    kept = only_encoder(state) if bare else state
    others = {"criterion.weight": torch.ones(3), "ema_decay": torch.ones(())}
    theirs = {**others, **behind(prefix, from_ours(kept, format_, bare=bare))}
    ours, dropped = to_ours(theirs, detect(theirs))
    assert ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    assert dropped == list(others)


TWO: dict[str, Callable[[State], State]] = {
    "a moving average": lambda state: behind("model.", state) | behind("ema_model.module.", state),
    "encoder and head apart": lambda state: {
        ("net." if name.startswith("backbone.") else "other.") + name: tensor
        for name, tensor in state.items()
    },
    "many": lambda state: {k: t for i in range(40) for k, t in behind(f"models.{i}.", state).items()},
}


@pytest.mark.parametrize("kind", TWO)
def test_two_networks_in_one_file_are_refused(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"below \S+ and names of one elsewhere .*save the one"):
        detect(TWO[kind](meta_state()))


def test_names_without_a_place_are_refused_and_the_first_ones_named() -> None:
    theirs = behind("net.", from_ours(meta_state(), "hf")) | {"loss.weight": torch.zeros(1)}
    extra = {f"net.neck.{i}.weight": torch.zeros(1) for i in range(9)}
    message = r"^9 of \d+ tensors have no place in .* Hugging Face names: net\.neck\.0\.weight.*and 3 more"
    with pytest.raises(CheckpointError, match=message):
        to_ours(theirs | extra, detect(theirs))


HALF = "segformer.encoder.block.0.1.attention.self."


@pytest.mark.parametrize(
    ("format_", "changes", "message"),
    [
        ("hf", {f"{HALF}value.bias": None}, r"block1\.1\.attn\.kv\.bias: the file has only the key half"),
        ("hf", {f"{HALF}key.bias": None}, "the file has only the value half"),
        (
            "hf",
            {f"{HALF}key.weight": torch.zeros(31, 32), f"{HALF}value.weight": torch.zeros(33, 32)},
            r"halves of shapes \(31, 32\) and \(33, 32\) don't fit",
        ),
        (
            "mmseg",
            {"backbone.layers.0.1.0.attn.attn.in_proj_bias": torch.zeros(95)},
            r"in_proj_bias of shape \(95,\) is not three equal parts",
        ),
    ],
)
def test_parts_of_a_tensor_that_do_not_fit_are_refused_and_named(
    format_: str, changes: dict[str, Tensor | None], message: str
) -> None:
    theirs = from_ours(meta_state(kind="encoder" if format_ == "mmseg" else "segmentation"), format_)
    theirs = {name: tensor for name, tensor in (theirs | changes).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        to_ours(theirs, detect(theirs))


@pytest.mark.parametrize(
    "names",
    [
        ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"],
        ["head.weight", "head.bias"],
        ["net.blocks.0.norm1.weight", "net.blocks.0.mlp.fc1.weight", "net.patch_embed.proj.weight"],
        ["model.encoder.layer_norm.weight", "model.head.weight"],
    ],
    ids=["vit", "head only", "vit behind a prefix", "bert behind a prefix"],
)
def test_names_of_another_network_are_refused(names: list[str]) -> None:
    with pytest.raises(CheckpointError, match=rf"none of its {len(names)} tensors has a name of a SegFormer"):
        detect(names)


def test_a_format_without_a_place_for_a_tensor_refuses_it_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"no Hugging Face SegFormer has: neck\.weight"):
        from_ours({"neck.weight": torch.zeros(1)}, "hf")
    with pytest.raises(CheckpointError, match=r"no mmsegmentation SegFormer has: decode_head"):
        from_ours(meta_state(), "mmseg")


def test_a_file_without_the_counter_of_batches_is_read_as_torch_reads_it(
    state: State, tmp_path: Path
) -> None:
    theirs = from_ours(state, "smp")
    del theirs[next(name for name in theirs if name.endswith("num_batches_tracked"))]
    torch.save(theirs, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert weights.state.keys() == state.keys()
    assert weights.state["decode_head.linear_fuse.bn.num_batches_tracked"].tolist() == 0
    assert "num_batches_tracked is not in the file; it only counts, and was set to 0" in weights.notes[0]


def test_other_buffers_must_be_there(state: State, tmp_path: Path) -> None:
    gone = ("decode_head.linear_fuse.bn.running_mean", "decode_head.linear_fuse.bn.num_batches_tracked")
    torch.save({name: t for name, t in state.items() if name not in gone}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"2 missing: {gone[1]}, {gone[0]}"):
        SegFormer.from_pretrained(tmp_path / "x.pth")
