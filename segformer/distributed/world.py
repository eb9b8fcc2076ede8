"""Ranks: who this process is, the few collectives that training needs, seeds.

Owns torch.distributed, beside rendezvous.py, by which the ranks find each other.

Control messages (flags, small objects) travel over gloo on the CPU also where tensors travel over NCCL, so
that agreeing on a stop never makes the host wait for the device.

SIGTERM, SIGHUP, SIGUSR2 and Ctrl-C only set a flag (StopFlag): collectives in a signal handler would meet
other ranks' ones.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segformer.distributed.rendezvous import Place, find_place, meet
from segformer.errors import SIGNALS, ConfigError, RankLost, SegformerError, reason_of

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a run as one of them sees them."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank zero, which alone writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place; all ranks call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on all ranks where `flag` is set on one; all ranks call it."""
        return self.begin_any(flag)()

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """`any`, exchanged while this rank goes on; calling the result waits for it. All ranks call both."""
        count = torch.tensor([float(flag)])
        work = dist.all_reduce(count, async_op=True) if self.size > 1 else None

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(count.item() > 0)

        return answer

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], _T]) -> _T:
        """Run `function` on rank zero and give its result to all ranks.

        What it raises ends every rank, and only rank zero reports it: one mistake, one line.
        """
        outcome: list[Any] = [None, None]  # the result, the exit code
        failure = None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                failure = error
                outcome[1] = error.exit_code if isinstance(error, SegformerError) else 1
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise SystemExit(outcome[1])
        return outcome[0]

    def close(self) -> None:
        """Leave the process group, so that the interpreter ends without warnings.

        A process alone keeps it until then: DeepSpeed holds on to the first group that it sees.
        """
        if self.size > 1:
            _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo may still be dropping the tensors of the last collective, which takes the
        # interpreter. Where that has begun to end, the process seems to abort ("terminate called without
        # an active exception", twice in about 100 starts on a busy machine): give the thread its turn.
        time.sleep(0.2)


def _mig_slices() -> list[str]:
    """The MIG slices that are visible, where there are several: CUDA shows a process the first alone."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible if len(visible) > 1 and visible[0].startswith("MIG-") else []


def init_world(timeout_s: float = 600.0) -> World:
    """Join the process group that the environment describes; a world of one when it describes none.

    Raises:
        ConfigError, RankLost: the environment is wrong, or the ranks can't meet (rendezvous.py); or there are
            GPUs, but fewer than ranks.
    """
    place = find_place()
    device = torch.device("cpu")
    slices = _mig_slices()
    if own_slice := place.local_rank < len(slices):
        os.environ["CUDA_VISIBLE_DEVICES"] = slices[place.local_rank]
    if torch.cuda.is_available():
        of_slurm = os.environ.get("SLURM_LOCALID") == str(place.local_rank)
        alone = of_slurm and "TORCHELASTIC_RUN_ID" not in os.environ and torch.cuda.device_count() == 1
        # --gpus-per-task=1: its GPU is the first
        index = 0 if own_slice or (alone and not slices) else place.local_rank
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {place.local_rank} has no GPU of its own, there are {torch.cuda.device_count()};"
                " start as many ranks as GPUs (or set CUDA_VISIBLE_DEVICES to nothing, for the CPU)"
            )
        device = torch.device("cuda", index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed chooses its device by it
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(place, device, timeout_s)
    return World(
        rank=place.rank,
        local_rank=place.local_rank,
        size=place.size,
        local_size=place.local_size,
        device=device,
    )


def _join(place: Place, device: torch.device, timeout_s: float) -> None:
    """Make the process group; all ranks."""
    store, on_gpu = meet(place, timeout_s), device.type != "cpu"
    if place.size == 1:
        atexit.register(_leave)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    except RuntimeError as error:
        # Of gloo it has no type of its own. NCCL's is a DistBackendError, of a GPU that two ranks have, say.
        lost = isinstance(error, (dist.DistStoreError, dist.DistNetworkError))
        if not lost and "connectFullMesh failed" not in str(error):
            raise
        what = f"the {place.size} ranks met at {place} but can't connect: {reason_of(error)}"
        raise RankLost(f"{what}; look at the first error of the other ranks") from error


def limit_threads(world: World) -> None:
    """Share the cores of a machine without GPUs between its ranks, unless OMP_NUM_THREADS has been set."""
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


class StopFlag:
    """Set by a signal; the loop looks at it once a step. Only the main thread of a process may listen to
    signals: in another one nothing sets it.

    Restores the previous handlers when it is left; but where an error leaves it after a signal, the process
    is about to end, and only Ctrl-C still does something (errors.ending). SIGHUP that is ignored (nohup)
    stays so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopFlag:
        nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        here = threading.current_thread() is threading.main_thread()
        taken = [number for number in SIGNALS if here and number not in nohup]
        self._previous = {number: signal.signal(number, self._set) for number in taken}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            if kind is None or self.signal is None or number == signal.SIGINT:
                signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on PYTHONHASHSEED or versions)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)  # all ranks
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)  # all ranks
        return total
