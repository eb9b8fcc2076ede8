"""Rates of a training interval, memory, loss spikes.

    images_per_s         images over all ranks / wall time of the interval
    step_s               wall time / optimizer steps, with all that lies between the steps
    step_p50_s, _p99_s   nearest-rank percentiles of the step times of rank zero. On a GPU they are times
                         between CUDA events, one after each step: the host runs ahead of the device, and its
                         clock shows the device's steps only where the loop waits for it
    data_wait            share of the time that the rank which waited longest waited for batches
    mfu                  operations that the model needs / operations that the devices could have done:
                         flops_per_image x images_per_s / sum of the ranks' PEAK_FLOPS
    straggler            the slowest rank's own working time / the (lower) median of the ranks'
    power_w              mean power of the boards of all ranks' devices, by NVML's energy counter
    energy_j_per_image   energy of those boards / images

Own working time is what a rank's step takes without its wait for the others at the step's edge, so that a
straggler is a rank whose data or host is late. One that computes slowly holds the others up inside of
collectives, and isn't seen. What is not known is None: MFU on a CPU or a device that is not
listed (a MIG slice has a name of its own), energy without NVML or on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segformer.distributed.world import World

# Floating-point operations per second of dense bf16 matrix products with fp32 sums, by the name of the
# device (torch.cuda.get_device_name), at the clock and power of the maker's sheet. Whatever precision a run
# has is held against it. V100 has no bf16 units: its figure is fp16's. Where a sheet gives the number with
# sparsity, half of it stands here. Sources, all by NVIDIA: data sheets "HGX B200", "GB200 NVL72", "H200
# Tensor Core GPU", "H100 Tensor Core GPU", "A100 80GB", "A30", "A40", "A10", "L40S", "L4", "V100 Tensor Core
# GPU", "RTX 6000 Ada", "RTX A6000"; white papers "Ada GPU architecture" (RTX 4090) and "Ampere GA102" (3090).
PEAK_FLOPS = {
    name: tflops * 1e12
    for tflops, names in {
        2500.0: ("NVIDIA GB200",),
        2250.0: ("NVIDIA B200",),
        989.4: ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"),
        835.5: ("NVIDIA H200 NVL", "NVIDIA H100 NVL"),
        756.5: ("NVIDIA H100 PCIe",),
        364.2: ("NVIDIA RTX 6000 Ada Generation",),
        362.05: ("NVIDIA L40S",),
        312.0: tuple(
            f"NVIDIA A100{kind}" for kind in ("-SXM4-40GB", "-SXM4-80GB", "-PCIE-40GB", " 80GB PCIe")
        ),
        165.2: ("NVIDIA GeForce RTX 4090",),
        165.0: ("NVIDIA A30",),
        154.8: ("NVIDIA RTX A6000",),
        149.7: ("NVIDIA A40",),
        125.0: ("NVIDIA A10", "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        121.0: ("NVIDIA L4",),
        112.0: ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
        71.0: ("NVIDIA GeForce RTX 3090",),
    }.items()
    for name in names
}


def peak_flops(device: torch.device) -> float | None:
    """PEAK_FLOPS of a device; None where it isn't listed."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def energy(device: torch.device) -> float | None:
    """Joules that the board of a device has used since its driver was loaded, by NVML; None without."""
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # no library, driver or counter: NVML has an error for each
            import pynvml

            pynvml.nvmlInit()
            # By its identity: NVML does not count as CUDA_VISIBLE_DEVICES does.
            board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(board)) / 1e3
    return None


class Meter:
    """Counts the steps of an interval, by clocks that nobody sets; every rank has one.

    `flops_per_image` is what training on one image takes (models/macs.training_flops); without it, and on
    devices of unknown peak, mfu is None.
    """

    def __init__(self, world: World | None = None, *, flops_per_image: float | None = None) -> None:
        self._world = world
        self._device = torch.device("cpu") if world is None else world.device
        self._flops_per_image = flops_per_image
        self._peak = peak_flops(self._device)
        self.reset()

    def reset(self) -> None:
        """Start a new interval; the peak of the device's memory starts anew, too."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.monotonic()
        self._joules = energy(self._device)
        self._marks = [self._mark()]
        self._waited = 0.0
        self._busy: float | None = 0.0
        self._images = 0
        self._steps = 0

    def add(self, images: int, waited: float, seconds: float | None = None) -> None:
        """Count an optimizer step.

        Args:
            images: of the step, over all ranks.
            waited: seconds that this rank waited for its batches.
            seconds: this rank's own working time; None where it wasn't measured,
                and then the interval has no straggler.
        """
        self._images += images
        self._waited += waited
        self._busy = None if seconds is None or self._busy is None else self._busy + seconds
        self._steps += 1
        self._marks.append(self._mark())

    def rates(self) -> dict[str, float | int | None]:
        """The rates of the module's table since the last reset; all ranks. On a GPU it waits for the device.

        Of wall times and step times, every rank returns its own.
        """
        elapsed = max(time.monotonic() - self._start, 1e-9)
        images_per_s = self._images / elapsed
        now = energy(self._device)
        joules = None if now is None or self._joules is None else now - self._joules
        own = (self._waited, self._busy, self._peak, joules)
        ranks = [own] if self._world is None else self._world.gather(own)  # all ranks
        waited, busy, peaks, energies = zip(*ranks, strict=True)
        peak, used = _total(peaks), _total(energies)
        straggler, straggler_rank = _straggler(busy)
        times = self._step_times()
        p50, p99 = np.percentile(times, (50, 99), method="inverted_cdf").tolist() if times else (None, None)
        return {
            "images_per_s": images_per_s,
            "step_s": elapsed / max(1, self._steps),
            "step_p50_s": p50,
            "step_p99_s": p99,
            "data_wait": max(waited) / elapsed,
            "mfu": self._flops_per_image * images_per_s / peak if peak and self._flops_per_image else None,
            "power_w": None if used is None else used / elapsed,
            "energy_j_per_image": used / self._images if used is not None and self._images else None,
            "straggler": straggler,
            "straggler_rank": straggler_rank,
        }

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _step_times(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _straggler(busy: Sequence[float | None]) -> tuple[float | None, int | None]:
    """(slowest / lower median, slowest rank); of two ranks that is slower / faster."""
    if len(busy) == 1:
        return 1.0, 0
    known = [seconds for seconds in busy if seconds is not None]
    middle = statistics.median_low(known) if len(known) == len(busy) else 0.0
    if middle <= 0:
        return None, None
    slowest = max(range(len(known)), key=lambda rank: known[rank])
    return known[slowest] / middle, slowest


class LossSpike:
    """Ratio of the loss of an interval to the median of the intervals before it.

    Knows the last `window` finite losses of this process: after a restart it begins anew, and the ratio is
    None until there are `least` of them.
    """

    def __init__(self, window: int = 50, least: int = 5) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._least = least

    def ratio(self, loss: float) -> float | None:
        """loss / median of the intervals before; None while they are few or their median is not positive."""
        ratio = None
        if len(self._losses) >= self._least and (middle := statistics.median(self._losses)) > 0:
            ratio = loss / middle
        if math.isfinite(loss):
            self._losses.append(loss)
        return ratio


def memory(device: torch.device) -> dict[str, float | None]:
    """GiB of this rank: peak of the device's allocator since the meter's last reset, and its resident set.

    On a CPU both are the resident set; None where the system has no /proc.
    """
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else None
    host = None if pages is None else pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else host
    return {"memory_gib": peak, "host_memory_gib": host}
