"""Measure: python launch/bench.py bench=<name> [root=<pictures>]

    python launch/bench.py bench=loader root=../shared/data/camvid
    python launch/bench.py bench=order order.samples=10000,1000000
    python launch/bench.py bench=peers device=cuda
    python launch/bench.py bench=rivals rivals.baseline=../older
    python launch/bench.py bench=kernels kernels.batch=8
    python launch/bench.py bench=trainers trainers.seeds=[0]
    python launch/bench.py bench=stages stages.variants=[b0]
    python launch/bench.py bench=agreement agreement.ranks=8
    python launch/bench.py bench=exports exports.variants=[b0]
    python launch/bench.py bench=scaling scaling.nodes=[1,8,64]

Tables are printed and written as CSV into `output`; bench/README.md says what
each column is.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this script is called bench too, and its folder comes first

from segformer.errors import importing  # noqa: E402

with importing(__name__):
    from bench.agreement import AgreementBench
    from bench.agreement import measure as measure_agreement
    from bench.exports import ExportsBench
    from bench.exports import measure as measure_exports
    from bench.kernels import KernelsBench
    from bench.kernels import measure as measure_kernels
    from bench.loader import LoaderBench
    from bench.loader import measure as measure_loader
    from bench.memory import MemoryBench
    from bench.memory import measure as measure_memory
    from bench.order import OrderBench
    from bench.order import measure as measure_order
    from bench.peers import PeersBench
    from bench.peers import measure as measure_peers
    from bench.predict import PredictBench
    from bench.predict import measure as measure_predict
    from bench.requeue import RequeueBench
    from bench.requeue import measure as measure_requeue
    from bench.rivals import RivalsBench
    from bench.rivals import measure as measure_rivals
    from bench.scaling import ScalingBench
    from bench.scaling import measure as measure_scaling
    from bench.stages import StagesBench
    from bench.stages import measure as measure_stages
    from bench.start import StartBench
    from bench.start import measure as measure_start
    from bench.trainers import TrainersBench
    from bench.trainers import measure as measure_trainers
    from segformer.errors import ConfigError
    from segformer.training.config import cli


@dataclass(kw_only=True, slots=True)
class BenchConfig:
    """The measurement and its settings."""

    bench: str = "???"
    """loader, order, start, memory, peers, rivals, predict, exports, kernels, trainers, stages,
    agreement, scaling or slurm."""
    root: str = ""
    """Folder with images/train and masks/train for loader and memory; empty = pictures made here. For
    trainers a folder with val, too; empty = data_prep/sample."""
    output: str = "bench/results"
    """Folder for the CSV files."""
    device: str = "cpu"
    """cpu or cuda, for peers."""
    loader: LoaderBench = field(default_factory=LoaderBench)
    order: OrderBench = field(default_factory=OrderBench)
    start: StartBench = field(default_factory=StartBench)
    memory: MemoryBench = field(default_factory=MemoryBench)
    peers: PeersBench = field(default_factory=PeersBench)
    rivals: RivalsBench = field(default_factory=RivalsBench)
    predict: PredictBench = field(default_factory=PredictBench)
    kernels: KernelsBench = field(default_factory=KernelsBench)
    trainers: TrainersBench = field(default_factory=TrainersBench)
    stages: StagesBench = field(default_factory=StagesBench)
    agreement: AgreementBench = field(default_factory=AgreementBench)
    scaling: ScalingBench = field(default_factory=ScalingBench)
    exports: ExportsBench = field(default_factory=ExportsBench)
    slurm: RequeueBench = field(default_factory=RequeueBench)

    def __post_init__(self) -> None:
        if self.bench not in (*BENCHES, "???"):
            raise ConfigError(f"bench={self.bench!r} is unknown; use one of {', '.join(BENCHES)}")


BENCHES: dict[str, Callable[[BenchConfig, Path], object]] = {
    "loader": lambda cfg, out: measure_loader(cfg.loader, cfg.root, out),
    "order": lambda cfg, out: measure_order(cfg.order, out),
    "start": lambda cfg, out: measure_start(cfg.start, out),
    "memory": lambda cfg, out: measure_memory(cfg.memory, cfg.root, out),
    "peers": lambda cfg, out: measure_peers(cfg.peers, cfg.device, out),
    "rivals": lambda cfg, out: measure_rivals(cfg.rivals, out),
    "predict": lambda cfg, out: measure_predict(cfg.predict, out),
    "kernels": lambda cfg, out: measure_kernels(cfg.kernels, out),
    "trainers": lambda cfg, out: measure_trainers(cfg.trainers, cfg.root, out),
    "stages": lambda cfg, out: measure_stages(cfg.stages, out),
    "agreement": lambda cfg, out: measure_agreement(cfg.agreement, out),
    "scaling": lambda cfg, out: measure_scaling(cfg.scaling, out),
    "exports": lambda cfg, out: measure_exports(cfg.exports, out),
    "slurm": lambda cfg, out: measure_requeue(cfg.slurm, out),
}


def run(cfg: BenchConfig) -> None:
    """Run the chosen measurement."""
    BENCHES[cfg.bench](cfg, Path(cfg.output))


if __name__ == "__main__":
    cli(BenchConfig, "bench", run)
