"""A folder of JPEGs to masks: `predict` beside transformers' pipeline and the network alone.

Each side is a process of its own, all in turns, on the same 512 x 512 pictures and the same B0 with random
weights (transformers' is read from our export):
    ours           `predict`, save=[mask]: bytes to PNGs of ids
    overlay        the same with save=[mask,overlay], the default
    network        the same network on as many tensors, with the classes of all pixels; no file is touched
    transformers   pipeline("image-segmentation"), the only output that is asked for is its masks as PNG
What is timed begins when one picture is done. `predict` opens the model once more in that time.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.record import ROOT, conditions, spread, table, write_csv
from bench.synthetic import natural_image
from segformer.errors import at_least
from segformer.inference.predict import PredictConfig, predict
from segformer.inference.predictor import Predictor
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata

SIDES = ("ours", "overlay", "network", "transformers")
"""What is measured."""
SIZE = 512


@dataclass(kw_only=True, slots=True)
class PredictBench:
    """How much is predicted."""

    images: int = 40
    "Pictures of each turn."
    rounds: int = 3
    "Turns of each side."
    classes: int = 150
    "Classes of the network."
    threads: int = 2
    "Threads of PyTorch, on all sides."

    def __post_init__(self) -> None:
        at_least(self, "predict.", images=2, rounds=1, classes=2, threads=1)


def measure(cfg: PredictBench, output: Path) -> None:
    """Measure all sides in turns and write predict.csv."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(cfg, folder)
        for turn in range(cfg.rounds):
            for side in SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]:
                request = {"side": side, "folder": place, "threads": cfg.threads}
                command = [sys.executable, "-m", "bench.predict", json.dumps(request)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{side}: {done.stderr[-2000:]}")
                seconds[side].append(float(done.stdout.splitlines()[-1]) / cfg.images)
    rows = []
    for side, found in seconds.items():
        row: dict[str, Any] = {"side": side, "images": cfg.images, "classes": cfg.classes}
        row |= {f"ms_{name}": value for name, value in spread([1e3 * one for one in found]).items()}
        for other in ("network", "transformers"):
            pairs = [one / two for one, two in zip(found, seconds[other], strict=True)]
            row[f"over_{other}"] = spread(pairs)["median"]
        rows.append(row)
    print(table(rows))
    packages = ("torch", "numpy", "transformers", "pillow", "opencv-python-headless")
    write_csv(output / "predict.csv", rows, conditions(packages))


def _prepare(cfg: PredictBench, folder: Path) -> None:
    """The model as an export, and the pictures."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(norm_profile="hf"), cfg.classes).eval()
    model.save_pretrained(folder / "model", Metadata(classes=[f"class {k}" for k in range(cfg.classes)]))
    for name, count in (("first", 1), ("pictures", cfg.images)):
        (folder / name).mkdir()
        for index in range(count):
            pixels = natural_image((SIZE, SIZE), np.random.default_rng(index))
            Image.fromarray(pixels).save(folder / name / f"{index:04d}.jpg", quality=90)


def _ours(folder: Path, save: list[str]) -> Callable[[str], object]:
    def run(pictures: str) -> object:
        cfg = PredictConfig(
            checkpoint=str(folder / "model"),
            input=str(folder / pictures),
            output=str(folder / f"ours-{'-'.join(save)}-{pictures}"),
            save=save,
            device="cpu",
        )
        return predict(cfg)

    return run


def _network(folder: Path) -> Callable[[str], object]:
    predictor = Predictor(folder / "model", device="cpu")

    @torch.inference_mode()
    def run(pictures: str) -> object:
        for index, _ in enumerate((folder / pictures).iterdir()):
            image = torch.full((1, 3, SIZE, SIZE), index % 256, dtype=torch.uint8)
            predictor.read_out(predictor.logits(image), (SIZE, SIZE))
        return None

    return run


def _transformers(folder: Path) -> Callable[[str], object]:
    from transformers import pipeline

    segment = pipeline("image-segmentation", str(folder / "model"), device="cpu")

    def run(pictures: str) -> object:
        target = folder / f"theirs-{pictures}"
        target.mkdir(exist_ok=True)
        ids = {name: k for k, name in segment.model.config.id2label.items()}
        for path in sorted((folder / pictures).iterdir()):
            mask = np.zeros((SIZE, SIZE), np.uint8)
            for found in segment(str(path), subtask="semantic"):
                mask[np.asarray(found["mask"]) > 0] = ids[found["label"]]
            Image.fromarray(mask).save(target / f"{path.stem}.png")
        return None

    return run


def main(request: dict[str, Any]) -> None:
    """Time one side, in this process; what is printed last are seconds."""
    torch.set_num_threads(request["threads"])
    folder = Path(request["folder"])
    sides: dict[str, Callable[[], Callable[[str], object]]] = {
        "ours": lambda: _ours(folder, ["mask"]),
        "overlay": lambda: _ours(folder, ["mask", "overlay"]),
        "network": lambda: _network(folder),
        "transformers": lambda: _transformers(folder),
    }
    run = sides[request["side"]]()
    run("first")
    start = time.perf_counter()
    run("pictures")
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
