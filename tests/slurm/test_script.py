"""The batch script of launch/slurm.py: what stands in it, and that no field can bring a command into it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from segformer.errors import ConfigError
from segformer.slurm.script import JobFolder, command_script, training_script
from segformer.slurm.settings import SlurmConfig, minutes
from segformer.slurm.submission import describe, plain_path
from segformer.training.config import RunConfig, compose

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "a\nrm -rf x", "a\r\nb", "a\0b", "a b", "a;b", "a'b", 'a"b', "a`b`", "$(touch x)", "${HOME}", "a|b",
    "a>b", "../../x", "-x", "--wrap=x", "\N{FULLWIDTH DIGIT ONE}", "a" * 300,
]  # fmt: skip
TEXTS = [
    "partition", "account", "qos", "constraint", "mem", "time", "nodes", "gpus_per_node", "gpu_request",
    "dependency", "nodelist", "exclude", "reservation", "container_image", "container_runtime",
    "container_python",
]  # fmt: skip
UNUSUAL = ["a b", "-x", "--wrap=x", "a" * 300]  # as names of folders


def script(*overrides: str, **fields: object) -> str:
    run = compose(RunConfig, "config", list(overrides))
    cfg, run_dir = SlurmConfig(**fields), plain_path("run_dir", run.run_dir)
    describe(cfg, run)
    return training_script(cfg, run.name, JobFolder(run_dir / "slurm/0001"), ROOT, run_dir)


def options(text: str) -> dict[str, str]:
    """The #SBATCH options of a script, as sbatch splits them."""
    words = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if "#SBATCH" in line]
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {key: value for key, _, value in pairs}


def test_the_command_of_the_documentation_prints_a_script_and_writes_nothing(tmp_path, monkeypatch, capsys):
    run = f"run_dir={tmp_path / 'run'}"
    monkeypatch.setattr(
        sys, "argv", ["slurm.py", "nodes=4", "experiment=sample", "steps=7", run, "dry_run=true"]
    )
    slurm.main()
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n")
    assert options(printed.out)["nodes"] == "4"
    assert "4 nodes x 1 ranks" in printed.err
    assert not (tmp_path / "run").exists()


def test_every_field_reaches_its_option():
    given = {
        "nodes": "2", "mem": "480G", "partition": "gpu,long", "account": "vision", "qos": "high",
        "constraint": "h100&nvlink|a", "nodelist": "n[0-3],n7", "exclude": "n5", "reservation": "ours",
        "dependency": "afterok:12:13,singleton",
    }  # fmt: skip
    more = {"time": "1d12h", "gpus_per_node": 8, "cpus_per_task": 12, "signal_delay_s": 300}
    found = options(script("name=trial", **given, **more, sbatch={"exclusive": True, "comment": "x"}))
    wanted = given | {
        "job-name": "trial", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12",
        "time": "2160", "signal": "USR2@300", "exclusive": "", "comment": "x", "requeue": "",
        "chdir": str(ROOT),
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert set(found) - set(wanted) == {"error", "open-mode", "output"}
    # what is not asked for is left to the cluster
    assert not {"mem", "partition", "account", "qos", "constraint", "wckey"} & set(options(script()))
    ranks = options(script(nodes="2", gpus_per_node=0, tasks_per_node=2))
    assert (ranks["ntasks-per-node"], ranks.get("gpus-per-node")) == ("2", None)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"gpus_per_node": 4}, {"gpus-per-node": "4"}),  # a number, as older records have it
        ({"gpus_per_node": "a100:4"}, {"gpus-per-node": "a100:4"}),
        ({"gpus_per_node": "a100_1g.5gb:4", "gpu_request": "gres"}, {"gres": "gpu:a100_1g.5gb:4"}),
        (
            {"gpus_per_node": "4", "gpu_request": "gres", "sbatch": {"gres": "nvme:1"}},
            {"gres": "gpu:4,nvme:1"},
        ),
        (
            {"gpus_per_node": "a100:4", "sbatch": {"gres": "nvme:1"}},
            {"gpus-per-node": "a100:4", "gres": "nvme:1"},
        ),
        ({"gpus_per_node": "0", "tasks_per_node": 4, "gpu_request": "gres"}, {}),
    ],
)
def test_gpus_are_asked_for_once_and_make_the_ranks(fields, wanted):
    found = options(script("global_batch=16", **fields))
    assert {key: found[key] for key in ("gpus-per-node", "gres") if key in found} == wanted
    assert found["ntasks-per-node"] == "4"


def srun_of(text: str) -> list[str]:
    return shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))


