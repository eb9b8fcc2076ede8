"""Files that an older version (commit 28add37) wrote: tests/fixtures/28add37.tar.xz.

shards/   3 training images and 1 validation image of data_prep/sample
run/      a run of MiT-B0 with optim.ema=0.9, checkpoints of steps 10 and 20: floating-point tensor number i
          holds (i % 97 + step) / 100 in every place, its EMA 0.5 more, its moments 1e-4 and 2e-4 x step
export/   the export of step 20
"""

import tarfile
from pathlib import Path

import pytest
import torch

from segformer import SegFormer
from segformer.data.shards.format import ShardSet
from segformer.data.shards.verify import find_defects
from segformer.distributed.world import init_world
from segformer.training.config import RunConfig, compose, frozen_difference, load_config
from segformer.training.loop import train


@pytest.fixture(scope="module")
def old(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(root / "tests/fixtures/28add37.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_shards_are_whole(old):
    shards = ShardSet.open(old / "shards")
    assert [shards.split(name).num_samples for name in ("train", "val")] == [3, 1]
    assert find_defects(old / "shards") == []


@pytest.mark.parametrize("name", ["export", "run", "run/checkpoints/step-00000020"])
def test_weights_are_the_average_of_the_newest_step(old, name, monkeypatch):
    monkeypatch.chdir(old)
    model = SegFormer.from_pretrained(name)
    parameters = {parameter for parameter, _ in model.named_parameters()}
    for i, (key, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            value = (i % 97 + 20) / 100 + (0.5 if key in parameters else 0)
            torch.testing.assert_close(tensor, torch.full_like(tensor, value), msg=key)
    assert model.backbone.patch_embed1.norm.eps == 1e-5
    assert model.backbone.block1[0].norm1.eps == 1e-6


def test_its_command_means_the_same_settings_now(old):
    saved = load_config(old / "run/config.yaml")
    now = compose(RunConfig, "config", ["data=sample"])
    assert saved.data.image_suffix == ".jpg"  # the default of then
    assert not [line for line in frozen_difference(saved, now) if line.startswith("data.")]


def test_a_run_goes_on(old, monkeypatch, capsys):
    """Configuration, sample order, moments and EMA are restored; the last evaluation is made again, and what
    is finished stays as it is."""
    monkeypatch.chdir(old)
    cfg = load_config(Path("run/config.yaml"))
    before = {path: path.stat().st_mtime_ns for path in Path("run/checkpoints").rglob("*")}
    world = init_world()
    try:
        scores = train(cfg, world)
    finally:
        world.close()
    assert 0 <= scores.score <= 1
    assert "continuing from step 20" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("run/checkpoints").rglob("*")} == before
