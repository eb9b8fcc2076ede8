"""The parity gate of exports: a file runs in its own runtime beside the network; what differs is refused.

Images are those of the run's validation split where its shards can be read, and otherwise noise of the
smoothness of photographs, seeded: which of the two is in the certificate. Batches of 1, 2 and 5 of several
sizes, multiples of 32 and others, are compared: the classes of all pixels, at the size of the image, and the
logits.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segformer.data.loading.photometric import Normalize
from segformer.data.loading.samples import Samples
from segformer.data.shards.format import ShardSet
from segformer.data.shards.storage import StorageConfig
from segformer.errors import CheckpointError, ConfigError, DataError
from segformer.models.ops.argmax import upsample_argmax
from segformer.models.weights.bundle import Weights

AGREEMENT = 0.9999
CASES = ((1, 256, 256), (1, 224, 321), (2, 133, 189), (2, 96, 64), (5, 65, 98), (5, 160, 128), (1, 61, 47))
"Batch, height and width of what is compared; the tests of an export trace none of them."
_TIMED = 3  # runs of the first case


def run_images(weights: Weights, count: int, split: str) -> Iterator[tuple[np.ndarray, Any]]:
    """At most `count` images (H, W, C) of a split of the run's shards, evenly over it, and their labels.

    Raises:
        DataError: they can't be read.
    """
    if not (place := weights.provenance.get("shards")):
        raise DataError(f"{weights.source} does not say which shards it was trained with")
    chosen = ShardSet.open(place, StorageConfig()).split(split)
    samples = Samples(chosen, None)
    for index in np.linspace(0, chosen.num_samples - 1, min(count, chosen.num_samples)).astype(int):
        yield samples.picture(int(index))


def _images(weights: Weights, count: int) -> tuple[list[np.ndarray], str]:
    """Images to compare on, and where they come from."""
    with suppress(DataError, ConfigError):  # shards that are not here any more, or have no such split
        found = [image for image, _ in run_images(weights, count, "val")]
        return found, f"val of {weights.provenance['shards']}"
    rng = np.random.default_rng(0)
    dtype, channels = weights.metadata.dtype or "uint8", weights.arch.in_channels
    mean, std = (np.array(values, np.float32) for values in (weights.metadata.mean, weights.metadata.std))
    coarse = rng.standard_normal((count, 12, 12, channels)).astype(np.float32) * std + mean
    found = [cv2.resize(image, (320, 320), interpolation=cv2.INTER_CUBIC) for image in coarse]
    limits = (0, 255) if dtype == "uint8" else (0, 65535) if dtype == "uint16" else (-np.inf, np.inf)
    return [x.reshape(320, 320, -1).clip(*limits).astype(dtype) for x in found], "seeded noise"


def batches(images: list[np.ndarray]) -> Iterator[Tensor]:
    """The images, cut or repeated to the CASES, (B, C, H, W)."""
    start = 0
    for batch, height, width in CASES:
        cut = []
        for image in (images[(start + index) % len(images)] for index in range(batch)):
            rows, columns = -(-height // len(image)), -(-width // image.shape[1])
            cut.append(np.tile(image, (rows, columns, 1))[:height, :width])
        start += batch
        yield torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)


@torch.inference_mode()
def compare(
    weights: Weights,
    network: nn.Module,
    file: Callable[[np.ndarray], np.ndarray],
    *,
    preprocess: bool = False,
    argmax: bool = False,
) -> dict[str, Any]:
    """How the file agrees with the network on images of its run: what stands in the certificate.

    agreement: share of all pixels with the same class, or of images of a classifier. difference: greatest of
    two logits. network_ms and file_ms: of one image of the first size.
    """
    images, source = _images(weights, 16)
    normalize = Normalize(weights.metadata.mean, weights.metadata.std)
    pixels = same = count = 0
    difference, own_s, file_s = 0.0, inf, inf
    for case, batch in enumerate(batches(images)):
        normal = normalize(batch, None)
        given = (batch.permute(0, 2, 3, 1) if preprocess else normal).contiguous().numpy()
        for _ in range(_TIMED if case == 0 else 1):
            start = time.perf_counter()
            wanted = network(normal)
            middle = time.perf_counter()
            found = torch.from_numpy(np.asarray(file(given)))
            if case == 0:
                own_s, file_s = min(own_s, middle - start), min(file_s, time.perf_counter() - middle)
        expected = _classes(wanted, batch)
        classes = found if argmax else _classes(found, batch)
        gap = (classes != expected).any().float() if argmax else (found - wanted).abs().max()
        difference = max(float(gap), difference)  # NaN stays, and its classes are not equal
        same, pixels = same + int((classes == expected).sum()), pixels + expected.numel()
        count += len(batch)
    return {
        "images": source,
        "digest": weights.provenance.get("digest") if source != "seeded noise" else None,
        "count": count,
        "sizes": [f"{batch} x {height} x {width}" for batch, height, width in CASES],
        "agreement": same / pixels,
        "difference": difference,
        "network_ms": round(1e3 * own_s, 2),
        "file_ms": round(1e3 * file_s, 2),
        "threads": torch.get_num_threads(),
    }


def _classes(logits: Tensor, batch: Tensor) -> Tensor:
    """Classes at the size of the images, or of whole images by a classifier."""
    return logits.argmax(1) if logits.ndim == 2 else upsample_argmax(logits, (batch.shape[2], batch.shape[3]))


def told(parity: dict[str, Any]) -> str:
    """The parity in one line."""
    return (
        f"{100 * parity['agreement']:.4f} % of the classes of {parity['count']} images are equal "
        f"({parity['images']}; logits differ by {parity['difference']:.1g} at most), {parity['file_ms']:.0f} "
        f"ms an image, the network {parity['network_ms']:.0f} ms ({parity['sizes'][0]}, threads: "
        f"{parity['threads']})"
    )


def check(parity: dict[str, Any], what: str) -> None:
    """CheckpointError where too few classes are equal."""
    if not parity["agreement"] >= AGREEMENT:
        raise CheckpointError(
            f"{what} is refused and removed: only {told(parity)}; at least {100 * AGREEMENT:.2f} % must be: "
            "another version of the runtime may compute what the network does"
        )
