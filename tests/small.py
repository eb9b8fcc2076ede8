"""A small network for tests of the whole: a quarter of MiT-B0's channels, one block a stage, 8 classes."""

from typing import Any
from unittest import mock

import torch

from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import VARIANTS, ModelConfig, Variant
from segformer.training.losses import LossConfig, SegmentationLoss

CLASSES = 8
SIZES = Variant(embed_dims=(8, 16, 40, 64), depths=(1, 1, 1, 1), decoder_dim=32)


def small(ops: str = "fused", **settings: Any) -> SegFormer:
    """The network with the same weights and running statistics every time, by default without drops."""
    torch.manual_seed(0)
    settings = {"drop_path_rate": 0.0, "dropout": 0.0} | settings
    with mock.patch.dict(VARIANTS, small=SIZES):
        model = build_model(ModelConfig(variant="small", ops=ops, **settings), CLASSES)
    norm = model.decode_head.linear_fuse.bn
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model


def cross_entropy(model: SegFormer) -> SegmentationLoss:
    """The cross entropy of its logits, by its own operations."""
    config = LossConfig(terms={"cross_entropy": 1.0})
    return SegmentationLoss(config, model.num_classes, model.decode_head.ops)
