"""Exports that other programs run: a folder with the file, config.json and certificate.json, or nothing.

    onnx       model.onnx                       of graph.py, run by onnxruntime
    openvino   model.xml, model.bin             of the same graph, run by openvino

The folder appears whole, after the file was run in its own runtime on images of the run and agreed with the
network (gate.py). certificate.json says on what, with which versions, how far, and how fast.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError, at_least, reraise_as
from segformer.files import remove, sha256_of, staged
from segformer.inference.exports import gate, int8
from segformer.inference.exports.graph import OPSET, to_onnx
from segformer.inference.exports.runtime import FILES, RUNTIMES, open_file, package
from segformer.models.weights.bundle import Weights
from segformer.models.weights.tensor_files import CONFIG_FILE
from segformer.models.weights.write import images_of, section_of

CERTIFICATE = "certificate.json"


@dataclass(kw_only=True, slots=True)
class FileConfig:
    """What is exported, and what is in the file beside the network."""

    to: str = "hf"
    "What for: hf (transformers and this project) or another runtime: onnx or openvino."
    preprocess: bool = False
    "The graph takes uint8 images (B, H, W, C) as they are decoded, and normalizes them."
    argmax: bool = False
    "The graph gives classes uint8 (B, H, W) at the size of the image, in place of logits."
    int8: bool = False
    "Quantize convolutions and linear maps, calibrated on the training split of the run's shards."
    calibration: int = 64
    "Images of the training split that int8 is calibrated on."
    max_miou_loss: float = 0.5
    "Most points of mIoU on the validation split that int8 may lose."

    def __post_init__(self) -> None:
        if self.to not in (known := ("hf", *WRITERS)):
            raise ConfigError(f"to={self.to} is unknown; use one of {', '.join(known)}")
        if self.to == "hf" and (self.preprocess or self.argmax or self.int8):
            raise ConfigError("preprocess, argmax and int8 are of to=onnx or openvino; leave them out")
        if self.int8 and (self.preprocess or self.argmax):
            raise ConfigError("int8 is judged by its logits; leave preprocess and argmax out")
        at_least(self, "", calibration=1, max_miou_loss=0)


def write(weights: Weights, network: Any, out: Path, wanted: FileConfig) -> str:
    """Write the folder `out`; the certificate in one line.

    Raises:
        ConfigError: the network can't be exported so, a package is missing, or the place can't be written.
        CheckpointError: the file computes something else.
    """
    if weights.arch.kind != "segmentation" and (wanted.int8 or wanted.argmax):
        raise ConfigError(f"{weights.source} is a classifier; int8 and argmax are of segmentation models")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"output={out} is a file or a link; give a new folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CERTIFICATE).is_file():
        raise ConfigError(f"output={out} holds other files; give a new folder or an old export of this kind")
    do = "choose another place, or free space"
    with reraise_as(ConfigError, f"output={out} can't be written", do), staged(out) as place:
        out.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        WRITERS[wanted.to](weights, network, place, wanted)
        run = open_file(wanted.to, place)
        own = {"preprocess": wanted.preprocess, "argmax": wanted.argmax}
        parity, scored = gate.compare(weights, network, run, **own), {}
        if wanted.int8:
            scored = int8.scores(weights, network, run, wanted.max_miou_loss)
        else:
            gate.check(parity, f"{out} (to={wanted.to})")
        runtime = RUNTIMES[wanted.to]
        versions = {name: version(name) for name in ("torch", "onnx", runtime)}
        said = {"to": wanted.to, "int8": wanted.int8}
        certificate = said | {"opset": OPSET, **parity, **scored, "versions": versions}
        exported = {
            **said,
            "files": {name: sha256_of(place / name) for name in FILES[wanted.to]},
            "kind": weights.arch.kind,
            "num_classes": weights.arch.num_classes,
            "in_channels": weights.arch.in_channels,
            **own,
        }
        config = {"exported": exported, "segformer": {**section_of(weights), **weights.provenance}}
        for name, content in ((CERTIFICATE, certificate), (CONFIG_FILE, config)):
            (place / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        remove(out)  # an older export; staged() needs the name free
    megabytes = sum((out / name).stat().st_size for name in FILES[wanted.to]) / 1e6
    lost = " to ".join(f"{100 * scored[key]:.2f}" for key in ("miou", "miou_int8") if key in scored)
    line = f"{megabytes:.1f} MB; {runtime} {versions[runtime]}: {gate.told(parity)}"
    if wanted.preprocess and (side := weights.metadata.long_side):
        line += f"; give it images of at most {side} pixels a side, as in training"
    return line + (f"; mIoU of val {lost}" if lost else "")


def _write_onnx(weights: Weights, network: Any, place: Path, wanted: FileConfig) -> None:
    package("onnx", "to=onnx")
    normalization = None
    if wanted.preprocess:
        if images_of(weights)[1] != "uint8":
            raise ConfigError("preprocess=true takes images of uint8, the model's are of another type")
        normalization = (weights.metadata.mean, weights.metadata.std)
    data = to_onnx(network, normalization=normalization, argmax=wanted.argmax)
    (place / FILES["onnx"][0]).write_bytes(data)
    if wanted.int8:
        int8.quantize(place / FILES["onnx"][0], weights, wanted.calibration)


def _write_openvino(weights: Weights, network: Any, place: Path, wanted: FileConfig) -> None:
    openvino = package("openvino", "to=openvino")
    _write_onnx(weights, network, place, wanted)
    file = place / FILES["onnx"][0]
    openvino.save_model(openvino.convert_model(file), place / FILES["openvino"][0], compress_to_fp16=False)
    remove(file)


WRITERS: dict[str, Callable[[Weights, Any, Path, FileConfig], None]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}
