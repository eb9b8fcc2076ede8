"""Names of SegFormer parameters in other people's files <-> ours; tables and pure renaming, no files.

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
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from segformer.errors import CheckpointError

_SHOWN = 6  # names listed in an error before "and N more"
_MAX_DEPTH = 100  # blocks of one stage that the tables hold; the deepest variant has 40
_MAX_PREFIXES = 16  # prefixes that are tried; a file with more holds many networks and is refused

# Each row: ours, hf, hf5, mmseg. "/0" and "/1" are the first and the second piece of one tensor, cut by rows.
_EMBED_ROWS = (
    ("patch_embed{s}.proj", "patch_embeddings.{i}.proj", "{i}.patch_embeddings.proj", "{i}.0.projection"),
    (
        "patch_embed{s}.norm",
        "patch_embeddings.{i}.layer_norm",
        "{i}.patch_embeddings.layer_norm",
        "{i}.0.norm",
    ),
    ("norm{s}", "layer_norm.{i}", "{i}.layer_norm", "{i}.2"),
)
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
_HEADS: dict[str, tuple[tuple[str, str], ...]] = {
    "nvlabs": tuple(
        (name, name)
        for name in (
            "decode_head.linear_c{s}.proj",
            "decode_head.linear_fuse.conv",
            "decode_head.linear_fuse.bn",
            "decode_head.linear_pred",
            "head",
        )
    ),
    "hf": (
        ("decode_head.linear_c{s}.proj", "decode_head.linear_c.{i}.proj"),
        ("decode_head.linear_fuse.conv", "decode_head.linear_fuse"),
        ("decode_head.linear_fuse.bn", "decode_head.batch_norm"),
        ("decode_head.linear_pred", "decode_head.classifier"),
        ("head", "classifier"),
    ),
    "smp": (
        ("decode_head.linear_c{s}.proj", "decoder.mlp_stage.{r}.linear"),
        ("decode_head.linear_fuse.conv", "decoder.fuse_stage.0"),
        ("decode_head.linear_fuse.bn", "decoder.fuse_stage.1"),
        ("decode_head.linear_pred", "segmentation_head.0"),
    ),
    "mmseg": (),  # its head is another network
}
_HEADS["hf5"] = tuple(
    (ours, theirs.replace("linear_c.", "linear_projections.")) for ours, theirs in _HEADS["hf"]
)
_PREFIX = {  # of the encoder, in a whole model and bare
    "nvlabs": ("backbone.", ""),
    "hf": ("segformer.encoder.", "encoder."),
    "hf5": ("segformer.stages.", "stages."),
    "smp": ("encoder.", ""),  # bare it is nvlabs'
    "mmseg": ("backbone.layers.", "layers."),
}
# Parameters that compute nothing here. NVlabs: left over from a base class, never called. SMP: the
# classifier that `aux_params` adds beside the segmentation.
_DEAD = {"nvlabs": "decode_head.conv_seg.", "smp": "classification_head."}
_MMSEG_HEADS = ("decode_head.", "auxiliary_head.")

TITLES = {
    "nvlabs": "NVlabs",
    "hf": "Hugging Face",
    "hf5": "Hugging Face (names of a live model)",
    "smp": "segmentation_models_pytorch",
    "mmseg": "mmsegmentation",
}
WRITTEN = ("hf", "nvlabs", "smp", "mmseg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """How the names of one file are made."""

    format: str
    "nvlabs, hf, hf5, smp or mmseg."
    bare: bool = False
    "The encoder's prefix is left out."
    wrapper: str = ""
    "What stands before the names of the network and means nothing, such as `module.`."


def printable(name: str) -> str:
    """The name as it is, or escaped where printing it would do more than show it."""
    return name if name.isprintable() else repr(name)


def listed(names: Iterable[str]) -> str:
    """The first few names for a message, and how many more there are."""
    ordered = [printable(name) for name in sorted(names)]
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


@cache
def _modules(format_: str, bare: bool) -> dict[str, str]:
    """Module name in a file -> ours, for every module that a SegFormer of this format can have."""
    column = _COLUMN[format_]
    rows = [(row[0], row[column]) for row in _EMBED_ROWS]
    rows += [
        (_BLOCKS[0] + row[0], _BLOCKS[column] + theirs)
        for row in _BLOCK_ROWS
        if (theirs := row[column]) and not (column == 0 and "/" in row[0])
    ]
    prefix = _PREFIX[format_][bare]
    templates = [(f"backbone.{ours}", prefix + theirs) for ours, theirs in rows]
    templates += [*_HEADS[format_]]
    return {
        theirs.format(s=i + 1, i=i, r=3 - i, j=j): ours.format(s=i + 1, i=i, r=3 - i, j=j)
        for ours, theirs in templates
        for i in range(4)
        for j in (range(_MAX_DEPTH) if "{j}" in ours else (0,))
    }


@cache
def _landmarks(start: str) -> tuple[str, ...]:
    """What modules of all formats are called that only a SegFormer has and that start with `start` here."""
    rows = [row for format_ in _PREFIX for bare in (False, True) for row in _modules(format_, bare).items()]
    is_landmark = re.compile(r"decode_head\.|backbone\.patch_embed\d\.proj").match
    return tuple({theirs for theirs, ours in rows if ours.startswith(start) and is_landmark(ours)})


def _prefixes(names: list[str]) -> list[str]:
    """What may stand before the names: nothing, or what stands before a patch embedding; shortest first."""
    modules = [name.rpartition(".")[0] for name in names]
    found = Counter(
        module.removesuffix(place)
        for place in _landmarks("backbone.")
        for module in modules
        if module.endswith(f".{place}")
    )
    return sorted(["", *(prefix for prefix, _ in found.most_common(_MAX_PREFIXES))], key=len)


def detect(names: Iterable[str]) -> Naming:
    """The naming that knows most of `names`.

    Raises CheckpointError where none knows any encoder name: the file is of another network; and where names
    of a SegFormer are elsewhere too.
    """
    names = list(names)
    known = {}
    for prefix in _prefixes(names):
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for format_ in _PREFIX:
            for bare in (False, True):
                modules = _modules(format_, bare)
                ours = [modules.get(_module_of(name, format_)[0], "") for name in below]
                known[prefix, format_, bare] = sum(name.startswith("backbone.") for name in ours)
    wrapper, format_, bare = max(known, key=known.__getitem__)  # of several: the shortest prefix
    if known[wrapper, format_, bare] == 0:
        raise CheckpointError(
            f"none of its {len(names)} tensors has a name of a SegFormer ({listed(names)}); "
            f"known are files of {', '.join(TITLES[key] for key in WRITTEN)} and our own"
        )
    marks = tuple(f".{place}" for place in _landmarks(""))
    beside = [name for name in names if not name.startswith(wrapper)]
    if other := [name for name in beside if f".{name}".rpartition(".")[0].endswith(marks)]:
        raise CheckpointError(
            f"it holds a SegFormer below {printable(wrapper)} and names of one elsewhere "
            f"({listed(other)}); save the one that is meant alone"
        )
    return Naming(format=format_, bare=bare, wrapper=wrapper)


def to_ours(state: dict[str, Tensor], naming: Naming) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of a file -> (tensors under ours, names that were dropped).

    Dropped are what is not below the wrapper, parameters that compute nothing, and the decode head of
    mmsegmentation, which is another network: names from `foreign_head`. Raises CheckpointError naming every
    tensor without a place, and every half of a pair or pair that does not fit together.
    """
    modules = _modules(naming.format, naming.bare)
    out: dict[str, Tensor] = {}
    dropped, unknown = [], []
    ignored = {*foreign_head(state, naming), *_dead(state, naming)}
    for full_name, tensor in state.items():
        name = full_name.removeprefix(naming.wrapper)
        if full_name in ignored or not full_name.startswith(naming.wrapper):
            dropped.append(full_name)
            continue
        for module, parameter, piece in _cut(name, tensor, naming.format):
            if ours := modules.get(module):
                out[f"{ours}.{parameter}"] = piece
            elif full_name not in unknown:
                unknown.append(full_name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state)} tensors have no place in a SegFormer of {TITLES[naming.format]} "
            f"names: {listed(unknown)}; check that the file is a SegFormer and nothing else"
        )
    return _join(out, equal=True), dropped


