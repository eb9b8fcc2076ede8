"""Which errors say that the other side of a collective is gone; what a guard does is in distributed/."""

import contextlib
import shutil

import pytest
import torch

from segformer.distributed.watchdog import Watchdog, is_lost_rank
from segformer.distributed.world import World

LOST = [  # as gloo, NCCL, the store and the system word them
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:63693",
    "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete",
    "Socket Timeout",
    "Broken pipe",
    "No route to host",
    "The client socket has timed out after 60000ms while trying to connect to (n0, 29511)",
    "NCCL error: unhandled system error: Call to recv failed: Connection closed by remote peer",
    "CUDA error: uncorrectable ECC error encountered",
]
OWN = [
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "Expected all tensors to be on the same device",
]


@pytest.mark.parametrize("text", LOST)
def test_an_error_that_another_rank_has_caused(text):
    assert is_lost_rank(RuntimeError(text))
    assert not is_lost_rank(ValueError(text))


@pytest.mark.parametrize("text", OWN)
def test_an_error_of_this_rank(text):
    assert not is_lost_rank(RuntimeError(text))


def test_a_run_that_is_removed_ends_by_its_own_error(tmp_path):
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
    with contextlib.suppress(KeyError), Watchdog(tmp_path / "run/stacks", world, 60.0):
        shutil.rmtree(tmp_path / "run")
        raise KeyError
