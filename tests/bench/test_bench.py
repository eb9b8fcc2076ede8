"""The measurements run in seconds with tiny settings and write their columns; no time is asserted."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import inflated, loader, memory, naive, order, start, synthetic
from launch.bench import BenchConfig
from segformer.data.loading.crop import AugmentConfig
from segformer.errors import ConfigError

FLAT_MIB = 24  # allowed growth of a process between the third and the tenth epoch


# Stock webdataset leaves its tar open when its iterator is dropped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_the_loader_is_measured_against_both_pipelines_in_both_modes(tmp_path, rows_of):
    threads = torch.get_num_threads()
    loader.measure(loader.LoaderBench(sets="ade", images=4, batch=2, batches=1, repeats=2), "", tmp_path)
    assert torch.get_num_threads() == threads
    rows = rows_of(tmp_path / "loader.csv")
    whole = {(row["pipeline"], row["mode"]) for row in rows if not row["pipeline"].startswith("stage")}
    assert whole == {
        (pipeline, mode)
        for pipeline in ("ours", "files", "webdataset")
        for mode in ("in process", "1 worker")
    }
    assert {row["pipeline"] for row in rows if row["pipeline"].startswith("stage")} == {
        f"stage: {name}" for name in loader.STAGES
    }
    for row in rows:
        assert float(row["cpu_ms_min"]) <= float(row["cpu_ms_median"]) <= float(row["cpu_ms_max"])
        if row["times_ours"]:
            rate = float(row["images_per_s_per_core"])
            assert float(row["cores_for_1000_images_per_s"]) == pytest.approx(1000 / rate, abs=0.01, rel=0.01)


@pytest.mark.parametrize("kind", ["camvid", "ade"])
def test_pictures_made_here_cost_the_bytes_of_real_ones(kind, tmp_path):
    wanted = synthetic.KINDS[kind]
    folder = synthetic.write_folder(tmp_path / kind, wanted, 2)
    sizes = [path.stat().st_size for path in (folder / "images/train").iterdir()]
    assert np.mean(sizes) == pytest.approx(wanted.bytes, rel=0.1)
    mask = synthetic.cells(wanted, np.random.default_rng(0))
    assert mask.shape == wanted.size
    assert len(np.unique(mask)) > 5


def test_the_naive_pipeline_gives_what_a_model_takes():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), np.uint8)
    mask = np.repeat(np.arange(5, dtype=np.uint8), 14)[None].repeat(50, 0)
    cfg = AugmentConfig(crop=[32, 48], resize=[80, 60], scale=[1.0, 1.0])
    for bgr in (True, False):
        pixels, labels = naive.augment(image, mask, cfg, rng, bgr=bgr)
        assert pixels.shape == (3, 32, 48)
        assert pixels.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 4}
    same = {"crop": [50, 70], "resize": [70, 50], "scale": [1.0, 1.0]}
    plain = AugmentConfig(**same, hflip=0, cat_max_ratio=1, photometric=False)
    pixels, labels = naive.augment(image, mask, plain, rng, bgr=True)
    expected = (image[..., ::-1] - np.array(plain.mean)) / np.array(plain.std)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), expected, atol=1e-4)
    np.testing.assert_array_equal(labels, mask)


def test_a_start_is_measured_on_a_set_that_is_valid(tmp_path, rows_of):
    folder = synthetic.write_folder(tmp_path / "folder", synthetic.KINDS["camvid"], 3)
    shards = inflated.inflate(folder, tmp_path / "many", 1000, 11)
    split = shards.split("train")
    assert split.num_samples == 1002
    assert len(set(split.keys)) == 1002
    label = int(split.labels(0)[0][0])
    assert {0, 3, 999} <= set(split.samples_with(label).tolist())
    start.measure(start.StartBench(samples=100, images=3, workers="0", repeats=1), tmp_path)
    (row,) = rows_of(tmp_path / "start.csv")
    assert {"samples", "workers", "open_s", "first_batch_s"} <= row.keys()


@pytest.mark.slow
def test_memory_stays_over_ten_epochs(tmp_path, rows_of):
    memory.measure(memory.MemoryBench(images=24, epochs=10, workers=1, batch=4), "", tmp_path)
    rows = rows_of(tmp_path / "memory.csv")
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 11)]
    for process in ("trainer_mib", "worker_0_mib"):
        assert float(rows[9][process]) - float(rows[2][process]) < FLAT_MIB, process


@pytest.mark.slow
def test_the_command_measures_the_order(root, tmp_path, rows_of):
    command = [sys.executable, "launch/bench.py", f"output={tmp_path}", "bench=order"]
    command += ["order.samples='500,20000'", "order.batches=5", "order.repeats=1"]
    subprocess.run(command, cwd=root, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)
    rows = rows_of(tmp_path / "order.csv")
    assert [row["samples"] for row in rows] == ["500", "20000"]
    assert {"build_s", "first_ids_s", "batch_ms", "next_epoch_s", "peak_mib"} <= rows[0].keys()
    assert rows[0]["command"].startswith("python launch/bench.py")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="use one of loader, order, start, memory, peers"):
        BenchConfig(bench="speed")
    with pytest.raises(ConfigError, match=r"loader\.sets names kitti"):
        loader.LoaderBench(sets="kitti")
    with pytest.raises(ConfigError, match=r"order\.samples='0'"):
        order.OrderBench(samples="0")
