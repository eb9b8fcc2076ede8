"""Ours beside this very checkout and the two runtimes, at the least that can be timed."""

import subprocess
import sys

import numpy as np
import pytest

from bench import rivals, turn
from bench.record import ROOT
from segformer.errors import ConfigError, SegformerError

SHORT = {"classes": 3, "rounds": 1, "seconds": 0, "threads": 1}


# transformers' network is traced: the exporter of today takes minutes.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_contenders_take_turns_with_the_same_result(tmp_path, rows_of):
    cells = ["training/b0/64x64/2", "inference/b0/64x96/1"]
    rivals.measure(rivals.RivalsBench(cells=cells, baseline=str(ROOT), **SHORT), tmp_path)
    rows = rows_of(tmp_path / "rivals.csv")
    assert [(row["cell"], row["contender"]) for row in rows] == [
        *((cells[0], name) for name in ("ours", "baseline")),
        *((cells[1], name) for name in ("ours", "baseline", "onnxruntime", "openvino")),
    ]
    for row in rows:
        assert float(row["ms_min"]) <= float(row["ms_median"]) <= float(row["ms_max"])
        assert float(row["peak_mib"]) > 100
        assert float(row["difference"]) < 1e-4
    assert {row["times_ours_median"] for row in rows if row["contender"] == "ours"} == {"1.00"}


def test_a_contender_that_computes_something_else_ends_the_measurement(tmp_path, monkeypatch):
    results = {"ours": 1.0, "baseline": 1.001}
    monkeypatch.setattr(
        rivals, "_turn", lambda name, *_: {"seconds": 1.0, "mib": 1.0, "result": results[name]}
    )
    cfg = rivals.RivalsBench(cells=["training/b0/64x64/1"], baseline=str(ROOT), **SHORT)
    with pytest.raises(
        SegformerError, match=r"training/b0/64x64/1: the results of ours and baseline differ by 0.001"
    ):
        rivals.measure(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_memory_of_a_turn_is_its_own():
    """This process holds more than the one that it starts."""
    held = np.ones(40 << 20)  # 320 MiB, touched
    code = "from bench.turn import peak_mib; print(peak_mib())"
    child = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))
    assert child + held.nbytes / 2**21 < turn.peak_mib()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"baseline": "/nowhere"}, "no checkout of the project; make one: git worktree add"),
        ({"runtimes": ["tvm"]}, "rivals.runtimes has tvm; use onnxruntime, openvino"),
        ({"cells": ["inference/b0/64x64/max"]}, "only bench=peers seeks"),
        ({"rounds": 0}, "rivals.rounds"),
    ],
)
def test_settings_that_can_not_be_measured_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        rivals.RivalsBench(**given)
