"""Evaluation: every validation image once over all ranks, one table of counts, the scores.

Segmentation takes images whole and unscaled, and brings logits to the label's size in fp32, tile by tile
(models/ops/argmax.py). Classification resizes the short side to eval_resize and cuts the center out.

The batches of a rank hold images of one size only; ranks may have different numbers of batches. Under ZeRO-3
each forward is a collective, so a rank that has run out repeats a forward that doesn't count until all are
done.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.loader import LoaderConfig, eval_batches, num_eval_batches
from segformer.data.loading.samples import Batch
from segformer.data.shards.format import Split
from segformer.distributed.world import World
from segformer.errors import SegformerError, reported
from segformer.evaluation.metrics import ClassificationMetric, Scores, SegmentationMetric
from segformer.models.ops.backend import BACKENDS, Backend


@torch.no_grad()
def evaluate(
    model: nn.Module,
    normalize: nn.Module,
    split: Split,
    loader: LoaderConfig,
    world: World,
    *,
    num_classes: int,
    batch_size: int,
    bf16: bool,
    should_stop: Callable[[], bool],
    on_error: Callable[[SegformerError], None],
    view: ClassificationAugment | None = None,
    ops: Backend = BACKENDS["fused"],
    on_batch: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
) -> Scores | None:
    """The scores of `model` on a split, the same on every rank; all ranks.

    Args:
        model: (B, 3, H, W) float -> logits, (B, K, H/4, W/4) or (B, K) of a classifier; its mode is kept.
        normalize: uint8 images -> model input, on the device.
        batch_size: images per forward and rank.
        should_stop: asked before every batch and after the last, answers alike on all ranks; True ends the
            evaluation with None.
        on_error: gets what is wrong with the data that this rank reads, and must make `should_stop` answer
            True on all ranks: raised here, the error would leave the others in a collective.
        view: how the images of a classification set are cropped; None for segmentation.
        ops: backend of the operation that counts the pixels of a segmentation.
        on_batch: gets every batch of this rank and its logits, once they are counted.
    """
    metric = SegmentationMetric(num_classes, ops) if view is None else ClassificationMetric(num_classes)
    metric = metric.to(world.device)
    training = model.training
    model.eval()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=world.device)
    ranks = {"rank": world.rank, "world_size": world.size, "local_world_size": world.local_size}
    batches = eval_batches(split, loader, batch_size=batch_size, augment=view, **ranks)
    with contextlib.closing(iter(batches)) as iterator:
        for _ in range(max(num_eval_batches(split, world.size, batch_size))):
            if should_stop():
                break
            batch = None
            with reported(on_error):
                batch = next(iterator, None)
            if batch is not None:
                batch = batch.to(world.device, non_blocking=True)
                images = batch.images
            autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=bf16)
            with autocast, bounded_compilation(model, images):
                logits = model(normalize(images, None))
            if batch is not None:
                with reported(on_error):
                    metric.update(logits, batch.targets)
                on_batch(batch, logits)
    model.train(training)
    if should_stop():
        return None
    with warnings.catch_warnings():  # a rank may have had no image: its zeros count
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
        return metric.compute()


def bounded_compilation(model: nn.Module, images: Tensor) -> contextlib.AbstractContextManager[object]:
    """A compiled model runs without its graphs where a side is no multiple of 32.

    All sizes of whole 32 share two or three graphs. The others have one for every way in which the maps of
    the stages round, and compiling each would hold up a training run for minutes.
    """
    whole = images.shape[2] % 32 == 0 and images.shape[3] % 32 == 0
    if whole or not getattr(model, "is_compiled", False):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
