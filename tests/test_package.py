"""The wheel: what is in it, and its commands in an environment of its own, outside of the repository."""

import sys
import tomllib
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