def from_ours(state: dict[str, Tensor], format_: str, *, bare: bool = False) -> dict[str, Tensor]:
    """Tensors under our names -> under those of a format; the inverse of `to_ours`, bit for bit.

    `bare` leaves the prefix of the encoder out. Raises CheckpointError naming every tensor that such a file
    has no place for.
    """
    places = {ours: theirs for theirs, ours in _modules(format_, bare).items()}
    pieces: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if f"{module}/0" in places:
            for index, piece in enumerate(tensor.chunk(2)):
                pieces[f"{module}/{index}.{parameter}"] = piece.clone()
        else:
            pieces[name] = tensor
    out: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in pieces.items():
        module, _, parameter = name.rpartition(".")
        if theirs := places.get(module):
            out[f"{theirs}.{parameter}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"tensors that no {TITLES[format_]} SegFormer has: {listed(unknown)}")
    if format_ == "mmseg":
        return {
            name.replace(".in_proj.", ".in_proj_"): tensor[..., None, None] if _is_1x1(name) else tensor
            for name, tensor in _join(out, equal=False).items()
        }
    return out


def foreign_head(names: Iterable[str], naming: Naming) -> list[str]:
    """Names of an mmsegmentation decode head: another network, which can't be converted."""
    if naming.format != "mmseg":
        return []
    return [name for name in names if name.removeprefix(naming.wrapper).startswith(_MMSEG_HEADS)]


def _dead(names: Iterable[str], naming: Naming) -> list[str]:
    dead = _DEAD.get(naming.format)
    return [name for name in names if dead and name.removeprefix(naming.wrapper).startswith(dead)]


def _module_of(name: str, format_: str) -> tuple[str, str]:
    """(module, parameter) of a name; mmseg's in_proj_weight counts as the first piece of a module in_proj."""
    module, _, parameter = name.rpartition(".")
    if format_ == "mmseg" and parameter in ("in_proj_weight", "in_proj_bias"):
        return f"{module}.in_proj/0", parameter.removeprefix("in_proj_")
    return module, parameter


def _is_1x1(name: str) -> bool:
    """A weight of mmsegmentation that is a 1x1 convolution there and a Linear here."""
    return name.endswith((".ffn.layers.0.weight", ".ffn.layers.4.weight"))


def _cut(name: str, tensor: Tensor, format_: str) -> list[tuple[str, str, Tensor]]:
    """(module, parameter, tensor) of one entry of a file: mmseg's in_proj in two pieces, all others whole."""
    module, parameter = _module_of(name, format_)
    if format_ != "mmseg":
        return [(module, parameter, tensor)]
    if module.endswith(".in_proj/0"):
        if tensor.ndim == 0 or tensor.shape[0] % 3:
            raise CheckpointError(f"{name} of shape {tuple(tensor.shape)} is not three equal parts q, k, v")
        rows = tensor.shape[0] // 3
        whole = module.removesuffix("/0")
        query, key_value = tensor[:rows].clone(), tensor[rows:].clone()
        return [(f"{whole}/0", parameter, query), (f"{whole}/1", parameter, key_value)]
    if _is_1x1(name) and tensor.shape[2:] == (1, 1):
        tensor = tensor.flatten(1)
    return [(module, parameter, tensor)]


def _join(state: dict[str, Tensor], *, equal: bool) -> dict[str, Tensor]:
    """Put the pieces `module/0.parameter` and `module/1.parameter` together, by rows.

    `equal`: keys and values, two pieces of one shape; otherwise q and kv, which share all but the rows.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    out = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        whole, slash, index = module.rpartition("/")
        if slash:
            pairs.setdefault(f"{whole}.{parameter}", {})[index] = tensor
        else:
            out[name] = tensor
    for name, pair in pairs.items():
        if len(pair) != 2:
            half = "key" if "0" in pair else "value"
            raise CheckpointError(f"{name}: the file has only the {half} half; it is incomplete")
        first, second = pair["0"], pair["1"]
        skip = 0 if equal else 1
        if first.ndim == 0 or first.shape[skip:] != second.shape[skip:]:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise CheckpointError(f"{name}: its halves of shapes {shapes} don't fit together")
        out[name] = torch.cat([first, second])
    return out
