"""The two forms of the operations of network, loss and evaluation, as one value each: fused and reference."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from segformer.models.ops import argmax, attention, cross_entropy, decode, ffn, linear, reference, resize


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """One form of the operations; the functions say what they do where they are defined."""

    name: str
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    attention_inputs: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, int], Tensor]
    mix_ffn: Callable[..., Tensor]
    project_sum: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
    norm_relu_linear: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    upsampled_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    upsample_confusion: Callable[[Tensor, Tensor, int], Tensor]


SUITES = {
    "fused": Ops(
        name="fused",
        linear=linear.linear,
        mix_ffn=ffn.mix_ffn,
        attention_inputs=attention.attention_inputs,
        attend=attention.attend,
        project_sum=resize.project_sum,
        norm_relu_linear=decode.norm_relu_linear,
        upsampled_cross_entropy=cross_entropy.upsampled_cross_entropy,
        upsample_confusion=argmax.upsample_confusion,
    ),
    "reference": Ops(
        name="reference",
        linear=reference.linear,
        mix_ffn=reference.mix_ffn,
        attention_inputs=reference.attention_inputs,
        attend=reference.attend,
        project_sum=reference.project_sum,
        norm_relu_linear=reference.norm_relu_linear,
        upsampled_cross_entropy=reference.upsampled_cross_entropy,
        upsample_confusion=reference.upsample_confusion,
    ),
}
