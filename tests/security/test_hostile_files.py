"""Files from strangers: data sets, shards, weights, runs, class maps and archives made to hurt.

A row of HOSTILE is (kind, what happens to a folder that is well, the line that the user reads). Each is read
as its command would, in a child (tests/hostile.py).
"""

import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import hostile
import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from hostile import Outcome, Reading
from PIL import Image

from segformer.checkpoint.format import TrainState
from segformer.checkpoint.reader import open_run
from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.index import pack_index, parse_index
from segformer.data.shards.reader import ShardReader
from segformer.data.shards.sharding import write_shards
from segformer.data.shards.verify import find_defects
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.data.sources.download import unpack
from segformer.errors import DataError, reraise_as
from segformer.inference.convert import _mapping
from segformer.inference.photograph import read_image
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Weights, find_arch
from segformer.models.weights.read import read_weights
from segformer.models.weights.write import write_export

Spoil = Callable[[Path, Path], object]
"""(folder, canary)"""
CONFIG = DatasetConfig(classes=["sky", "road"], splits=["train"])
STEP = "checkpoints/step-00000001"


# What a folder of each kind holds, and how it is read.


def make_source(folder: Path) -> None:
    for kind, end in (("images", "jpg"), ("masks", "png")):
        (folder / kind / "train").mkdir(parents=True)
        for number in range(2):
            shape = (16, 24, 3) if kind == "images" else (16, 24)
            cv2.imwrite(str(folder / kind / f"train/{number}.{end}"), np.full(shape, number, np.uint8))


def make_classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        cv2.imwrite(str(folder / "train" / name / "0.png"), np.zeros((16, 24, 3), np.uint8))


def shard(folder: Path, cfg: DatasetConfig = CONFIG) -> None:
    write_shards(cfg, folder, folder / "out", seed=0, samples_per_shard=4, workers=1)


def make_shards(folder: Path) -> None:
    make_source(folder / "source")
    write_shards(CONFIG, folder / "source", folder / "set", seed=0, samples_per_shard=4, workers=1)
    shutil.rmtree(folder / "source")


def read_shards(folder: Path) -> None:
    """Open, read and verify."""
    split = ShardSet.open(folder / "set").split("train")
    reader = ShardReader(split)
    for number in range(split.num_samples):
        sample = reader.read(number)
        decode_image(sample.image), decode_mask(sample.target)
    for defect in find_defects(folder / "set"):
        raise DataError(defect)


def read_cut_shards(folder: Path) -> None:
    """A mapped file that is cut would end the process by SIGBUS."""
    split = ShardSet.open(folder / "set").split("train")
    whole = split.records.tobytes(), split.keys
    os.truncate(folder / "set/train.idx", 0)
    assert (split.records.tobytes(), split.keys) == whole
    os.truncate(folder / "set/train-000000.tar", 600)
    with pytest.raises(DataError, match="bytes early"):
        ShardReader(split).read(0)


def make_weights(folder: Path) -> None:
    torch.manual_seed(0)
    state = build_model(ModelConfig(), 2).state_dict()
    write_export(
        Weights(state=state, arch=replace(find_arch(state), norm_profile="original")), folder / "model"
    )


def read_model(folder: Path, name: str = "model") -> None:
    read_weights(folder / name)


def make_run(folder: Path) -> None:
    tensors = {"a": torch.zeros(3)}
    write_checkpoint(tensors, {"exp_avg.a": torch.zeros(3)}, TrainState(step=1), folder / "run/checkpoints")
    (folder / "run/config.yaml").write_text("name: x\n")


def read_archive(folder: Path) -> None:
    (archive,) = folder.iterdir()
    with reraise_as(DataError, "archive", on=(tarfile.TarError, zipfile.BadZipFile)):
        unpack(archive, folder / "out/deep")
    assert not (folder / "x").exists()
    assert not list((folder / "out").glob("[!d]*"))


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "source": (make_source, shard),
    "list": (
        make_source,
        partial(shard, cfg=replace(CONFIG, split_lists={"train": "list"})),
    ),
    "classes": (
        make_classes,
        partial(shard, cfg=DatasetConfig(task="classification", splits=["train"], image_dir="{split}")),
    ),
    "picture": (lambda folder: None, lambda folder: read_image(folder / "a.png")),
    "shards": (make_shards, read_shards),
    "shards in use": (make_shards, read_cut_shards),
    "model": (make_weights, read_model),
    "file": (lambda folder: None, partial(read_model, name="x.pth")),
    "run": (make_run, lambda folder: open_run(folder / "run" / STEP)),
    "map": (lambda folder: None, lambda folder: _mapping(str(folder / "map"))),
    "json map": (lambda folder: None, lambda folder: _mapping(str(folder / "map.json"))),
    "archive": (lambda folder: None, read_archive),
}


