"""Ranks: who this process is, the few collectives that training needs, seeds.

Owns torch.distributed. Launchers describe the world by environment variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT: `deepspeed`, `torchrun` and our Slurm entry all set them; in a job step of `srun`
they are made from Slurm's own); with none of them set the process is a world of one. A partly set environment
is refused.

Control messages (flags, small objects) travel over gloo on the CPU also where tensors travel over NCCL, so
that agreeing on a stop never makes the host wait for the device.

SIGTERM, SIGUSR2 and Ctrl-C only set a flag (StopFlag): collectives in a signal handler would meet other
ranks' ones.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segformer.errors import ConfigError, SegformerError, reraise_as

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_T = TypeVar("_T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


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
        return bool(self.sum(torch.tensor([float(flag)])).item() > 0)

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
        """Leave the process group, so that the interpreter ends without warnings."""
        if dist.is_initialized():
            dist.destroy_process_group()
            # A thread of gloo may still be dropping the tensors of the last collective, which takes the
            # interpreter. Where that has begun to end, the process seems to abort ("terminate called without
            # an active exception", twice in about 100 starts on a busy machine): give the thread its turn.
            time.sleep(0.2)


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


def init_world(timeout_s: float = 600.0) -> World:
    """Join the process group that the environment describes; a world of one when it describes none.

    Raises:
        ConfigError: some, but not all, of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set; or
            there are GPUs, but fewer than ranks.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        alone = ("0", "1", "0", "127.0.0.1", str(free_port()))
        os.environ.update(slurm_environment(os.environ) or zip(_ENVIRONMENT, alone, strict=True))
    if missing := [name for name in _ENVIRONMENT if name not in os.environ]:
        raise ConfigError(
            f"the environment names a rank but not {', '.join(missing)}; start with `deepspeed`, `torchrun` "
            "or plain python, or unset RANK and WORLD_SIZE"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        of_slurm = os.environ.get("SLURM_LOCALID") == str(local_rank)
        own_gpu_only = of_slurm and "TORCHELASTIC_RUN_ID" not in os.environ and torch.cuda.device_count() == 1
        index = 0 if own_gpu_only else local_rank  # --gpus-per-task=1: every task knows its GPU as the first
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start as many ranks as GPUs (or set CUDA_VISIBLE_DEVICES to nothing, for the CPU)"
            )
        device = torch.device("cuda", index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed chooses its device by it
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    return World(
        rank=rank,
        local_rank=local_rank,
        size=size,
        # torchrun and Slurm set the first, deepspeed the second
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size),
        device=device,
    )


def limit_threads(world: World) -> None:
    """Share the cores of a machine without GPUs between its ranks, unless OMP_NUM_THREADS has been set."""
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


class StopFlag:
    """Set by a signal; the loop looks at it once a step. Restores the previous handlers when it is left."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
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
