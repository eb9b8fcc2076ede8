"""Whole-image prediction with any module that maps images to logits of a lower resolution.

    logits_at   logits, resized bilinearly (align_corners=False) to a given size
    predict     their argmax, without holding the resized logits

Both run without gradients and leave the module's train or eval mode as it is: the caller sets it.

Shapes: B batch, H W image, K classes.
"""

import torch
from torch import Tensor, nn

from segformer.models.ops.argmax import upsample_argmax
from segformer.models.ops.reference import upsample_to


@torch.no_grad()
def logits_at(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W), normalised -> float32 logits (B, K, *size)."""
    return upsample_to(model(images).float(), size)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W), normalised -> classes (B, *size), uint8 up to 256 classes and int64 beyond."""
    return upsample_argmax(model(images), size)
