"""Jobs that are no training runs, what `dry_run` says, and arguments that want to be commands."""

import hashlib
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from segformer.slurm.script import command_script, rank_python
from segformer.slurm.settings import SlurmConfig
from segformer.slurm.submission import make_folder

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


def printed_by(cluster, folder, cfg, *command):
    """What a job of these settings prints, whose ranks run a command."""
    job = make_folder(folder)
    text = command_script(cfg, job, shlex.join([*rank_python(cfg, Path.cwd()), *command]), ranks=True)
    job.script.write_text(text)
    number = cluster.run("sbatch", "--parsable", job.script).stdout.strip()
    cluster.wait_for_state(number, "COMPLETED", "FAILED", timeout_s=60)
    logs = "".join(path.read_text() for path in sorted(job.logs.iterdir()))
    assert cluster.job(number)["JobState"] == "COMPLETED", logs
    return logs


SMALL = {"mem": "500M", "cpus_per_task": 1, "time": "5m"}
DEVICES = ("-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))")


@pytest.mark.parametrize("option", ["gpus-per-node", "gres"])
def test_a_job_gets_the_gpus_of_the_type_that_it_asks_for(cluster, launch, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    mig = SlurmConfig(gpus_per_node="a100_1g.5gb:2", gpu_request=option, nodelist="n1", **SMALL)
    assert printed_by(cluster, tmp_path, mig, *DEVICES).split() == ["4,5", "4,5"]
    whole = SlurmConfig(gpus_per_node="a100:1", gpu_request=option, exclude="n[0-1]", **SMALL)
    assert printed_by(cluster, tmp_path, whole, *DEVICES).split() == ["0"]
    asked = (
        f"gpu_request={option}",
        "gpus_per_node=a100:5",
        "global_batch=5",
        "experiment=sample",
        "dry_run=true",
    )
    refused = launch(cluster, *asked, f"run_dir={tmp_path / 'x'}", check=False)
    assert refused.returncode == 2
    assert "configuration is not available" in refused.stderr


# Stand-ins of the runtimes: they write down how they are started, and start what they are given.
STUBS = {
    "pyxis": (
        "srun",
        """#!/bin/bash
rest=()
for word; do case $word in --container-*) echo "$word" >> {record};; *) rest+=("$word");; esac; done
exec {srun} "${{rest[@]}}"
""",
    ),
    "apptainer": (
        "apptainer",
        """#!/bin/bash
printf '%s\\n' "$@" > {record}
while [ "$1" != {python} ]; do shift; done
exec "$@"
""",
    ),
}


@pytest.mark.parametrize("runtime", STUBS)
def test_a_container_is_started_with_its_image_and_mounts(cluster, tmp_path, monkeypatch, runtime):
    monkeypatch.chdir(tmp_path)
    record, python = tmp_path / "record", "import sys; print(*sys.argv[1:], sep='|')"
    name, text = STUBS[runtime]
    text = text.format(record=record, srun=cluster.run("which", "srun").stdout.strip(), python=sys.executable)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / name).write_text(text)
    (tmp_path / "bin" / name).chmod(0o755)
    cfg = SlurmConfig(
        gpus_per_node="0",
        container_runtime=runtime,
        container_image="registry.example#a/b:1.0-py3",
        container_mounts=["/data", "/scratch/a:/b"],
        container_python=sys.executable,
        setup=[f"export PATH={tmp_path}/bin:$PATH"],
        **SMALL,
    )
    hostile = ["$(touch x)", "a b", "'; touch x"]
    assert printed_by(cluster, tmp_path, cfg, "-c", python, *hostile) == "|".join(hostile) + "\n"
    assert not (tmp_path / "x").exists()
    wanted = {
        "pyxis": [
            "--container-image=registry.example#a/b:1.0-py3",
            f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/scratch/a:/b",
            f"--container-workdir={tmp_path}",
        ],
        "apptainer": [
            "exec", f"--pwd={tmp_path}", f"--bind={tmp_path}:{tmp_path}", "--bind=/data:/data",
            "--bind=/scratch/a:/b", "registry.example#a/b:1.0-py3", sys.executable, "-c", python, *hostile,
        ],
    }  # fmt: skip
    assert record.read_text().splitlines() == wanted[runtime]


@pytest.mark.slow
def test_a_job_waits_for_others_and_its_watcher_for_it(cluster, launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = cluster.run("sbatch", "--parsable", "--hold", "--mem=100", "--wrap=true").stdout.strip()
    held = ("gpus_per_node=0", "mem=500M", "time=5m", "cpus_per_task=1", f"dependency=afterok:{first}")
    asked = launch(cluster, "evaluate", *held, f"checkpoint={tmp_path / 'none'}").stdout.split()[1]
    assert cluster.job(asked)["Dependency"].startswith(f"afterok:{first}")
    cluster.run("scontrol", "release", first)
    cluster.wait_for_state(asked, "FAILED", timeout_s=90)  # there is no such checkpoint
    last = launch(cluster, "evaluate", *held[:-1], "watch=true", f"checkpoint={tmp_path / 'none'}").stdout
    assert last.splitlines()[-1].startswith(f"job {int(asked) + 1} FAILED")
