"""Peak memory of a contender's steps, above what is there when the model is loaded.

GPU: the most that torch's allocator held during a step, less what it held before.

CPU: a process of its own for every contender, with the allocator as the system sets it up. The process loads
everything, touches every weight and input, gives what is free back to the system, reads its resident memory,
resets the kernel's high-water mark (5 > /proc/self/clear_refs, Linux), runs STEPS steps and reads the mark.
Weights are not in the difference, gradients and activations are. Not for compiled contenders: compiling
leaves more memory behind than a step takes.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.contenders import Cell, batch_of, build, step_of
from bench.record import ROOT

STEPS = 2
STATUS, MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Request:
    """What a process of its own is to run."""

    contender: str
    cell: str
    num_classes: int
    folder: str
    precision: str
    threads: int


def cuda_peak_mib(step: Callable[[], Tensor]) -> float:
    """MiB that one step takes on the GPU above what is held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_peak_mib(request: Request) -> float | None:
    """MiB that STEPS steps take above the loaded model; None where there is no /proc or too little memory."""
    if not MARKS.exists():
        return None
    command = [sys.executable, "-m", "bench.footprint", json.dumps(asdict(request))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == -9:  # the kernel's answer to too little memory
        return None
    if done.returncode != 0:
        raise RuntimeError(f"{request.contender}: {done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def measure(request: Request) -> float:
    """MiB of this process's peak in STEPS steps, above its resident memory before them."""
    torch.set_num_threads(request.threads)
    cell = Cell.parse(request.cell)
    names = (request.contender, cell.variant, request.num_classes, Path(request.folder))
    contender = build(*names)
    data = batch_of(cell, cell.batch or 1, request.num_classes, torch.device("cpu"))
    step = step_of(contender.model, contender.run, cell.mode, data, request.precision)
    for tensor in [*contender.model.parameters(), *contender.model.buffers()]:
        tensor.detach().sum()  # a file that is mapped, not read, becomes resident
    del tensor
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc: what loading left free is not in use
        trim(0)
    MARKS.write_text("5")
    before = _status("VmRSS")
    for _ in range(STEPS):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(measure(Request(**json.loads(sys.argv[1]))))
