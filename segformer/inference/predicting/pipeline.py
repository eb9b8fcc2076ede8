"""Work that is done ahead, in threads, while the network computes: decoding before it, writing behind it.

    pictures -> ahead(decode) -> same_size -> network -> ahead(write) -> done

A chain of generators: who takes a result from its end drives it all. Held at a time: `depth` pictures being
decoded and as many being written, and at most two batches of decoded ones that wait for others of their size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Protocol, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="Shaped")


class Shaped(Protocol):
    """What has a shape, as arrays have."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, channels."""


def ahead(pool: Executor, function: Callable[[_T], _R], items: Iterable[_T], depth: int) -> Iterator[_R]:
    """`function` of each item, in their order; up to `depth` further ones are begun before one is taken."""
    running: deque[Future[_R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > depth:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def same_size(items: Iterable[tuple[_T, _S]], batch: int) -> Iterator[list[tuple[_T, _S]]]:
    """Groups of up to `batch` items of one shape; where two batches wait, the largest group leaves."""
    waiting: dict[tuple[int, ...], list[tuple[_T, _S]]] = {}
    for item in items:
        group = waiting.setdefault(item[1].shape, [])
        group.append(item)
        if len(group) == batch:
            yield waiting.pop(item[1].shape)
        elif sum(map(len, waiting.values())) == 2 * batch:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()
