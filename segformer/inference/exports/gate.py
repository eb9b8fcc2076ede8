"""The parity gate of exports: a file runs in its own runtime beside the network; what differs is refused.

Images are those of the run's validation split where its shards can be read, and otherwise noise of the
smoothness of photographs, seeded: which of the two is in the certificate. Batches of 1, 2 and 5 of several
sizes, multiples of 32 and others, are compared: the classes of all pixels, at the size of the image, and the
logits.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from segformer.errors import CheckpointError, DataError
from segformer.models.ops.argmax import upsample_argmax
from segformer.models.weights.bundle import Weights

AGREEMENT = 0.9999
CASES = ((1, 256, 256), (1, 224, 321), (2, 133, 189), (2, 96, 64), (5, 65, 98), (5, 160, 128), (1, 61, 47))
"Batch, height and width of what is compared; the tests of an export trace none of them."
_TIMED = 3  # runs of the first case

Images = list[np.ndarray]


@dataclass(frozen=True, slots=True)
class Parity:
    """How a file agrees with its network."""

    images: str
    "Where they come from."
    digest: str
    "Of the shards; empty for noise."
    count: int
    "Images that were compared."
    sizes: list[str]
    agreement: float
    "Share of all pixels with the same class, or of all images of a classifier."
    difference: float
    "Greatest difference of two logits; of argmax in the graph 0 or 1."
    network_ms: float
    "Of one image of the first size."
    file_ms: float
    threads: int

    def __str__(self) -> str:
        """In one line."""
        return (
            f"{100 * self.agreement:.4f} % of the classes of {self.count} images are equal ({self.images}; "
            f"logits differ by {self.difference:.1g} at most), {self.file_ms:.0f} ms an image, the network "
            f"{self.network_ms:.0f} ms ({self.sizes[0]}, {self.threads} threads)"
        )


def images_of_run(weights: Weights, count: int, split: str = "val") -> tuple[Images, str, str]:
    """`count` images (H, W, C) of a split of the run's shards, where they come from, and their digest."""
    place = weights.provenance.get("shards")
    try:
        shards = ShardSet.open(place, StorageConfig()) if place else None
        if shards is not None and split in shards.splits:
            chosen = shards.split(split)
            samples = Samples(chosen, None)
            ids = np.linspace(0, chosen.num_samples - 1, min(count, chosen.num_samples)).astype(int)
            return [samples.picture(int(i))[0] for i in ids], f"{split} of {place}", shards.digest
    except DataError:  # moved, or somebody else's: an export has no need of them
        pass
    rng = np.random.default_rng(0)
    dtype, channels = weights.metadata.dtype or "uint8", weights.arch.in_channels
    mean, std = (np.array(values, np.float32) for values in (weights.metadata.mean, weights.metadata.std))
    coarse = rng.standard_normal((count, 12, 12, channels)).astype(np.float32) * std + mean
    found = [cv2.resize(image, (320, 320), interpolation=cv2.INTER_CUBIC) for image in coarse]
    limits = (0, 255) if dtype == "uint8" else (0, 65535) if dtype == "uint16" else (-np.inf, np.inf)
    return [x.reshape(320, 320, -1).clip(*limits).astype(dtype) for x in found], "seeded noise", ""


def batches(images: Images) -> Iterator[Tensor]:
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
) -> Parity:
    """The file beside the network on images of its run."""
    images, source, digest = images_of_run(weights, 16)
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
    return Parity(
        images=source,
        digest=digest,
        count=count,
        sizes=[f"{batch} x {height} x {width}" for batch, height, width in CASES],
        agreement=same / pixels,
        difference=difference,
        network_ms=1e3 * own_s,
        file_ms=1e3 * file_s,
        threads=torch.get_num_threads(),
    )


def _classes(logits: Tensor, batch: Tensor) -> Tensor:
    """Classes at the size of the images, or of whole images by a classifier."""
    return logits.argmax(1) if logits.ndim == 2 else upsample_argmax(logits, (batch.shape[2], batch.shape[3]))


def check(parity: Parity, what: str) -> dict[str, Any]:
    """The parity as it is written; CheckpointError where too few classes are equal."""
    if not parity.agreement >= AGREEMENT:
        raise CheckpointError(
            f"{what} is refused and removed: only {parity}; at least {100 * AGREEMENT:.2f} % must "
            "be: another version of the runtime may compute what the network does"
        )
    return asdict(parity)
