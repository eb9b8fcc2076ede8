"""The backends of network, loss and evaluation: `fused`, and `reference`, the same in library calls.

What a call computes, and the layouts of its tensors, stand at the reference of each operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from segformer.models.ops.argmax import upsample_confusion, upsample_confusion_reference
from segformer.models.ops.attention import (
    norm_query_reduce,
    norm_query_reduce_reference,
    sdpa,
    sdpa_reference,
)
from segformer.models.ops.batch_norm import BatchNorm
from segformer.models.ops.cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_reference
from segformer.models.ops.decode import decode, decode_reference
from segformer.models.ops.ffn import prenorm_ffn, prenorm_ffn_reference
from segformer.models.ops.layer_norm import Norm
from segformer.models.ops.linear import Affine, linear, linear_reference


@dataclass(frozen=True, slots=True)
class Backend:
    """The operations of one network; `model.ops` names it."""

    fused: bool

    def linear(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear map of values (..., C)."""
        return (linear if self.fused else linear_reference)(values, weight, bias)

    def norm_query_reduce(
        self, tokens: Tensor, size: tuple[int, int], norm: Norm, query: Affine, reduction: Affine | None
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm of tokens, then their queries and the spatially reduced tokens."""
        run = norm_query_reduce if self.fused else norm_query_reduce_reference
        return run(tokens, size, norm, query, reduction)

    def sdpa(self, query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
        """Multi-head scaled dot-product attention."""
        return (sdpa if self.fused else sdpa_reference)(query, key_value, num_heads)

    def prenorm_ffn(
        self, tokens: Tensor, size: tuple[int, int], norm: Norm, parameters: list[Tensor]
    ) -> Tensor:
        """LayerNorm and Mix-FFN of tokens."""
        return (prenorm_ffn if self.fused else prenorm_ffn_reference)(tokens, size, norm, parameters)

    def decode(
        self,
        stages: Sequence[Tensor],
        projections: Sequence[Affine],
        fuse: Tensor,
        norm: BatchNorm,
        keep: Tensor | None,
        prediction: Affine,
    ) -> Tensor:
        """Four maps -> logits."""
        run = decode if self.fused else decode_reference
        return run(stages, projections, fuse, norm, keep, prediction)

    def upsampled_cross_entropy(
        self,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        *,
        pixel_weights: Tensor | None = None,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum, and loss of every pixel, of enlarged logits."""
        run = upsampled_cross_entropy if self.fused else upsampled_cross_entropy_reference
        weights = {"pixel_weights": pixel_weights, "class_weights": class_weights}
        return run(logits, target, ignore_index, label_smoothing=label_smoothing, **weights)

    def upsample_confusion(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Confusion matrix of enlarged logits."""
        return (upsample_confusion if self.fused else upsample_confusion_reference)(
            logits, target, ignore_index
        )


BACKENDS = {"fused": Backend(fused=True), "reference": Backend(fused=False)}