# What is done to them.


def put(name: str, data: bytes | str | Callable[[], bytes]) -> Spoil:
    def spoil(folder: Path, canary: Path) -> None:
        content = data() if callable(data) else data.encode() if isinstance(data, str) else data
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content.replace(b"CANARY", str(canary).encode()))

    return spoil


def pipe(name: str) -> Spoil:
    return lambda folder, _: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))


def link(name: str, target: str = "/dev/zero") -> Spoil:
    return lambda folder, _: ((folder / name).unlink(missing_ok=True), (folder / name).symlink_to(target))


def hole(name: str, size: int = 2**40) -> Spoil:
    """A file that takes no place on the disk."""
    return lambda folder, _: ((folder / name).touch(), os.truncate(folder / name, size))


def listening(name: str) -> Spoil:
    def spoil(folder: Path, _: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        here = os.open(folder, os.O_RDONLY)  # the path may be longer than an address
        socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{here}/{name}")

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda folder, canary: [spoil(folder, canary) for spoil in spoils]


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.mknod, (str(self.path), 0o600)


def pickled(name: str, **options: bool) -> Spoil:
    def spoil(folder: Path, canary: Path) -> None:
        content = {"state_dict": {"a": torch.zeros(1)}, "meta": Touch(canary)}
        torch.save(content, folder / name, **options) if options else (folder / name).write_bytes(
            pickle.dumps(content)
        )

    return spoil


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int = 8, height: int = 8, *, pixels: int = 72, extra: bytes = b"") -> bytes:
    """A grey PNG of these sides, with so many bytes of rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = extra + chunk(b"IDAT", zlib.compress(bytes(pixels), 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def jpeg(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = jpeg(progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def text(body: bytes, kind: bytes = b"zTXt") -> bytes:
    return chunk(kind, b"a\0\0" + zlib.compress(body, 1))


def segments(count: int, part: bytes) -> bytes:
    return jpeg()[:2] + part * count + jpeg()[2:]


def described(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """dataset.json changed, with a digest that fits."""

    def spoil(folder: Path, _: Path) -> None:
        path = folder / "set/dataset.json"
        content = json.loads(path.read_text())
        change(content)
        content["digest"] = content_digest(content)
        path.write_text(json.dumps(content))

    return spoil


def sealed(folder: Path) -> None:
    """Sizes and sums in dataset.json as those of the files."""
    import hashlib

    def change(content: dict[str, Any]) -> None:
        for split in content["splits"].values():
            for entry in (split["index"], *split["shards"]):
                data = (folder / "set" / entry["file"]).read_bytes()
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    described(change)(folder, folder)


def indexed(field: str, value: int) -> Spoil:
    """A field of the first record of the index, whose sum fits."""

    def spoil(folder: Path, _: Path) -> None:
        path = folder / "set/train.idx"
        records, labels, keys = (part.copy() for part in parse_index(np.fromfile(path, np.uint8)))
        records[field][0] = value
        path.write_bytes(pack_index(records, labels, keys.tobytes()))
        sealed(folder)

    return spoil


def header(**values: int) -> Spoil:
    """The first line of the index, whose sum fits."""

    def spoil(folder: Path, _: Path) -> None:
        path = folder / "set/train.idx"
        line, _, rest = path.read_bytes().partition(b"\n")
        new = json.dumps(json.loads(line) | values).encode()
        path.write_bytes(new.ljust(len(line)) + b"\n" + rest)
        sealed(folder)

    return spoil


def tarred(name: str, kind: bytes = tarfile.REGTYPE, target: str = "/etc/passwd") -> bytes:
    """A tar of one member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, target, 4 * (kind == tarfile.REGTYPE)
        archive.addfile(member, io.BytesIO(b"true"))
    return buffer.getvalue()


def swapped(data: bytes) -> Spoil:
    """Another shard, whose sum fits."""
    return both(put("set/train-000000.tar", data), lambda folder, _: sealed(folder))


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "true")
    return buffer.getvalue()


