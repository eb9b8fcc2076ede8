"""The compiled cross entropy against float64, its determinism, and what happens without a compiler."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from segformer.models.ops import native
from segformer.models.ops.cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_reference

OFF = """
import torch
from segformer.models.ops import native
print(native.available(torch.zeros(1)), native.missing())
"""

pytestmark = pytest.mark.skipif(
    bool(native.missing()), reason=f"native.cpp can't be compiled here: {native.missing()}"
)


def problem(classes, small, large, *, batch=2, channels_last=True):
    torch.manual_seed(0)
    logits = 4 * torch.randn(batch, *small, classes)
    logits = logits.permute(0, 3, 1, 2)
    target = torch.randint(classes, (batch, *large))
    target[0, : large[0] // 4] = 255
    weights = {
        "class_weights": torch.rand(classes),
        "pixel_weights": torch.rand(batch, *large).round(decimals=1),
    }
    return logits if channels_last else logits.contiguous(), target, weights


def run(function, logits, target, **options):
    leaf = logits.clone().requires_grad_()
    total, losses = function(leaf, target, 255, **options)
    return total.detach(), losses, torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("options", ["plain", "class_weights", "pixel_weights", "smoothing", "all"])
@pytest.mark.parametrize(
    ("classes", "small", "large"),
    [
        (1, (4, 5), (16, 20)),
        (2, (1, 1), (3, 4)),
        (16, (17, 9), (68, 36)),  # two bands, and no class beyond a vector
        (17, (33, 5), (50, 47)),
        (150, (9, 8), (5, 3)),  # made smaller: rows that no pixel reads
        (5, (7, 6), (7, 6)),
    ],
)
def test_compiled_cross_entropy_is_that_of_float64(classes, small, large, options):
    logits, target, weights = problem(classes, small, large, channels_last=options != "all")
    chosen = weights if options == "all" else {key: weights[key] for key in weights if key == options}
    smoothing = 0.1 if options in ("smoothing", "all") else 0.0
    got = run(upsampled_cross_entropy, logits, target, **chosen, label_smoothing=smoothing)
    wide = {key: value.double() for key, value in chosen.items()}
    want = run(upsampled_cross_entropy_reference, logits.double(), target, **wide, label_smoothing=smoothing)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit():
    logits, target, weights = problem(7, (40, 6), (160, 24), batch=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(upsampled_cross_entropy, logits, target, **weights))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    weights["pixel_weights"] = weights["pixel_weights"][1:2]
    alone = run(upsampled_cross_entropy, logits[1:2], target[1:2], **weights)
    assert torch.equal(alone[1], found[0][1][1:2])
    assert torch.equal(alone[2], found[0][2][1:2])


def test_what_is_not_finite_stays_so_and_ignored_pixels_cost_nothing():
    logits, target, _ = problem(5, (4, 4), (16, 16))
    target[1] = 255
    total, losses, grad = run(upsampled_cross_entropy, logits, target)
    assert not losses[1].any()
    assert not grad[1].any()
    assert total > 0
    for bad in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[0, 2, 3, 3] = bad
        total, _, grad = run(upsampled_cross_entropy, broken, target)
        assert not total.isfinite()
        assert not grad[0].isfinite().all()
        assert grad[1].isfinite().all()


FAULTS = """
import resource, sys, torch
from segformer.models.ops.native import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    return [torch.zeros(5 << 20) for _ in range(4)]  # 20 MiB each
for _ in range(10):  # the heap takes some rounds to find room for all
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_freed_memory_is_used_again_without_a_page_fault():
    """Beside a process that gives all of it back; what glibc does by default depends on the heap's layout."""
    given = {"MALLOC_MMAP_THRESHOLD_": "131072", "PYTHONPATH": os.pathsep.join(sys.path)}
    env = {**os.environ, **given}
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, word], env=env, text=True))
        for word in ("keep", "give back")
    )
    assert kept < given_back / 10  # 5 times 80 MiB are 102,400 pages of 4 KiB


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_that_is_no_class_is_named(label):
    logits, target, _ = problem(5, (4, 4), (16, 16))
    target[1, 7, 7] = label
    with pytest.raises(IndexError, match=rf"labels .*{label}.* are not all 0 to 4 or 255"):
        upsampled_cross_entropy(logits, target, 255)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"CXX": "/nowhere/c++"}, "No such file or directory: '/nowhere/c++'"),
        ({"CXX": "false"}, "returned non-zero exit status 1"),
        ({"SEGFORMER_NATIVE": "0"}, "SEGFORMER_NATIVE=0"),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "No such file or directory: '/proc/nowhere"),
        ({}, "others may write there"),
    ],
)
def test_without_a_compiler_or_a_safe_folder_torch_does_it_and_says_why(changed, said, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    if not changed:
        (tmp_path / "segformer").mkdir()
        (tmp_path / "segformer").chmod(0o777)  # anybody could have put a library there
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)  # asked anew
    assert said in native.missing()
    assert not native.available(torch.zeros(1))
    logits, target, weights = problem(5, (4, 4), (16, 16))
    got = run(upsampled_cross_entropy, logits, target, **weights)
    want = run(upsampled_cross_entropy_reference, logits, target, **weights)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_processes_that_start_together_leave_one_library(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OFF]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == ["True", "True"]
    assert len(list((tmp_path / "segformer").iterdir())) == 1
