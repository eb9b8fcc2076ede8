"""The commands by name, where the repository is not at hand or not wanted.

    segformer train experiment=sample         python launch/train.py experiment=sample
    segformer shard data=folder root=...      python data_prep/shard.py data=folder root=...
    python -m segformer train ...             the same
    deepspeed --module segformer train ...    all ranks; torchrun -m segformer train ...

A command is the script of its name in launch/ or data_prep/, run as it is.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

from segformer.errors import ConfigError, ending
from segformer.files import HOME
from segformer.training.overrides import near

NO_COMMANDS = ("bench", "slurm_job")  # of the repository alone; of a batch script alone


def commands() -> dict[str, Path]:
    """Name -> script."""
    paths = [path for folder in ("data_prep", "launch") for path in sorted((HOME / folder).glob("*.py"))]
    return {path.stem: path for path in paths if path.stem not in NO_COMMANDS}


def usage(found: dict[str, Path]) -> str:
    """The commands, each with the first line of its script."""
    lines = [(name, ast.get_docstring(ast.parse(path.read_text())) or "") for name, path in found.items()]
    width = max(map(len, found))
    return "\n".join(
        ["segformer <command> key=value ...    (segformer <command> --help)", ""]
        + [f"  {name:<{width}}  {text.splitlines()[0]}" for name, text in lines]
    )


def main() -> None:
    """The command line; see above."""
    given = [one for one in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", one)]
    found, name = commands(), given[0] if given else "--help"
    with ending():
        if name in ("--help", "-h"):
            print(usage(found))
            return
        if name not in found:
            meant = near(name, found)
            raise ConfigError(
                f"{name!r} is not a command; "
                + (f"did you mean {meant}?" if meant else f"use {', '.join(found)}")
            )
    sys.argv = [str(found[name]), *given[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
