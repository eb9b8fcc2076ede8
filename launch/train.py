"""Train a SegFormer, or continue it; then export it and write the report.

python launch/train.py experiment=sample
deepspeed --num_accelerators 2 launch/train.py experiment=sample
torchrun --nproc-per-node 8 launch/train.py experiment=sample
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.job import run_job
    from segformer.training.config import RunConfig, cli
    from segformer.training.directory import check_run

if __name__ == "__main__":
    cli(RunConfig, "config", run_job, check_run)
