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


def bare(state: State, prefix: str = "backbone.") -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def mmseg_names(state: State) -> State:
    """Written out here: what mmsegmentation 1.x calls the tensors of the encoder, and how it keeps them."""
    block = {"attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4"}
    block["mlp.dwconv.dwconv"] = "ffn.layers.1"
    out = {}
    for name, tensor in bare(state).items():
        part, *rest = name.split(".")
        stage, kind = int(part[-1]) - 1, part[:-1]
        module, parameter = ".".join(rest[1:-1]), rest[-1]
        if kind == "patch_embed":
            out[f"layers.{stage}.0.{name.split('.', 1)[1].replace('proj.', 'projection.')}"] = tensor
        elif kind == "norm":
            out[f"layers.{stage}.2.{parameter}"] = tensor
        elif module == "attn.q":
            kv = state[f"backbone.{name.replace('attn.q', 'attn.kv')}"]
            out[f"layers.{stage}.1.{rest[0]}.attn.attn.in_proj_{parameter}"] = torch.cat([tensor, kv])
        elif module != "attn.kv":
            linear = parameter == "weight" and module in ("mlp.fc1", "mlp.fc2")
            value = tensor[:, :, None, None] if linear else tensor
            out[f"layers.{stage}.1.{rest[0]}.{block.get(module, module)}.{parameter}"] = value
    return out
