"""Evaluation: every validation image once over all ranks, one table of counts, the scores.

Segmentation takes images as the inference mode says, whole and unscaled by default, and brings logits to the
label's size in fp32, tile by tile (models/ops/argmax.py). A split of tiles is scored over its whole images
(stitching.py). Classification resizes the short side to eval_resize and cuts the center out.

The batches of a rank hold images of one size only; ranks may have different numbers of batches. Under ZeRO-3
each forward is a collective, so a rank that has run out repeats a forward that doesn't count until all are
done.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.loader import LoaderConfig, eval_batches, num_eval_batches
from segformer.data.loading.mixture import LabelMap
from segformer.data.loading.samples import Batch
from segformer.data.loading.workers import print_line
from segformer.data.shards.format import Split
from segformer.distributed.world import World
from segformer.errors import DataError, SegformerError, listed, reported, reraise_as
from segformer.evaluation.inference_mode import InferenceMode, InferenceModeConfig, of_tiles, protocol
from segformer.evaluation.metrics import (
    ClassificationMetric,
    Count,
    Scores,
    SegmentationMetric,
    SegmentationScores,
)
from segformer.evaluation.stitching import Stitching
from segformer.models.ops.backend import BACKENDS, Backend


def protocol_of(view: ClassificationAugment | None, mode: InferenceModeConfig | None = None) -> str:
    """How images are seen, as it is said beside every score; arguments as of `evaluate`."""
    if view is not None:
        return f"short side {view.eval_resize}, center {view.size}x{view.size}"
    return protocol(mode or InferenceModeConfig())


def mode_of(split: Split, mode: InferenceModeConfig | None = None) -> InferenceModeConfig:
    """How images of a split go through the model where `mode` is asked for; ConfigError if it can't be."""
    mode = mode or InferenceModeConfig()
    return of_tiles(mode, split.tiled.tiling) if split.tiled else mode


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
    mode: InferenceModeConfig | None = None,
    table: np.ndarray | None = None,
    ops: Backend = BACKENDS["fused"],
    count: Count | None = None,
    on_batch: Callable[[Batch, Tensor], None] = lambda batch, logits: None,
    warn: Callable[[str], None] = print_line,
) -> Scores | None:
    """The scores of `model` on a split, the same on every rank; all ranks.

    Args:
        model: (B, C, H, W) float -> logits, (B, K, H/4, W/4) or (B, K) of a classifier; its mode is kept.
        should_stop: asked before every batch and after the last, alike on all ranks; True ends it with None.
        on_error: gets what is wrong with the data that this rank reads, and must make `should_stop` answer
            True on all ranks: raised here, the error would leave the others in a collective.
        view: how the images of a classification set are cropped; None for segmentation.
        mode: how images of segmentation go through the model; None for whole, at their own size; see mode_of.
        table: label -> class of the model, uint8 (256,); None where labels are these.
        ops, count: backend of the operation that counts the pixels of a segmentation; what counts instead.
        on_batch: gets every batch of this rank and its logits, once they are counted.
        warn: gets a line where workers had to be started again.
    """
    masks = view is None
    metric = SegmentationMetric(num_classes, ops, count) if masks else ClassificationMetric(num_classes)
    metric, training = metric.to(world.device), model.training
    model.eval()
    network = InferenceMode(model, mode_of(split, mode)) if view is None else model
    parts = Stitching(split.tiled).add if split.tiled else lambda ids, *batch: [(*batch, ids)]
    images = torch.zeros(1, split.channels, 64, 64, dtype=getattr(torch, split.dtype), device=world.device)
    batches = _batches(split, loader, world, batch_size=batch_size, augment=view, table=table, warn=warn)
    with contextlib.closing(batches) as iterator:
        for _ in range(max(num_eval_batches(split, world.size, batch_size))):
            if should_stop():
                break
            batch = None
            with reported(on_error):
                batch = next(iterator, None)
            if batch is not None:
                images = (batch := batch.to(world.device, non_blocking=True)).images
            with _eagerly(model), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
                logits = network(normalize(images, None))
            if batch is not None:
                with reported(on_error), _naming(split, batch):
                    for part in parts(batch.sample_ids.tolist(), logits, batch.targets):
                        metric.update(*part)
                on_batch(batch, logits)
    model.train(training)
    return None if should_stop() else _compute(metric)


def _batches(split: Split, loader: LoaderConfig, world: World, **how: Any) -> Any:
    how |= {"rank": world.rank, "world_size": world.size, "local_world_size": world.local_size}
    return iter(eval_batches(split, loader, **how))


def _compute(metric: SegmentationMetric | ClassificationMetric) -> Scores:
    """The scores; all ranks, of which one may have had no image: its zeros count."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
        return metric.compute()


def _eagerly(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """A model that is compiled for its training crops runs without graphs, as if it weren't.

    Batches of an evaluation vary in all three sizes. Each new graph holds a run up for a minute, and of sizes
    that vary Inductor (torch 2.13) makes wrong ranges and fails.
    """
    if getattr(model, "is_compiled", False):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _naming(split: Split, batch: Batch) -> contextlib.AbstractContextManager[None]:
    """A DataError of the block begins with the samples of the batch."""
    return reraise_as(DataError, listed(map(split.describe, batch.sample_ids.tolist()), 3), on=DataError)


def evaluate_labels(
    model: nn.Module, *data: Any, labels: LabelMap | None, num_classes: int, **options: Any
) -> Scores | None:
    """`evaluate` where the split's labels are others than the model's classes; scores in these labels.

    labels: what they are in the model's classes; None for these themselves. Predicted is the label of the
    best class among those that the split annotates; `on_batch` gets logits and targets of these classes.
    """
    if labels is None:
        return evaluate(model, *data, num_classes=num_classes, **options)
    known = labels.annotated
    network, table = _Annotated(model, known), labels.table(known)
    scores = evaluate(network, *data, num_classes=len(known), table=table, **options)
    if not isinstance(scores, SegmentationScores):
        return scores
    return SegmentationScores.from_counts(labels.folded(torch.tensor(scores.confusion)))


class _Annotated(nn.Module):
    """A network that is asked for some of its classes only."""

    def __init__(self, model: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        self.training = model.training
        self.is_compiled = getattr(model, "is_compiled", False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.classes]
