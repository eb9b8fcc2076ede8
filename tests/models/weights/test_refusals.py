"""Files that are refused: each is really written, and each is one clear CheckpointError."""

import json
from pathlib import Path

import pytest
import torch
from model_files import State, bundle
from safetensors.torch import load_file, save_file
from torch import Tensor

from segformer.errors import CheckpointError
from segformer.models.segformer import SegFormer
from segformer.models.weights.key_maps import from_ours
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import write_export


@pytest.fixture
def export(state: State, tmp_path: Path) -> Path:
    write_export(bundle(state), tmp_path / "export")
    return tmp_path / "export"


def refused(path: Path, message: str) -> None:
    """Reading is one error of one line."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


class History:
    """Stands for the objects that training tools leave in their checkpoints."""


NEITHER = "is neither a PyTorch nor a safetensors file; download it again .a web page or a Git LFS pointer"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pth", b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", NEITHER),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", NEITHER),
        ("pytorch_model.bin", b"", NEITHER),
        ("model.safetensors", b"\x00" * 4096, NEITHER),
        ("model.safetensors", b"PK\x03\x04" + b"\x00" * 100, "can't be read as a PyTorch file"),
        ("x.pth", b"\x80\x02garbage", "can't be read as a PyTorch file"),
        ("x.bin", b"\x10\0\0\0\0\0\0\0{broken json   ", "can't be read as safetensors"),
    ],
    ids=["html", "lfs", "empty", "zeros", "zip", "pickle", "safetensors"],
)
def test_what_is_no_file_of_weights_is_refused_whatever_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


@pytest.mark.parametrize("keep", [100, 0.5, 0.9999])
@pytest.mark.parametrize("kind", ["pth", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(state: State, tmp_path: Path, kind: str, keep: float) -> None:
    file = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(from_ours(state, "hf"), file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    refused(file, "may be truncated")


def test_a_flipped_bit_of_a_pth_is_found(state: State, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(file, r"is damaged: the crc32 of its record \S+ is wrong")


RESNET = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(64)}
BIAS = "backbone.norm3.bias"
CONTENTS: dict[str, tuple[object, str]] = {
    "resnet": (RESNET, r"none of its 2 tensors has a name of a SegFormer \(conv1\.weight"),
    "wrapped": ({"state_dict": RESNET}, "none of its 2 tensors"),
    "empty": ({}, "holds a dict, not a dictionary of tensors"),
    "list": ([torch.zeros(1)], "holds a list, not a dictionary"),
    "tensor": (torch.zeros(3), "holds a Tensor, not a dictionary"),
    "numbers": ({"epoch": 3, "lr": 0.1}, r"2 of 2 entries are no tensors: epoch, lr"),
    "object": ({"hub": History()}, r"holds \S*History, .*torch\.save\(checkpoint\['state_dict'\]"),
    "model": (torch.nn.Linear(2, 2), r"holds torch\.nn\.modules\.linear\.Linear"),
    "nan": ({BIAS: torch.tensor([1.0, torch.nan])}, r"1 tensors hold NaN or infinity: backbone\.norm3\.bias"),
    "infinity": ({BIAS: torch.tensor([1.0, torch.inf])}, "1 tensors hold NaN or infinity"),
    "sparse": ({BIAS: torch.zeros(32).to_sparse()}, "not in plain floating point"),
    "int8": ({BIAS: torch.zeros(32, dtype=torch.int8)}, r"norm3\.bias \(32,\).*unquantized"),
    "10**14 values": ({BIAS: torch.zeros(1).expand(10**7, 10**7)}, "1 tensors have no data, or less"),
    "meta": ({BIAS: torch.zeros(32, device="meta")}, r"have no data, or less.*backbone\.norm3\.bias"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_other_contents_are_refused(tmp_path: Path, kind: str) -> None:
    content, message = CONTENTS[kind]
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


EMBED = "backbone.patch_embed1.proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {EMBED: torch.zeros(32, 3, 5, 5)},
            r"1 of another shape: \S+ \(32, 3, 5, 5\) for \(32, 3, 7, 7\)",
        ),
        (
            {"backbone.block1.0.mlp.fc1.weight": torch.zeros(256, 32)},
            r"fc1\.weight \(256, 32\) for \(128, 32\)",
        ),  # PVTv2
        ({"backbone.block2.2.norm1.bias": torch.zeros(64)}, r"depths \(2, 3, 2, 2\) are those of no known"),
        ({"backbone.patch_embed4.proj.weight": torch.zeros(300, 160, 3, 3)}, r"embed_dims \(32, .*300\) and"),
        ({EMBED: torch.zeros(())}, r"patch_embed1\.proj\.weight has the shape \(\)"),
        ({EMBED: None}, r"backbone\.patch_embed1\.proj\.weight is missing; the file is incomplete"),
        ({"decode_head.linear_pred.weight": None}, r"decode_head\.linear_pred\.weight is missing"),
    ],
    ids=["kernel", "PVTv2", "deeper", "wide", "flat", "hole", "headless"],
)
def test_sizes_of_no_variant_are_refused_and_named(
    state: State, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    torch.save(changed, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth.*{message}"):
        SegFormer.from_pretrained(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "glpn"),
        ("num_attention_heads", [1, 2, 4, 8]),
        ("hidden_act", "relu"),
    ],
)
def test_a_config_of_another_network_is_refused(
    state: State, tmp_path: Path, key: str, value: object
) -> None:
    save_file(from_ours(state, "hf"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    refused(tmp_path, f"config.json says {key}=")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not valid JSON"),
        ("[]", "holds a list, not an object"),
        ("[" * 100_000, "is not valid JSON"),
    ],
    ids=["none", "torn", "list", "deep"],
)
def test_a_directory_without_a_sound_config_is_refused(
    state: State, tmp_path: Path, config: str | None, message: str
) -> None:
    save_file(from_ours(state, "hf"), tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    refused(tmp_path, message)


def test_a_directory_without_weights_is_refused_and_a_file_in_it_suggested(tmp_path: Path) -> None:
    refused(tmp_path, r"model\.safetensors is missing.*expected one of")
    (tmp_path / "mit_b0.pth").touch()
    refused(tmp_path, r"give the file itself: \S+mit_b0\.pth")
    refused(tmp_path / "nowhere", "does not exist")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"names part-2\.safetensors, which is missing"),
        ("outside", r"names '\.\./part-2\.safetensors', which is no file beside it; refused"),
        ("absolute", "which is no file beside it; refused"),
        ("unlisted", r"holds tensors that \S+ does not list: stray"),
        ("lacking", "lists tensors that its files lack: ghost"),
        ("list", "has no weight_map"),
    ],
)
def test_damaged_shards_are_refused(state: State, tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    theirs = from_ours(state, "hf")
    files = ["part-1.safetensors", "part-2.safetensors"]
    weight_map = {name: files[index % 2] for index, name in enumerate(theirs)}
    for file in files:
        stray = {"stray": torch.zeros(1)} if damage == "unlisted" else {}
        save_file({n: t for n, t in theirs.items() if weight_map[n] == file} | stray, folder / file)
    second = {"outside": "../part-2.safetensors", "absolute": str(tmp_path / "part-2.safetensors")}.get(
        damage
    )
    if second:
        (folder / files[1]).rename(tmp_path / files[1])
        weight_map = {name: second if file == files[1] else file for name, file in weight_map.items()}
    if damage == "missing":
        (folder / files[1]).unlink()
    if damage == "lacking":
        weight_map["ghost"] = files[0]
    index = {"weight_map": list(weight_map) if damage == "list" else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    refused(folder, message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "b9"),
        ("norm_profile", "batch"),
        ("norm_profile", ["hf"]),
        ("classes", ["one"]),
        ("palette", [[0, 0, 300]] * 3),
    ],
)
def test_a_damaged_section_of_an_export_is_refused(export: Path, key: str, value: object) -> None:
    config = json.loads((export / "config.json").read_text())
    config["segformer"][key] = value
    (export / "config.json").write_text(json.dumps(config))
    refused(export, r'section "segformer" beside it is damaged')


def test_an_export_with_the_weights_of_another_is_refused(export: Path) -> None:
    file = export / "model.safetensors"
    tensors = load_file(file)
    tensors["decode_head.classifier.bias"] += 1
    save_file(tensors, file)
    refused(export, r"damaged or of another export \(sha256\)")


def test_a_name_that_no_file_can_have_and_a_place_that_fails_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path / ("x" * 300), "can't be read: File name too long")

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    refused(tmp_path, "can't be read: Permission denied")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "has no checkpoint yet")
