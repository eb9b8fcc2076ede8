"""A whole job on all its ranks: train or continue a run, then export its models and write its report.

`launch/train.py` and the tasks of a Slurm job are this function.
"""

from __future__ import annotations

from pathlib import Path

from segformer.checkpoint.reader import newest_state
from segformer.distributed.world import init_world
from segformer.evaluation.metrics import Scores
from segformer.inference.export import ExportConfig, export
from segformer.inference.report import ReportConfig, report
from segformer.training.config import RunConfig
from segformer.training.loop import train


def run_job(cfg: RunConfig) -> Scores:
    """Train on all ranks; rank zero then exports the newest and the best checkpoint, and writes the report.

    Raises:
        SegformerError: see `train`; the export and the report are left out then.
    """
    world = init_world(cfg.engine.timeout_s)
    try:
        scores = train(cfg, world)
    finally:
        world.close()
    if world.is_main:
        export(ExportConfig(checkpoint=cfg.run_dir))
        state = newest_state(Path(cfg.run_dir) / "checkpoints")
        if state is not None and state.best_step is not None:  # None where no score is a number
            export(ExportConfig(checkpoint=cfg.run_dir, step="best", output=f"{cfg.run_dir}/export_best"))
        report(ReportConfig(checkpoint=cfg.run_dir))
    return scores
