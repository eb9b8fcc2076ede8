"""Cross entropy of bilinearly enlarged logits, without ever holding the enlarged logits.

On a CPU, in float32, native.cpp makes the logits of one pixel after the other. Elsewhere, and where it could
not be compiled, they are made in tiles that stay in the cache, and the gradient is computed while a tile is
there. For (8, 150, 64, 64) -> 256 x 256, forward and backward take 0.04 s and 0.14 s on two Xeon cores where
F.interpolate + F.cross_entropy take 1.3 s, with 315 MB of enlarged logits.

It is a torch.library operation, so that torch.compile calls it whole; on CUDA it is the kernel of
cross_entropy_triton.py.

Shapes: B batch, K classes, h w logits, H W target.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.models.ops import native
from segformer.models.ops.dispatch import first_derivative, register
from segformer.models.ops.resize import Enlargement, check_target, upsample_to

_TINY = 1e-30  # below it, log(softmax) is taken by log_softmax


def upsampled_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits (B, K, h, w) enlarged to target (B, H, W), ignoring `ignore_index`.

    Returns the sum over pixels of pixel_weights (B, H, W) * loss, and the plain -log p_t (B, H, W) of every
    pixel, without gradient. Computed and returned in float32 at least, whatever the logits and autocast are.
    """
    logits = _wide(logits)
    enlarged = upsample_to(logits, (target.shape[1], target.shape[2]))
    plain = partial(F.cross_entropy, ignore_index=ignore_index, reduction="none")
    losses = plain(enlarged, target.long(), class_weights, label_smoothing=label_smoothing)
    weighted = losses if pixel_weights is None else losses * pixel_weights
    return weighted.sum(), plain(enlarged, target.long()).detach()


def _tile_loss_and_grad(
    enlarged: Tensor,
    target: Tensor,
    pixel_weights: Tensor | None,
    class_weights: Tensor | None,
    smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the pixels of a tile: logits (R, K, W), target and pixel_weights (R, W), class_weights (K,).

    Returns the weighted sum, its gradient (R, K, W) and the plain -log p_t (R, W), 0 where the pixel is
    ignored. With smoothing e, class weights c and label y the loss of a pixel is, as in torch,
        (1 - e) c_y (lse - z_y) + e / K sum_k c_k (lse - z_k)
    """
    target = target[:, None]
    ignored = target == ignore_index
    label = target.masked_fill(ignored, 0).long()
    grad = enlarged.softmax(dim=1)
    hit = grad.gather(1, label)
    # The short ways are for CPUs: on a GPU the question whether one is open would wait for the device.
    cpu = enlarged.device.type == "cpu"
    underflow = not cpu or bool((hit <= _TINY).any())
    nll = -enlarged.log_softmax(dim=1).gather(1, label) if underflow else -hit.log()
    plain = pixel_weights is None and class_weights is None and smoothing == 0
    if cpu and plain and not bool(ignored.any()):
        return nll.sum(), grad.scatter_(1, label, hit - 1), nll[:, 0]
    counted = (~ignored).to(nll.dtype)
    pixel = counted if pixel_weights is None else counted * pixel_weights[:, None]
    own = (1 - smoothing) * (pixel if class_weights is None else pixel * class_weights[label])
    loss, factor = (own * nll).sum(), own
    if smoothing > 0:
        classes = enlarged.shape[1]
        spread = enlarged.new_ones(classes) if class_weights is None else class_weights
        spread = (spread * (smoothing / classes))[:, None]
        lse = nll + enlarged.gather(1, label)
        loss = loss + (pixel * (spread.sum() * lse - (spread * enlarged).sum(dim=1, keepdim=True))).sum()
        factor = own + spread.sum() * pixel
    grad.mul_(factor).scatter_(1, label, hit * factor - own)
    if smoothing > 0:
        grad.sub_(spread * pixel)
    return loss, grad, (nll * counted)[:, 0]


def _wide(values: Tensor) -> Tensor:
    """Values in the type that is computed in, and that of all results."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _results(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the results of `_compute`; the gradient is in channels-last memory as the logits are."""
    batch, classes, height, width = logits.shape
    new = partial(logits.new_empty, dtype=torch.promote_types(logits.dtype, torch.float32))
    needs_grad = options[-1]
    grad = new((batch, height, width, classes)).permute(0, 3, 1, 2) if needs_grad else new((0,))
    return new(()), new(target.shape), grad


def _compute(
    logits: Tensor,
    target: Tensor,
    pixel_weights: Tensor | None,
    class_weights: Tensor | None,
    smoothing: float,
    ignore_index: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Weighted sum of the pixel losses, -log p_t (B, H, W), gradient of the sum (B, K, h, w) or nothing)."""
    total, losses, grad = _results(logits, target, needs_grad)
    if native.available(total):
        options = (pixel_weights, class_weights, smoothing, ignore_index, needs_grad)
        return native.cross_entropy(_wide(logits), target, *options)
    total.zero_()
    enlargement = Enlargement(logits, (target.shape[1], target.shape[2]), total.dtype)
    for index, image in enumerate(logits.permute(0, 2, 1, 3)):
        small = _wide(image).contiguous()  # (h, K, w)
        grad_small = torch.zeros_like(small) if needs_grad else small
        for row, column in enlargement.tiles():
            pixels = (index, row.rows, column.rows)
            loss, grad_tile, losses[pixels] = _tile_loss_and_grad(
                enlargement.tile(small, row, column),
                target[pixels],
                None if pixel_weights is None else pixel_weights[pixels],
                class_weights,
                smoothing,
                ignore_index,
            )
            total += loss
            if needs_grad:
                enlargement.add_transposed(grad_small, grad_tile, row, column)
        if needs_grad:
            grad[index] = grad_small.transpose(0, 1)
    return total, losses, grad


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, losses, grad = output
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(losses, grad)


@first_derivative
def _scale_grad(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return (grad * grad_total).to(ctx.dtype), None, None, None, None, None, None


_cross_entropy = register(
    "upsampled_cross_entropy(Tensor logits, Tensor target, Tensor? pixel_weights, Tensor? class_weights, "
    "float smoothing, int ignore_index, bool needs_grad) -> (Tensor, Tensor, Tensor)",
    _compute,
    _results,
    kernel="cross_entropy_triton.forward",
    backward=_scale_grad,
    setup_context=_keep_grad,
)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`upsampled_cross_entropy_reference`; ValueError for shapes that don't belong together."""
    check_target(logits, target)
    for name, weights, shape in (
        ("pixel_weights", pixel_weights, target.shape),
        ("class_weights", class_weights, logits.shape[1:2]),
    ):
        if weights is not None and weights.shape != shape:
            raise ValueError(
                f"{name} of {tuple(weights.shape)} with logits {tuple(logits.shape)}; give {tuple(shape)}"
            )
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        pixels, classes = (
            None if weights is None else weights.to(dtype) for weights in (pixel_weights, class_weights)
        )
        needs_grad = logits.requires_grad and torch.is_grad_enabled()
        total, losses, _ = _cross_entropy(
            logits, target, pixels, classes, label_smoothing, ignore_index, needs_grad
        )
    return total, losses
