"""Train a SegFormer, or continue it; then export the model and write the report.

python launch/train.py experiment=sample
deepspeed --num_accelerators 2 launch/train.py experiment=sample
torchrun --nproc-per-node 8 launch/train.py experiment=sample
"""

from pathlib import Path

from segformer.config import RunConfig, cli
from segformer.dist import init_world
from segformer.train import train


def main(cfg: RunConfig) -> None:
    """Train on all ranks; rank zero then exports the model and writes the report."""
    world = init_world(cfg.engine.timeout_s)
    try:
        train(cfg, world)
    finally:
        world.close()
    if world.is_main:
        from segformer.export import ExportConfig, export
        from segformer.report import ReportConfig, report

        export(ExportConfig(run=cfg.run_dir, out=str(Path(cfg.run_dir) / "export")))
        report(ReportConfig(run=cfg.run_dir))


if __name__ == "__main__":
    cli(RunConfig, "config", main)
