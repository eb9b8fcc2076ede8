"""The meter on a real GPU: times of the device, its peak, its energy, its memory."""

import time

import pytest
import torch

from segformer.distributed.world import World
from segformer.telemetry.meter import Meter, energy, memory, peak_flops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]
SIDE = 8192


@pytest.fixture
def world():
    return World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cuda", 0))


def work(count):
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    for _ in range(count):
        left = torch.nn.functional.normalize(left @ left)


def test_step_times_are_the_device_s_though_the_host_runs_ahead(world):
    work(3)
    torch.cuda.synchronize()
    meter = Meter(world)
    began = time.monotonic()
    for _ in range(10):
        work(20)
        meter.add(1, 0.0)
    enqueued = time.monotonic() - began
    p50 = meter.rates()["step_p50_s"]
    whole = time.monotonic() - began
    assert enqueued < 0.7 * whole, "the host did not run ahead: the test shows nothing"
    assert p50 == pytest.approx(whole / 10, rel=0.3)


def test_matrix_products_have_a_plausible_mfu(world):
    if peak_flops(world.device) is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not listed")
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) / SIDE**0.5
    left @ left
    torch.cuda.synchronize()
    meter = Meter(world, flops_per_image=2 * SIDE**3)
    for _ in range(50):
        left @ left
    torch.cuda.synchronize()
    meter.add(50, 0.0)
    assert 0.3 < meter.rates()["mfu"] < 1.0


def test_energy_is_that_of_a_board_at_work(world):
    pytest.importorskip("pynvml")
    meter = Meter(world)
    if energy(world.device) is None:
        pytest.skip("NVML gives no energy here")
    began = time.monotonic()
    while time.monotonic() - began < 2:
        work(20)
        torch.cuda.synchronize()
        meter.add(4, 0.0)
    rates = meter.rates()
    assert 50 < rates["power_w"] < 1500
    images = rates["images_per_s"]
    assert rates["energy_j_per_image"] == pytest.approx(rates["power_w"] / images, rel=0.05)


def test_the_memory_peak_starts_anew(world):
    meter = Meter(world)
    held = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    assert memory(world.device)["memory_gib"] >= 0.5
    del held
    assert memory(world.device)["memory_gib"] >= 0.5, "the peak of the interval"
    meter.reset()
    assert memory(world.device)["memory_gib"] < 0.5
