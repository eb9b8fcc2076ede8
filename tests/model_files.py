"""What tests of weights share: random models under our names, and configurations of transformers."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import SegformerConfig

from segformer.models.variants import VARIANTS
from segformer.models.weights.bundle import Metadata, Weights, find_arch

NAMES = ["wall", "sky", "car"]
State = dict[str, Tensor]


def hf_config(variant: str = "b0", classes: int = 3, **more: object) -> SegformerConfig:
    sizes = VARIANTS[variant]
    return SegformerConfig(
        hidden_sizes=list(sizes.embed_dims),
        depths=list(sizes.depths),
        num_attention_heads=list(sizes.num_heads),
        decoder_hidden_size=sizes.decoder_dim,
        num_labels=classes,
        **more,
    )


def randomize(state: State) -> State:
    """Random values of order one everywhere, so that no two tensors agree by chance."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return state


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def bundle(state: State, profile: str = "original", metadata: Metadata | None = None) -> Weights:
    arch = replace(find_arch(state), norm_profile=profile)
    return Weights(state=state, arch=arch, metadata=metadata or Metadata())
