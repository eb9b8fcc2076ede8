"""Runs on a real cluster, disturbed as a real one disturbs them, end as they would have ended.

Two nodes of two ranks over gloo. The reference is the same run on four local ranks, never disturbed: every
weight, moment and buffer must have the same bits.
"""

import json
from dataclasses import replace

import pytest
import torch
from comparing import assert_identical, saved_state
from slurm.real.conftest import JOB, STEPS

from segformer.checkpoint.reader import list_steps, load_checkpoint
from segformer.data.loading.order import OrderSpec, SampleOrder
from segformer.telemetry.jsonl import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]  # one cluster


def ledger(run_dir):
    """The samples of every step, by what each rank wrote down; a step that was done again counts once."""
    used = {}
    for path in sorted((run_dir / "ledger").iterdir()):
        lines = map(json.loads, path.read_text().splitlines())
        for line in {line["step"]: line for line in lines}.values():  # of a rank the last counts
            begin, ids = used.get(line["step"], (-1, []))
            if line["from"] > begin:
                begin, ids = line["from"], []
            used[line["step"]] = (begin, ids + line["ids"] if line["from"] == begin else ids)
    return {step: sorted(ids) for step, (_, ids) in sorted(used.items())}


def assert_nothing_lost(job, undisturbed):
    """Every step had its samples of the order, none missing and none twice, on whatever ranks."""
    state = load_checkpoint(job.run_dir / "checkpoints").state
    order = SampleOrder(OrderSpec.from_dict(state.order_spec))
    wanted = {step: sorted(order.ids(4 * step - 4, 4).tolist()) for step in range(1, STEPS + 1)}
    assert ledger(job.run_dir) == wanted
    assert ledger(undisturbed) == wanted


def assert_undisturbed(job, undisturbed, metrics):
    """The samples, losses, weights, moments and buffers of the undisturbed run, to the same bits."""
    assert_nothing_lost(job, undisturbed)
    assert_identical(saved_state(job.run_dir), saved_state(undisturbed))
    wanted = {line["step"]: line["loss"] for line in metrics(undisturbed)}
    lines = job.lines()
    assert {line["step"] for line in lines} == set(wanted)
    assert [line["loss"] for line in lines] == [wanted[line["step"]] for line in lines]


def redone(job):
    """Steps that were logged more than once, by the lines and as the run has counted them itself."""
    steps = [line["step"] for line in job.lines()]
    counted = sum(line["redone"] for line in job.lines("continued"))
    assert len(steps) - len(set(steps)) == counted
    return counted


@pytest.mark.slow
def test_signals_requeues_and_preemption_cost_no_step(limited, submit, undisturbed, launch, cluster, metrics):
    """A daemon that dies; USR2, plain requeue (TERM only), a job of higher priority: all in one run."""
    job = submit()
    job.wait_for_step(5)
    worker = cluster.nodes_of(job.id)[1]
    cluster.kill_slurmd(worker)
    cluster.start_slurmd(worker)
    job.wait_for_step(15)
    cluster.run("scancel", "--signal=USR2", job.id)
    job.wait_until_gone_on(1)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_until_gone_on(2)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"
    ).stdout.strip()
    job.wait_until_gone_on(3)
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert job.end() == "COMPLETED", job.logs()
    assert (len(job.attempts), redone(job)) == (4, 0), job.logs()
    assert_undisturbed(job, undisturbed, metrics)
    for name in ("metrics.jsonl", "log.txt", "report.html", "export/model.safetensors"):
        assert (job.run_dir / name).stat().st_size, name
    printed = launch(cluster, "status", str(job.run_dir)).stdout
    assert f"job         {job.id}: COMPLETED" in printed
    assert f"step        {STEPS} of {STEPS} (100 %)" in printed
    watched = launch(cluster, "watch", str(job.run_dir)).stdout
    assert watched.startswith(f"job {job.id} COMPLETED"), watched
    assert (job.run_dir / "slurm").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_power_cuts_cost_the_steps_since_the_last_checkpoint(submit, undisturbed, powered, metrics):
    """A worker with a spare node, the batch node with none, a node that is back before Slurm misses it."""
    cluster = powered
    job = submit("checkpoint.save_every=8")
    job.wait_until_gone_on(0)
    second = cluster.nodes_of(job.id)[1]
    cluster.cut_power(second)
    job.wait_until_gone_on(1)
    assert second not in cluster.nodes_of(job.id)
    batch = cluster.job(job.id)["BatchHost"]
    cluster.cut_power(batch)
    cluster.wait_for_state(job.id, "PENDING", timeout_s=90)
    cluster.boot(second)
    job.wait_until_gone_on(2)
    worker = next(node for node in cluster.nodes_of(job.id) if node != cluster.job(job.id)["BatchHost"])
    cluster.cut_power(worker)
    cluster.boot(worker)
    job.wait_until_gone_on(3)
    assert job.end() == "COMPLETED", job.logs()
    # A node that comes back may be told to end the step of before, which has the number of the new one.
    assert len(job.attempts) >= 4, job.logs()
    assert 0 < redone(job) <= len(job.attempts) * 16
    assert_undisturbed(job, undisturbed, metrics)


