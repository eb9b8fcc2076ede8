"""The cases that bench=kernels measures: both sides compute the same; without a GPU nothing is measured."""

import csv

import pytest
import torch

from bench import kernels
from bench.kernel_cases import Case, cases
from bench.kernels import KernelsBench, compare, measure
from segformer.errors import ConfigError, SegformerError
from segformer.models.variants import Variant

pytest.importorskip("triton", reason="Triton is not installed")

TINY = Variant(embed_dims=(2, 4, 6, 8), depths=(1, 1, 1, 1), decoder_dim=12)


def test_both_sides_of_every_case_compute_the_same(device):
    torch.manual_seed(0)
    names = set()
    for case in cases(TINY, 1, 32, 5, torch.float32, device):
        given = case.inputs()
        compare(case, case.ours(given), case.plain(case.function, given))
        names.add(case.kernel)
    assert names == {
        *("depthwise", "depthwise + backward", "upsample_sum", "upsample_sum + backward"),
        *("cross_entropy + backward", "argmax", "confusion"),
    }


def test_another_function_is_found(device):
    case = next(iter(cases(TINY, 1, 32, 5, torch.float32, device)))
    given = case.inputs()
    with pytest.raises(SegformerError, match=r"depthwise of 1 x 8 x 8 x 8: result 0 is .* away"):
        compare(case, [1.1 * case.ours(given)[0]], case.plain(case.function, given))


def plain_case(name, ours):
    """A case of twice a number; no kernel, no GPU."""

    def plain(function, given):
        return [function(*given)]

    return Case(
        kernel=name, shape="2", inputs=lambda: [torch.ones(2)], ours=ours, function=lambda value: 2 * value,
        plain=plain, least=lambda given, results: 16,
    )  # fmt: skip


def fail(given):
    raise ValueError("PassManager::run failed\nmore")


def test_a_case_that_differs_or_fails_has_a_note_and_the_others_their_numbers(tmp_path, monkeypatch):
    found = [
        plain_case("argmax", lambda given: [3 * given[0]]),
        plain_case("depthwise", fail),
        plain_case("confusion", lambda given: [given[0] + given[0]]),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(kernels, "cases", lambda *_: iter(found))
    monkeypatch.setattr(kernels, "ROTATE", 1)
    monkeypatch.setattr(kernels, "peak", lambda *_: 1.0)
    monkeypatch.setattr(kernels, "capture", lambda side, sets: lambda: len(sets))
    monkeypatch.setattr(kernels, "take_turns", lambda *_: [[1e-9, 2e-9], [2e-9, 4e-9]])
    with pytest.raises(SegformerError, match=r"SegformerError: .* away .*; depthwise of 2: ValueError: Pass"):
        measure(KernelsBench(), tmp_path)
    with (tmp_path / "kernels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kernel"] for row in rows] == ["argmax", "depthwise", "confusion"]
    assert rows[1]["note"] == "ValueError: PassManager::run failed"
    assert all(rows[0][name] == rows[1][name] == "" for name in kernels.NUMBERS)
    assert not rows[2]["note"]
    assert all(rows[2][name] for name in kernels.NUMBERS)
    assert float(rows[2]["times_faster"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        measure(KernelsBench(), tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"variant": "b9"}, "variant='b9' is unknown"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"size": 100}, "not a multiple of 32"),
        ({"classes": 256}, "classes 1 to 255"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        KernelsBench(**setting)
