"""The command that a batch script of launch/slurm.py runs; not for people.

python launch/slurm_job.py rank <folder>        every rank: train, or go on
python launch/slurm_job.py after <folder> <exit code>   once, when they ended
python launch/slurm_job.py sweep <folder>       when an array of it has ended
"""

import sys
from pathlib import Path


def main() -> None:
    """The command line; see above. Each imports only what it needs: torch takes seconds."""
    match sys.argv[1:]:
        case ["rank", folder]:
            from segformer.slurm.task import task

            task(Path(folder))
        case ["after", folder, code] if code.isdigit():
            from segformer.slurm.after import after

            after(Path(folder), int(code))
        case ["sweep", folder]:
            from segformer.errors import ending
            from segformer.slurm.sweeping import go_on

            with ending():
                go_on(Path(folder))
        case _:
            sys.exit(f"usage: {sys.argv[0]} rank <folder> | after <folder> <exit code> | sweep <folder>")


if __name__ == "__main__":
    main()
