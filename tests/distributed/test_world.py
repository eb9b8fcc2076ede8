"""Worlds, seeds and synchronized batch norm; the ranks are real gloo processes."""

import contextlib
import os
import signal

import pytest
import torch
import torch.distributed as dist

from segformer.distributed import world
from segformer.distributed.rendezvous import Place
from segformer.distributed.world import StopFlag, derive_seed, init_world
from segformer.errors import SIGNALS, ConfigError, RankLost


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_ranks):
    """What two ranks of ranks.py found, and the batch that they shared."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(1)
    x = torch.randn(5, 6, 4, 3) * 3 + 10
    data = {"x": x, "weight": torch.randn_like(x), "shares": [2, 5]}
    torch.save(data, folder / "input.pt")
    run_ranks(2, "tests/distributed/ranks.py", str(folder))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)], data


def test_batch_norm_over_unequal_ranks_equals_one_batch(found):
    parts, data = found
    reference = torch.nn.Sequential(torch.nn.BatchNorm2d(6, momentum=0.3))
    whole = data["x"].clone().requires_grad_()
    y = reference(whole)
    (y * data["weight"]).sum().backward()
    assert torch.allclose(torch.cat([part["y"] for part in parts]), y, atol=1e-5)
    assert torch.allclose(torch.cat([part["grad_x"] for part in parts]), whole.grad, atol=1e-5)
    for part in parts:
        for got, parameter in zip(part["gradients"], reference.parameters(), strict=True):
            assert torch.allclose(got, parameter.grad, atol=1e-4)
        for got, buffer in zip(part["buffers"], reference.buffers(), strict=True):
            assert torch.allclose(got, buffer, atol=1e-5)
        assert part["names"] == list(reference.state_dict())
    evaluated = reference.eval()(data["x"])
    assert torch.allclose(torch.cat([part["evaluated"] for part in parts]), evaluated, atol=1e-5)


def test_ranks_agree(found):
    for rank in found[0]:
        assert rank["collectives"] == [True, False, [0, 1]]
        assert rank["main"] == 0


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed(0, "step", 1) == derive_seed(0, "step", 1)
    assert len({derive_seed(seed, "step", step) for seed in range(10) for step in range(10)}) == 100
    # pinned: a change would break the bit-for-bit continuation of existing runs
    assert derive_seed(0, "step", 1, 0, 0) == 8644710782108860644


def test_a_signal_sets_the_flag_a_second_interrupt_stops_at_once_and_others_change_nothing():
    before = [signal.getsignal(number) for number in SIGNALS]
    with contextlib.suppress(KeyError), StopFlag() as stop:
        for number in SIGNALS:  # SIGINT is the last
            os.kill(os.getpid(), number)
            assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise KeyError  # as the error that a stopped run ends by
    assert signal.getsignal(signal.SIGINT) == before[-1]
    try:
        for number in SIGNALS[:-1]:  # the process ends now: a second signal must not change how
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_who_finishes_in_spite_of_a_signal_can_be_stopped_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_signal_the_old_handlers_come_back_and_nohup_stays():
    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[SIGNALS.index(signal.SIGHUP)])
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (dist.DistStoreError("Wait timeout"), RankLost),
        (RuntimeError("Gloo connectFullMesh failed with [...] Connect timeout"), RankLost),  # one has ended
        (dist.DistBackendError("Duplicate GPU detected : rank 1 and rank 0"), dist.DistBackendError),
    ],
)
def test_a_rank_that_is_gone_is_worth_another_start_and_a_wrong_device_is_not(monkeypatch, error, kind):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setattr(world, "meet", lambda *_: dist.HashStore())
    with pytest.raises(kind):
        world._join(Place(0, 2, 0, 2, "here", 1), torch.device("cpu"), 1.0)


@pytest.fixture
def one_gpu_each(monkeypatch):
    """Task 2 of 4 on a node, where torch sees one GPU; the process group is there already."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    values = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "SLURM_LOCALID": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_a_task_that_slurm_gave_one_gpu_takes_it(one_gpu_each):
    world = init_world()
    assert (world.rank, world.local_rank, world.device) == (2, 2, torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed chooses its device by it"


def test_ranks_of_torchrun_do_not_share_the_one_gpu_of_a_task(one_gpu_each, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own"):
        init_world()


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_each_rank_takes_the_mig_slice_of_its_own(one_gpu_each, monkeypatch, launcher):
    """torch sees one GPU however many slices are visible."""
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,MIG-c,MIG-d")
    assert init_world().device == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-c"
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own"):
        init_world()
