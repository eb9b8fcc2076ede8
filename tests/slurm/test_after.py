"""What the batch script decides when the ranks have ended: one row for everything that can have happened."""

import pytest

from segformer.checkpoint.lease import Owner
from segformer.slurm import after
from segformer.slurm.after import decide
from segformer.slurm.queue import JobState, own_environment

RUNNING = JobState("RUNNING")
SAVED = {"rank": 0, "code": 75, "message": "Preempted: stopped at step 7"}
LOST = {"rank": 1, "code": 76, "message": "RankLost: another rank has ended"}
WRONG = {"rank": 0, "code": 2, "message": "ConfigError: no such shards"}
QUIET = {"rank": 1, "code": 2, "message": ""}
BUG = {"rank": 3, "code": 1, "message": "ValueError: x"}


@pytest.mark.parametrize(
    ("code", "ended", "state", "more", "again", "why"),
    [
        (75, [SAVED], RUNNING, {}, True, "stopped by a signal"),
        (137, [SAVED], RUNNING, {}, True, "stopped by a signal"),
        (76, [LOST], RUNNING, {}, True, "a rank or a node was lost (exit code 76)"),
        (137, [], RUNNING, {}, True, "a rank or a node was lost (exit code 137)"),
        (139, [LOST], RUNNING, {}, True, "a rank or a node was lost"),
        (2, [WRONG, QUIET], RUNNING, {}, False, "rank 0 ended with 2: ConfigError: no such shards"),
        (137, [QUIET, WRONG], RUNNING, {}, False, "rank 0 ended with 2: ConfigError: no such shards"),
        (137, [LOST, BUG], RUNNING, {}, False, "rank 3 ended with 1: ValueError: x"),
        (1, [], RUNNING, {}, True, "a rank or a node was lost (exit code 1)"),
        (76, [], RUNNING, {}, True, "a rank or a node was lost (exit code 76)"),
        (75, [SAVED], RUNNING, {"out_of_memory": True}, True, "stopped by a signal"),
        (137, [], JobState("PENDING"), {}, False, "started the job again already"),
        (75, [SAVED], JobState("COMPLETING", preempted=True), {}, True, "stopped by a signal"),
        (137, [], RUNNING, {"out_of_memory": True}, False, "for its memory"),
        (75, [SAVED], JobState("COMPLETING"), {}, False, "Slurm is ending the job itself (COMPLETING)"),
        (75, [SAVED], JobState("COMPLETING", reason="TimeLimit"), {}, True, "stopped by a signal"),
        (137, [], JobState("UNKNOWN"), {}, True, "lost"),
        (137, [], JobState("RUNNING", restarts=1), {}, False, "started the job again already"),
        (75, [SAVED], RUNNING, {"requeue": False}, False, "requeue=false"),
        (137, [], RUNNING, {"stuck": "3 restarts in a row"}, False, "3 restarts in a row"),
    ],
)
def test_decisions(code, ended, state, more, again, why):
    usual = {"attempt": 0, "requeue": True, "out_of_memory": False, "stuck": ""}
    found = decide(code, ended, state, **usual | more)
    assert found[0] is again
    assert why in found[1]


def test_an_attempt_that_could_not_be_noted_is_the_last(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/attempts.jsonl").write_text(
        '{"job": "17", "attempt": 0, "ranks": 1, "nodes": "n0", "newest": ""}\n'
    )
    assert after._uncounted(tmp_path, Owner("17", 0, "n0", 1)) == ""
    assert "is the disk full?" in after._uncounted(tmp_path, Owner("17", 1, "n0", 1))
    assert "is the disk full?" in after._uncounted(tmp_path, Owner("18", 0, "n0", 1))


@pytest.mark.parametrize(
    ("state", "asked", "known"),
    [
        (JobState("RUNNING", restarts=0), True, True),
        (JobState("PENDING", restarts=1), False, True),
        (JobState("RUNNING", restarts=1), False, True),
        (JobState("RUNNING"), False, False),
    ],
    ids=["running", "waits again", "runs again", "known to the accounts only"],
)
def test_what_slurm_has_started_again_is_not_requeued(monkeypatch, state, asked, known):
    commands = []
    monkeypatch.setattr(after, "job_state", lambda job: state)
    monkeypatch.setattr(after, "slurm", lambda *command: commands.append(command))
    assert after._requeue(Owner("17", 0, "n0", 1)) == known
    assert commands == [("scontrol", "requeue", "17")] * asked


def test_the_submitters_job_is_not_handed_on(monkeypatch):
    others = ("SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_DEBUG", "RANK", "LOCAL_RANK", "MASTER_ADDR")
    kept = ("SLURM_CONF", "SLURM_JWT", "LOCAL_SCRATCH", "GROUP_HOME", "PATH")
    for name in (*others, *kept):
        monkeypatch.setenv(name, "x")
    found = own_environment()
    assert set(kept) <= set(found)
    assert not set(others) & set(found)
