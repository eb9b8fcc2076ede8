"""SegFormer in PyTorch and the system that trains it.

`import segformer` gives the model, a trained one in use, and training, evaluation and export, each loaded
on first use; all else is imported by its module (segformer.training.loop, segformer.data.shards.format ...).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segformer.api import TrainingResult, evaluate, export, train
    from segformer.errors import CheckpointError, ConfigError, DataError, SegformerError
    from segformer.inference.predictor import Prediction, Predictor
    from segformer.models.segformer import MiTClassifier, SegFormer, build_model
    from segformer.models.variants import VARIANTS, ModelConfig

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "segformer.errors",
    "ConfigError": "segformer.errors",
    "DataError": "segformer.errors",
    "SegformerError": "segformer.errors",
    "TrainingResult": "segformer.api",
    "evaluate": "segformer.api",
    "export": "segformer.api",
    "train": "segformer.api",
    "VARIANTS": "segformer.models.variants",
    "MiTClassifier": "segformer.models.segformer",
    "ModelConfig": "segformer.models.variants",
    "Prediction": "segformer.inference.predictor",
    "Predictor": "segformer.inference.predictor",
    "SegFormer": "segformer.models.segformer",
    "build_model": "segformer.models.segformer",
}
__all__ = [
    "VARIANTS",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MiTClassifier",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "SegFormer",
    "SegformerError",
    "TrainingResult",
    "build_model",
    "evaluate",
    "export",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'segformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
