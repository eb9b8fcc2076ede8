"""A tiny network in a server: in this process, and started."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nano
import pytest
import torch

from segformer.inference.predictor import Predictor
from segformer.inference.serving.app import build_app
from segformer.inference.serving.batching import Batcher
from segformer.inference.serving.serve import LOOPBACK
from segformer.models.segformer import build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.bundle import Metadata

ROOT = Path(__file__).resolve().parents[3]
CLASSES, PALETTE = ["road", "tree", "sky"], [[0, 0, 0], [0, 200, 80], [250, 120, 10]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("served") / "export"
    VARIANTS.update([nano.SIZE])
    try:
        model = build_model(ModelConfig(variant="nano"), 3).eval()
        model.save_pretrained(out, Metadata(classes=CLASSES, palette=PALETTE))
        yield out
    finally:
        del VARIANTS["nano"]


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu")


@pytest.fixture
def batcher(predictor):
    found = Batcher(predictor, batch=3, most=300_000)
    yield found
    found.close()


@pytest.fixture
def door(batcher):
    return build_app(batcher, {"checkpoint": "x"}, most=200_000, queue=4, timeout=20, hosts=LOOPBACK)


@pytest.fixture(scope="module")
def started(checkpoint):
    """(address, process) of a started server; it ends with exit code 0 when it is told to."""
    command = [sys.executable, "tests/nano.py", "launch/serve.py", f"checkpoint={checkpoint}", "port=0"]
    command += ["device=cpu", "timeout=10", "queue=6", "long_side=256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.match(r"serve: (http://127\.0\.0\.1:\d+)/ .*3 classes: road, tree, sky", line)
            assert found, line
            yield found[1], process
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
