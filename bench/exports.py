"""Our ONNX file beside transformers' of the same weights, in ONNX Runtime and in OpenVINO: time of an image.

transformers' file is traced (torch.onnx.export) at the very size that is timed, with constant shapes; ours
has open ones. Each turn is a process of its own, and the two files take turns, so that a slow minute of the
machine slows both; ratios are formed within a round. Logits are compared first.

    python -m bench.exports '{"file": ..., ...}'      the fields of Turn; prints seconds of an image as JSON
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.record import ROOT, conditions, spread, table, write_csv
from segformer.errors import ConfigError, at_least

RUNTIMES = ("onnxruntime", "openvino")
TOLERANCE = 1e-4  # of the greatest logit


@dataclass(kw_only=True, slots=True)
class ExportsBench:
    """What is timed, and how long."""

    variants: list[str] = field(default_factory=lambda: ["b0", "b2", "b5"])
    "Sizes of the network."
    side: int = 512
    "Height and width of the image."
    classes: int = 150
    "Classes of the network."
    threads: int = 2
    "Threads of a runtime."
    rounds: int = 5
    "Turns of each file in each runtime."
    seconds: float = 5
    "Time of a turn, after two runs that are not timed."

    def __post_init__(self) -> None:
        at_least(self, "exports.", side=64, classes=1, threads=1, rounds=1, seconds=0)


@dataclass(frozen=True, slots=True)
class Turn:
    """One process."""

    file: str
    runtime: str
    side: int
    threads: int
    seconds: float


def measure(cfg: ExportsBench, out: Path) -> list[dict[str, Any]]:
    """Measure every size and write exports.csv into `out`."""
    rows: list[dict[str, Any]] = []
    for variant in cfg.variants:
        with TemporaryDirectory() as scratch:
            files = write_files(variant, cfg.classes, cfg.side, Path(scratch))
            for runtime in RUNTIMES:
                rows += _turns(cfg, variant, runtime, files)
    write_csv(out / "exports.csv", rows, conditions(("torch", "transformers", "onnx", *RUNTIMES)))
    print(table(rows))
    return rows


def write_files(variant: str, classes: int, side: int, folder: Path) -> dict[str, Path]:
    """The two ONNX files of one network with random weights."""
    import torch
    from transformers import SegformerForSemanticSegmentation

    from segformer.inference.exports.graph import to_onnx
    from segformer.models.segformer import build_model
    from segformer.models.variants import ModelConfig

    torch.manual_seed(0)
    model = build_model(ModelConfig(variant=variant, norm_profile="hf"), classes).eval()
    model.save_pretrained(folder / "weights")
    theirs = SegformerForSemanticSegmentation.from_pretrained(folder / "weights").eval()

    files = {name: folder / f"{name}.onnx" for name in ("ours", "transformers")}
    files["ours"].write_bytes(to_onnx(model))
    trace(theirs, (1, 3, side, side), files["transformers"])
    return files


def trace(model: Any, shape: tuple[int, ...], file: Path) -> None:
    """Write transformers' network as an ONNX file for images of one shape, logits alone."""
    import torch

    class Logits(torch.nn.Module):
        """The tensor alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            return self.model(pixel_values=images).logits

    with torch.no_grad():  # the exporter by tracing: that by torch.export takes 3 minutes for b0
        torch.onnx.export(Logits().eval(), (torch.zeros(shape),), file, dynamo=False, opset_version=17)


def _turns(cfg: ExportsBench, variant: str, runtime: str, files: dict[str, Path]) -> list[dict[str, Any]]:
    image = np.random.default_rng(0).standard_normal((1, 3, cfg.side, cfg.side)).astype(np.float32)
    ours, theirs = (session(str(file), runtime, cfg.threads)(image) for file in files.values())
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= TOLERANCE:
        raise ConfigError(f"{variant} in {runtime}: the two files differ by {difference:.2g}; not timed")
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for number in range(cfg.rounds):
        for name in (*files,) if number % 2 else (*reversed(files),):
            turn = Turn(str(files[name]), runtime, cfg.side, cfg.threads, cfg.seconds)
            command = [sys.executable, "-m", "bench.exports", json.dumps(asdict(turn))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            seconds[name].append(json.loads(done.stdout))
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    common = {"variant": variant, "runtime": runtime, "side": cfg.side, "threads": cfg.threads}
    return [
        common
        | {"file": name, "MB": round(files[name].stat().st_size / 1e6, 1), "rounds": cfg.rounds}
        | {f"ms_{key}": value for key, value in spread([1e3 * s for s in seconds[name]], 3).items()}
        | {
            "times_as_fast": f"{median(ratios):.2f}" if name == "ours" else "1",
            "difference": f"{difference:.1g}",
        }
        for name in files
    ]


def session(file: str, runtime: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function of images."""
    if runtime == "openvino":
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
        return lambda images: request.infer([images])[0].copy()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda images: opened.run(None, {name: images})[0]


def run_turn(turn: Turn) -> float:
    """Median seconds of an image."""
    run = session(turn.file, turn.runtime, turn.threads)
    image = np.random.default_rng(0).standard_normal((1, 3, turn.side, turn.side)).astype(np.float32)
    run(image), run(image)
    taken: list[float] = []
    while sum(taken) < turn.seconds or len(taken) < 3:
        start = time.perf_counter()
        run(image)
        taken.append(time.perf_counter() - start)
    return median(taken)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.exports '{...}' (started by launch/bench.py bench=exports)")
    print(json.dumps(run_turn(Turn(**json.loads(sys.argv[1])))))
