"""The measurement of ZeRO stages: real engines on two ranks, rows, and a memory figure that is one."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import stages
from segformer.distributed.world import World
from segformer.errors import ConfigError

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def bench(root, monkeypatch) -> Callable[[str], Any]:
    """Import a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(root))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.mark.slow
def test_stages_are_measured_on_two_ranks_and_compute_the_same(tmp_path, rows_of):
    small = {"crop": 32, "micro_batch": 1, "classes": 3, "warmup": 1, "steps": 2, "rounds": 2}
    stages.measure(stages.StagesBench(stages=["0", "3+offload"], variants=["b0"], ranks=2, **small), tmp_path)
    rows = rows_of(tmp_path / "stages.csv")
    assert [(row["variant"], row["stage"], row["ranks"]) for row in rows] == [
        ("b0", "0", "2"), ("b0", "3+offload", "2")
    ]  # fmt: skip
    assert {row["m_parameters"] for row in rows} == {"3.71"}
    for row in rows:
        for name in ("step_ms", "times_first", "peak_mib"):
            low, middle, high = (float(row[f"{name}_{part}"]) for part in ("min", "median", "max"))
            assert 0 < low <= middle <= high
        assert float(row["peak_mib_min"]) > float(row["ideal_mib"])
    assert rows[0]["times_first_max"] == "1.0"


def test_peak_memory_is_what_was_taken_even_where_it_was_given_back():
    memory = stages.Memory(ALONE)
    torch.ones(64 * 2**18)  # 64 MiB of fp32, freed at once
    assert memory.peak_mib() == pytest.approx(64, abs=4)
    again = stages.Memory(ALONE)
    assert again.peak_mib() < 4


def test_ideal_memory_is_that_of_the_paper():
    ideal = stages.ideal_mib
    # Rajbhandari et al. 2020, figure 1: 7.5e9 parameters on 64 ranks; in fp32, 16 bytes each.
    giga = 7.5e9 / 2**20
    found = [ideal(stage, 7.5e9, 64) for stage in range(4)]
    assert found == pytest.approx([giga * 16, giga * (8 + 8 / 64), giga * (4 + 12 / 64), giga * 16 / 64])


def test_a_stage_that_computes_something_else_ends_the_run():
    check = stages.check_losses
    check("b0", {"0": 1.0, "1": 1.0000004}, "fp32")
    with pytest.raises(RuntimeError, match=r"b0: stage 3 has a loss of 1\.01, stage 0 of 1"):
        check("b0", {"0": 1.0, "3": 1.01}, "fp32")
    check("b0", {"0": 1.0, "3": 1.01}, "bf16")


def test_settings_are_checked():
    for wrong, said in (
        ({"stages": ["4"]}, r"stages\.stages has 4; use 0, 1, 2, 3, 3\+offload"),
        ({"variants": ["b9"]}, r"stages\.variants has b9"),
        ({"variants": []}, r"stages\.variants is empty"),
        ({"rounds": 0}, r"rounds must be 1"),
        ({"crop": 16}, r"stages\.crop 0 or 32"),
    ):
        with pytest.raises(ConfigError, match=said):
            stages.StagesBench(**wrong)
