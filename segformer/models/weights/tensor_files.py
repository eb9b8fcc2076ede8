"""Files of weights: tensors under the names of the file, read without running anything in it.

    directory     model.safetensors | model.safetensors.index.json with its shards | pytorch_model.bin |
                  pytorch_model.bin.index.json with its shards; beside them config.json and
                  preprocessor_config.json
    file          .safetensors, or what torch.save wrote (.pth, .pt, .bin, .ckpt): a state dictionary, alone
                  or under "state_dict" or "model", beside it perhaps "meta"

Which of the two a file is follows from its first bytes. torch files are read with weights_only=True: a pickle
that would call anything else than the builders of tensors is refused. Refuses also what is truncated or
damaged (crc32 of every record), shards that lie outside the directory and entries that are no tensors.
"""

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segformer import files
from segformer.errors import CheckpointError, listed, reraise_as

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
_NAMES = (MODEL_FILE, f"{MODEL_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_STATE_KEYS = ("state_dict", "model", "model_state_dict")


@dataclass(kw_only=True, slots=True)
class ModelFiles:
    """Files of one model."""

    file: Path
    state: dict[str, Tensor]
    meta: dict[str, Any]
    'The "meta" of a torch file, or the header of a safetensors file.'
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] = field(default_factory=dict)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; CheckpointError where it is damaged."""
    if not file.exists():
        return None
    with (
        reraise_as(CheckpointError, f"{file} can't be read"),
        reraise_as(CheckpointError, f"{file} is not valid JSON", on=ValueError),
    ):
        parsed = files.read_json(file)
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file} holds a {type(parsed).__name__}, not an object")
    return parsed


def read_files(source: Path) -> ModelFiles:
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; give a file or directory of weights (nothing is downloaded)"
        )
    file = _file_of(source) if source.is_dir() else source
    config = read_json(file.parent / CONFIG_FILE) if file.name in _NAMES else None
    if config is None and source.is_dir():
        raise CheckpointError(f"{source} has no config.json; give an export or transformers model")
    preprocessor = None if config is None else read_json(file.parent / PREPROCESSOR_FILE)
    state, meta = _read_shards(file) if file.name.endswith(".index.json") else _read_file(file)
    return ModelFiles(file=file, state=state, meta=meta, config=config, preprocessor=preprocessor or {})


def _file_of(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    hint = f"give the file itself: {folder / found[0]}" if found else f"expected one of {', '.join(_NAMES)}"
    raise CheckpointError(f"{folder}: {MODEL_FILE} is missing, and so is every other name of weights; {hint}")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All shards that `index` names; exactly the tensors that it lists, each in the file that it says."""
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names and files")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index} names {shard!r}, which is no file beside it; refused")
        if not file.is_file():
            raise CheckpointError(f"{index} names {shard}, which is missing; copy all of its files")
        tensors, _ = _read_file(file)
        if other := [name for name in tensors if weight_map.get(name) != shard]:
            raise CheckpointError(f"{file} holds tensors that {index.name} does not list: {listed(other)}")
        state.update(tensors)
    if missing := weight_map.keys() - state.keys():
        raise CheckpointError(f"{index} lists tensors that its files lack: {listed(missing)}")
    return state, {}


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of one file, by what its first bytes say it is."""
    with reraise_as(CheckpointError, f"{file} can't be read"), files.regular(file).open("rb") as opened:
        head = opened.read(16)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(file)
    if head[8:9] != b"{":
        raise CheckpointError(
            f"{file} is neither a PyTorch nor a safetensors file; download it again (a web page or a Git LFS "
            "pointer may have been saved under its name)"
        )
    unread = reraise_as(
        CheckpointError, f"{file} can't be read as safetensors", "it may be truncated", on=SafetensorError
    )
    with unread, safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    zipped = zipfile.is_zipfile(file)
    bad = None
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if sum(record.file_size for record in archive.infolist()) > file.stat().st_size:
                    raise ValueError("its records are compressed or overlap, as torch.save never writes them")
                bad = archive.testzip()
        # mmap: the optimizer's state, twice the size of the weights, is then never read.
        loaded = None if bad else torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file makes the reader fail in any way
        text = " ".join(str(error).split())
        if found := re.search(r"GLOBAL (\S+)|(?:call|instantiate|class|function) (\S+\.\S+)", text):
            name = (found[1] or found[2]).rstrip(".,")
            raise CheckpointError(
                f"{file} is refused: it is a pickle that holds {name}, and reading that would run code; save "
                "the tensors alone, where it was made: torch.save(checkpoint['state_dict'], 'weights.pth')"
            ) from None
        raise CheckpointError(
            f"{file} can't be read as a PyTorch file ({text[:80]}); it may be truncated: get it again"
        ) from None
    if bad:
        raise CheckpointError(f"{file} is damaged: the crc32 of its record {bad} is wrong")
    return _unwrap(loaded, file)


def _unwrap(loaded: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dictionary in what torch.save wrote, and the "meta" beside it."""
    meta: Any = {}
    if isinstance(loaded, dict):
        for key in _STATE_KEYS:
            if isinstance(loaded.get(key), dict):
                loaded, meta = loaded[key], loaded.get("meta")
                break
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}, not a dictionary of tensors by name")
    if other := [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{file}: {len(other)} of {len(loaded)} entries are no tensors: {listed(other)}; expected a "
            f"state dictionary, or one under {' or '.join(_STATE_KEYS[:2])}"
        )
    state = {str(name): tensor.detach() for name, tensor in loaded.items()}
    return state, meta if isinstance(meta, dict) else {}
