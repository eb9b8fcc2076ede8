"""How far an evaluation is, in lines."""

import pytest

from segformer.telemetry import progress


def test_an_evaluation_says_every_thirty_seconds_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    evaluated = progress.Evaluated(2000, lines.append)
    for _ in range(250):
        clock[0] += 1
        evaluated.add(8)  # 8 a second
    assert [line.split(",")[0] for line in lines] == [
        f"evaluated {n} of 2000 images" for n in range(240, 2000, 240)
    ]
    assert lines[0] == "evaluated 240 of 2000 images, 8.0 img/s, eta 3m40s"


def test_a_short_evaluation_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    with progress.evaluated(3, lines.append) as advance:
        for _ in range(3):
            advance(1)
    assert not lines