def test_ranks_run_in_the_container_and_the_last_line_does_not():
    image, mounts = "nvcr.io#nvidia/pytorch:25.10-py3", ["/data", "/scratch/a:/tmp/a"]
    given = {"container_image": image, "container_mounts": mounts, "srun": {"mpi": "pmix"}}
    folder = f"{ROOT}/runs/x/slurm/0001"
    entry = ["-u", f"{folder}/code/launch/slurm_job.py"]
    pyxis = script("run_dir=runs/x", **given)
    words = srun_of(pyxis)
    assert {f"--container-image={image}", f"--container-workdir={ROOT}", "--mpi=pmix"} < set(words)
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data,/scratch/a:/tmp/a" in words
    assert words[-5:] == ["python", *entry, "rank", folder]
    apptainer = script("run_dir=/elsewhere/x", **given, container_runtime="apptainer", container_python="/py")
    words = srun_of(apptainer)
    start = words.index("apptainer")
    assert words[start:-4] == [
        "apptainer", "exec", "--nv", f"--pwd={ROOT}", f"--bind={ROOT}:{ROOT}",
        "--bind=/elsewhere/x:/elsewhere/x", "--bind=/data:/data", "--bind=/scratch/a:/tmp/a", image, "/py",
    ]  # fmt: skip
    for text in (pyxis, apptainer):
        assert shlex.split(text.splitlines()[-1])[0] == sys.executable


@pytest.mark.parametrize(
    "mount", ["data", "/a:/b:/c", "/a,/b", "/a b", "/a:b", "/a;b", "/a/../b", "$HOME", "/a\n"]
)
def test_a_mount_that_is_no_path_is_refused(mount):
    with pytest.raises(ConfigError, match="container_mounts"):
        SlurmConfig(container_mounts=[mount])


def test_every_task_runs_the_fixed_entry_with_the_path_of_the_composed_configuration():
    lines = script("name=trial", "run_dir=runs/trial").splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert {"--kill-on-bad-exit=1", "--ntasks-per-node=1", "--cpus-per-task=8", "--wait=0"} < set(words)
    folder = ROOT / "runs/trial/slurm/0001"
    command = [sys.executable, "-u", str(folder / "code/launch/slurm_job.py")]
    assert words[-5:] == [*command, "rank", str(folder)]
    assert shlex.split(lines[-1]) == [*command, "after", str(folder), "$?"]
    assert lines.index("trap : TERM USR2 CONT") < len(lines) - 2
    assert f"export PYTHONPATH={folder}/code" in "\n".join(lines)


def test_a_range_of_nodes_is_refused_unless_every_number_can_share_the_batch():
    found = options(script(nodes="1-2", gpus_per_node=8, cpus_per_task=4))
    assert (found["nodes"], found["gpus-per-node"], found["mincpus"]) == ("1-2", "8", "32")
    # what Slurm keeps of these would keep the job from starting again on fewer nodes
    assert not {"ntasks", "ntasks-per-node", "cpus-per-task"} & set(found)
    with pytest.raises(ConfigError, match=r"global_batch=16 is not divisible by .* x 12"):
        script(nodes="2-4", gpus_per_node=4)


def test_a_command_without_ranks_runs_once_and_without_srun():
    folder = JobFolder(ROOT / "runs/slurm/shard/0001")
    text = command_script(SlurmConfig(), folder, "true", tasks=4)
    assert "srun" not in text
    assert options(text)["array"] == "0-3%4"


def test_lines_of_the_profile_stand_before_the_training():
    lines = script(setup=["module load cuda", "export NCCL_DEBUG=WARN"]).splitlines()
    srun = next(number for number, line in enumerate(lines) if line.startswith("srun"))
    assert lines.index("module load cuda") < lines.index("export NCCL_DEBUG=WARN") < srun


@pytest.mark.parametrize("field", TEXTS)
def test_a_hostile_text_is_refused_in_every_field(field):
    for value in HOSTILE:
        if (field, value) != ("constraint", "a|b"):
            with pytest.raises(ConfigError, match=f"{field}="):
                SlurmConfig(**{field: value})


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_name_or_path_is_refused(value):
    with pytest.raises(ConfigError, match="name="):
        RunConfig(name=value)
    if value not in UNUSUAL:
        with pytest.raises(ConfigError, match="run_dir="):
            plain_path("run_dir", f"runs/{value}")


