"""Classes of bilinearly enlarged logits, without ever holding the enlarged logits.

    upsample_argmax      the class of every pixel
    upsample_confusion   the confusion matrix against a label image

In tiles that stay in the cache; on CUDA the kernels of argmax_triton.py.

Shapes: B batch, K classes, h w logits, H W image.
"""

import torch
from torch import Tensor

from segformer.models.ops.dispatch import register
from segformer.models.ops.resize import Enlargement, check_target, upsample_to


def upsample_argmax_reference(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over classes of logits (B, K, h, w) enlarged to `size` -> (B, *size), the first one of equals.

    uint8 up to 256 classes, int64 beyond; in float32 at least, whatever the logits and autocast are.
    """
    labels = upsample_to(logits.to(torch.promote_types(logits.dtype, torch.float32)), size).argmax(dim=1)
    return labels.to(torch.uint8) if logits.shape[1] <= 256 else labels


def upsample_confusion_reference(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """confusion[t, p]: pixels of target (B, H, W) of class t whose enlarged logits (B, K, h, w) choose p.

    (K, K) int64; pixels of `ignore_index` and of a label that is no class are left out.
    """
    return _count(
        upsample_argmax_reference(logits, (target.shape[1], target.shape[2])), logits, target, ignore_index
    )


def _count(predicted: Tensor, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    classes = logits.shape[1]
    counted = (target != ignore_index) & (target >= 0) & (target < classes)
    pairs = target[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _compute_argmax(logits: Tensor, height: int, width: int) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    enlargement = Enlargement(logits, (height, width), dtype)
    out = _empty_labels(logits, height, width)
    for labels, image in zip(out, logits.permute(0, 2, 1, 3), strict=True):
        small = image.to(dtype).contiguous()  # (h, K, w)
        for row, column in enlargement.tiles():
            labels[row.rows, column.rows] = enlargement.tile(small, row, column).argmax(dim=1)
    return out


def _empty_labels(logits: Tensor, height: int, width: int) -> Tensor:
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    return torch.empty(logits.shape[0], height, width, dtype=dtype, device=logits.device)


_argmax = register(
    "upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor",
    _compute_argmax,
    _empty_labels,
    kernel="argmax_triton.upsample_argmax",
)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """`upsample_argmax_reference`, of one tile of enlarged logits at a time."""
    with torch.autocast(logits.device.type, enabled=False):
        return _argmax(logits, *size)


def _compute_confusion(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    predicted = _argmax(logits, target.shape[1], target.shape[2])
    return _count(predicted, logits, target, ignore_index)


_confusion = register(
    "upsample_confusion(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    _compute_confusion,
    lambda logits, *_: logits.new_empty(logits.shape[1], logits.shape[1], dtype=torch.int64),
    kernel="argmax_triton.upsample_confusion",
)


def upsample_confusion(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """`upsample_confusion_reference`; ValueError for shapes that don't belong together."""
    check_target(logits, target)
    with torch.autocast(logits.device.type, enabled=False):
        return _confusion(logits, target, ignore_index)
