"""Exported files, opened and run in their own runtime as networks: images float32 -> logits.

    to         files                      runtime
    onnx       model.onnx                 onnxruntime, on the CPU
    openvino   model.xml, model.bin       openvino, on the CPU

The section "exported" of config.json beside them says which and their sha256 sums; its section "segformer" is
that of every export. A file may come from anywhere, so it is bounded and looked at before a runtime gets it:
ONNX has the operators that are written here and no others, its weights within the file, one input and one
output; OpenVINO's XML no entities and only operators of its own sets. torch_export and aoti are not opened by
their path: sympy evaluates the expressions of a .pt2, and aoti's holds a shared library.

Refuses, with CheckpointError, all else; with ConfigError, what takes other images than the network does
(preprocess, argmax), and a runtime that is not installed.
"""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segformer.errors import CheckpointError, ConfigError, listed, reraise_as
from segformer.files import read_bytes, sha256_of
from segformer.inference.exports.graph import MOST_BYTES, OPERATORS
from segformer.models.variants import VARIANTS
from segformer.models.weights.bundle import Arch, Weights
from segformer.models.weights.read import describe_as
from segformer.models.weights.tensor_files import CONFIG_FILE, read_json

Run = Callable[[np.ndarray], np.ndarray]
FILES = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
_MOST_XML = 2**26
_FOREIGN = re.compile(rb"<!DOCTYPE|<!ENTITY|version=\"(?!opset\d+\"|1\.0\"|\d+\")[^\"]*\"")


def package(name: str, what: str) -> Any:
    """An installed package; ConfigError that says how to install it."""
    needed = "'openvino>=2025.3'" if name == "openvino" else "'onnx>=1.19' 'onnxruntime>=1.22'"
    with reraise_as(ConfigError, f"{what} needs {name}", f"pip install {needed}", on=ImportError):
        return import_module(name)


class Exported(nn.Module):
    """An exported file as a network on the CPU: images (B, C, H, W), normalized -> logits."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.source, self.classes = weights.source, weights.arch.num_classes
        self.errors = _errors(weights.runtime)
        self.run = open_file(weights.runtime, Path(weights.source))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """As of the network that was exported, in float32, on the device of the images."""
        with reraise_as(CheckpointError, f"{self.source} can't be run", "export it again", on=self.errors):
            found = self.run(images.detach().float().cpu().contiguous().numpy())
            if found.shape[:2] != (len(images), self.classes):
                raise ValueError(f"it gives {found.shape} of {tuple(images.shape)}")
        return torch.from_numpy(found).to(images.device)


def open_file(to: str, folder: Path) -> Run:
    """The function of the file of `folder`, in the runtime of `to`; the file is looked at before."""
    return (_open_onnx if to == "onnx" else _open_openvino)(folder)


def _open_onnx(folder: Path) -> Run:
    file = folder / FILES["onnx"][0]
    onnx, runtime = (package(name, str(file)) for name in ("onnx", "onnxruntime"))
    with reraise_as(CheckpointError, f"{file} can't be read"):
        data = read_bytes(file, most=MOST_BYTES + 2**20)
    with reraise_as(CheckpointError, f"{file} is no ONNX file", on=_errors("onnx")):
        _check_onnx(onnx.load_model_from_string(data), onnx)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    with reraise_as(CheckpointError, f"{file} can't be opened", "export it again", on=_errors("onnx")):
        session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _errors(to: str) -> tuple[type[Exception], ...]:
    """What a runtime raises of a file that is none, or does not fit together."""
    if to != "onnx":
        return (RuntimeError, ValueError)
    package("onnxruntime", "an ONNX file")
    own = vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state")).values()
    found = [kind for kind in own if isinstance(kind, type) and issubclass(kind, Exception)]
    return (import_module("google.protobuf.message").DecodeError, ValueError, *found)


def _check_onnx(model: Any, onnx: Any) -> None:
    """ValueError where a model is more than the operators and weights of a graph that is written here."""
    graph = model.graph
    if foreign := {n.domain or n.op_type for n in graph.node if n.domain or n.op_type not in OPERATORS}:
        raise ValueError(f"it has operators that no export here has: {listed(sorted(foreign))}; refused")
    tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
    if any(t.data_location == onnx.TensorProto.EXTERNAL or t.external_data for t in tensors):
        raise ValueError("its weights are in other files, which are not read; refused")
    others = model.functions or model.training_info or graph.sparse_initializer
    if others or (len(graph.input), len(graph.output)) != (1, 1):
        raise ValueError("it has functions, training, sparse weights or several inputs or outputs; refused")


def _open_openvino(folder: Path) -> Run:
    openvino = package("openvino", str(folder))
    with reraise_as(CheckpointError, f"{folder} can't be read"):
        text, weights = (
            read_bytes(folder / name, most=most)
            for name, most in zip(FILES["openvino"], (_MOST_XML, MOST_BYTES), strict=True)
        )
    if found := _FOREIGN.search(text):
        raise CheckpointError(f"{folder}/model.xml has {found[0].decode(errors='replace')[:40]}; refused")
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    what = f"{folder}/model.xml can't be opened"
    with reraise_as(CheckpointError, what, "export it again", on=_errors("openvino")):
        core = openvino.Core()
        model = core.read_model(text, weights)
        request = core.compile_model(model, "CPU", threads).create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def is_exported(folder: Path) -> bool:
    """`folder` holds a config.json of an exported file."""
    return "exported" in (read_json(folder / CONFIG_FILE) or {}) if folder.is_dir() else False


def read_exported(folder: Path) -> Weights:
    """What config.json says of an exported file, whose sums are checked; it has no tensors.

    Raises:
        CheckpointError: it is damaged, or of another file.
        ConfigError: it is not opened by its path, or takes other images than a network.
    """
    config = read_json(folder / CONFIG_FILE) or {}
    damaged = (KeyError, TypeError, ValueError, AttributeError)
    with reraise_as(CheckpointError, f"{folder}/{CONFIG_FILE} is damaged", "export it again", on=damaged):
        said, section = config["exported"], config["segformer"]
        to, sums = str(said["to"]), dict(said["files"])
        if section["variant"] not in VARIANTS:
            raise ValueError(f"variant {section['variant']!r}")
        arch = Arch(
            variant=section["variant"],
            kind=str(said["kind"]),
            num_classes=int(said["num_classes"]),
            in_channels=int(said["in_channels"]),
            head=section.get("head", "segformer"),
            decoder_dim=section["decoder_dim"],
        )
    if to not in RUNTIMES:
        raise ConfigError(
            f"{folder} was exported to={to}, and opening such a file can run code: from Python, where you "
            "know who wrote it; here, use the run, or export it to=onnx"
        )
    if said.get("preprocess") or said.get("argmax"):
        raise ConfigError(
            f"{folder} has pre- or post-processing in its graph: it takes and gives other arrays than a "
            f"network (docs/weights.md); run it with {RUNTIMES[to]}, or export it without"
        )
    weights = Weights(state={}, arch=arch, source=str(folder), runtime=to)
    describe_as(weights, section)
    with reraise_as(CheckpointError, f"{folder} can't be read"):
        wrong = [name for name in FILES[to] if sums.get(name) != sha256_of(folder / name)]
    if wrong:
        raise CheckpointError(
            f"{folder}/{wrong[0]} is damaged or of another export (sha256); export it again"
        )
    return weights
