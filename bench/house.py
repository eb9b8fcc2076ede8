"""Measures of the code itself, at two commits side by side: python bench/house.py [<before>] [<after>]

entries              files and folders at the top of segformer/
arrows               pairs (importing, imported) of these entries
sample_files         own files that one training sample enters between the fetch of its batch and the end
                     of the step; traced in a run of one step on a CPU, without worker processes
library, tests       lines of segformer/ and of tests/
tests_per_line       tests / library
except_per_1000      except clauses per 1,000 lines of the library
ci_minutes           of `.ci/run`, from bench/results/ci.csv, where it has been timed at that commit

Prints the table, and the files that the sample enters at the second commit.
"""

import ast
import csv
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "entries": 13,
    "arrows": 45,
    "sample_files": 20,
    "library": 16_500,
    "tests": "",
    "tests_per_line": 0.9,
    "except_per_1000": 4,
    "ci_minutes": 30,
}
# Runs a script of the tree and prints, as its last line, the files of segformer/ that are entered in between.
TRACE = """
import json, os, re, runpy, sys, threading
own, seen, state = os.path.join(os.getcwd(), "segformer") + os.sep, set(), "before"
def hook(frame, event, argument):
    global state
    code = frame.f_code
    if not code.co_filename.startswith(own) or state == "after":
        return
    if event == "call" and re.fullmatch("_?fetch(_batches)?", code.co_name):
        state = "between"
    if event == "call" and state == "between":
        seen.add(code.co_filename[len(own):])
    if event == "return" and code.co_name == "train_step":
        state = "after"
sys.argv = sys.argv[1:]
threading.setprofile(hook)
sys.setprofile(hook)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.setprofile(None)
    print(json.dumps(sorted(seen)))
"""
RUN = (
    "launch/train.py experiment=sample steps=1 overlays=0 loader.workers=0 global_batch=1 "
    "augment.crop=[64,64] optim.warmup_steps=0 data.shards={shards} run_dir={run}"
)


def measure(commit: str) -> tuple[dict[str, Any], list[str]]:
    """The measures of a commit, and the files of its sample."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(tree, filter="data")
        library, tests = sources(tree / "segformer"), sources(tree / "tests")
        lines, test_lines = (sum(map(count_lines, found.values())) for found in (library, tests))
        handlers = sum(
            isinstance(node, ast.ExceptHandler)
            for text in library.values()
            for node in ast.walk(ast.parse(text))
        )
        entries = {entry(name) for name in library} - {"__init__"}
        files = sample_files(tree, Path(folder))
        row = {
            "commit": commit,
            "entries": len(entries),
            "arrows": len(set(arrows(library))),
            "sample_files": len(files),
            "library": lines,
            "tests": test_lines,
            "tests_per_line": round(test_lines / lines, 2),
            "except_per_1000": round(1000 * handlers / lines, 1),
            "ci_minutes": ci_minutes(commit),
        }
        return row, files


def sources(folder: Path) -> dict[str, str]:
    """Path below `folder` -> text of its Python files."""
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.py")}


def count_lines(text: str) -> int:
    """Lines of a file."""
    return text.count("\n")


def entry(name: str) -> str:
    """The file or folder at the top that a path or a dotted name below segformer is in."""
    return name.replace("/", ".").removesuffix(".py").split(".")[0]


def arrows(library: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(importing entry, imported entry) of every import that crosses from one into another."""
    tops = {entry(name) for name in library}
    for name, text in library.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or node.module is None or node.level:
                continue
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = {entry(one.removeprefix("segformer.")) for one in full if one.startswith("segformer.")}
            for target in inner & tops - {entry(name)}:
                if name != "__init__.py":
                    yield entry(name), target


def sample_files(tree: Path, scratch: Path) -> list[str]:
    """Files below segformer/ that one sample enters in a training step of one rank on the CPU."""
    environment = os.environ | {"PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    shards, run = scratch / "shards", scratch / "run"

    def python(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command[-3:])} failed in {tree}:\n{done.stderr}")
        return done.stdout

    python("data_prep/shard.py", "data=sample", f"data.shards={shards}")
    printed = python("-c", TRACE, *RUN.format(shards=shards, run=run).split())
    found: list[str] = json.loads(printed.splitlines()[-1])
    return found


def ci_minutes(commit: str) -> float | str:
    """Minutes of `.ci/run` at a commit; "not timed" where the file has no row of it."""
    with (ROOT / "bench/results/ci.csv").open() as file:
        found = [float(row["seconds"]) for row in csv.DictReader(file) if row["commit"] == commit]
    return round(sum(found) / 60, 1) if found else "not timed"


def main() -> None:
    """Print the table of both commits and the targets."""
    names = (sys.argv[1:] + ["28add37", "HEAD"][len(sys.argv) - 1 :])[:2]
    (before, _), (after, files) = (measure(name) for name in names)
    print(f"{'':16} {names[0]:>12} {names[1]:>12} {'target':>12}")
    for key, target in TARGETS.items():
        print(f"{key:16} {before[key]!s:>12} {after[key]!s:>12} {target!s:>12}")
    print("\nfiles of one sample:", " ".join(files))


if __name__ == "__main__":
    main()
