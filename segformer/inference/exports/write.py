"""Exports that other programs run: a folder with the file, config.json and certificate.json, or nothing.

    onnx       model.onnx                       of graph.py, run by onnxruntime
    openvino   model.xml, model.bin             of the same graph, run by openvino

The folder appears whole, after the file was run in its own runtime on images of the run and agreed with the
network (gate.py). certificate.json says on what, with which versions, how far, and how fast.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segformer.errors import ConfigError, reraise_as
from segformer.files import remove, sha256_of, staged
from segformer.inference.exports import gate
from segformer.inference.exports.graph import OPSET, to_onnx
from segformer.inference.exports.runtime import FILES, open_file, package, runtime_of
from segformer.models.weights.bundle import Weights
from segformer.models.weights.tensor_files import CONFIG_FILE
from segformer.models.weights.write import images_of, section_of

CERTIFICATE = "certificate.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for beside the network itself."""

    to: str
    preprocess: bool = False
    argmax: bool = False


def write(weights: Weights, network: Any, out: Path, wanted: Wanted) -> str:
    """Write the folder `out`; the certificate in one line.

    Raises:
        ConfigError: the network can't be exported so, a package is missing, or the place can't be written.
        CheckpointError: the file computes something else.
    """
    _claim(out)
    do = "choose another place, or free space"
    with reraise_as(ConfigError, f"output={out} can't be written", do), staged(out) as place:
        out.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        WRITERS[wanted.to](weights, network, place, wanted)
        parity = gate.compare(
            weights,
            network,
            open_file(wanted.to, place),
            preprocess=wanted.preprocess,
            argmax=wanted.argmax,
        )
        certificate = {
            "to": wanted.to,
            "runtime": runtime_of(wanted.to),
            "opset": OPSET,
            **gate.check(parity, f"{out} (to={wanted.to})"),
            "versions": {"segformer": sys.modules["segformer"].__version__, "torch": torch.__version__},
        }
        exported = {
            "to": wanted.to,
            "files": {name: sha256_of(place / name) for name in FILES[wanted.to]},
            "kind": weights.arch.kind,
            "num_classes": weights.arch.num_classes,
            "in_channels": weights.arch.in_channels,
            "preprocess": wanted.preprocess,
            "argmax": wanted.argmax,
        }
        section = {**section_of(weights), **weights.provenance}
        for name, content in (
            (CERTIFICATE, certificate),
            (CONFIG_FILE, {"exported": exported, "segformer": section}),
        ):
            (place / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        remove(out)  # an older export; staged() needs the name free
    return f"{runtime_of(wanted.to)}: {parity}"


def _claim(out: Path) -> None:
    """ConfigError where `out` is more than an older export of these."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"output={out} is a file or a link; give a new folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CERTIFICATE).is_file():
        raise ConfigError(f"output={out} holds other files; give a new folder or an old export of this kind")


def _write_onnx(weights: Weights, network: Any, place: Path, wanted: Wanted) -> None:
    package("onnx", "to=onnx")
    normalization = None
    if wanted.preprocess:
        if images_of(weights)[1] != "uint8":
            raise ConfigError("preprocess=true takes images of uint8, the model's are of another type")
        normalization = (weights.metadata.mean, weights.metadata.std)
    data = to_onnx(network, normalization=normalization, argmax=wanted.argmax)
    (place / FILES["onnx"][0]).write_bytes(data)


def _write_openvino(weights: Weights, network: Any, place: Path, wanted: Wanted) -> None:
    openvino = package("openvino", "to=openvino")
    _write_onnx(weights, network, place, wanted)
    file = place / FILES["onnx"][0]
    openvino.save_model(openvino.convert_model(file), place / FILES["openvino"][0], compress_to_fp16=False)
    remove(file)


WRITERS: dict[str, Callable[[Weights, Any, Path, Wanted], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}
