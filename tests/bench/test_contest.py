"""What becomes of contenders that differ, fail or don't fit: a note, and the others go on."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segformer.errors import SegformerError

CPU = torch.device("cpu")


@pytest.fixture
def biased(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contender `reference` has one weight of its own."""
    contest, build = bench("contest"), bench("contenders").build

    def changed(name: str, *arguments: Any, **options: Any) -> Any:
        contender = build(name, *arguments, **options)
        if name == "reference":
            contender.model.decode_head.linear_pred.bias.data[0] += 0.01
        return contender

    monkeypatch.setattr(contest, "build", changed)


def test_a_contender_that_computes_something_else_is_not_timed(
    bench: Any, rules: Any, biased: None, tmp_path: Path
) -> None:
    contenders, contest = bench("contenders"), bench("contest")
    contenders.write_weights("b0", 5, tmp_path / "b0")
    cell = contenders.Cell.parse("inference/b0/64x64/1")
    _, entries = contest.hold(cell, ["fused", "reference", "original"], tmp_path / "b0", rules())
    assert [len(entry.seconds) for entry in entries] == [1, 0, 1]
    assert [entry.wrong for entry in entries] == [False, True, False]
    assert entries[1].note.startswith("logits or loss differ by ")
    assert entries[1].difference > 1e-5


