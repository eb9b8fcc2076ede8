"""Rendezvous: how the ranks of a run find each other, or learn in one line why they can't.

Launchers describe the ranks by environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT: `deepspeed`, `torchrun` and our Slurm entry all set them; in a job step of `srun` they are made
from Slurm's own); with none of them set the process is a world of one. An environment that is set in part, or
whose values can't be, is refused.

    rank zero    listens at MASTER_ADDR:MASTER_PORT and keeps the store there (of torchrun the agent does)
    every rank   reaches the store, says that it has come, and waits for the others

Every NEWS_S seconds, the first time after FIRST_NEWS_S, the first of the ranks that came says how many did
and which are missing; after `timeout_s` all of them end. Nothing here waits for longer than a second at once,
so that a signal is handled while ranks wait.
"""

from __future__ import annotations

import math
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from segformer.errors import (
    START_ALONE,
    ConfigError,
    RankLost,
    SegformerError,
    listed,
    reason_of,
    reported,
    reraise_as,
)

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_NEWS_S, NEWS_S, POLL_S = 5.0, 30.0, 0.2
UNKNOWN_S = 60.0  # after which a name that no name server knows is a wrong one; a node may come up late


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among the others, and where they meet."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and the like for a task of an `srun` job step of several tasks; {} outside of one.

    A batch script is no such step, although Slurm describes it by some of the same variables: it has no
    SLURM_STEP_ID of a number. The port follows from the job and step, so that steps on one node differ.

    Raises:
        ConfigError: Slurm's variables are incomplete.
    """
    step, tasks = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not step.isdigit() or tasks == "1":
        return {}
    what = "this looks like a step of srun, but a variable of Slurm is missing or no number"
    with reraise_as(ConfigError, what, on=(KeyError, ValueError)):
        # Below the ephemeral ports; another one after a requeue, whose old one may still be taken.
        attempt = int(environment.get("SLURM_RESTART_COUNT", "0"))
        port = 20000 + (int(environment["SLURM_JOB_ID"]) * 131 + attempt * 17 + int(step)) % 12000
        nodes, node = environment["SLURM_STEP_NODELIST"], int(environment.get("SLURM_NODEID", "0"))
        first = re.sub(r"\[(\w+)[^]]*]", r"\1", nodes).split(",")[0]  # gpu[03-05,9],cpu1 -> gpu03
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": _tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], node),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first,
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        }


def _tasks_on_node(text: str, node: int) -> str:
    """The tasks of a node from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    counts = [count for count, times in found for _ in range(int(times or 1))]
    if not counts:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text} can't be read")
    return counts[min(node, len(counts) - 1)]


def find_place() -> Place:
    """The place of this process, which the environment describes from now on, as DeepSpeed expects it to.

    Raises:
        ConfigError: some, but not all, of ENVIRONMENT are set; or one has a value that it can't have.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        alone = ("0", "1", "0", "127.0.0.1", str(free_port()))
        os.environ.update(slurm_environment(os.environ) or zip(ENVIRONMENT, alone, strict=True))
    if missing := [name for name in ENVIRONMENT if not os.environ.get(name)]:
        raise ConfigError(f"the environment names a rank but not {', '.join(missing)}; {START_ALONE}")
    size = _number("WORLD_SIZE", 1, 10**6)
    # torchrun and Slurm set LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), "WORLD_SIZE")
    return Place(
        rank=_number("RANK", 0, size - 1),
        size=size,
        local_rank=_number("LOCAL_RANK", 0, size - 1),
        local_size=_number(local, 1, size),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 1, 2**16 - 1),
    )


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(
            f"{name}={text!r} in the environment must be a number from {least} to {most}; {START_ALONE}"
        )
    return int(text)


def meet(place: Place, timeout_s: float) -> Store:
    """The store that all ranks share, once all have come to it; all ranks.

    Raises:
        ConfigError: MASTER_ADDR is not known, here or to the name server.
        RankLost: the port is taken, the address does not answer, or not every rank came in time.
    """
    if place.size == 1:
        return HashStore()
    wait = _Wait(place, timeout_s)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = _listen(place) if place.rank == 0 and not agent else None
    _reach(place, wait)
    # torchrun keeps its store when it starts its ranks again, perhaps another number of them.
    start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{place.size}"
    store = PrefixStore(start, _open_store(place, wait, listener))
    with reraise_as(RankLost, f"the store of the ranks at {place} has ended", wait.hint, on=DistError):
        _gather(place, wait, store)
    return store


class _Wait:
    """How long ranks wait for each other, and what they hear of it."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        self._begin, self._timeout_s, self._next = time.monotonic(), timeout_s, FIRST_NEWS_S
        self.hint = "look at the first error of the other ranks, and at MASTER_ADDR and MASTER_PORT"
        if place.size > 1 and "SLURM_STEP_ID" in os.environ and "SLURM_PTY_PORT" in os.environ:
            self.hint = "in an interactive shell of srun `unset SLURM_STEP_ID` makes it a single process"
        self._prefix = f"[rank {place.rank}] " if place.rank else ""

    @property
    def left(self) -> float:
        """Seconds."""
        return self._timeout_s - self._waited

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._begin

    def sleep(
        self, news: Callable[[], str], kind: type[SegformerError] = RankLost, most: float = math.inf
    ) -> None:
        """Wait a little; tell `news` ("" for none) when it is time, and raise them when time is over."""
        end = min(self._timeout_s, most)
        if self._waited >= end:
            raise self._ended(news(), kind, end)
        time.sleep(min(POLL_S, max(0.0, end - self._waited)))
        if self._waited >= self._next:
            self._next = self._waited + NEWS_S
            if text := news():
                line = f"{self._prefix}{text}; waiting for {max(0.0, end - self._waited):.0f} s more"
                print(line, file=sys.stderr, flush=True)

    def _ended(self, news: str, kind: type[SegformerError], end: float) -> BaseException:
        """The error of the rank that speaks, and the silent end of the others."""
        if not news:
            return SystemExit(kind.exit_code)
        return kind(f"{news} after {end:.0f} s; {self.hint}")


