"""Rates of an interval, alone and over ranks; what is unknown is None."""

import math
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from segformer.distributed.world import World
from segformer.telemetry.meter import PEAK_FLOPS, LossSpike, Meter, energy, memory, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_rates_are_means_since_the_last_reset(clock):
    meter = Meter()
    for _ in range(4):
        clock.now += 0.5
        meter.add(images=16, waited=0.125)
    rates = meter.rates()
    assert rates["images_per_s"] == 32.0
    assert rates["step_s"] == 0.5
    assert rates["data_wait"] == 0.25
    meter.reset()
    clock.now += 1.0
    meter.add(images=16, waited=0.0)
    rates = meter.rates()
    assert (rates["images_per_s"], rates["step_s"], rates["data_wait"]) == (16.0, 1.0, 0.0)


def test_step_times_have_percentiles_and_a_pause_between_steps_counts_for_the_mean(clock):
    meter = Meter()
    for seconds in [1.0] * 98 + [5.0, 9.0]:
        clock.now += seconds
        meter.add(images=1, waited=0.0)
    clock.now += 100.0
    rates = meter.rates()
    assert rates["step_p50_s"] == pytest.approx(1.0)
    assert rates["step_p99_s"] == pytest.approx(5.0)
    assert rates["step_s"] == pytest.approx(2.12)


def test_an_interval_without_steps_has_no_step_times(clock):
    rates = Meter().rates()
    assert (rates["step_p50_s"], rates["step_p99_s"], rates["images_per_s"]) == (None, None, 0.0)


def test_mfu_is_the_operations_of_the_images_over_those_of_the_devices(clock):
    meter = Meter(flops_per_image=2e12)
    meter._peak = 100e12
    clock.now += 2.0
    meter.add(images=40, waited=0.0)
    assert meter.rates()["mfu"] == pytest.approx(0.4)  # 20 images/s x 2 T / 100 T


def test_what_a_cpu_can_t_say_is_none():
    meter = Meter(World(rank=0, local_rank=0, size=1, local_size=1, device=CPU), flops_per_image=1e9)
    meter.add(images=1, waited=0.0)
    rates = meter.rates()
    unknown = {name for name, value in rates.items() if value is None}
    assert unknown == {"mfu", "power_w", "energy_j_per_image"}
    assert rates["straggler"] == 1.0, "one rank is no straggler"
    assert peak_flops(CPU) is None
    assert energy(CPU) is None


def test_peaks_are_dense_and_those_of_one_chip_agree():
    assert PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == 989.4e12
    assert PEAK_FLOPS["NVIDIA A100-SXM4-80GB"] == PEAK_FLOPS["NVIDIA A100-SXM4-40GB"] == 312e12
    assert all(50e12 < peak < 3000e12 for peak in PEAK_FLOPS.values())
    assert "NVIDIA H100 80GB HBM3 MIG 1g.10gb" not in PEAK_FLOPS


def test_energy_is_the_difference_of_the_counter(clock, monkeypatch):
    counter = iter([1000.0, 1600.0])
    monkeypatch.setattr("segformer.telemetry.meter.energy", lambda device: next(counter))
    meter = Meter()
    clock.now += 2.0
    meter.add(images=30, waited=0.0)
    rates = meter.rates()
    assert rates["power_w"] == pytest.approx(300.0)
    assert rates["energy_j_per_image"] == pytest.approx(20.0)


def test_the_rates_of_three_ranks_name_the_slow_one_and_the_longest_wait(clock):
    """Each rank gives what `gather` brings together: waited, busy, peak, joules."""

    def rates(busy, peaks=(None, None, None), joules=(None, None, None)):
        ranks = list(zip((0.0, 0.0, 0.5), busy, peaks, joules, strict=True))
        meter = Meter(types.SimpleNamespace(device=CPU, gather=lambda own: ranks), flops_per_image=1e9)
        clock.now += 2.0
        meter.add(images=8, waited=0.0)
        return meter.rates()

    even, slow, unknown = rates((4.0, 4.0, 4.0)), rates((4.0, 10.0, 4.0)), rates((None, 1.0, 1.0))
    assert even["straggler"] == 1.0
    assert (slow["straggler"], slow["straggler_rank"]) == (2.5, 1)
    assert (unknown["straggler"], unknown["straggler_rank"]) == (None, None)
    assert slow["data_wait"] == 0.25, "rank 2's"
    assert slow["mfu"] is None
    known = rates((1.0,) * 3, (2e9, 2e9, 4e9), (100.0, 200.0, 300.0))
    assert (known["mfu"], known["power_w"], known["energy_j_per_image"]) == (0.5, 300.0, 75.0)
    assert rates((1.0,) * 3, (2e9, None, 4e9))["mfu"] is None, "one device is unknown"


def test_a_spike_stands_out_from_the_median_of_the_intervals_before_it():
    spike = LossSpike(window=6, least=3)
    assert [spike.ratio(loss) for loss in (4.0, 1.0, 2.0)] == [None, None, None]
    assert spike.ratio(6.0) == 3.0  # median of 4, 1, 2
    assert spike.ratio(math.inf) == math.inf
    assert spike.ratio(3.0) == 1.0  # of 4, 1, 2, 6: the infinite one isn't remembered
    for _ in range(6):
        spike.ratio(10.0)
    assert spike.ratio(10.0) == 1.0
    assert math.isnan(spike.ratio(math.nan))
    zero = LossSpike(least=1)
    assert [zero.ratio(loss) for loss in (0.0, 1.0)] == [None, None], "no spike of a loss of zero"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_cpu_is_the_resident_set():
    expected = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**20
    assert memory(CPU) == pytest.approx({"memory_gib": expected, "host_memory_gib": expected}, rel=0.02)
