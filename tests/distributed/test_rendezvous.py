"""Ranks that meet, or say in one line why they can't; they are threads of this process."""

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, Store, TCPStore

from segformer.distributed import rendezvous
from segformer.distributed.rendezvous import Place, find_place, free_port, meet, slurm_environment
from segformer.errors import ConfigError, RankLost


@pytest.fixture
def ranks():
    """(address, size, ranks, timeout_s) -> what became of each of the ranks that started."""

    def start(address: str, size: int, who: list[int], timeout_s: float = 10.0) -> list[Future[Store]]:
        port = free_port()
        with ThreadPoolExecutor(len(who)) as pool:
            places = [Place(rank, size, rank, size, address, port) for rank in who]
            return [pool.submit(meet, place, timeout_s) for place in places]

    return start


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_ranks_meet_in_one_store_in_whichever_order_they_come(ranks, address):
    stores = [future.result() for future in ranks(address, 3, [2, 1, 0])]
    assert [store.add("key", 1) for store in stores] == [1, 2, 3]


def test_a_world_of_one_needs_no_port():
    assert isinstance(meet(Place(0, 1, 0, 1, "no-such-node.invalid", 1), 1.0), HashStore)


def test_the_first_of_the_ranks_that_came_says_who_is_missing(ranks, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "FIRST_NEWS_S", 0.5)
    monkeypatch.setattr(rendezvous, "NEWS_S", 0.6)
    first, other = ranks("127.0.0.1", 5, [0, 2], timeout_s=2.0)
    what = r"2 of 5 ranks have come to MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+, not rank 1, 3, 4"
    with pytest.raises(RankLost, match=what + " after 2 s; look at the first error"):
        first.result()
    assert isinstance(other.exception(), SystemExit | RankLost)  # RankLost: rank zero took the store along
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in (2, 3), lines
    assert all(line.startswith("2 of 5 ranks have come to ") and " s more" in line for line in lines)


def test_an_interactive_shell_of_srun_is_told_how_to_be_a_single_process(ranks, monkeypatch):
    for name, value in {**STEP, "SLURM_PTY_PORT": "4000"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match="`unset SLURM_STEP_ID` makes it a single process"):
        ranks("127.0.0.1", 7, [0], timeout_s=0.5)[0].result()
    monkeypatch.delenv("SLURM_STEP_ID")
    assert find_place().size == 1


def test_two_processes_of_one_rank_are_refused(ranks):
    outcomes = [future.exception() for future in ranks("127.0.0.1", 3, [0, 1, 1], timeout_s=1.0)]
    assert "say that they are RANK=1 of 3" in "".join(str(error) for error in outcomes)
    assert sorted(type(error).__name__ for error in outcomes[1:])[0] == "ConfigError"


@pytest.fixture
def other_server():
    """The port of a server that is no rank zero and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "address", "error", "what"),
    [
        (0, "127.0.0.1", RankLost, "0 of 2 ranks have met, rank zero can't listen at .*already in use"),
        (
            1,
            "127.0.0.1",
            RankLost,
            "what listens at MASTER_ADDR=127.0.0.1 .* is not rank zero of 2 ",
        ),
        (
            1,
            "::1",
            RankLost,
            r"rank 1 of 2 can't reach .* at MASTER_ADDR=::1 .*\(Connection refused\)",
        ),
        (1, "no-such-node.invalid", ConfigError, r"MASTER_ADDR=no-such-node.invalid .*not known\) after 1 s"),
    ],
)
def test_who_can_not_meet_says_where_and_why(other_server, rank, address, error, what):
    with pytest.raises(error, match=what) as caught:
        meet(Place(rank, 2, 0, 2, address, other_server), 1.0)
    assert "\n" not in str(caught.value)


def test_a_name_that_nobody_knows_is_not_waited_for_as_a_late_rank_is(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "UNKNOWN_S", 0.5)
    with pytest.raises(ConfigError, match="after 0 s"):
        meet(Place(4, 6, 0, 2, "no-such-node.invalid", 1), 1800.0)
    with pytest.raises(SystemExit):  # the first rank of its node has said so
        meet(Place(5, 6, 1, 2, "no-such-node.invalid", 1), 1800.0)


def test_ranks_that_torchrun_starts_again_meet_in_the_store_of_the_first_start(monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        places = [Place(rank, 2, rank, 2, "127.0.0.1", agent.port) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            stores = list(pool.map(lambda place: meet(place, 10.0), places))
        assert [store.add("key", 1) for store in stores] == [1, 2]


def test_a_store_that_ends_is_a_lost_rank():
    port = free_port()
    store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(meet, Place(1, 2, 1, 2, "127.0.0.1", port), 30.0)
        while not store.check(["0/2/come/1"]):
            time.sleep(0.01)
        del store  # as rank zero does when it ends
        with pytest.raises(RankLost, match=f"the store of the ranks at .*{port} has ended: "):
            outcome.result(timeout=20)


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": ""},
        {"RANK": "one"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "0.5"},
        {"LOCAL_WORLD_SIZE": "3"},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": "0"},
        {"MASTER_PORT": "65536"},
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused_by_name(monkeypatch, wrong):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (WHOLE | wrong).items():
        monkeypatch.setenv(name, value)
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"{name}(=|;).*`unset RANK .*` for a single process"):
        find_place()


def test_a_half_set_environment_is_refused(monkeypatch):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        find_place()


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
