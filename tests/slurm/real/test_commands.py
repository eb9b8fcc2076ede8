"""Jobs that are no training runs, what `dry_run` says, and arguments that want to be commands."""

import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from segformer.slurm.settings import SlurmConfig

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]  # one cluster

ROOT = Path(__file__).resolve().parents[3]
# Every option with every value in one process; it prints what is not refused.
TRY = """
import json, runpy, sys
script = sys.argv[1]
for option, value in json.load(open(sys.argv[2])):
    sys.argv = [script, "steps=1", f"{option}={value}"]
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code
    if code != 2:
        print(option, value, code)
"""


def hostile(trace):
    """Texts that make the file `trace` where a shell reads them."""
    make = f"touch {trace}"
    return [f"x\n{make}", f"$({make})", f"x;{make}", f"'`{make}`\"", f"../../{make}"]


def hashes(folder):
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def jobs(cluster):
    """All jobs that the cluster has had."""
    return cluster.run("scontrol", "show", "job", "-o").stdout.count("JobId=")


def test_no_option_brings_a_command_to_the_cluster(cluster, tmp_path):
    trace, before = tmp_path / "trace", jobs(cluster)
    options = [f.name for f in fields(SlurmConfig)] + ["name", "run_dir", "cluster", "local", "experiment"]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([(option, value) for option in options for value in hostile(trace)]))
    done = cluster.run(sys.executable, "-c", TRY, ROOT / "launch/slurm.py", plan)
    assert done.stdout == ""
    assert done.stderr.count("Error: ") == len(options) * len(hostile(trace))
    assert "Traceback" not in done.stderr
    assert jobs(cluster) == before
    assert not trace.exists()


@pytest.mark.slow
def test_an_evaluation_is_that_of_this_machine(cluster, launch, undisturbed, metrics, tmp_path, monkeypatch):
    """On 2 x 2 ranks; beside it one whose argument stays an argument, which is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace"
    shape = ("nodes=2", "gpus_per_node=0", "tasks_per_node=2", "mem=1G", "cpus_per_task=1")
    good = launch(cluster, "evaluate", *shape, f"checkpoint={undisturbed}").stdout.split()[1]
    wrong = launch(cluster, "evaluate", *shape[1:], f'checkpoint="x;touch {trace};$(touch {trace})"').stdout
    cluster.wait_for_state(wrong.split()[1], "FAILED", timeout_s=90)
    cluster.wait_for_state(good, "COMPLETED", "FAILED", timeout_s=90)
    printed = (tmp_path / f"runs/slurm/evaluate/0001/logs/{good}_0_log.out").read_text()
    (final,) = metrics(undisturbed, "final")
    assert cluster.job(good)["JobState"] == "COMPLETED", printed
    assert f"{100 * final['miou']:.2f}" in printed
    assert not trace.exists()


@pytest.mark.slow
def test_four_tasks_and_a_join_write_what_one_command_writes(
    tiny_root, tiny_shards, tmp_path, launch, cluster, monkeypatch
):
    """And a part that fails has its join cancelled."""
    monkeypatch.chdir(tmp_path)
    job = ("tasks=4", "cpus_per_task=1", "mem=500M", "time=10m")
    data = ("data=sample", f"root={tiny_root}", f"output={tmp_path / 'out'}", "samples_per_shard=6")
    good = launch(cluster, "shard", *job, *data).stdout.split("; job ")[1].split()[0]
    absent = ("data=sample", "root=/nowhere", f"output={tmp_path / 'none'}")
    bad = launch(cluster, "shard", "tasks=1", *job[1:], *absent).stdout.split("; job ")[1].split()[0]
    cluster.wait_for_state(good, "COMPLETED", "FAILED", "CANCELLED", timeout_s=90)
    logs = "".join(path.read_text() for path in (tmp_path / "runs/slurm/shard/0001/logs").iterdir())
    assert cluster.job(good)["JobState"] == "COMPLETED", logs
    assert "4 of 4 shards were complete already" in logs, logs
    assert hashes(tmp_path / "out") == hashes(tiny_shards)
    cluster.wait_for_state(bad, "CANCELLED", timeout_s=60)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_shows_the_script_and_asks_the_controller(cluster, launch, tmp_path):
    run = ("experiment=sample", f"run_dir={tmp_path / 'run'}", "cpus_per_task=1", "dry_run=true")
    before = jobs(cluster)
    printed = launch(cluster, "nodes=2", "gpus_per_node=8", "global_batch=16", *run)
    assert printed.stdout.startswith("#!/bin/bash\n")
    assert "to start at" in printed.stderr
    refused = launch(cluster, "nodes=64", "gpus_per_node=1", "global_batch=64", *run, check=False)
    assert refused.returncode == 2
    assert "Requested node configuration is not available" in refused.stderr
    assert jobs(cluster) == before
    assert not (tmp_path / "run").exists()