def bombed() -> bytes:
    """A file of torch.save whose record inflates to 64 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(4):
                record.write(bytes(2**24))
    return buffer.getvalue()


def tensors(entry: dict[str, Any], data: bytes = bytes(8), size: int | None = None) -> bytes:
    """A safetensors file by hand."""
    line = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return struct.pack("<Q", len(line) if size is None else size) + line + data


def mapped(shard: str) -> Spoil:
    """The index of weights in several files names this one."""

    def spoil(folder: Path, _: Path) -> None:
        (folder / "model/model.safetensors").unlink()
        content = {"weight_map": {"backbone.norm1.weight": shard}}
        (folder / "model/model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def stated(**values: Any) -> Spoil:
    """The state of a checkpoint, whose manifest fits; name a file to replace it as a whole."""

    def spoil(folder: Path, _: Path) -> None:
        from segformer.checkpoint.atomic import MANIFEST, _encode, _entry

        path = folder / "run" / STEP
        content = values.get("whole") or json.dumps(json.loads((path / "state.json").read_text()) | values)
        (path / "state.json").write_text(content)
        names = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_bytes(_encode({name: _entry(path / name) for name in names}))

    return spoil


NESTED = "[" * 5_000
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SYSTEM = "!!python/object/apply:os.system ['touch CANARY']\n"
NO_FILE = "it is a pipe, socket or device, not a file"
UNREAD = "is not a whole JPEG, PNG, TIFF, WebP or BMP"

HOSTILE: dict[str, tuple[str, Spoil, str]] = {
    # pictures and masks of a source folder, and of predict
    "image: pipe": ("source", pipe("images/train/0.jpg"), NO_FILE),
    "image: link to a pipe": ("source", both(pipe("p"), link("images/train/0.jpg", "../../p")), NO_FILE),
    "image: link to /dev/zero": ("source", link("images/train/0.jpg"), NO_FILE),
    "image: socket": ("source", listening("images/train/0.jpg"), NO_FILE),
    "image: link to /etc/passwd": ("source", link("images/train/0.jpg", "/etc/passwd"), UNREAD),
    "image: link to itself": ("source", link("images/train/0.jpg", "0.jpg"), "Too many levels"),
    "image: a terabyte": ("source", hole("images/train/0.jpg"), "the limit for one file"),
    "image: a pickle": ("source", pickled("images/train/0.jpg"), UNREAD),
    "image: PostScript": ("source", put("images/train/0.jpg", "%!PS-Adobe\n(CANARY) (w) file\n"), UNREAD),
    "image: SVG": ("source", put("images/train/0.jpg", '<!DOCTYPE s SYSTEM "file:///etc/passwd">'), UNREAD),
    "image: 400 million pixels": ("source", put("images/train/0.jpg", png(20000, 20000)), "the limit is"),
    "image: pixels beyond the header": (
        *("source", put("images/train/0.jpg", lambda: png(pixels=2**26))),
        "more pixels than its header says",
    ),
    "image: 100 scans": ("source", put("images/train/0.jpg", lambda: scans(100)), "JPEG of 1.. scans"),
    "image: endless segments": (
        *("source", put("images/train/0.jpg", lambda: segments(10**5, b"\xff\xfe\0\2"))),
        "more than 65536 segments",
    ),
    "image: endless fill bytes": (
        *("source", put("images/train/0.jpg", lambda: segments(2**20, b"\xff"))),
        "more than 65536 segments",
    ),
    "image: endless chunks": (
        *("source", put("images/train/0.jpg", lambda: png(extra=chunk(b"tEXt", b"a\0b") * 10**5))),
        "more than 65536 chunks",
    ),
    "image: animation without end": (
        *("source", put("images/train/0.jpg", png(extra=chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))))),
        "24 x 16|16 x 24|8 x 8",
    ),
    "mask: pipe": ("source", pipe("masks/train/0.png"), NO_FILE),
    "mask: link to /dev/zero": ("source", link("masks/train/0.png"), NO_FILE),
    "mask: text that inflates": (
        *("source", put("masks/train/0.png", lambda: png(extra=text(bytes(2**25))))),
        "Decompressed data too large",
    ),
    "mask: many texts that inflate": (
        *("source", put("masks/train/0.png", lambda: png(extra=text(bytes(2**20 - 9)) * 100))),
        "Too much memory used in text chunks",
    ),
    "mask: profile that inflates": (
        *("source", put("masks/train/0.png", lambda: png(extra=text(bytes(2**25), b"iCCP")))),
        "Decompressed data too large",
    ),
    "mask: TIFF": ("source", put("masks/train/0.png", b"II*\0\x08\0\0\0"), "it is truncated or damaged"),
    "names: escape sequence": (
        *("source", both(put("images/train/\x1b[2J.jpg", "x"), put("masks/train/\x1b[2J.png", "x"))),
        "cannot be a key",
    ),
    "names: webdataset's own": (
        *("source", both(put("images/train/__url__.jpg", "x"), put("masks/train/__url__.png", "x"))),
        "cannot be a key",
    ),
    "folder: link to the one above": (
        "source",
        link("images/train/up", ".."),
        "links to a folder",
    ),
    "class folder: pipe": ("classes", pipe("train/cat/a.jpg"), NO_FILE),
    "class folder: link to /dev/zero": ("classes", link("train/cat/a.png"), NO_FILE),
    "class folder: no text": (
        *("classes", lambda folder, _: os.mkdir(os.fsencode(folder / "train") + b"/\xff")),
        "names that can't be written",
    ),
    "left out: no text": (
        *("source", lambda folder, _: os.mknod(os.fsencode(folder / "images/train") + b"/\xff.t\xff")),
        "",
    ),
    "list: pipe": ("list", pipe("list"), NO_FILE),
    "list: link to /dev/zero": ("list", link("list"), NO_FILE),
    "list: a terabyte": ("list", hole("list"), "more than 268435456 bytes"),
    "list: other bytes": ("list", put("list", b"0\n\xff\xfe\n"), "line 2 is not UTF-8"),
    "list: a key that leads out": ("list", put("list", "../../../etc/passwd\n"), "have no file"),
    "picture: pipe": ("picture", pipe("a.png"), NO_FILE),
    "picture: link to /dev/zero": ("picture", link("a.png"), NO_FILE),
    "picture: a pickle": ("picture", pickled("a.png"), "is not a whole picture"),
    "picture: pixels beyond the header": (
        *("picture", put("a.png", lambda: png(pixels=2**26))),
        "more pixels than its header says",
    ),
    "picture: 400 million pixels": ("picture", put("a.png", png(20000, 20000)), "the limit is"),
    # shards
    "dataset.json: pipe": ("shards", pipe("set/dataset.json"), "no shards in"),
    "dataset.json: link to /dev/zero": ("shards", link("set/dataset.json"), "no shards in"),
    "dataset.json: a terabyte": ("shards", hole("set/dataset.json"), "at most 268435456 are expected"),
    "dataset.json: nested": ("shards", put("set/dataset.json", NESTED), "nested too deeply"),
    "dataset.json: just not too deep": (
        *("shards", described(lambda content: content.update(license=json.loads("[" * 500 + "]" * 500)))),
        "",
    ),
    "dataset.json: a number of 5,000 digits": ("shards", put("set/dataset.json", "9" * 5000), "not complete"),
    "dataset.json: 2^70 samples": (
        *("shards", described(lambda content: content["splits"]["train"]["shards"][0].update(samples=2**70))),
        "not complete",
    ),
    "dataset.json: 2^60 samples": (
        *("shards", described(lambda content: content["splits"]["train"]["shards"][0].update(samples=2**60))),
        "contradicts itself or dataset.json",
    ),
    "dataset.json: a size of NaN": (
        *(
            "shards",
            described(lambda c: c["splits"]["train"]["index"].update(bytes=float("nan"))),
        ),
        "not complete",
    ),
    "dataset.json: a shard that leads out": (
        *(
            "shards",
            described(lambda c: c["splits"]["train"]["shards"][0].update(file="../x.tar")),
        ),
        "no plain file name",
    ),
    "dataset.json: a shard that is a command": (
        *("shards", described(lambda c: c["splits"]["train"]["shards"][0].update(file="pipe:touch x"))),
        "no plain file name",
    ),
    "dataset.json: an index that leads out": (
        *(
            "shards",
            described(lambda c: c["splits"]["train"]["index"].update(file="/etc/passwd")),
        ),
        "no plain file name",
    ),
    "index: cut while in use": ("shards in use", lambda *_: None, ""),
    "index: pipe": ("shards", pipe("set/train.idx"), NO_FILE),
    "index: link to /dev/zero": ("shards", link("set/train.idx"), NO_FILE),
    "index: a terabyte": ("shards", hole("set/train.idx"), "has 1099511627776 bytes"),
    "index: 2^63 samples": ("shards", header(samples=2**63), "it is torn"),
    "index: negative labels": ("shards", header(labels=-1), "it is torn"),
    "index: negative keys": ("shards", header(labels=10**9, key_bytes=-(10**9)), "it is torn"),
    "index: image of 2^63 bytes": ("shards", indexed("image_size", 2**63 - 1), "contradicts itself"),
    "index: image before the file": ("shards", indexed("image_offset", -(2**63)), "contradicts itself"),
    "index: target over the image": ("shards", indexed("target_offset", 512), "contradicts itself"),
    "index: labels that go around": ("shards", indexed("labels_end", 2**62), "contradicts itself"),
    "index: keys that go around": ("shards", indexed("key_end", 2**63 - 1), "contradicts itself"),
    "shard: pipe": ("shards", pipe("set/train-000000.tar"), NO_FILE),
    "shard: link to /dev/zero": ("shards", link("set/train-000000.tar"), NO_FILE),
    "shard: a terabyte": ("shards", hole("set/train-000000.tar"), "has 1099511627776 bytes instead"),
    "shard: a link": ("shards", swapped(tarred("0.jpg", tarfile.SYMTYPE)), "contradicts|damaged"),
    # weights
    "weights: pickle": ("file", pickled("x.pth"), "can't be read as a PyTorch file"),
    "weights: pickle in a zip": (
        *("file", pickled("x.pth", _use_new_zipfile_serialization=True)),
        r"is refused: it is a pickle that holds posix\.mknod",
    ),
    "weights: old pickle": (
        *("file", pickled("x.pth", _use_new_zipfile_serialization=False)),
        r"is refused: it is a pickle that holds posix\.mknod",
    ),
    "weights: a record that inflates": ("file", put("x.pth", bombed), "compressed or overlap"),
    "weights: pipe": ("file", pipe("x.pth"), NO_FILE),
    "weights: link to /dev/zero": ("file", link("x.pth"), NO_FILE),
    "weights: a terabyte": ("file", hole("x.pth"), "neither a PyTorch nor a safetensors file"),
    "weights: header of 2^63 bytes": ("file", put("x.pth", tensors({}, size=2**63)), "as safetensors"),
    "weights: header beyond the file": ("file", put("x.pth", tensors({}, size=10**8)), "as safetensors"),
    "weights: tensor of 2^63 numbers": (
        *("file", put("x.pth", tensors({"shape": [2**62], "data_offsets": [0, 2**63]}))),
        "as safetensors",
    ),
    "weights: tensor that goes around": (
        *("file", put("x.pth", tensors({"shape": [2**32, 2**32]}))),
        "as safetensors",
    ),
    "weights: negative offset": ("file", put("x.pth", tensors({"data_offsets": [-8, 0]})), "as safetensors"),
    "weights: offsets the wrong way": (
        "file",
        put("x.pth", tensors({"data_offsets": [8, 0]})),
        "as safetensors",
    ),
    "weights: fewer bytes than numbers": ("file", put("x.pth", tensors({}, bytes(4))), "as safetensors"),
    "config.json: pipe": ("model", pipe("model/config.json"), NO_FILE),
    "config.json: link to /dev/zero": ("model", link("model/config.json"), NO_FILE),
    "config.json: nested": ("model", put("model/config.json", NESTED), "nested too deeply"),
    "model.safetensors: pipe": ("model", pipe("model/model.safetensors"), "model.safetensors is missing"),
    "index.json: a shard that leads out": ("model", mapped("../x"), "is no file beside it; refused"),
    "index.json: a shard elsewhere": ("model", mapped("/etc/passwd"), "is no file beside it; refused"),
    # runs
    "config.yaml: code": ("run", put("run/config.yaml", f"a: {SYSTEM}"), "can't be read as a configuration"),
    "config.yaml: aliases": ("run", put("run/config.yaml", ALIASES), "aliases"),
    "config.yaml: nested": ("run", put("run/config.yaml", NESTED), "can't be read as a configuration"),
    "config.yaml: a date that is none": ("run", put("run/config.yaml", "a: !!timestamp x"), "can't be read"),
    "config.yaml: pipe": ("run", pipe("run/config.yaml"), NO_FILE),
    "config.yaml: link to /dev/zero": ("run", link("run/config.yaml"), NO_FILE),
    "config.yaml: a terabyte": ("run", hole("run/config.yaml"), "more than 8388608 bytes"),
    "manifest: pipe": ("run", pipe(f"run/{STEP}/MANIFEST.json"), "no checkpoint"),
    "manifest: link to /dev/zero": ("run", link(f"run/{STEP}/MANIFEST.json"), "no checkpoint"),
    "manifest: nested": ("run", put(f"run/{STEP}/MANIFEST.json", NESTED), "nested too deeply"),
    "manifest: a file that leads out": (
        *("run", put(f"run/{STEP}/MANIFEST.json", '{"../../x": {"bytes": 1}}')),
        "is no name of a file",
    ),
    "checkpoint: pipe": ("run", pipe(f"run/{STEP}/model.safetensors"), NO_FILE),
    "checkpoint: link to /dev/zero": ("run", link(f"run/{STEP}/optimizer.safetensors"), NO_FILE),
    "state: pipe": ("run", pipe(f"run/{STEP}/state.json"), NO_FILE),
    "state: nested": ("run", stated(whole=NESTED), "nested too deeply"),
    "state: no table": ("run", stated(whole="[1, 2]"), "is damaged"),
    "state: a step that is none": ("run", stated(step="x"), "is no number"),
    "state: code in its settings": ("run", stated(settings=SYSTEM), "the settings in the checkpoint"),
    "state: aliases in its settings": ("run", stated(settings=ALIASES), "aliases"),
    # class maps
    "class map: code": ("map", put("map", SYSTEM), "can't be read"),
    "class map: aliases": ("map", put("map", ALIASES), "aliases"),
    "class map: nested": ("map", put("map", NESTED), "can't be read"),
    "class map: nested JSON": ("json map", put("map.json", NESTED), "nested too deeply"),
    "class map: pipe": ("map", pipe("map"), NO_FILE),
    "class map: link to /dev/zero": ("map", link("map"), NO_FILE),
    "class map: a terabyte": ("map", hole("map"), "more than 1048576 bytes"),
    # archives
    "archive: a name that leads out": ("archive", put("a.tar", tarred("../../x")), "archive"),
    "archive: a link that leads out": ("archive", put("a.tar", tarred("x", tarfile.SYMTYPE)), "archive"),
    "archive: a device": ("archive", put("a.tar", tarred("x", tarfile.CHRTYPE)), "archive"),
    "archive: a zip that leads out": ("archive", put("a.zip", zipped("../../x")), ""),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """How each row ended."""
    base = tmp_path_factory.mktemp("hostile")
    for kind, (make, _) in KINDS.items():
        (base / kind).mkdir()
        make(base / kind)

    def prepared(number: int, kind: str, spoil: Spoil, canary: Path) -> Reading:
        folder = Path(shutil.copytree(base / kind, base / str(number)))
        spoil(folder, canary)
        return partial(KINDS[kind][1], folder)

    inputs = {
        name: partial(prepared, number, kind, spoil)
        for number, (name, (kind, spoil, _)) in enumerate(HOSTILE.items())
    }
    return hostile.outcomes(inputs, base / "canary")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_runs_nothing_and_ends_soon_and_small_in_one_line(
    name: str, found: dict[str, Outcome]
) -> None:
    hostile.check(found[name], HOSTILE[name][2])


def test_the_checks_can_fail(tmp_path: Path) -> None:
    """What runs, dies, takes memory or is no line is seen, and the inputs after it are read all the same."""

    def hog(canary: Path) -> Reading:
        return lambda: bytearray(2**30 + 2**28).__setitem__(slice(None, None, 4096), b"x" * 327680)

    inputs = {
        "runs": lambda canary: canary.touch,
        "dies": lambda canary: lambda: os.kill(os.getpid(), signal.SIGKILL),
        "takes": hog,
        "raises": lambda canary: lambda: 1 // 0,
        "is well": lambda canary: lambda: None,
    }
    found = hostile.outcomes(inputs, tmp_path / "canary")
    for name in inputs:
        if name != "is well":
            with pytest.raises(AssertionError):
                hostile.check(found[name], "")
    hostile.check(found["is well"], "")
