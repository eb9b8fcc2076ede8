"""Modules of bench/ by name, and the rules of a comparison as short as can be."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of bench/ by its name."""
    monkeypatch.syspath_prepend(str(root))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def rules(bench: Any) -> Callable[..., Any]:
    """Rules of a run as short as can be."""

    def make(**changed: Any) -> Any:
        given = {"device": CPU, "precision": "fp32", "num_classes": 5, "threads": 1, "rounds": 1}
        given |= {"turn_seconds": 0, "cell_seconds": 60, "deadline": math.inf, "memory": False}
        return bench("contest").Rules(**given | {"compile_mode": "default"} | changed)

    return make
