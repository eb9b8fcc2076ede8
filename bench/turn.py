"""One turn of bench/rivals.py: a process that imports the project of PYTHONPATH, an older one perhaps.

PYTHONPATH=<checkout> python bench/turn.py '{"cell": ..., ...}'    prints seconds, result and MiB as JSON
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.contenders import Cell, batch_of, build, step_of

try:
    from segformer.models.ops.native import keep_freed_memory
except ImportError:  # an older commit

    def keep_freed_memory() -> None:
        """Nothing."""


def step(given: dict[str, Any]) -> Callable[[], float]:
    """A function that makes one step and gives a number that tells results apart."""
    cell = Cell.parse(given["cell"])
    images, target = batch_of(cell, cell.batch or 1, given["classes"], torch.device("cpu"))
    if given["runtime"] in ("onnxruntime", "openvino"):
        from bench.exports import session  # of this checkout

        opened, pixels = session(given["file"], given["runtime"], given["threads"]), images.numpy()
        return lambda: float(abs(opened(pixels)).mean())
    keep_freed_memory()
    ours = build("fused", cell.variant, given["classes"], Path(given["folder"]))
    run = step_of(ours.model, ours.run, cell.mode, (images, target), "fp32")
    return lambda: float(run().abs().mean())


def main(given: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, its result, and the most memory of this process in MiB."""
    torch.set_num_threads(given["threads"])
    run = step(given)
    run(), run()
    taken: list[float] = []
    result = 0.0
    while sum(taken) < given["seconds"] or len(taken) < 3:
        start = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - start)
    return {"seconds": median(taken), "result": result, "mib": peak_mib()}


def peak_mib() -> float:
    """The most memory of this process, MiB (Linux); getrusage would begin with that of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/turn.py '{...}' (started by launch/bench.py bench=rivals)")
    print(json.dumps(main(json.loads(sys.argv[1]))))
