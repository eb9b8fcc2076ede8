"""The picture of the first batch: what the network gets, and that training does not notice."""

from unittest.mock import Mock

import numpy as np
import pytest
import shapes
import torch
from PIL import Image

from segformer.data.loading.samples import Batch
from segformer.data.shards.format import ShardSet
from segformer.distributed.world import World
from segformer.evaluation import drawing
from segformer.evaluation.drawing import IGNORED
from segformer.training import header
from segformer.training.config import RunConfig, compose
from segformer.training.header import draw_first_batch
from segformer.training.task import make_task

WORLD = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


class Log:
    """A telemetry that keeps its lines."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture
def drawn(tmp_path, tiny_shards):
    """() -> (picture of a gray batch, brighter by 20, whose lower half is padding; the lines)."""
    cfg = compose(RunConfig, "config", ["data=sample", f"data.shards={tiny_shards}", f"run_dir={tmp_path}"])
    task = make_task(cfg, ShardSet.open(tiny_shards), WORLD)
    targets = torch.zeros(1, 384, 384, dtype=torch.uint8)
    targets[:, 192:] = 255
    batch = Batch(
        torch.full((1, 3, 384, 384), 100, dtype=torch.uint8),
        targets,
        torch.tensor([1]),
        photometric=torch.tensor([[20.0, 1, 1, 0, 1]]),
        valid=torch.tensor([[192, 384]]),
    )

    def draw():
        log = Log()
        draw_first_batch(cfg, WORLD, task, log, [batch], 0)
        return tmp_path / "train_batch.jpg", log.lines

    return draw


def test_the_first_batch_is_drawn_as_the_network_gets_it(drawn):
    before = torch.get_rng_state()
    path, lines = drawn()
    assert torch.equal(torch.get_rng_state(), before)
    assert str(path) in lines[0]
    with Image.open(path) as picture:
        pixels = np.asarray(picture).astype(int)
    gray = (np.abs(pixels - 120) < 4).all(2)
    assert abs(gray.sum() - 192 * 384) < 800, "distorted, not the pixels of the file"
    dimmed = (np.abs(pixels - IGNORED * np.array([123.675, 116.28, 103.53])) < 6).all(2)
    assert abs(dimmed.sum() - 192 * 384) < 800, "padding has the mean color and is ignored"


def test_a_picture_that_is_there_stays_and_a_full_disk_costs_only_the_picture(drawn, monkeypatch):
    path, _ = drawn()
    before = path.stat()
    assert drawn()[1] == []
    assert path.stat() == before
    path.unlink()
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(header, "write_picture", full)
    assert drawn()[1] == [f"no {path}: No space left on device"]


def test_a_classifier_s_batch_is_mixed_as_the_loss_gets_it_and_names_its_shares(tmp_path, monkeypatch):
    shards = ShardSet.open(shapes.write_set(tmp_path / "shapes", {"train": 3, "val": 3}))
    overrides = ["data=folder", "data.task=classification", f"data.shards={shards.root}"]
    more = ["classification.size=48", "classification.cutmix=1", "classification.mix_prob=1"]
    cfg = compose(RunConfig, "config", [*overrides, *more, f"run_dir={tmp_path}"])
    task, labels = make_task(cfg, shards, WORLD), torch.tensor([0, 1])
    grid = Mock(return_value=Image.new("RGB", (4, 4)))
    monkeypatch.setattr(drawing, "grid", grid)
    pixels = torch.tensor([10, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 48, 48)
    draw_first_batch(cfg, WORLD, task, Log(), [Batch(pixels, labels, labels)], 3)
    captions, pictures = zip(*grid.call_args.args[0], strict=True)
    box = (pictures[0] > 100).mean()
    shares = {"checks": 1 - box, "disc": box}
    first, second = sorted(shares, key=shares.__getitem__, reverse=True)
    assert captions[0] == f"{first} {shares[first]:.0%}, {second} {shares[second]:.0%}"
