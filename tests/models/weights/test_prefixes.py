"""Names behind the prefix of a wrapper: found and taken off; what is beside them is left out by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from segformer.errors import CheckpointError
from segformer.models.segformer import SegFormer
from segformer.models.weights.key_maps import detect, from_ours, to_ours
from segformer.models.weights.read import read_weights

PREFIXES = ["net.", "model.", "_orig_mod.module.", "trainer.model.net.", "backbone.net.", "module.layers."]


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("format_", ["nvlabs", "hf", "smp", "mmseg"])
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
def test_any_prefix_is_taken_off_and_what_is_not_below_it_is_dropped(
    state: dict[str, Tensor], format_: str, bare: bool, prefix: str, beside: bool
) -> None:
    kept = state if not bare and format_ != "mmseg" else only_encoder(state)
    others = {"criterion.weight": torch.ones(3), "ema_decay": torch.ones(())} if beside else {}
    theirs = {**others, **behind(prefix, from_ours(kept, format_, bare=bare))}
    ours, dropped = to_ours(theirs, detect(theirs))
    assert ours.keys() == kept.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    assert dropped == list(others)


def only_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def test_what_is_below_the_prefix_and_has_no_place_is_still_refused(state: dict[str, Tensor]) -> None:
    theirs = behind("net.", state) | {"net.neck.weight": torch.zeros(1), "loss.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"^1 of \d+ tensors have no place.*: net\.neck\.weight; check"):
        to_ours(theirs, detect(theirs))


TWO: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a moving average": lambda state: behind("model.", state) | behind("ema_model.module.", state),
    "encoder and head apart": lambda state: {
        ("net." if name.startswith("backbone.") else "other.") + name: tensor
        for name, tensor in state.items()
    },
    "many": lambda state: {k: t for i in range(40) for k, t in behind(f"models.{i}.", state).items()},
}


@pytest.mark.parametrize("kind", TWO)
def test_two_networks_in_one_file_are_refused(state: dict[str, Tensor], kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"below \S+ and names of one elsewhere .*save the one"):
        detect(TWO[kind](state))


@pytest.mark.parametrize("format_", ["nvlabs", "hf", "smp"])
def test_a_file_without_the_counter_of_batches_is_read_as_torch_reads_it(
    state: dict[str, Tensor], tmp_path: Path, format_: str
) -> None:
    theirs = from_ours(state, format_)
    counter = next(name for name in theirs if name.endswith("num_batches_tracked"))
    del theirs[counter]
    torch.save(theirs, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert weights.state.keys() == state.keys()
    assert weights.state["decode_head.linear_fuse.bn.num_batches_tracked"].tolist() == 0
    assert weights.notes == [
        "decode_head.linear_fuse.bn.num_batches_tracked is not in the file; it only counts, and was set to 0"
    ]
    SegFormer.from_pretrained(tmp_path / "x.pth")


def test_other_buffers_must_be_there(state: dict[str, Tensor], tmp_path: Path) -> None:
    gone = ("decode_head.linear_fuse.bn.running_mean", "decode_head.linear_fuse.bn.num_batches_tracked")
    torch.save({name: t for name, t in state.items() if name not in gone}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"2 missing: {gone[1]}, {gone[0]}|2 missing: {gone[0]}"):
        SegFormer.from_pretrained(tmp_path / "x.pth")
