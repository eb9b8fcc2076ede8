"""The rules of a comparison as short as can be, and the rows of a table."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.contest import Rules


@pytest.fixture
def rules() -> Callable[..., Rules]:
    """Rules of a run as short as can be."""

    def make(**changed) -> Rules:
        given = {
            "device": torch.device("cpu"),
            "precision": "fp32",
            "num_classes": 5,
            "threads": 1,
            "rounds": 1,
        }
        given |= {"turn_seconds": 0, "cell_seconds": 60, "deadline": math.inf, "memory": False}
        return Rules(**given | {"compile_mode": "default"} | changed)

    return make


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, str]]]:
    """The rows of a table, which all name the conditions of the measurement."""

    def read(path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert rows
        assert all(row[key] for row in rows for key in ("command", "commit", "date", "hardware", "versions"))
        return rows

    return read
