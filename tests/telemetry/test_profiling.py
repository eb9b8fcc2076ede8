"""The profile of a few steps of a real model: a trace that can be read, a table that names what is slow."""

import dataclasses
import gzip
import json
import re
import resource
from pathlib import Path

import pytest
import torch

from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.telemetry.profiling import ProfileConfig, Profiler

MAIN = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


def train(profiler, steps, work=lambda: torch.ones(3).sum()):
    for step in steps:
        with profiler.step(step):
            work()
    profiler.close()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Folder and lines of a run of 5 steps of which 2 and 3 are profiled."""
    folder, lines = tmp_path_factory.mktemp("run"), []
    model, images = build_model(ModelConfig(), 3), torch.randn(2, 3, 64, 64)
    profiler = Profiler(ProfileConfig(steps=[2, 3]), folder, MAIN, lines.append)
    train(profiler, range(1, 6), lambda: model(images).sum().backward())
    return folder / "profile", lines


def test_the_trace_holds_the_operations_of_the_steps_that_were_asked_for(profiled):
    folder, _ = profiled
    events = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("optimizer step") == 2
    embeddings = [event for event in events if event.get("name") == "aten::conv2d"]
    first = [e for e in embeddings if e["args"]["Input Dims"][1] == [32, 3, 7, 7]]
    assert len(first) == 2, "one first patch embedding a step, forward only"
    assert first[0]["args"]["Input Dims"][0] == [2, 3, 64, 64]


def test_the_table_names_the_slow_operations_with_their_shapes(profiled):
    folder, said = profiled
    assert said[0] == "profiling from step 2 to 3: these steps are slower"
    assert "trace-rank0.json.gz" in said[1]
    assert said[2].endswith("table.txt")
    lines = (folder / "table.txt").read_text().splitlines()
    assert lines[0] == "steps 2 to 3 of rank 0"
    header = next(line for line in lines if "Self CPU %" in line)
    rows = [line for line in lines if re.search(r"aten::\w*convolution .* \[\[2, \d+, \d+, \d+\]", line)]
    assert rows, "\n".join(lines)
    shares = [float(found[1]) for line in lines if (found := re.match(r".*?\s(\d+\.\d+)%", line))]
    assert len(shares) == 40
    assert shares == sorted(shares, reverse=True), header


@pytest.mark.parametrize(
    ("rank", "steps", "files"),
    [(0, [1, 1], set()), (1, [1, 1], {"trace-rank1.json.gz", "table.txt"}), (1, [], set())],
)
def test_only_the_ranks_and_steps_that_are_named_are_written(tmp_path, rank, steps, files):
    world = dataclasses.replace(MAIN, rank=rank)
    train(Profiler(ProfileConfig(steps=steps, ranks=[1]), tmp_path, world, lambda _: None), [1])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == files


def test_the_steps_whose_times_say_nothing_are_known():
    profiler = Profiler(ProfileConfig(steps=[2, 3]), Path(), MAIN)
    assert [profiler.covers(step) for step in (1, 2, 3, 4)] == [False, True, True, False]
    assert not Profiler(ProfileConfig(), Path(), MAIN).covers(1)
    assert Profiler(ProfileConfig(steps=[2, 3]), Path(), dataclasses.replace(MAIN, rank=1)).covers(2)


def test_a_run_that_ends_or_starts_within_the_steps_profiles_what_it_has(tmp_path):
    lines = []
    train(Profiler(ProfileConfig(steps=[1, 9]), tmp_path / "ends", MAIN, lines.append), [1, 2])
    assert "steps 1 to 2" in lines[1]
    train(Profiler(ProfileConfig(steps=[1, 4]), tmp_path / "starts", MAIN, lines.append), [3, 4, 5])
    assert "steps 3 to 4" in (tmp_path / "starts/profile/table.txt").read_text()


def test_a_step_that_fails_keeps_its_error_and_another_profile_can_start(tmp_path):
    profiler = Profiler(ProfileConfig(steps=[1, 2]), tmp_path, MAIN)
    with pytest.raises(ZeroDivisionError), profiler.step(1):
        1 / 0  # noqa: B018
    profiler.close()
    train(Profiler(ProfileConfig(steps=[1, 1]), tmp_path, MAIN), [1])


@pytest.mark.faults
def test_a_full_disk_costs_the_profile_and_not_the_run(tmp_path):
    lines = []
    profiler = Profiler(ProfileConfig(steps=[1, 1]), tmp_path, MAIN, lines.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        train(profiler, [1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "can't be written" in lines[-1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("wrong", [{"steps": [3]}, {"steps": [4, 3]}, {"steps": [0, 3]}, {"ranks": []}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"profile\.{next(iter(wrong))}"):
        ProfileConfig(**wrong)
