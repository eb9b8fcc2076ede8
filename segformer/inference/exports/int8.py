"""Static quantization of an ONNX file: int8 weights, a scale a channel, uint8 activations.

Convolutions and linear maps are quantized; the products of attention, norms, softmax and resizes stay float.
Ranges are those of images of the training split; what it costs is the mIoU on the whole validation split.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from segformer.data.loading.photometric import Normalize
from segformer.errors import CheckpointError, ConfigError, DataError, reraise_as
from segformer.evaluation.metrics import SegmentationMetric, SegmentationScores
from segformer.inference.exports.gate import run_images
from segformer.inference.exports.runtime import package
from segformer.models.weights.bundle import Weights


def _labelled(weights: Weights, count: int, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (1, C, H, W), normalized, and masks (1, H, W) of a split of the run's shards."""
    normalize = Normalize(weights.metadata.mean, weights.metadata.std)
    what, do = "int8=true is calibrated and scored on the shards of the run", "export where they are"
    with reraise_as(ConfigError, what, do, on=DataError):
        for image, mask in run_images(weights, count, split):
            yield normalize(torch.from_numpy(image).permute(2, 0, 1)[None], None), torch.tensor(mask)[None]


def quantize(file: Path, weights: Weights, calibration: int) -> None:
    """Quantize an ONNX file in its place, by `calibration` images of the training split."""
    onnx, quantization = package("onnx", "int8=true"), package("onnxruntime.quantization", "int8=true")
    graph = onnx.load(file).graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in constants]
    kinds = quantization.QuantType
    batches = ({"images": images.numpy()} for images, _ in _labelled(weights, calibration, "train"))
    logging.disable(logging.WARNING)  # advice to preprocess the model
    try:
        quantization.quantize_static(
            file,
            file,
            SimpleNamespace(get_next=lambda: next(batches, None)),
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_exclude=products,
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)


@torch.inference_mode()
def scores(weights: Weights, network: nn.Module, file: Any, most: float) -> dict[str, float]:
    """mIoU of network and file on the validation split; CheckpointError where over `most` points are lost."""
    counts = [SegmentationMetric(weights.arch.num_classes) for _ in range(2)]
    for pixels, target in _labelled(weights, 2**31, "val"):
        counts[0].update(network(pixels), target)
        counts[1].update(torch.from_numpy(file(pixels.numpy())), target)
    own, theirs = (100 * SegmentationScores.from_counts(metric.counts).miou for metric in counts)
    if not own - theirs <= most:
        raise CheckpointError(
            f"int8 is refused and removed: it loses {own - theirs:.2f} points of mIoU ({own:.2f} to "
            f"{theirs:.2f}) with max_miou_loss={most:g}; give more images (calibration=), or allow more"
        )
    return {"miou": own / 100, "miou_int8": theirs / 100}
