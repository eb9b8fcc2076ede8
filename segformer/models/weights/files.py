"""Files of weights: tensors by name, read without running anything in them.

    directory     model.safetensors | model.safetensors.index.json with its shards | pytorch_model.bin |
                  pytorch_model.bin.index.json with its shards; beside them config.json and
                  preprocessor_config.json
    run           directory with checkpoints/step-*: the newest one; or one such step, with its MANIFEST.json
    file          .safetensors, or what torch.save wrote (.pth, .pt, .bin, .ckpt): a state dictionary, alone
                  or under "state_dict" or "model", beside it perhaps "meta"

Which of the two a file is follows from its first bytes. torch files are read with weights_only=True: a pickle
that would call anything else than the builders of tensors is refused. Refuses also what is truncated or
damaged (crc32 of every record), a web page or a Git LFS pointer saved under the name of the weights, shards
that lie outside the directory, tensors that are not finite, tensors without data or with less of it than
their shape says, and entries that are no dense tensors.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segformer.errors import CheckpointError
from segformer.models.weights.names import listed

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
_MANIFEST = "MANIFEST.json"
_NAMES = (MODEL_FILE, f"{MODEL_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STATE_KEYS = ("state_dict", "model", "model_state_dict")


@dataclass(kw_only=True, slots=True)
class Contents:
    """What was read."""

    file: Path
    "The file with the weights, or the index of its shards."
    state: dict[str, Tensor]
    "Tensors on the CPU under the names of the file, as they are stored."
    config: dict[str, Any] | None = None
    "config.json beside it."
    preprocessor: dict[str, Any] = field(default_factory=dict)
    "preprocessor_config.json beside it."
    meta: dict[str, Any] = field(default_factory=dict)
    'What a torch file has as "meta", or the header of a safetensors file.'
    is_run: bool = False
    "It is a checkpoint of a run."


def read_contents(path: str | Path) -> Contents:
    """Read a directory or file of weights; CheckpointError for every reason in the module docstring."""
    try:
        return _read(Path(path))
    except (OSError, ValueError, RecursionError) as error:  # names that are too long, places closed to us
        raise CheckpointError(
            f"{path} can't be read: {reason_of(error)}; give a file or directory of weights that you may read"
        ) from None


def _read(source: Path) -> Contents:
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; give a file or directory of weights (nothing is downloaded)"
        )
    if source.is_dir():
        folder = _newest_step(source) if (source / "checkpoints").is_dir() else source
        file = _weights_of(folder)
    else:
        file, folder = source, source.parent
    is_run = (folder / _MANIFEST).is_file() and file.name == MODEL_FILE
    if is_run:
        _check_manifest(folder)
    config = read_json(folder / CONFIG_FILE) if file.name in _NAMES else None
    if config is None and source.is_dir() and not is_run:
        raise CheckpointError(f"{folder} has no config.json; give an export or transformers model")
    if file.name.endswith(".index.json"):
        state, meta = _read_shards(file)
    else:
        state, meta = _read_file(file)
    check_tensors(state, file)
    preprocessor = read_json(folder / PREPROCESSOR_FILE) if config is not None else None
    return Contents(
        file=file, state=state, config=config, preprocessor=preprocessor or {}, meta=meta, is_run=is_run
    )


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; CheckpointError where it is damaged."""
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file} holds a {type(parsed).__name__}, not an object")
    return parsed


def reason_of(error: Exception) -> str:
    """Why reading or writing failed, on one line."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((text or str(error)).split()) or type(error).__name__


def sha256_of(file: Path) -> str:
    """The sha256 sum of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _weights_of(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    hint = f"give the file itself: {folder / found[0]}" if found else f"expected one of {', '.join(_NAMES)}"
    raise CheckpointError(f"{folder}: {MODEL_FILE} is missing, and so is every other name of weights; {hint}")


def _newest_step(run: Path) -> Path:
    steps = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    if not steps:
        raise CheckpointError(f"{run} has no checkpoint yet; train it first, or name another run")
    return max(steps, key=lambda path: int(path.name[5:]))


def _check_manifest(folder: Path) -> None:
    manifest = read_json(folder / _MANIFEST) or {}
    entry = manifest.get(MODEL_FILE)
    if not isinstance(entry, dict) or entry.get("sha256") != sha256_of(folder / MODEL_FILE):
        raise CheckpointError(f"{folder} is damaged: {MODEL_FILE} is not the one that {_MANIFEST} describes")


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
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from None
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{file} is a web page saved under this name; download the weights again")
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_torch(file)
    if head[8:9] == b"{":
        return _read_safetensors(file)
    what = "is empty" if not head else "is neither a PyTorch nor a safetensors file"
    raise CheckpointError(f"{file} {what}; download or copy it again")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; it may be truncated") from None


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if (bad := archive.testzip()) is not None:
                    raise CheckpointError(f"{file} is damaged: the crc32 of its record {bad} is wrong")
        # mmap: the optimiser's state, twice the size of the weights, is then never read.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes the reader fail in any way
        raise CheckpointError(f"{file} {_why_unreadable(error)}") from None
    return _unwrap(loaded, file)


def _why_unreadable(error: Exception) -> str:
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL (\S+)|(?:call|instantiate|class|function) (\S+\.\S+)", text):
        name = (found.group(1) or found.group(2)).rstrip(".,")
        return (
            f"is refused: it is a pickle that holds {name}, and reading that would run code; where it was "
            "made, save the tensors alone: torch.save(checkpoint['state_dict'], 'weights.pth')"
        )
    first = re.split(r"(?<=[.!]) |: Please|, please", text)[0][:160] or type(error).__name__
    return (
        f"can't be read as a PyTorch file ({first}); it may be truncated: get it again, or check what it is"
    )


def _unwrap(loaded: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def check_tensors(state: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise CheckpointError where `state`, which is or would be in a file, has tensors that are refused."""
    odd, hollow, wrong = [], [], []
    for name, tensor in state.items():
        counter = name.endswith("num_batches_tracked")
        if tensor.layout != torch.strided or not (tensor.dtype in _FLOATS or counter):
            odd.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif tensor.device.type != "cpu":
            hollow.append(f"{name} (on {tensor.device.type})")
        elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            hollow.append(f"{name} {tuple(tensor.shape)}")
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            wrong.append(name)
    if odd:
        raise CheckpointError(
            f"{source}: {len(odd)} tensors are not in plain floating point: {listed(odd)}; save it "
            "unquantised"
        )
    if hollow:
        raise CheckpointError(
            f"{source}: {len(hollow)} tensors have no data, or less than their shapes say: {listed(hollow)}; "
            "save a model that is on the CPU, and its tensors with .contiguous()"
        )
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors hold NaN or infinity: {listed(wrong)}; use weights from before "
            "they diverged"
        )
