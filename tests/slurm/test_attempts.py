"""Attempts of a Slurm job: written by a line of shell, counted until they are in vain."""

import subprocess

import pytest

from segformer.slurm.attempts import attempt_line, attempts, give_up, in_vain


def begin(run_dir, attempt):
    """What the batch script does."""
    (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    environment = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
    environment |= {"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}
    subprocess.run(["bash", "-c", attempt_line(run_dir, 2)], env=environment, check=True)


def test_the_shell_writes_what_python_reads(tmp_path):
    run_dir = tmp_path / "a run"
    begin(run_dir, 0)
    (run_dir / "checkpoints/step-00000030").mkdir(parents=True)
    (run_dir / "checkpoints/bad-step-00000040").mkdir()
    (run_dir / "checkpoints/step-00000007").mkdir()
    begin(run_dir, 1)
    with (run_dir / "slurm/attempts.jsonl").open("a") as file:
        file.write('{"job": "17", "att')  # a line that was cut short is left out
    common = {"job": "17", "ranks": 4, "nodes": "n[0-1]"}
    assert attempts(run_dir) == [
        {**common, "attempt": 0, "newest": ""},
        {**common, "attempt": 1, "newest": "step-00000030"},
    ]
    assert attempts(run_dir, "18") == []


@pytest.mark.parametrize(
    ("newest", "now", "wanted"),
    [
        ([0], 0, 0),  # the first start is no restart
        ([0, 0], 0, 1),
        ([0, 0, 0, 0], 0, 3),
        ([0, 0, 0, 0], 20, 0),  # the last of them made a checkpoint
        ([0, 30, 30, 30], 30, 3),
        ([0, 30, 30, 60], 60, 1),
        ([], 0, 0),
    ],
)
def test_restarts_without_a_new_checkpoint_are_counted(newest, now, wanted):
    ended = [{"attempt": index, "newest": f"step-{step:08d}"} for index, step in enumerate(newest)]
    assert in_vain(ended, f"step-{now:08d}") == wanted


def test_the_third_restart_in_vain_is_the_last(tmp_path):
    for attempt in range(4):
        begin(tmp_path, attempt)
        assert not give_up(tmp_path, "17", begun=True)
        assert bool(give_up(tmp_path, "17", begun=False)) == (attempt == 3)
    begin(tmp_path, 4)  # Slurm itself started it once more
    assert "3 restarts in a row (on n[0-1], n[0-1], n[0-1])" in give_up(tmp_path, "17", begun=True)
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    assert not give_up(tmp_path, "17", begun=False)
