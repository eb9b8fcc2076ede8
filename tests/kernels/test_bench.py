"""The cases that bench=kernels measures: both sides compute the same; without a GPU nothing is measured."""

import pytest
import torch

from bench.kernel_cases import cases
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
