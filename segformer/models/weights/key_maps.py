"""Key maps: names of SegFormer's parameters in other people's files <-> ours; tables and pure renaming.

Ours are the names of the original repository: `backbone.` with `decode_head.` (segmentation) or with `head.`
(ImageNet classifier). With s = stage 1..4, i = s - 1, r = 4 - s, j = block:

    ours, nvlabs            hf (in files)                    hf5 (in memory)                  mmseg
    backbone.               segformer.encoder.               segformer.stages.                backbone.layers.
    patch_embed{s}.proj     patch_embeddings.{i}.proj        {i}.patch_embeddings.proj        {i}.0.projection
    patch_embed{s}.norm     patch_embeddings.{i}.layer_norm  {i}.patch_embeddings.layer_norm  {i}.0.norm
    block{s}.{j}.*          block.{i}.{j}.*                  {i}.blocks.{j}.*                 {i}.1.{j}.*
    norm{s}                 layer_norm.{i}                   {i}.layer_norm                   {i}.2

smp has our encoder under `encoder.`; heads are below. Three things are cut otherwise than here, where `kv`
holds C rows of keys and then C rows of values: Hugging Face keeps key and value apart, mmseg has
`in_proj` = cat[q, kv], and mmseg's fc1 and fc2 are 1x1 convolutions. A bare encoder has the prefix left out
(Hugging Face: `encoder.` for `segformer.encoder.`). hf5 is what `state_dict()` of a live transformers 5 model
says; transformers itself writes hf, so hf5 is only read.

Names may stand behind what a wrapper puts before them, such as `module.` (DataParallel), `_orig_mod.`
(torch.compile), `model.` (Lightning); what is not below it (`criterion.weight`) is no part of the network.

Refuses, with CheckpointError: names of no SegFormer, names without a place, two SegFormers in one file, half
a key/value pair.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from segformer.errors import CheckpointError, listed, printable

_MAX_DEPTH = 100  # blocks of one stage that the tables hold; the deepest variant has 40
_MAX_PREFIXES = 16  # prefixes that are tried; a file with more holds many networks and is refused

# Each row: ours, hf, hf5, mmseg. "/0" and "/1" are the first and the second piece of one tensor, cut by rows.
_EMBED = ("patch_embed{s}.", "patch_embeddings.{i}.", "{i}.patch_embeddings.", "{i}.0.")
_EMBED_ROWS = (("proj", "proj", "proj", "projection"), ("norm", "layer_norm", "layer_norm", "norm"))
_STAGE_NORM = ("norm{s}", "layer_norm.{i}", "{i}.layer_norm", "{i}.2")
_BLOCK_ROWS = (  # below block{s}.{j}, block.{i}.{j}, {i}.blocks.{j}, {i}.1.{j}
    ("norm1", "layer_norm_1", "layernorm_before", "norm1"),
    ("norm2", "layer_norm_2", "layernorm_after", "norm2"),
    ("attn.q", "attention.self.query", "attention.q_proj", "attn.attn.in_proj/0"),
    ("attn.kv", None, None, "attn.attn.in_proj/1"),
    ("attn.kv/0", "attention.self.key", "attention.k_proj", None),
    ("attn.kv/1", "attention.self.value", "attention.v_proj", None),
    ("attn.proj", "attention.output.dense", "attention.o_proj", "attn.attn.out_proj"),
    ("attn.sr", "attention.self.sr", "attention.sequence_reduction.sequence_reduction", "attn.sr"),
    ("attn.norm", "attention.self.layer_norm", "attention.sequence_reduction.layer_norm", "attn.norm"),
    ("mlp.fc1", "mlp.dense1", "mlp.fc1", "ffn.layers.0"),
    ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv", "ffn.layers.1"),
    ("mlp.fc2", "mlp.dense2", "mlp.fc2", "ffn.layers.4"),
)
_BLOCKS = ("block{s}.{j}.", "block.{i}.{j}.", "{i}.blocks.{j}.", "{i}.1.{j}.")
_COLUMN = {"nvlabs": 0, "smp": 0, "hf": 1, "hf5": 2, "mmseg": 3}
_HEAD_ROWS = (  # ours, hf, smp
    ("decode_head.linear_c{s}.proj", "decode_head.linear_c.{i}.proj", "decoder.mlp_stage.{r}.linear"),
    ("decode_head.linear_fuse.conv", "decode_head.linear_fuse", "decoder.fuse_stage.0"),
    ("decode_head.linear_fuse.bn", "decode_head.batch_norm", "decoder.fuse_stage.1"),
    ("decode_head.linear_pred", "decode_head.classifier", "segmentation_head.0"),
    ("head", "classifier", None),
)
_MMSEG_HEAD = ("convs.{i}.conv", "convs.{i}.bn", "fusion_conv.conv", "fusion_conv.bn", "conv_seg")
_HEADS = {
    "nvlabs": [(ours, ours) for ours, *_ in _HEAD_ROWS],
    "hf": [(ours, hf) for ours, hf, _ in _HEAD_ROWS],
    "hf5": [(ours, hf.replace("linear_c.", "linear_projections.")) for ours, hf, _ in _HEAD_ROWS],
    "smp": [(ours, smp) for ours, _, smp in _HEAD_ROWS if smp],
    "mmseg": [(f"decode_head.{module}", f"decode_head.{module}") for module in _MMSEG_HEAD],
}
_PREFIX = {  # of the encoder, in a whole model and bare
    "nvlabs": ("backbone.", ""),
    "hf": ("segformer.encoder.", "encoder."),
    "hf5": ("segformer.stages.", "stages."),
    "smp": ("encoder.", ""),  # bare it is nvlabs'
    "mmseg": ("backbone.layers.", "layers."),
}
# Parameters that compute nothing here. NVlabs: left over from a base class, never called. SMP: the
# classifier that `aux_params` adds beside the segmentation. mmsegmentation: a second head for training.
_DEAD = {
    "nvlabs": ("decode_head.conv_seg.",),
    "smp": ("classification_head.",),
    "mmseg": ("auxiliary_head.",),
}
# Weights of mmsegmentation that are 1x1 convolutions there and Linears here.
_1X1 = (".ffn.layers.0.weight", ".ffn.layers.4.weight")

TITLES = {
    "nvlabs": "NVlabs",
    "hf": "Hugging Face",
    "hf5": "Hugging Face (names of a live model)",
    "smp": "segmentation_models_pytorch",
    "mmseg": "mmsegmentation",
    "ours": "export of this project",
    "run": "checkpoint of a run",
}
ALIGNED = (
    "segmentation_models_pytorch enlarges logits with align_corners=True, this project with False: the "
    "logits agree, 1 to 11 % of the pixels get another class"
)
WRITTEN = ("hf", "nvlabs", "smp", "mmseg")


class KeyFormat(NamedTuple):
    """How the names of one file are made."""

    format: str
    "nvlabs, hf, hf5, smp or mmseg."
    bare: bool = False
    "The encoder's prefix is left out."
    wrapper: str = ""
    "Prefix of all names of the network that means nothing, such as `module.`."


@cache
def _modules(format_: str, bare: bool) -> dict[str, str]:
    """Module name in a file -> ours, for every module that a SegFormer of this format can have."""
    column = _COLUMN[format_]
    rows = [(_STAGE_NORM[0], _STAGE_NORM[column])]
    rows += [
        (start[0] + row[0], start[column] + theirs)
        for start, table in ((_EMBED, _EMBED_ROWS), (_BLOCKS, _BLOCK_ROWS))
        for row in table
        if (theirs := row[column]) and not (column == 0 and "/" in row[0])
    ]
    prefix = _PREFIX[format_][bare]
    templates = [(f"backbone.{ours}", prefix + theirs) for ours, theirs in rows]
    templates += _HEADS[format_]
    return {
        theirs.format(s=i + 1, i=i, r=3 - i, j=j): ours.format(s=i + 1, i=i, r=3 - i, j=j)
        for ours, theirs in templates
        for i in range(4)
        for j in (range(_MAX_DEPTH) if "{j}" in ours else (0,))
    }


@cache
def _landmarks(start: str) -> tuple[str, ...]:
    """Names, in all formats, of the modules that only a SegFormer has and that start with `start` here."""
    rows = [row for format_ in _PREFIX for bare in (False, True) for row in _modules(format_, bare).items()]
    is_landmark = re.compile(r"decode_head\.|backbone\.patch_embed\d\.proj").match
    return tuple({theirs for theirs, ours in rows if ours.startswith(start) and is_landmark(ours)})


def _prefixes(names: list[str]) -> list[str]:
    """Possible prefixes of the names: none, or what stands before a patch embedding; shortest first."""
    modules = [name.rpartition(".")[0] for name in names]
    found = Counter(
        module.removesuffix(place)
        for place in _landmarks("backbone.")
        for module in modules
        if module.endswith(f".{place}")
    )
    return sorted(["", *(prefix for prefix, _ in found.most_common(_MAX_PREFIXES))], key=len)


def detect(names: Iterable[str]) -> KeyFormat:
    """The format that knows most of `names`.

    Raises CheckpointError where none knows any encoder name: the file is of another network; and where names
    of a SegFormer are elsewhere too.
    """
    names = list(names)
    known = {}
    for prefix in _prefixes(names):
        modules = [name.removeprefix(prefix).rpartition(".")[0] for name in names if name.startswith(prefix)]
        for format_ in _PREFIX:
            for bare in (False, True):
                ours = _modules(format_, bare)
                found = sum(ours.get(module, "").startswith("backbone.") for module in modules)
                known[KeyFormat(format_, bare, prefix)] = found
    best = max(known, key=known.__getitem__)  # of several: the shortest prefix
    if known[best] == 0:
        raise CheckpointError(
            f"none of its {len(names)} tensors has a name of a SegFormer ({listed(sorted(names))}); "
            f"known are files of {', '.join(TITLES[key] for key in WRITTEN)} and our own"
        )
    marks = tuple(f".{place}" for place in _landmarks(""))
    beside = [name for name in names if not name.startswith(best.wrapper)]
    if other := [name for name in beside if f".{name}".rpartition(".")[0].endswith(marks)]:
        raise CheckpointError(
            f"it holds a SegFormer below {printable(best.wrapper)} and names of one elsewhere "
            f"({listed(sorted(other))}); save the one that is meant alone"
        )
    return best


def to_ours(
    state: Mapping[str, Tensor], keys: KeyFormat, *, encoder_only: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of a file -> (tensors under ours, names that were dropped).

    Dropped are what is not below the wrapper, parameters that compute nothing, and with `encoder_only` a
    decode head of any kind. Raises CheckpointError naming every tensor without a place, and every half of a
    pair or pair that does not fit together.
    """
    dead = (*_DEAD.get(keys.format, ()), *(["decode_head."] if encoder_only else []))
    below = {name: name.removeprefix(keys.wrapper) for name in state if name.startswith(keys.wrapper)}
    kept = {name: short for name, short in below.items() if not short.startswith(dead)}
    theirs = {short: state[name] for name, short in kept.items()}
    if keys.format == "mmseg":
        theirs = _from_mmseg(theirs)
    modules = _modules(keys.format, keys.bare)
    out: dict[str, Tensor] = {}
    unknown: set[str] = set()
    for name, tensor in theirs.items():
        module, _, parameter = name.rpartition(".")
        if ours := modules.get(module):
            out[f"{ours}.{parameter}"] = tensor
        else:
            unknown.add(keys.wrapper + re.sub("/[01]", "", name))
    if unknown:
        do = "check that the file is a SegFormer and nothing else"
        if all(name.startswith(f"{keys.wrapper}decode_head.") for name in unknown):
            do = "of another decode head, take the encoder alone, with launch/convert.py encoder_only=true"
        raise CheckpointError(
            f"{len(unknown)} of {len(state)} tensors have no place in a SegFormer of {TITLES[keys.format]} "
            f"names: {listed(sorted(unknown))}; {do}"
        )
    return _join(out, equal=True), [name for name in state if name not in kept]


