"""The wheel: what is in it, and its commands in an environment of its own, outside of the repository."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from segformer import __main__ as program
from segformer.errors import ConfigError, as_started, error_line

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_named_for_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("segformer/**/__init__.py")}
    assert set(packages) == found | {"segformer.conf", "segformer.launch", "segformer.data_prep"}


def test_every_command_is_named_with_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["segformer"])
    program.main()
    printed = capsys.readouterr().out
    scripts = {path.stem for folder in ("launch", "data_prep") for path in ROOT.glob(f"{folder}/*.py")}
    for name in scripts - {"bench", "slurm_job"}:
        assert f"\n  {name} " in printed
    assert "Train a SegFormer" in printed


def test_a_misspelled_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["segformer", "--local_rank=0", "trian"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ConfigError: 'trian' is not a command; did you mean train?\n"


def test_a_message_names_commands_as_they_were_started(monkeypatch):
    text = (
        "python launch/train.py a=1\ndeepspeed -n 2 launch/train.py a=1\n"
        "torchrun --nproc-per-node 8 launch/train.py a=1\nsee launch/evaluate.py"
    )
    assert as_started(text) == text
    for started in (["python", "/env/bin/segformer", "train"], ["python", "-u", "-m", "segformer", "train"]):
        monkeypatch.setattr(sys, "orig_argv", started)
        assert as_started(text) == (
            "segformer train a=1\ndeepspeed -n 2 --module segformer train a=1\n"
            "torchrun --nproc-per-node 8 -m segformer train a=1\nsee segformer evaluate"
        )
        error = ConfigError("write them: python data_prep/shard.py data=x")
        assert error_line(error) == "ConfigError: write them: segformer shard data=x"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source archive, wheel built from it) of what a checkout has, and of files that it must not ship."""
    folder = tmp_path_factory.mktemp("built")
    tree, out = folder / "tree", folder / "dist"
    for name in ("segformer", "launch", "conf", "data_prep"):
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "sample", "local")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (
        "conf/local/default.yaml",
        "tests/test_x.py",
        "runs/x/config.yaml",
        "data_prep/sample/x.jpg",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    quiet = {"check": True, "capture_output": True}
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, **quiet)
    (archive,) = out.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*pip, str(archive)], cwd=folder, **quiet)
    (wheel,) = out.glob("*.whl")
    return archive, wheel


@pytest.mark.slow
def test_archive_and_wheel_hold_library_commands_and_choices_and_nothing_else(built):
    archive, wheel = built
    kept = (
        "segformer/**/*.py",
        "launch/*.py",
        "data_prep/*.py",
        "conf/*.yaml",
        "conf/*/*.yaml",
        "segformer/**/*.html",
        "segformer/**/*.cpp",
    )
    files = {p.relative_to(ROOT).as_posix() for kind in kept for p in ROOT.glob(kind)}
    files = {name for name in files if not name.startswith("conf/local/")}
    inside = {name if name.startswith("segformer/") else f"segformer/{name}" for name in files}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == inside
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames() if not tar.getmember(name).isdir()}
    assert files | {"pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.startswith(("runs/", "conf/local", "data_prep/sample"))]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """(command, arguments ...) -> what it prints, where the wheel is installed and no checkout is seen."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", symlinks=True)
    (packages,) = (folder / "env/lib").glob("python3*/site-packages")
    (packages / "present.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = folder / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, str(built[1])], check=True, capture_output=True)
    unset = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command, code=0):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return folder, run


@pytest.mark.slow
def test_the_wheel_trains_the_sample_outside_of_the_repository(installed, tiny_root):
    folder, run = installed
    where = run("python", "-c", "import segformer; print(segformer.__file__)")
    assert where.startswith(str(folder / "env"))
    shutil.copytree(tiny_root, folder / "photos")
    for name, text in (
        ("data/nuclei.yaml", "defaults: [folder]\nname: nuclei\nclasses: [background, nucleus]\n"),
        ("experiment/night.yaml", "# @package _global_\ndefaults:\n  - override /data: nuclei\nsteps: 2\n"),
    ):
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text(text)
    run(
        "segformer",
        "shard",
        "--conf",
        "mine",
        "data=nuclei",
        "root=photos",
        "output=data/nuclei",
        "workers=1",
    )
    short = (
        "global_batch=2",
        "augment.crop=[64,64]",
        "overlays=0",
        "loader.workers=0",
        "optim.warmup_steps=0",
    )
    night = ("--conf=mine", "experiment=night", "data.shards=data/nuclei", "name=night", *short)
    assert "finished" in run("python", "-m", "segformer", "train", *night)
    assert "mean" in run("segformer", "evaluate", "checkpoint=runs/night", "loader.workers=0")
    run("segformer", "predict", "checkpoint=runs/night/export", "input=photos/images/val", "output=masks")
    assert len(list((folder / "masks").glob("*_overlay.jpg"))) == 3
    told = run("segformer", "train", "data=folder", "data.shards=absent", "data.classes=[a]", code=2)
    assert "segformer shard data=" in told
    assert "segformer train experiment=sample" in run("segformer", "train", "--help")


@pytest.mark.slow
def test_a_job_of_slurm_copies_the_installed_package(installed):
    folder, run = installed
    script = run(
        "segformer", "slurm", "dry_run=true", "experiment=sample", "data.shards=data/x", "run_dir=runs/j"
    )
    assert f"{folder}/runs/j/slurm/0001/code/segformer/launch/slurm_job.py" in script
    copied = "from segformer.slurm.code import ROOT, Path, copy_code; copy_code(ROOT, Path('copy'))"
    run("python", "-c", copied)
    for name in (
        "segformer/launch/slurm_job.py",
        "segformer/conf/config.yaml",
        "segformer/training/config.py",
    ):
        assert (folder / "copy" / name).is_file()
    assert {path.name for path in (folder / "copy").iterdir()} == {"segformer", "CODE.json"}
