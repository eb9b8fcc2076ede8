"""The copy of the code that a job runs: what git knows and what was changed since, whole or not at all."""

import json
import subprocess

import pytest

from segformer.errors import ConfigError
from segformer.slurm.code import copy_code

FILES = {
    "segformer/a.py": "a = 1\n",
    "launch/b.py": "b = 1\n",
    "conf/c.yaml": "c: 1\n",
    "data_prep/sample/x.png": "not code",
    "pyproject.toml": "[project]\n",
    "docs/d.md": "no part of it",
    ".gitignore": "*.log\n/conf/local/\n",
}


def git(root, *command):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "-C", root, *identity, *command], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path):
    """A folder with code, under git."""
    root = tmp_path / "tree"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(tmp_path, "init", "-q", root)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_clean_tree_is_its_commit(tree, tmp_path):
    found = copy_code(tree, tmp_path / "copy")
    head = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (found["commit"], found["changed"]) == (head.strip(), False)
    assert names(tmp_path / "copy") == {
        "segformer/a.py", "launch/b.py", "conf/c.yaml", "pyproject.toml", "CODE.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "copy/CODE.json").read_text()) == found


def test_changes_are_copied_and_kept_as_a_patch(tree, tmp_path):
    clean = copy_code(tree, tmp_path / "clean")
    (tree / "segformer/a.py").write_text("a = 2\n")
    (tree / "segformer/new.py").write_text("new = 1\n")
    (tree / "segformer/x.log").write_text("ignored")
    found = copy_code(tree, tmp_path / "copy")
    assert found["changed"]
    assert found["sha256"] != clean["sha256"]
    assert (tmp_path / "copy/segformer/a.py").read_text() == "a = 2\n"
    assert "segformer/new.py" in names(tmp_path / "copy")
    assert "segformer/x.log" not in names(tmp_path / "copy")
    git(tree, "checkout", "segformer/a.py")
    git(tree, "apply", tmp_path / "copy/CODE.diff")
    assert (tree / "segformer/a.py").read_text() == "a = 2\n"


def test_without_git_everything_but_caches_is_taken(tree, tmp_path):
    subprocess.run(["rm", "-rf", tree / ".git"], check=True)
    (tree / "segformer/__pycache__").mkdir()
    (tree / "segformer/__pycache__/a.pyc").write_text("x")
    found = copy_code(tree, tmp_path / "copy")
    assert (found["commit"], found["changed"]) == (None, None)
    assert "segformer/__pycache__/a.pyc" not in names(tmp_path / "copy")


def test_a_copy_that_fails_leaves_nothing(tree, tmp_path):
    (tree / "segformer/gone.py").symlink_to("/proc/self/mem")
    with pytest.raises(ConfigError, match=r"gone\.py can't be copied"):
        copy_code(tree, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".tmp-*"))
