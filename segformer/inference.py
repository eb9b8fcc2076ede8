"""Whole-image prediction with any module that maps images to logits of a lower resolution.

    predict     the classes of the logits, resized bilinearly (align_corners=False), which are never held

It runs without gradients and leaves the module's train or eval mode as it is: the caller sets it.

Shapes: B batch, H W image, K classes.
"""

import torch
from torch import Tensor, nn

from segformer.models.ops.argmax import upsample_argmax


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W), normalised -> classes (B, *size), uint8 up to 256 classes and int64 beyond."""
    return upsample_argmax(model(images), size)
