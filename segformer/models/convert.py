"""Names of SegFormer parameters in other people's files <-> ours, strict both ways.

Ours are the names of the original repository under `backbone.` and `decode_head.` (segmentation) or
`backbone.` and `head.` (ImageNet classifier). Files written by Hugging Face transformers name the same
tensors differently and keep key and value apart where we have one `kv` (first C rows k, next C rows v).
transformers 5 renames its modules in memory and maps names when it saves and loads, so this module converts
files, never live modules.

    Hugging Face                                                   ours
    segformer.encoder.patch_embeddings.{i}.proj | layer_norm       backbone.patch_embed{s}.proj | norm
    segformer.encoder.block.{i}.{j}.layer_norm_1 | layer_norm_2    backbone.block{s}.{j}.norm1 | norm2
      .attention.self.query                                          .attn.q
      .attention.self.key, .attention.self.value                     .attn.kv
      .attention.self.sr | layer_norm                                .attn.sr | norm
      .attention.output.dense                                        .attn.proj
      .mlp.dense1 | dwconv.dwconv | dense2                           .mlp.fc1 | dwconv.dwconv | fc2
    segformer.encoder.layer_norm.{i}                               backbone.norm{s}
    decode_head.linear_c.{i}.proj                                  decode_head.linear_c{s}.proj
    decode_head.linear_fuse | batch_norm                           decode_head.linear_fuse.conv | bn
    decode_head.classifier                                         decode_head.linear_pred
    classifier                                                     head
with s = i + 1. Refuses, with CheckpointError, a name that is not in this table and half a key/value pair.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segformer.errors import CheckpointError

# One row per module: (Hugging Face, ours). {i} stands for stage - 1 in the first and {s} for stage in the
# second.
_HF_MODULES = (
    ("segformer.encoder.patch_embeddings.{i}.proj", "backbone.patch_embed{s}.proj"),
    ("segformer.encoder.patch_embeddings.{i}.layer_norm", "backbone.patch_embed{s}.norm"),
    ("segformer.encoder.block.{i}.{j}.layer_norm_1", "backbone.block{s}.{j}.norm1"),
    ("segformer.encoder.block.{i}.{j}.layer_norm_2", "backbone.block{s}.{j}.norm2"),
    ("segformer.encoder.block.{i}.{j}.attention.self.query", "backbone.block{s}.{j}.attn.q"),
    ("segformer.encoder.block.{i}.{j}.attention.self.sr", "backbone.block{s}.{j}.attn.sr"),
    ("segformer.encoder.block.{i}.{j}.attention.self.layer_norm", "backbone.block{s}.{j}.attn.norm"),
    ("segformer.encoder.block.{i}.{j}.attention.output.dense", "backbone.block{s}.{j}.attn.proj"),
    ("segformer.encoder.block.{i}.{j}.mlp.dense1", "backbone.block{s}.{j}.mlp.fc1"),
    ("segformer.encoder.block.{i}.{j}.mlp.dwconv.dwconv", "backbone.block{s}.{j}.mlp.dwconv.dwconv"),
    ("segformer.encoder.block.{i}.{j}.mlp.dense2", "backbone.block{s}.{j}.mlp.fc2"),
    ("segformer.encoder.layer_norm.{i}", "backbone.norm{s}"),
    ("decode_head.linear_c.{i}.proj", "decode_head.linear_c{s}.proj"),
    ("decode_head.linear_fuse", "decode_head.linear_fuse.conv"),
    ("decode_head.batch_norm", "decode_head.linear_fuse.bn"),
    ("decode_head.classifier", "decode_head.linear_pred"),
    ("classifier", "head"),
)
_HF_PAIR = "segformer.encoder.block.{i}.{j}.attention.self"
_OUR_PAIR = "backbone.block{s}.{j}.attn.kv"
_SHOWN = 6  # names listed in an error before "and N more"


def _pattern(template: str) -> re.Pattern[str]:
    """A regular expression whose groups i, s, j are the numbers in `template`."""
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template)))


_FROM_HF = [(_pattern(theirs), ours) for theirs, ours in _HF_MODULES]
_TO_HF = [(_pattern(ours), theirs) for theirs, ours in _HF_MODULES]
_HF_PAIR_PATTERN = _pattern(_HF_PAIR)
_OUR_PAIR_PATTERN = _pattern(_OUR_PAIR)


def _fill(template: str, found: re.Match[str]) -> str:
    """Put the numbers of a match into the other side's template; stages count from 0 in theirs, 1 in ours."""
    numbers = {name: int(value) for name, value in found.groupdict().items()}
    if "i" in numbers:
        numbers["s"] = numbers["i"] + 1
    elif "s" in numbers:
        numbers["i"] = numbers["s"] - 1
    return template.format(**numbers)


def _rename(module: str, rows: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rows:
        if found := pattern.fullmatch(module):
            return _fill(template, found)
    return None


def listed(names: list[str]) -> str:
    """The first few names for an error message, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Hugging Face file names -> under ours.

    Raises CheckpointError naming every tensor without a place here, and every key without its value or
    reverse.
    """
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        found = _HF_PAIR_PATTERN.fullmatch(parent) if part in ("key", "value") else None
        if found:
            pairs.setdefault(f"{_fill(_OUR_PAIR, found)}.{parameter}", {})[part] = tensor
        elif renamed := _rename(module, _FROM_HF):
            out[f"{renamed}.{parameter}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state)} tensors have no place in a SegFormer of Hugging Face names: "
            f"{listed(unknown)}; check that the file is a SegFormer saved by transformers"
        )
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise CheckpointError(f"{name}: the file has only the {next(iter(pair))} half; it is incomplete")
        out[name] = torch.cat([pair["key"], pair["value"]])
    return out


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names -> under Hugging Face file names; the inverse of `from_hf`, bit for bit.

    Raises CheckpointError naming every tensor that has no place there.
    """
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if found := _OUR_PAIR_PATTERN.fullmatch(module):
            parent = _fill(_HF_PAIR, found)
            key, value = tensor.chunk(2)
            out[f"{parent}.key.{parameter}"] = key.clone()
            out[f"{parent}.value.{parameter}"] = value.clone()
        elif renamed := _rename(module, _TO_HF):
            out[f"{renamed}.{parameter}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"tensors that no Hugging Face SegFormer has: {listed(unknown)}")
    return out


def load_hf_directory(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read config.json and model.safetensors of a Hugging Face or export directory.

    Returns (tensors on the CPU under our names, the parsed config). Raises CheckpointError for a missing or
    damaged file and for every reason that `from_hf` has.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no directory with config.json and model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; give an export or transformers model") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds a {type(config).__name__}, not an object")
    return load_hf_file(folder / "model.safetensors"), config


def load_hf_file(path: str | Path) -> dict[str, Tensor]:
    """Read one safetensors file under Hugging Face names -> tensors on the CPU under our names."""
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; expected the weights in safetensors format")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; it may be truncated") from None
    try:
        return from_hf(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
