"""Runs of a network that is small enough for many of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nano
import pytest

from segformer.models.variants import VARIANTS


@pytest.fixture(scope="module")
def small_in(tiny_in: Callable[[Path], Callable[..., list[str]]]) -> Iterator[Callable[..., Callable]]:
    """`tiny_in` with MiT-nano, which this process and train_many.py know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, *nano.SIZE)
        yield lambda folder: lambda name, *more: tiny_in(folder)(name, "model=nano", *more)


@pytest.fixture
def small(small_in: Callable[..., Callable], tmp_path: Path) -> Callable[..., list[str]]:
    """`tiny` with MiT-nano."""
    return small_in(tmp_path)
