"""The comparison with peers: equal functions, operations as published, and rows that mean what they say."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import contenders, contest, original, peers, roofline
from bench.roofline import Work, work
from segformer.errors import ConfigError
from segformer.models.variants import VARIANTS

# Published multiply-accumulates by variant and side, with 150 classes (arXiv 2105.15203).
PUBLISHED = {("b0", 512): 8.4, ("b1", 512): 15.9, ("b2", 512): 62.3, ("b3", 512): 79.0, ("b4", 512): 95.6,
             ("b5", 512): 111.5, ("b5", 640): 183.1}  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_original_equals_transformers_with_the_same_weights(mode, tmp_path):
    contenders.write_weights("b0", 19, tmp_path / "b0")
    data = contenders.batch_of(contenders.Cell(mode, "b0", (97, 131), 2), 2, 19, CPU)
    found = []
    for name in ("transformers", "original"):
        contender = contenders.build(name, "b0", 19, tmp_path / "b0")
        out = contenders.step_of(contender.model, contender.run, mode, data, "fp32")()
        found.append((out, contender))
    (theirs, peer), (ours, original) = found
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if mode == "training":
        norms = [contenders.gradient_norm(contender.model) for contender in (peer, original)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_stochastic_depth_of_the_original_keeps_the_mean():
    torch.manual_seed(0)
    block = original.Block(8, 1, 1, 4, 0.25, (1e-6, 1e-5)).train()
    kept = block._skip(torch.ones(4000, 3, 8))
    assert set(kept.unique().tolist()) == {0.0, float(torch.ones(()) / 0.75)}
    assert kept.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept)), "a branch is dropped for a whole sample"


@pytest.mark.parametrize(("variant", "side"), PUBLISHED)
def test_operations_are_the_published_ones_and_those_that_are_counted(variant, side):
    step = work(variant, (side, side), 150, folded=False, training=False)
    assert step.macs / 1e9 == pytest.approx(PUBLISHED[variant, side], abs=0.05)
    with torch.device("meta"):
        model, images = original.Original(VARIANTS[variant], 150).eval(), torch.empty(1, 3, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert 2 * step.macs == counter.get_total_flops()


def grouped_backward(grad, _, weight, *rest, **__) -> int:
    """Operations of both gradients of a convolution; the counter's own formula ignores groups."""
    asked = rest[-1]  # for the gradients of input, weight and bias
    return (asked[0] + asked[1]) * 2 * math.prod(grad) * math.prod(weight[1:])


def test_operations_of_a_training_step_are_those_that_are_counted():
    model = original.Original(VARIANTS["b0"], 19)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: grouped_backward}
    ) as counter:
        model(torch.randn(2, 3, 97, 131)).sum().backward()
    step = work("b0", (97, 131), 19, batch=2, folded=False, training=True)
    assert 2 * step.macs == counter.get_total_flops()


def test_the_folded_head_has_the_operations_of_its_matrix_products():
    variant, sides = VARIANTS["b2"], (128, 64, 32, 16)
    with torch.device("meta"):
        encoder = original.Original(variant, 150).eval().backbone
        folded = [torch.empty(variant.decoder_dim, dim) for dim in variant.embed_dims]
        fuse = torch.empty(variant.decoder_dim, variant.decoder_dim)
        predict, images = torch.empty(150, variant.decoder_dim), torch.empty(3, 3, 512, 512)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = encoder(images)
        projected = [F.linear(m.flatten(2).transpose(1, 2), w) for m, w in zip(maps, folded, strict=True)]
        F.linear(projected[0], predict)
    assert [m.shape[-1] for m in maps] == list(sides)
    assert (
        2 * work("b2", (512, 512), 150, batch=3, folded=True, training=False).macs
        == counter.get_total_flops()
    )
    # Training multiplies the weights too, once for the three images, and so do its two gradients.
    with FlopCounterMode(display=False) as products:
        for weight in folded:
            fuse @ weight
    leading = 2 * 3 * 128 * 128 * 64 * 7 * 7 * 3  # the gradient of the images, which is not formed
    whole = 3 * (counter.get_total_flops() + products.get_total_flops()) - leading
    assert 2 * work("b2", (512, 512), 150, batch=3, folded=True, training=True).macs == whole


