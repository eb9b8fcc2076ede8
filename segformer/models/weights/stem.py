"""The first convolution of weights of RGB images, for images of other channels.

    one channel    the sum of the three kernels: a gray image gives the logits of its RGB copy
    zero           the kernels of R, G and B for the first three channels, 0 for the others: RGB beside bands
                   that mean nothing yet, and the logits of RGB at first
    mean           3 / C times the mean of the three kernels for each of C channels
    repeat         3 / C times the kernels of R, G, B, R, G ... for the channels in their order

Each but zero gives the activations that they gave, in size, where the channels are normalized. Two channels
under zero take the kernels of R and G. Weights of as many channels as are asked for stay as they are; others
than of three are refused with CheckpointError.
"""

from dataclasses import replace

import torch
from torch import Tensor

from segformer.errors import CheckpointError
from segformer.models.encoders import stem_of
from segformer.models.variants import RGB
from segformer.models.weights.bundle import Metadata, Weights


def adapt_stem(weights: Weights, channels: int, rule: str) -> Weights:
    """The model for images of `channels`, by a rule of STEMS; its normalization was of other channels."""
    if (there := weights.arch.in_channels) == channels:
        return weights
    if there != RGB:
        raise CheckpointError(
            f"{weights.source} takes images of {there} channels, and {channels} are asked for; only weights "
            f"for RGB can be adapted: use images of {there} channels, or other weights"
        )
    name = stem_of(weights.arch.variant)
    state = weights.state | {name: _adapted(weights.state[name], channels, rule)}
    metadata = Metadata(classes=weights.metadata.classes, palette=weights.metadata.palette)
    arch = replace(weights.arch, in_channels=channels)
    return replace(weights, state=state, arch=arch, metadata=metadata, provenance={})


def _adapted(kernels: Tensor, channels: int, rule: str) -> Tensor:
    """Kernels (D, 3, k, k) -> (D, C, k, k)."""
    if channels == 1:
        return kernels.sum(dim=1, keepdim=True)
    if rule == "zero":
        out = kernels.new_zeros(len(kernels), channels, *kernels.shape[2:])
        out[:, :RGB] = kernels[:, :channels]
        return out
    if rule == "mean":
        kernels = kernels.mean(dim=1, keepdim=True).expand_as(kernels)
    return kernels[:, torch.arange(channels) % RGB] * (RGB / channels)