def _listen(place: Place) -> int:
    """The file descriptor of rank zero's listening socket, on every network of this machine."""
    both = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if both else (socket.AF_INET, "")
    what = f"0 of {place.size} ranks have met, rank zero can't listen at {place}"
    do = "end the process that has the port, or set another MASTER_PORT"
    with reraise_as(RankLost, what, do):
        return socket.create_server((host, place.port), family=family, dualstack_ipv6=both).detach()


def _reach(place: Place, wait: _Wait) -> None:
    """Wait until something listens at the address: rank zero may start later, on a node that does, too."""
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=1.0):
                return
        except OSError as error:
            unknown = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
            why = reason_of(error)
        what = f"rank {place.rank} of {place.size} can't reach rank zero at {place} ({why})"
        # One of a node speaks: on that of rank zero, which may be dead, the one after it, too.
        news = partial(str, what if place.local_rank <= (place.rank == place.local_rank) else "")
        if unknown:
            wait.sleep(news, ConfigError, UNKNOWN_S)
        else:
            wait.sleep(news)


def _open_store(place: Place, wait: _Wait, listener: int | None) -> Store:
    """The store at the address, opened in a thread: where none answers, torch waits for ever."""
    found: queue.SimpleQueue[Store | Exception] = queue.SimpleQueue()

    def connect() -> None:
        with reported(found.put, on=RuntimeError):
            store = TCPStore(
                place.address,
                place.port,
                place.size,
                is_master=listener is not None,
                timeout=timedelta(seconds=max(1.0, wait.left)),
                wait_for_workers=False,
                master_listen_fd=listener,
            )
            found.put(store)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    while True:
        with suppress(queue.Empty):
            store = found.get(timeout=POLL_S)
            if isinstance(store, Exception):
                what = f"no rendezvous of {place.size} ranks at {place}"
                raise RankLost(f"{what}: {reason_of(store)}; {wait.hint}")
            return store
        wait.sleep(lambda: f"what listens at {place} is not rank zero of {place.size}")


def _gather(place: Place, wait: _Wait, store: Store) -> None:
    """Say that this rank has come, and wait for the others."""
    if store.add(f"come/{place.rank}", 1) > 1:
        raise ConfigError(f"two processes at {place} say that they are RANK={place.rank} of {place.size}")
    store.add("come", 1)

    def news() -> str:
        missing = [rank for rank in range(place.size) if not store.check([f"come/{rank}"])]
        came = place.size - len(missing)
        if any(rank not in missing for rank in range(place.rank)):
            return ""  # a rank before this one speaks
        names = listed(map(str, missing))
        return f"{came} of {place.size} ranks have come to {place}, not rank {names}"

    while store.add("come", 0) < place.size:
        wait.sleep(news)
