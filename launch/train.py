"""Train a SegFormer, or continue it; then export it and write the report.

python launch/train.py experiment=scratch data.shards=data/mine name=mine
python launch/train.py experiment=sample
deepspeed --num_accelerators 2 launch/train.py experiment=sample
torchrun --nproc-per-node 8 launch/train.py experiment=sample
"""

import shlex
import sys

from segformer.errors import ConfigError, ending, importing

with importing(__name__):
    from segformer.job import run_job
    from segformer.training.config import RunConfig, cli
    from segformer.training.directory import check_run

MULTIRUN = ("-m", "--multirun")  # as hydra's users write it

if __name__ == "__main__":
    if given := [one for one in sys.argv[1:] if one in MULTIRUN]:
        rest = [one for one in sys.argv[1:] if one not in MULTIRUN]
        name = [] if any(one.startswith("name=") for one in rest) else ["name=sweep"]
        with ending():
            command = shlex.join(["python", "launch/sweep.py", *name, *rest])
            raise ConfigError(f"{given[0]} is a command of its own here; write {command}")
    cli(RunConfig, "config", run_job, check_run)
