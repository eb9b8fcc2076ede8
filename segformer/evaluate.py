"""Evaluation: every validation image once over all ranks, one confusion matrix, the scores.

Images are taken whole and unscaled, logits are brought to the label's size (inference.py). The batches of a
rank hold images of one size only; ranks may have different numbers of batches. Under ZeRO-3 each forward is a
collective, so a rank that has run out repeats a forward on nothing that counts until all are done.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from segformer.data.loader import Batch
from segformer.dist import World
from segformer.inference import predict
from segformer.metrics import Scores, SegmentationMetric


@torch.no_grad()
def evaluate(
    model: nn.Module,
    normalize: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    num_classes: int,
    rounds: int,
    autocast: bool = False,
) -> Scores:
    """The scores of `model` over the batches of all ranks; the same on every rank.

    Args:
        model: (B, 3, H, W) float -> (B, K, H/4, W/4) logits; left in the mode it came in.
        normalize: uint8 images -> model input, on the device.
        batches: this rank's share; together the ranks hold every sample once.
        rounds: the largest number of batches that a rank has.
        autocast: run the model in bf16 autocast.
    """
    metric = SegmentationMetric(num_classes).to(world.device)
    training = model.training
    model.eval()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=world.device)
    iterator = iter(batches)
    for _ in range(rounds):
        batch = next(iterator, None)
        if batch is not None:
            batch = batch.to(world.device, non_blocking=True)
            images = batch.images
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=autocast):
            prediction = predict(model, normalize(images, None), (images.shape[2], images.shape[3]))
        if batch is not None:
            metric.update(prediction, batch.targets)
    model.train(training)
    return metric.compute()