@pytest.mark.parametrize("value", UNUSUAL)
def test_an_unusual_run_directory_stays_one_word(value):
    folder = JobFolder(ROOT / value / "slurm/0001")
    lines = training_script(SlurmConfig(), "x", folder, ROOT, ROOT / value).rstrip().splitlines()
    assert len(lines) == len(script().rstrip().splitlines())
    assert shlex.split(lines[-1])[-2] == str(folder.path)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What launch/slurm.py prints to stderr before it ends with 2."""
    monkeypatch.setattr(sys, "argv", ["slurm.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        slurm.main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    return printed.err


@pytest.mark.parametrize(
    "override",
    [
        "setup=[ls]", "+setup=[ls]", "++setup=[ls]", "~setup", "setup.0=ls", "sbatch.wrap=ls",
        "+sbatch={wrap: ls}", "cluster.setup=[ls]", "+cluster={setup: [ls]}", "cluster@x=default",
        "cluster=../../x", "local=../x",
    ],
)  # fmt: skip
def test_what_belongs_to_the_profile_is_refused_on_the_command_line(override):
    with pytest.raises(ConfigError, match="belong to a cluster profile"):
        slurm.split_overrides([override])


@pytest.mark.parametrize(
    "profile",
    [
        *({"setup": [line]} for line in ("a\nb", "a\rb", "", " ", "a\0b", "\x1b[2J")),
        *({"sbatch": {key: "x"}} for key in ("wrap", "output", "nodes", "a b", "Comment")),
        *({"sbatch": {"comment": value}} for value in ("a\nb", "$(ls)", ["a"], None, False)),
        *({"sbatch": {key: "4"}} for key in ("gpus", "gpus-per-task", "ntasks-per-gpu")),
        *({"sbatch": {"gres": value}} for value in ("gpu:4", "nvme:1,gpu:a100:4", "gpu", "gres/gpu=4")),
        *({"srun": {key: "x"}} for key in ("container-image", "output", "gres", "gpu-bind", "a b")),
        {"srun": {"mpi": "$(ls)"}},
        {"sbatch": {"reservation": "a"}, "reservation": "b"},
    ],
)
def test_the_lines_and_options_of_a_profile_are_checked(profile):
    with pytest.raises(ConfigError, match=r"setup holds|sbatch|srun"):
        SlurmConfig(**profile)


@pytest.mark.parametrize(
    ("text", "wanted"),
    {"24h": 1440, "90m": 90, "90": 90, "2d": 2880, "1-12": 2160, "90 minutes": 90, "1 day": 1440,
     "1d12h30m": 2190, "12:00:00": 720, "0:10:01": 11, "1-12:00:00": 2160}.items(),
)  # fmt: skip
def test_durations_are_read_as_sbatch_and_people_mean_them(text, wanted):
    assert minutes(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "12:00", "1d12", "h", "24x", "1.5h", "-1", "0", "400d", "2h1d", "٣h"],
)
def test_other_durations_are_refused(text):
    with pytest.raises(ConfigError, match="time="):
        minutes(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"nodes": "0"}, {"nodes": "4-2"}, {"nodes": "2-"}, {"gpus_per_node": -1}, {"signal_delay_s": 59},
        {"time": "3m"}, {"gpus_per_node": 4, "tasks_per_node": 2}, {"mem": "480 XB"},
        {"gpus_per_node": "a100:65"}, {"gpus_per_node": "a100"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises(ConfigError):
        SlurmConfig(**fields)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/cluster").glob("*.yaml")))
def test_every_shipped_profile_makes_a_script_that_bash_accepts(name):
    cfg = compose(SlurmConfig, "slurm", [f"cluster={name}"])
    text = training_script(cfg, "x", JobFolder(ROOT / "runs/x/slurm/0001"), ROOT, ROOT / "runs/x")
    checked = subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_text_that_hydra_would_misread_keeps_its_value():
    given = ["partition=a,b", "constraint=a&b|c", "time='2h'", "account=my-1.project", "mem=480 GB"]
    job, training = slurm.split_overrides([*given, "steps=5", "nodes=3"])
    cfg = compose(SlurmConfig, "slurm", job)
    assert (cfg.partition, cfg.constraint, cfg.time, cfg.nodes) == ("a,b", "a&b|c", "2h", "3")
    assert {SlurmConfig(mem=text).mem for text in (cfg.mem, "480g", "480GiB")} == {"480G"}
    assert training == ["steps=5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodes=2", "run_dir=/proc/x"], "can't be made"),
        (["status"], "status needs a run's directory"),
        (["status", "/nowhere"], "/nowhere does not exist"),
        (["status", "/"], "has not been submitted"),
        (["statu", "runs/x"], "'statu' is not a command; did you mean status?"),
        (["train"], "'train' is not a command; use status, watch, cancel, "),
        (["shard", "data=sample"], "tasks=''"),
        (["shard", "tasks=2", "part=0/2"], "part is set by the array"),
        (["evaluate", "chekpoint=x"], "chekpoint"),
        (["node=2", "dry_run=true"], "did you mean nodes?"),
        (["stepz=2", "dry_run=true"], "did you mean steps?"),
        (["nodes=many", "dry_run=true"], "nodes"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line_and_code_2(arguments, message, monkeypatch, capsys):
    printed = refused(monkeypatch, capsys, *arguments)
    assert printed.startswith("ConfigError: ")
    assert message in printed
