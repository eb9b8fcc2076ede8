"""The backends of network, loss and evaluation: `fused`, and `reference`, the same in library calls."""

from segformer.models.ops.argmax import upsample_confusion, upsample_confusion_reference
from segformer.models.ops.block import (
    norm_query_reduce,
    norm_query_reduce_reference,
    prenorm_ffn,
    prenorm_ffn_reference,
    sdpa,
    sdpa_reference,
)
from segformer.models.ops.cross_entropy import upsampled_cross_entropy, upsampled_cross_entropy_reference
from segformer.models.ops.decode import decode, decode_reference
from segformer.models.ops.linear import linear, linear_reference


class Backend:
    """The operations of one network; what each computes stands at its reference, whose signature it has."""

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused
        self.linear = linear if fused else linear_reference
        self.norm_query_reduce = norm_query_reduce if fused else norm_query_reduce_reference
        self.sdpa = sdpa if fused else sdpa_reference
        self.prenorm_ffn = prenorm_ffn if fused else prenorm_ffn_reference
        self.decode = decode if fused else decode_reference
        self.upsampled_cross_entropy = upsampled_cross_entropy if fused else upsampled_cross_entropy_reference
        self.upsample_confusion = upsample_confusion if fused else upsample_confusion_reference


BACKENDS = {"fused": Backend(fused=True), "reference": Backend(fused=False)}
