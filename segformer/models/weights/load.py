"""Weights into a network and out of one; refuses, with CheckpointError, those of another architecture."""

from torch import nn

from segformer.errors import CheckpointError, ConfigError, listed
from segformer.models.backbone import Backbone
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Arch, Metadata, Weights, with_shapes
from segformer.models.weights.key_maps import ALIGNED
from segformer.models.weights.read import read_weights, to_fp32
from segformer.models.weights.stem import adapt_stem


def load_pretrained(model: nn.Module, cfg: ModelConfig, kind: str, num_classes: int) -> str:
    """Load the encoder of `cfg.pretrained`, and its head where it is of the same kind and as many classes.

    `kind` is segmentation or classification; each takes the encoder of the other. Weights for RGB are adapted
    to other channels (stem.py). Returns in words what was loaded; "" where `cfg.pretrained` names nothing.
    Raises CheckpointError where the weights are not of `cfg.variant`, take other channels, or naming what is
    missing or of another shape; ConfigError where `cfg.num_classes` is set and differs.
    """
    if cfg.num_classes not in (None, num_classes):
        raise ConfigError(
            f"model.num_classes={cfg.num_classes}, but the data set has {num_classes} classes; use null"
        )
    if not cfg.pretrained:
        return ""
    weights = read_weights(cfg.pretrained)
    arch = weights.arch
    if arch.variant != cfg.variant:
        raise CheckpointError(
            f"{cfg.pretrained} is {arch.variant}, this model is {cfg.variant}; use model={arch.variant} or "
            "other weights"
        )
    weights = adapt_stem(weights, cfg.channels, cfg.stem)
    same_head = arch.head == cfg.head or kind != "segmentation"
    keep_head = (arch.kind, arch.num_classes) == (kind, num_classes) and same_head
    load_weights(model, weights if keep_head else weights.encoder())
    loaded = "encoder and head" if keep_head else "encoder"
    said = [f"{arch.variant} of {cfg.pretrained} ({weights.title}): {loaded}"]
    if arch.in_channels != cfg.channels:
        rule = "their sum" if cfg.channels == 1 else cfg.stem
        said.append(f"its kernels for RGB are adapted to {cfg.channels} channels ({rule})")
    if not keep_head:
        there = f", which has {arch.num_classes} classes there," if arch.kind == kind else ""
        if arch.kind == kind and not same_head:
            there = f", which is that of model.head={arch.head} there,"
        said.append(f"the head{there} is new, for {num_classes} classes")
    if (theirs := arch.norm_profile) not in (cfg.norm_profile, None):
        said.append(f"LayerNorm epsilons are those of {cfg.norm_profile}, the weights had those of {theirs}")
    if keep_head and ALIGNED in weights.notes:
        said.append(ALIGNED)
    return "; ".join(said)


def classes_of(weights: Weights, num_classes: int | None) -> int:
    """Classes of a segmentation network with these weights; `num_classes` are asked for, or None."""
    found = weights.arch.num_classes or num_classes
    if found is None:
        raise ConfigError(f"{weights.source} has no segmentation head; give num_classes for a fresh one")
    if num_classes not in (None, found):
        raise ConfigError(
            f"{weights.source} has {found} classes, num_classes={num_classes}; give class_map, such as "
            f"{{k: None for k in range({num_classes})}} for {num_classes} fresh ones"
        )
    return found


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Load all of the weights, of an encoder into the backbone; refuses what `check_weights` refuses."""
    check_weights(model, weights)
    model.load_state_dict(weights.state, strict=False)


def check_weights(
    model: nn.Module, weights: Weights, do: str = "check model.variant and model.decoder_dim"
) -> None:
    """Raise CheckpointError naming every tensor that is missing, unexpected or of another shape.

    `model` may be on the meta device; of an encoder, only its backbone counts. `do`: remedy.
    """
    state = weights.state
    prefix = "backbone." if weights.arch.kind == "encoder" else ""
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    problems = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if state[name].shape != own[name].shape
        },
    }
    if found := [f"{len(few)} {what}: {listed(sorted(few))}" for what, few in problems.items() if few]:
        source = f"{weights.source}, which is {weights.arch.variant},"
        raise CheckpointError(f"{source} does not fit this model: {'; '.join([*found, do])}")


def weights_of(model: nn.Module, backbone: Backbone, metadata: Metadata) -> Weights:
    """The weights of a SegFormer or MiTClassifier, half precision as float32."""
    cfg, state = backbone.config, model.state_dict()
    arch = Arch(
        variant=cfg.variant,
        kind="encoder",
        norm_profile=cfg.norm_profile,
        dropout=cfg.dropout,
        drop_path_rate=cfg.drop_path_rate,
    )
    wide = {name: tensor if tensor.itemsize == 8 else to_fp32(tensor) for name, tensor in state.items()}
    return Weights(state=wide, arch=with_shapes(arch, state), metadata=metadata)
