"""What becomes of contenders that differ, fail or don't fit: a note, and the others go on."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import contenders, contest, peers, picture
from bench.contenders import Cell
from bench.contest import Entry
from segformer.errors import SegformerError

CPU = torch.device("cpu")


def test_a_run_measures_what_it_can_and_then_names_what_failed_or_differed(tmp_path, monkeypatch, rows_of):
    """A cell that fails as a whole, then one in which `reference` has one weight of its own."""
    build, hold = contest.build, peers.hold

    def biased(name, *arguments, **options):
        contender = build(name, *arguments, **options)
        if name == "reference":
            contender.model.decode_head.linear_pred.bias.data[0] += 0.01
        return contender

    def sometimes(cell, *arguments):
        if cell.size == (64, 64):
            raise RuntimeError("CUDA error: misaligned address\nmore")
        return hold(cell, *arguments)

    monkeypatch.setattr(contest, "build", biased)
    monkeypatch.setattr(peers, "hold", sometimes)
    monkeypatch.setattr(peers, "peaks", lambda *_: None)  # takes seconds
    cfg = peers.PeersBench(
        cells=["inference/b0/64x64/1", "inference/b0/32x64/1"], contenders=["reference", "original"],
        rounds=1, turn_seconds=0, threads=1, memory=False,
    )  # fmt: skip
    wanted = (
        r"64x64/1: RuntimeError: CUDA error: misaligned address; inference/b0/32x64/1: reference: .* differ "
    )
    with pytest.raises(SegformerError, match=wanted):
        peers.measure(cfg, "cpu", tmp_path)
    different, good = rows_of(tmp_path / "peers.csv")
    assert (different["ms_median"], good["note"]) == ("", "")
    assert different["note"].startswith("logits or loss differ by ")
    assert float(good["ms_median"]) > 0


def fake(name, most, error=torch.OutOfMemoryError):
    """An entry whose steps fail above `most` images."""

    def logits(images):
        if len(images) > most:
            raise error("CUDA ran out of memory\nmore")
        return images.sum((2, 3))

    functions = contenders.Functions(logits, lambda images, target: logits(images).sum())
    return Entry(name, contender=contenders.Contender(name, torch.nn.Linear(1, 1), functions, functions))


@pytest.mark.slow
def test_the_largest_batch_is_that_of_ours_and_transformers(rules, capsys):
    cell = Cell.parse("inference/b0/32x32/max")
    entries = [fake("fused", 100), fake("transformers", 11, RuntimeError), fake("original", 2)]
    assert contest.largest_batch(cell, entries, rules()) == 8
    assert capsys.readouterr().out == f"{cell}: transformers does not fit 16 images: CUDA ran out of memory\n"
    assert contest.largest_batch(cell, entries[2:], rules()) == 2


@pytest.mark.parametrize(
    ("most", "deadline", "batch", "notes"),
    [
        (5, math.inf, 4, ["", ""]),
        (0, math.inf, 1, ["", "out of memory"]),
        (5, 0.0, 8, ["", "left out: the time limit of peers.minutes"]),
    ],
)
@pytest.mark.slow
def test_the_largest_batch_is_halved_until_what_is_compiled_fits_too(
    rules, monkeypatch, most, deadline, batch, notes
):
    monkeypatch.setattr(contest, "LARGEST_BATCH", 8)
    limits = {"fused": 100, "fused+compile": most}
    monkeypatch.setattr(contest, "build", lambda name, *_, **__: fake(name, limits[name]).contender)
    cell = Cell.parse("inference/b0/32x32/max")
    found, entries = contest.hold(cell, list(limits), Path(), rules(deadline=deadline))
    assert found == batch
    assert [entry.note for entry in entries] == notes
    assert [len(entry.seconds) for entry in entries] == [1, int(not notes[1])]


@pytest.mark.parametrize(
    ("name", "error", "note", "wrong"),
    [
        ("fused", "cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", "out of memory", False),
        ("transformers", "an odd stride\nmore", "RuntimeError: an odd stride", False),
        ("fused+compile", "an odd stride\nmore", "RuntimeError: an odd stride", True),
    ],
)
def test_an_error_becomes_a_note_and_one_of_ours_is_wrong(rules, name, error, note, wrong):
    entry = fake(name, 0, lambda _: RuntimeError(error))
    cell = Cell.parse("inference/b0/32x32/1")
    contest._warm(cell, entry, contenders.batch_of(cell, 1, 5, CPU), rules())
    assert (entry.note, entry.wrong, entry.contender) == (note, wrong, None)


def test_where_the_yardstick_fails_the_next_one_is_taken(rules):
    entries = [fake("fused", 9), fake("transformers", 0), fake("original", 9)]
    contest.compare(Cell.parse("inference/b0/32x32/1"), entries, rules())
    assert [entry.note for entry in entries] == ["", "out of memory", ""]
    assert [entry.difference for entry in entries] == [0, None, 0]


def test_memory_is_over_that_of_both_forms_of_ours(rules):
    entries = [
        Entry("fused", peak_mib=200.0, seconds=[1.0]), Entry("fused+compile", peak_mib=160.0, seconds=[0.5]),
        Entry("transformers", peak_mib=320.0, seconds=[2.0]), Entry("original", note="out of memory"),
    ]  # fmt: skip
    cell = Cell.parse("training/b0/32x32/2")
    rows = peers.rows_of(cell, 2, entries, rules(), None)
    assert [row["memory_fused"] for row in rows] == [1, 0.8, 1.6, None]
    assert [row["memory_compiled"] for row in rows] == [1.25, 1, 2, None]
    text = peers.shown(cell, 2, rows)
    assert "MiB / fused  MiB / compiled" in text
    assert max(map(len, text.splitlines())) < 200
    assert {row["memory_compiled"] for row in peers.rows_of(cell, 2, entries[::2], rules(), None)} == {None}


def test_without_a_measurement_there_is_no_picture(rules, tmp_path):
    entry = Entry("fused", note="out of memory")
    picture.draw(
        peers.rows_of(Cell.parse("training/b0/32x32/2"), 2, [entry], rules(), None), tmp_path / "a.png"
    )
    assert not any(tmp_path.iterdir())


def test_turns_rotate_and_end_at_the_time_limit_after_three_rounds(rules):
    order = []
    entries = [Entry(name, contender=SimpleNamespace(model=torch.nn.Linear(1, 1))) for name in "abc"]
    for entry in entries:
        entry.step = lambda name=entry.name: order.append(name)
    contest.take_turns([*entries, Entry("left out")], rules(rounds=9, cell_seconds=0))
    assert "".join(order[::2]) == "abcbcacab", "every second step is the one that is not timed"
    assert [len(entry.seconds) for entry in entries] == [3, 3, 3]
