"""What a start writes down of command, devices, versions and code, and what it leaves out."""

import json
import subprocess

import pytest
import torch

from segformer.distributed.world import World
from segformer.telemetry.machine import ROOT, command_line, commit, start_row


def git(root, *command):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    line = ["git", "-C", root, *identity, *command]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "segformer").mkdir()
    (tmp_path / "segformer/__init__.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_start_names_command_devices_versions_and_commit():
    row = start_row(World(rank=0, local_rank=0, size=3, local_size=3, device=torch.device("cpu")))
    assert row["devices"].startswith("3 x ")
    assert row["devices"].endswith(" cores)")
    assert row["torch"] == torch.__version__
    assert row["time"].endswith("+00:00")
    assert row["commit"] == commit(ROOT)
    assert json.loads(json.dumps(row)) == row


def test_a_command_is_one_for_a_shell_without_its_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    argv = ["launch/train.py", "--check", "name=two words", "wandb_key=x", "data.root=/a/hunter2hunter2/b"]
    assert command_line(argv) == "launch/train.py --check 'name=two words'"
    twice = ["name=hunter2hunter2", "name=ok", "data.shards=s3://me:pw@host/a@b", "hunter2hunter2"]
    assert command_line(twice) == "name=ok data.shards=s3://host/a@b"


def test_the_commit_is_that_of_a_checkout_with_its_changes(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout / "segformer/__init__.py").write_text("x = 1\n")
    assert commit(checkout) == f"{head} and changes"


def test_a_package_installed_below_the_checkout_of_another_project_has_no_commit(checkout):
    inner = checkout / ".venv/lib"
    (inner / "segformer").mkdir(parents=True)
    (inner / "segformer/__init__.py").touch()
    assert commit(inner) is None


@pytest.mark.parametrize(("changed", "text"), [(False, "a1"), (True, "a1 and changes"), (None, "a1")])
def test_a_copy_of_the_code_knows_its_commit(tmp_path, changed, text):
    (tmp_path / "CODE.json").write_text(json.dumps({"commit": "a1", "changed": changed}))
    assert commit(tmp_path) == text