@pytest.mark.slow
@pytest.mark.faults
def test_a_job_waits_for_its_worker_where_there_is_no_spare(submit, undisturbed, powered, metrics):
    cluster = powered
    job = submit("checkpoint.save_every=8", "partition=apart")
    job.wait_until_gone_on(0)
    batch = cluster.job(job.id)["BatchHost"]
    worker = next(node for node in cluster.nodes_of(job.id) if node != batch)
    cluster.cut_power(worker)
    cluster.wait_for_state(job.id, "PENDING", timeout_s=90)
    cluster.boot(worker)
    job.wait_until_gone_on(1)
    assert job.end() == "COMPLETED", job.logs()
    assert 0 < redone(job) <= 16
    assert_undisturbed(job, undisturbed, metrics)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_nodes_and_with_more(submit, undisturbed, cluster, metrics):
    job = submit("nodes=1-2")
    job.wait_until_gone_on(0)
    command = ("-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    taken = cluster.run("sbatch", "--parsable", *command).stdout.strip()
    job.wait_until_gone_on(1)
    cluster.run("scancel", taken)
    cluster.wait_for_state(taken, "CANCELLED", timeout_s=30)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_until_gone_on(2)
    assert job.end() == "COMPLETED", job.logs()
    assert [one["ranks"] for one in job.attempts] == [4, 2, 4]
    assert_nothing_lost(job, undisturbed)
    # These 40 steps reach over both changes. Rounding grows with the steps: from below 1e-6 to 3.5e-5 after a
    # change at step 14.
    assert job.lines("continued")[-1]["step"] < 40
    losses = [line["loss"] for line in job.lines()][:40]
    wanted = [line["loss"] for line in metrics(undisturbed)][:40]
    assert (torch.tensor(losses) - torch.tensor(wanted)).abs().max() < 2e-4


@pytest.mark.slow
def test_three_restarts_in_vain_are_the_last(submit, cluster):
    """A rank that is killed at the start of every attempt."""
    job = submit("nodes=1", "tasks_per_node=1")
    for attempt in range(1, 5):
        job.wait_for_attempt(attempt)
        cluster.wait(
            lambda: cluster.nodes_of(job.id) and cluster.signal("KILL", cluster.nodes_of(job.id)[0]), 30
        )
    assert job.end() == "FAILED", job.logs()
    assert len(job.attempts) == 4
    assert "3 restarts in a row" in job.logs()


def test_an_error_is_not_started_again(submit):
    job = submit("data.shards=/nowhere")
    assert job.end() == "FAILED"
    assert len(job.attempts) == 1
    assert "ended: rank 0 ended with 2: DataError" in job.logs()


@pytest.mark.slow
def test_a_second_job_on_the_same_run_is_refused(submit, overrides, launch, cluster):
    job = submit("nodes=1", "tasks_per_node=1", "steps=100000")
    job.wait_for_step(1)
    again = launch(cluster, "nodes=2", "gpus_per_node=0", *overrides(job.run_dir), check=False)
    assert again.returncode == 2
    assert f"has job {job.id}, which is RUNNING" in again.stderr
    assert "is being ended" in launch(cluster, "cancel", str(job.run_dir)).stdout
    assert job.end() == "CANCELLED"
    saved = list_steps(job.run_dir / "checkpoints")
    assert saved, "its state was saved"
    assert len(job.attempts) == 1
    printed = launch(cluster, "resubmit", str(job.run_dir), "time=5m").stdout
    job = replace(job, id=printed.partition(":")[0].removeprefix("job "))
    job.wait_until_gone_on(1)
    assert job.lines("continued") == [{"kind": "continued", "step": saved[-1], "redone": 0, "ranks": 1}]
    assert cluster.job(job.id)["TimeLimit"] == "00:05:00"
    cluster.run("scancel", job.id)


@pytest.mark.slow
def test_a_time_limit_is_met_twice_or_more(limited, undisturbed, metrics):
    assert limited.end(timeout_s=300) == "COMPLETED", limited.logs()
    assert len(limited.attempts) >= 3, limited.logs()
    assert redone(limited) == 0, limited.logs()
    assert_undisturbed(limited, undisturbed, metrics)


@pytest.mark.slow
@pytest.mark.faults
def test_a_sweep_as_an_array_ends_as_its_runs_do_alone(
    launch, overrides, powered, train_many, tmp_path, monkeypatch
):
    """Four runs, two at a time, in two rungs; slurmctld is killed, and a node that works loses its power."""
    cluster, runs = powered, tmp_path / "runs/s"
    monkeypatch.chdir(tmp_path)
    own = ("name=", "run_dir=", "steps=", "optim.lr=")
    common = [one for one in overrides(tmp_path / "x") if not one.startswith(own)]
    common += ["steps=20", "checkpoint.save_every=5"]
    plan = ("name=s", "images=0", "sweep.jobs=2", "sweep.halving=2", "optim.lr=1e-5,2e-5", "seed=0,1")
    command = ("sweep", "nodes=1", "tasks_per_node=1", *JOB, *plan, *common)
    array = launch(cluster, *command).stdout.partition("job ")[2].partition(":")[0]
    again = launch(cluster, *command, check=False)
    assert (again.returncode, f"has job {array}" in again.stderr) == (2, True), again.stderr
    cluster.wait(lambda: list_steps(runs / "lr1e-5_seed1/checkpoints"), 120, "a checkpoint")
    cluster.restart_controller()
    cluster.wait(lambda: cluster.nodes_of(f"{array}_2"), 120, "the third run at work")
    (node,) = cluster.nodes_of(f"{array}_2")
    cluster.cut_power(node)
    cluster.wait_for_state(f"{array}_2", "PENDING", "RUNNING", timeout_s=60)
    cluster.boot(node)
    cluster.wait((runs / "comparison/index.html").exists, 400, "the comparison")
    assert "COMPLETED" in launch(cluster, "status", "runs/s").stdout
    names = sorted(path.parent.name for path in runs.glob("*/config.yaml"))
    ends = {name: list_steps(runs / name / "checkpoints")[-1] for name in names}
    assert sorted(ends.values()) == [10, 10, 20, 20], "one setting of two went on to the end"
    alone = [
        [
            *common,
            f"name={name}",
            f"run_dir={tmp_path / name}",
            f"optim.lr={lr}",
            f"seed={seed}",
            f"stop_at={end}",
        ]
        for name, end in ends.items()
        for lr, _, seed in [name.removeprefix("lr").partition("_seed")]
    ]
    train_many(1, alone)
    for name in names:
        assert_identical(saved_state(runs / name), saved_state(tmp_path / name))
        steps = [row["step"] for row in read_metrics(runs / name, "train")]
        again = sum(row["redone"] for row in read_metrics(runs / name, "continued"))
        assert len(steps) == ends[name] + again
