"""What the tests of the model share."""

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """Set torch's threads for one test: on several, fp32 linear maps of a CPU are oneDNN's convolutions."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(use_threads: Callable[[int], None]) -> None:
    """Two threads for one test."""
    use_threads(2)