def test_the_bound_is_the_larger_of_arithmetic_and_memory():
    limits = roofline.Peaks(flops=1e12, bandwidth=1e11, source="measured")
    assert limits.bound(Work(10**12, 10), "fp32") == pytest.approx(2)
    assert limits.bound(Work(10, 10**11), "fp32") == pytest.approx(4)
    assert limits.bound(Work(10, 10**11), "bf16") == pytest.approx(2)
    assert roofline.peaks(CPU, "bf16") is None
    found = roofline.peaks(CPU, "fp32", side=256, triad=10**6)
    assert found.source == "measured"
    assert 1e8 < found.flops < 1e15
    assert 1e7 < found.bandwidth < 1e14


@pytest.mark.slow
def test_a_short_run_gives_every_row_its_numbers_and_a_picture(tmp_path, monkeypatch, rows_of):
    limits = roofline.Peaks(1e11, 1e10, "measured")
    monkeypatch.setattr(peers, "peaks", lambda *_: limits)
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)  # takes a minute
    names = ["fused", "reference", "transformers", "original", "fused+compile", "smp"]
    cells = ["inference/b0/64x64/1", "training/b0/64x64/2"]
    cfg = peers.PeersBench(
        cells=cells, contenders=names, rounds=2, turn_seconds=0, threads=1, memory=False,
        picture=str(tmp_path / "pictures/peers.png"),
    )  # fmt: skip
    before = torch.get_num_threads()
    rows = peers.measure(cfg, "cpu", tmp_path)
    assert torch.get_num_threads() == before
    written = rows_of(tmp_path / "peers.csv")
    assert [(row["mode"], row["contender"]) for row in written] == [
        (mode, name) for mode in ("inference", "training") for name in names
    ]
    assert written[0].keys() >= rows[0].keys()
    for row in rows:
        if row["contender"] == "smp" and row["note"]:
            assert row["note"].startswith("segmentation_models_pytorch cannot be imported")
            continue
        assert not row["note"]
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers)
        assert row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        for other in ("times_fused", "times_compiled"):
            assert row[f"{other}_min"] <= row[other] <= row[f"{other}_max"]
        assert row["roofline_share"] == pytest.approx(row["bound_ms"] / row["ms_median"], rel=0.01)
        assert row["gflop_per_s"] == pytest.approx(1e3 * row["gflop"] / row["ms_median"], rel=0.01)
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"], rel=0.01)
        assert row["difference"] <= 1e-5
        assert (row["gradient_difference"] is None) == (row["mode"] == "inference")
        assert row["rounds"] == 2
        assert row["memory_fused"] is row["memory_compiled"] is None, "peers.memory=false"
    assert rows[0]["times_fused"] == 1
    assert (tmp_path / "pictures/peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_peak_memory_of_a_training_step_holds_the_gradients(rules, tmp_path):
    contenders.write_weights("b0", 5, tmp_path / "b0")
    cell = contenders.Cell.parse("training/b0/64x64/1")
    _, (entry,) = contest.hold(cell, ["fused"], tmp_path / "b0", rules(memory=True))
    assert entry.weights_mib == pytest.approx(
        4 * 3_715_445 / 2**20, rel=0.01
    )  # 3,719,027 - 14 x 257 parameters
    assert 0.95 * entry.weights_mib < entry.peak_mib < 400


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cells_of_the_lists_can_be_read(device):
    parse = contenders.Cell.parse
    cells = peers._cells(peers.PeersBench(cells=["accept", "all", peers.ACCEPT[device][0]]), device)
    assert [str(cell) for cell in cells] == list(peers.ALL[device])
    assert all(parse(str(cell)) == cell for cell in cells)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cells": ["training/b2"]}, "peers.cells has 'training/b2'; write"),
        ({"cells": ["training/b9/64x64/1"]}, "'training/b9/64x64/1', which is unknown"),
        ({"cells": ["speed/b0/64x64/1"]}, "modes inference, training"),
        ({"cells": ["inference/b0/16x64/1"]}, "sides of 32 pixels or more"),
        ({"cells": []}, "the number of cells must be 1 or more"),
        ({"contenders": ["mmseg"]}, "peers.contenders has mmseg; use fused, "),
        ({"precision": "fp8"}, "peers.precision=fp8 is unknown"),
        ({"rounds": 0}, "rounds and the number of cells must be 1 or more"),
        ({"minutes": -1}, "must not be negative"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message):
    with pytest.raises(ConfigError, match=message):
        peers.PeersBench(**wrong)


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, cells, message in (
        ("tpu", ["accept"], "device=tpu is unknown"),
        ("cuda", ["accept"], "torch sees no GPU"),
        ("cpu", ["training/b0/64x64/max"], "sought on a GPU only"),
    ):
        with pytest.raises(ConfigError, match=message):
            peers.measure(peers.PeersBench(cells=cells), device, tmp_path)
