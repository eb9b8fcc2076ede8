"""Which SegFormer some tensors are: variant, kind, classes and decoder_dim, from names and shapes.

Refuses, with CheckpointError that names the sizes, what is none of VARIANTS, such as another number of input
channels or PVTv2, which has the same names and other MLP ratios. Numbers of heads and strides leave no trace
in shapes; card.py compares those where a config.json says them.
"""

from dataclasses import dataclass

from torch import Tensor

from segformer.errors import CheckpointError
from segformer.models.variants import VARIANTS


@dataclass(kw_only=True, slots=True)
class Sizes:
    """What the shapes of the tensors say."""

    variant: str
    kind: str
    "segmentation, classification or encoder."
    num_classes: int | None
    decoder_dim: int | None


def find_sizes(state: dict[str, Tensor]) -> Sizes:
    """Variant, kind, classes and decoder_dim of tensors under our names.

    Raises CheckpointError naming the sizes where they are none of VARIANTS, or what is missing to know them.
    """
    found = {
        "input channels": (_dim(state, "backbone.patch_embed1.proj.weight", 1),),
        "embed_dims": tuple(_dim(state, f"backbone.patch_embed{s}.proj.weight", 0) for s in (1, 2, 3, 4)),
        "depths": tuple(_depth(state, s) for s in (1, 2, 3, 4)),
        "sr_ratios": tuple(_reduction(state, s) for s in (1, 2, 3, 4)),
        "mlp_ratios": tuple(
            _dim(state, f"backbone.block{s}.0.mlp.fc1.weight", 0)
            // max(1, _dim(state, f"backbone.block{s}.0.mlp.fc1.weight", 1))
            for s in (1, 2, 3, 4)
        ),
    }
    known = {
        name: {
            "input channels": (3,),
            **{key: getattr(variant, key) for key in ("embed_dims", "depths", "sr_ratios", "mlp_ratios")},
        }
        for name, variant in VARIANTS.items()
    }
    name = next((name for name, sizes in known.items() if sizes == found), None)
    if name is None:
        near = max(known, key=lambda key: sum(known[key][size] == found[size] for size in found))
        other = [
            f"{size} {_plain(found[size])} instead of {_plain(known[near][size])}"
            for size in found
            if found[size] != known[near][size]
        ]
        raise CheckpointError(
            f"its sizes are those of no known SegFormer; nearest is {near}, but it has {', '.join(other)}"
        )
    kind, num_classes, decoder_dim = "encoder", None, None
    if any(key.startswith("decode_head.") for key in state):
        predictor = "decode_head.linear_pred.weight"
        kind, num_classes, decoder_dim = "segmentation", _dim(state, predictor, 0), _dim(state, predictor, 1)
    elif any(key.startswith("head.") for key in state):
        kind, num_classes = "classification", _dim(state, "head.weight", 0)
    return Sizes(variant=name, kind=kind, num_classes=num_classes, decoder_dim=decoder_dim)


def _dim(state: dict[str, Tensor], name: str, axis: int) -> int:
    if name not in state:
        raise CheckpointError(f"{name} is missing; the file is incomplete")
    if state[name].ndim <= axis:
        raise CheckpointError(f"{name} has the shape {tuple(state[name].shape)}, which none of SegFormer has")
    return state[name].shape[axis]


def _depth(state: dict[str, Tensor], stage: int) -> int:
    prefix = f"backbone.block{stage}."
    return 1 + max((int(name.split(".")[2]) for name in state if name.startswith(prefix)), default=-1)


def _reduction(state: dict[str, Tensor], stage: int) -> int:
    name = f"backbone.block{stage}.0.attn.sr.weight"
    return _dim(state, name, 2) if name in state else 1


def _plain(sizes: tuple[int, ...]) -> str:
    return ",".join(map(str, sizes))
