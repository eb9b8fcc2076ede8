"""Worlds, seeds and synchronized batch norm; the ranks are real gloo processes."""

import os
import signal

import pytest
import torch

from segformer.distributed.world import SIGNALS, StopFlag, derive_seed, init_world, slurm_environment
from segformer.errors import ConfigError


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


def test_a_half_set_environment_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        init_world()


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert derive_seed(0, "step", 1) == derive_seed(0, "step", 1)
    assert len({derive_seed(seed, "step", step) for seed in range(10) for step in range(10)}) == 100
    # pinned: a change would break the bit-for-bit continuation of existing runs
    assert derive_seed(0, "step", 1, 0, 0) == 8644710782108860644


def test_a_signal_sets_the_flag_a_second_interrupt_stops_at_once_and_the_old_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag() as stop:
        for number in SIGNALS:  # SIGINT is the last
            os.kill(os.getpid(), number)
            assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


STEP = {  # what srun gives to task 5 of a step of 7 tasks on 3 nodes
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,09]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def test_a_task_of_srun_has_its_rank_from_slurm():
    found = slurm_environment(STEP)
    assert {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
    }.items() <= found.items()
    assert found["MASTER_ADDR"] == "gpu03"
    last = slurm_environment(STEP | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert last["LOCAL_WORLD_SIZE"] == "1"
    assert last["MASTER_PORT"] == found["MASTER_PORT"]
    other = slurm_environment(STEP | {"SLURM_STEP_ID": "3"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"], "two steps may share a node"
    assert 1024 < int(found["MASTER_PORT"]) < 65536
    single = slurm_environment(STEP | {"SLURM_STEP_NODELIST": "login-1,gpu2"})
    assert single["MASTER_ADDR"] == "login-1"


@pytest.mark.parametrize(
    "changed",
    [{"SLURM_STEP_ID": ""}, {"SLURM_STEP_ID": "batch"}, {"SLURM_STEP_NUM_TASKS": "1"}],
)
def test_a_batch_script_or_a_single_task_is_a_world_of_one(changed):
    assert slurm_environment(STEP | changed) == {}


def test_an_incomplete_step_of_srun_is_refused_by_name():
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        slurm_environment({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})
    with pytest.raises(ConfigError, match="TASKS_PER_NODE=many"):
        slurm_environment(STEP | {"SLURM_STEP_TASKS_PER_NODE": "many"})


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