def from_ours(state: Mapping[str, Tensor], format_: str, *, bare: bool = False) -> dict[str, Tensor]:
    """Tensors under our names -> under those of a format; the inverse of `to_ours`, bit for bit.

    `bare` leaves the prefix of the encoder out. Raises CheckpointError naming every tensor that such a file
    has no place for.
    """
    places = {ours: theirs for theirs, ours in _modules(format_, bare).items()}
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if f"{module}/0" in places:
            for index, piece in enumerate(tensor.chunk(2)):
                out[f"{places[f'{module}/{index}']}.{parameter}"] = piece.clone()
        elif module in places:
            out[f"{places[module]}.{parameter}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"tensors that no {TITLES[format_]} SegFormer has: {listed(unknown)}")
    return _to_mmseg(out) if format_ == "mmseg" else out


def _from_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """in_proj in two pieces, q and kv, as if it were a module; 1x1 convolutions as Linears."""
    out = {}
    for name, tensor in state.items():
        head, found, parameter = name.rpartition(".in_proj_")
        if not found:
            is_1x1 = name.endswith(_1X1) and tensor.shape[2:] == (1, 1)
            out[name] = tensor.flatten(1) if is_1x1 else tensor
            continue
        if tensor.ndim == 0 or tensor.shape[0] % 3:
            raise CheckpointError(f"{name} of shape {tuple(tensor.shape)} is not three equal parts q, k, v")
        rows = tensor.shape[0] // 3
        out[f"{head}.in_proj/0.{parameter}"] = tensor[:rows].clone()
        out[f"{head}.in_proj/1.{parameter}"] = tensor[rows:].clone()
    return out


def _to_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace(".in_proj.", ".in_proj_"): tensor[..., None, None] if name.endswith(_1X1) else tensor
        for name, tensor in _join(state, equal=False).items()
    }


def _join(state: Mapping[str, Tensor], *, equal: bool) -> dict[str, Tensor]:
    """Put the pieces `module/0.parameter` and `module/1.parameter` together, by rows.

    `equal`: keys and values, two pieces of one shape; otherwise q and kv, which share all but the rows.
    """
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(re.sub("/[01]", "", name) for name in state):
        if name in state:
            out[name] = state[name]
            continue
        module, _, parameter = name.rpartition(".")
        first, second = (state.get(f"{module}/{index}.{parameter}") for index in (0, 1))
        if first is None or second is None:
            half = "key" if second is None else "value"
            raise CheckpointError(f"{name}: the file has only the {half} half; it is incomplete")
        skip = 0 if equal else 1
        if first.ndim == 0 or first.shape[skip:] != second.shape[skip:]:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise CheckpointError(f"{name}: its halves of shapes {shapes} don't fit together")
        out[name] = torch.cat([first, second])
    return out