def test_a_run_measures_all_others_and_then_names_what_differed(
    bench: Any, biased: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench("peers"), "peaks", lambda *_: None)  # takes seconds
    cfg = bench("peers").PeersBench(
        cells=["inference/b0/64x64/1", "inference/b0/32x64/1"], contenders=["reference", "original"],
        rounds=1, turn_seconds=0, threads=1, memory=False,
    )  # fmt: skip
    with pytest.raises(SegformerError, match=r"64x64/1: reference: .* differ .*; inference/b0/32x64/1: ref"):
        bench("peers").measure(cfg, "cpu", tmp_path)
    with (tmp_path / "peers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [bool(row["ms_median"]) for row in rows] == [False, True, False, True]
    assert [row["note"].startswith("logits or loss differ") for row in rows] == [True, False, True, False]


def test_a_cell_that_fails_as_a_whole_leaves_the_others_their_rows(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, hold = bench("peers"), bench("contest").hold

    def sometimes(cell: Any, *arguments: Any) -> Any:
        if cell.size == (64, 64):
            raise RuntimeError("CUDA error: misaligned address\nmore")
        return hold(cell, *arguments)

    monkeypatch.setattr(peers, "hold", sometimes)
    monkeypatch.setattr(peers, "peaks", lambda *_: None)
    cfg = peers.PeersBench(
        cells=["inference/b0/64x64/1", "inference/b0/32x64/1"], contenders=["original"],
        rounds=1, turn_seconds=0, threads=1, memory=False,
    )  # fmt: skip
    with pytest.raises(SegformerError, match=r"64x64/1: RuntimeError: CUDA error: misaligned address$"):
        peers.measure(cfg, "cpu", tmp_path)
    assert len((tmp_path / "peers.csv").read_text().splitlines()) == 2


def fake(bench: Any, name: str, most: int, error: Callable[[str], Exception] = torch.OutOfMemoryError) -> Any:
    """An entry whose steps fail above `most` images."""

    def logits(images: torch.Tensor) -> torch.Tensor:
        if len(images) > most:
            raise error("CUDA ran out of memory\nmore")
        return images.sum((2, 3))

    contenders = bench("contenders")
    functions = contenders.Functions(logits, lambda images, target: logits(images).sum())
    contender = contenders.Contender(name, torch.nn.Linear(1, 1), functions, functions)
    return bench("contest").Entry(name, contender=contender)


def test_the_largest_batch_is_that_of_ours_and_transformers(bench: Any, rules: Any) -> None:
    contest = bench("contest")
    cell = bench("contenders").Cell.parse("inference/b0/32x32/max")
    entries = [fake(bench, "fused", 100), fake(bench, "transformers", 11), fake(bench, "original", 2)]
    assert contest.largest_batch(cell, entries, rules()) == 8
    assert contest.largest_batch(cell, entries[2:], rules()) == 2


def test_any_error_while_the_largest_batch_is_sought_is_shown_and_means_that_it_does_not_fit(
    bench: Any, rules: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = bench("contenders").Cell.parse("inference/b0/32x32/max")
    entry = fake(bench, "transformers", 11, RuntimeError)
    assert bench("contest").largest_batch(cell, [entry], rules()) == 8
    assert capsys.readouterr().out == f"{cell}: transformers does not fit 16 images: CUDA ran out of memory\n"


@pytest.mark.parametrize(
    ("most", "deadline", "batch", "notes"),
    [
        (5, math.inf, 4, ["", ""]),
        (1, math.inf, 1, ["", ""]),
        (0, math.inf, 1, ["", "out of memory"]),
        (5, 0.0, 8, ["", "left out: the time limit of peers.minutes"]),
    ],
)
def test_the_largest_batch_is_halved_until_what_is_compiled_fits_too(
    bench: Any, rules: Any, monkeypatch: pytest.MonkeyPatch,
    most: int, deadline: float, batch: int, notes: list[str],
) -> None:  # fmt: skip
    contest = bench("contest")
    monkeypatch.setattr(contest, "LARGEST_BATCH", 8)
    limits = {"fused": 100, "fused+compile": most}
    monkeypatch.setattr(contest, "build", lambda name, *_, **__: fake(bench, name, limits[name]).contender)
    cell = bench("contenders").Cell.parse("inference/b0/32x32/max")
    found, entries = contest.hold(cell, list(limits), Path(), rules(deadline=deadline))
    assert found == batch
    assert [entry.note for entry in entries] == notes
    assert [len(entry.seconds) for entry in entries] == [1, int(not notes[1])]


def test_the_batch_stays_where_warming_again_would_take_too_long(
    bench: Any, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest, clock = bench("contest"), iter(range(0, 10**6, 10))
    monkeypatch.setattr(contest, "LARGEST_BATCH", 8)
    monkeypatch.setattr(contest, "time", SimpleNamespace(
        monotonic=lambda: next(clock), perf_counter=lambda: next(clock)
    ))  # fmt: skip
    limits = {"fused": 100, "fused+compile": 5}
    monkeypatch.setattr(contest, "build", lambda name, *_, **__: fake(bench, name, limits[name]).contender)
    cell = bench("contenders").Cell.parse("inference/b0/32x32/max")
    found, entries = contest.hold(cell, list(limits), Path(), rules(deadline=45))
    assert (found, entries[1].note) == (8, "out of memory")


@pytest.mark.parametrize(
    ("name", "error", "note", "wrong"),
    [
        ("fused", "cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", "out of memory", False),
        ("transformers", "an odd stride\nmore", "RuntimeError: an odd stride", False),
        ("fused+compile", "an odd stride\nmore", "RuntimeError: an odd stride", True),
    ],
)
def test_an_error_becomes_a_note_and_one_of_ours_is_wrong(
    bench: Any, rules: Any, name: str, error: str, note: str, wrong: bool
) -> None:
    contest, contenders = bench("contest"), bench("contenders")
    entry = fake(bench, name, 0, lambda _: RuntimeError(error))
    cell = contenders.Cell.parse("inference/b0/32x32/1")
    contest._warm(cell, entry, contenders.batch_of(cell, 1, 5, CPU), rules())
    assert (entry.note, entry.wrong, entry.contender) == (note, wrong, None)


def test_where_the_yardstick_fails_the_next_one_is_taken(bench: Any, rules: Any) -> None:
    cell = bench("contenders").Cell.parse("inference/b0/32x32/1")
    entries = [fake(bench, "fused", 9), fake(bench, "transformers", 0), fake(bench, "original", 9)]
    bench("contest").compare(cell, entries, rules())
    assert [entry.note for entry in entries] == ["", "out of memory", ""]
    assert [entry.difference for entry in entries] == [0, None, 0]


def test_memory_is_over_that_of_both_forms_of_ours(bench: Any, rules: Any) -> None:
    peers, entry = bench("peers"), bench("contest").Entry
    entries = [
        entry("fused", peak_mib=200.0, seconds=[1.0]), entry("fused+compile", peak_mib=160.0, seconds=[0.5]),
        entry("transformers", peak_mib=320.0, seconds=[2.0]), entry("original", note="out of memory"),
    ]  # fmt: skip
    cell = bench("contenders").Cell.parse("training/b0/32x32/2")
    rows = peers.rows_of(cell, 2, entries, rules(), None)
    assert [row["memory_fused"] for row in rows] == [1, 0.8, 1.6, None]
    assert [row["memory_compiled"] for row in rows] == [1.25, 1, 2, None]
    text = peers.shown(cell, 2, rows)
    assert "MiB / fused  MiB / compiled" in text
    assert max(map(len, text.splitlines())) < 200
    assert {row["memory_compiled"] for row in peers.rows_of(cell, 2, entries[::2], rules(), None)} == {None}


def test_without_a_measurement_there_is_no_picture(bench: Any, rules: Any, tmp_path: Path) -> None:
    cell, entry = bench("contenders").Cell.parse("training/b0/32x32/2"), bench("contest").Entry
    rows = bench("peers").rows_of(cell, 2, [entry("fused", note="out of memory")], rules(), None)
    bench("picture").draw(rows, tmp_path / "peers.png")
    assert not any(tmp_path.iterdir())


def test_a_contender_without_memory_or_time_keeps_a_row_with_the_reason(bench: Any, rules: Any) -> None:
    contest, contenders = bench("contest"), bench("contenders")
    cell = contenders.Cell.parse("inference/b0/32x32/4")
    data = contenders.batch_of(cell, 4, 5, CPU)
    entries = [fake(bench, "original", 2), fake(bench, "fused+compile", 9), fake(bench, "fused", 9)]
    for entry in entries:
        contest._warm(cell, entry, data, rules(deadline=0.0))
    contest.take_turns(entries, rules(rounds=3))
    assert [entry.note for entry in entries] == [
        "out of memory",
        "left out: the time limit of peers.minutes",
        "",
    ]
    assert [len(entry.seconds) for entry in entries] == [0, 0, 3]


def test_turns_rotate_and_end_at_the_time_limit_after_three_rounds(bench: Any, rules: Any) -> None:
    contest, order = bench("contest"), []
    entries = [contest.Entry(name, contender=SimpleNamespace(model=torch.nn.Linear(1, 1))) for name in "abc"]
    for entry in entries:
        entry.step = lambda name=entry.name: order.append(name)
    contest.take_turns(entries, rules(rounds=9, cell_seconds=0))
    assert "".join(order[::2]) == "abcbcacab", "every second step is the one that is not timed"
    assert [len(entry.seconds) for entry in entries] == [3, 3, 3]
