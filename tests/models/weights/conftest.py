"""A model under our names, and a directory that transformers wrote."""

from pathlib import Path

import pytest
import torch
from model_files import NAMES, State, hf_config, randomize
from transformers import SegformerForSemanticSegmentation

from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that transformers wrote, with class names; nothing in it is shared with our code."""
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(hf_config(id2label=dict(enumerate(NAMES)))).eval()
    randomize(model.state_dict())
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def state() -> State:
    """B0 for 3 classes under our names, which are those of NVlabs."""
    torch.manual_seed(1)
    return randomize(build_model(ModelConfig(), 3).state_dict())
