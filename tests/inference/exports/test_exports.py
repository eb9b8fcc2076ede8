"""Exported files: their logits beside the network's, opened like any model, the gate, and hostile files."""

import json
import shutil
from pathlib import Path
from typing import Any

import nano
import numpy as np
import pytest
import torch
from checkpoints import make_run
from model_files import randomize

from segformer.errors import CheckpointError, ConfigError
from segformer.files import sha256_of
from segformer.inference.export import ExportConfig, build, export, open_checkpoint
from segformer.inference.exports import gate
from segformer.inference.exports.graph import to_onnx
from segformer.inference.predictor import Predictor
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.training.config import compose

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
SIZES = [(1, 64, 64), (2, 101, 77), (5, 33, 65), (1, 96, 130), (2, 47, 200), (5, 128, 32)]


@pytest.fixture(scope="module", autouse=True)
def _nano() -> Any:
    VARIANTS.update([nano.SIZE])
    yield
    del VARIANTS["nano"]


def network(kind: str = "segmentation", variant: str = "nano", classes: int = 7, **settings: Any) -> Any:
    """A network whose every parameter and buffer is random."""
    torch.manual_seed(0)
    make = build_model if kind == "segmentation" else build_classifier
    model = make(ModelConfig(variant=variant, **settings), classes).eval()
    randomize(model.state_dict())
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run of the nano network on the tiny shards, exported to=onnx."""
    state = network(classes=2).state_dict()
    place = tmp_path_factory.mktemp("run") / "run"
    make_run(place, {10: state}, "data=sample", f"data.shards={tiny_shards}", "model.variant=nano")
    export(ExportConfig(checkpoint=str(place), to="onnx"))
    return place


def session(data: bytes) -> Any:
    found = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: found.run(None, {"images": images})[0]


def agree(model: Any, file: Any, sizes: Any = SIZES) -> None:
    """1e-4 of the logits' size, and 99.99 % of their classes."""
    same = total = 0
    for size in sizes:
        images = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            wanted = model(images)
        found = torch.from_numpy(np.asarray(file(images.numpy())))
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1)
        same, total = same + int((found.argmax(1) == wanted.argmax(1)).sum()), total + wanted[:, 0].numel()
    assert same >= 0.9999 * total


@pytest.mark.parametrize("settings", [{"norm_profile": "hf"}, {"head": "mmseg"}])
def test_the_onnx_graph_is_the_network_at_any_size_and_batch(settings: dict[str, str]) -> None:
    model = network(**settings)
    agree(model, session(to_onnx(model)))


def test_the_onnx_graph_of_a_classifier() -> None:
    model = network("classification")
    agree(model, session(to_onnx(model)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["nano", "b0"])
def test_openvino_runs_the_graph(variant: str) -> None:
    openvino = pytest.importorskip("openvino")
    model, core = network(variant=variant), openvino.Core()
    plain = {"INFERENCE_PRECISION_HINT": "f32"}  # where the CPU has bfloat16, its default is that
    file = core.compile_model(core.read_model(to_onnx(model), b""), "CPU", plain)
    request = file.create_infer_request()
    agree(model, lambda images: request.infer([images])[0], SIZES[:3])


def test_the_graph_carries_the_folded_head() -> None:
    """No concatenation of maps, and a projection of each stage at its own resolution."""
    graph = onnx.load_model_from_string(to_onnx(network())).graph
    made = {out: node for node in graph.node for out in node.output}
    resized = [made[node.input[0]] for node in graph.node if node.op_type == "Resize"]
    assert [node.op_type for node in resized] == ["Conv"] * 3
    constants = {one.name: list(one.dims) for one in graph.initializer}
    assert [constants[node.input[1]][0] for node in resized] == [37] * 3
    assert all(len(node.input) == 2 for node in graph.node if node.op_type == "Concat")  # of shapes alone


def test_pixels_in_and_classes_out_are_what_the_predictor_draws(run: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (75, 118, 3), np.uint8)
    config = {"to": "onnx", "output": str(tmp_path / "out"), "preprocess": True, "argmax": True}
    out = export(ExportConfig(checkpoint=str(run), **config))
    found = session((out / "model.onnx").read_bytes())(image[None])
    assert found.dtype == np.uint8
    assert (found[0] == Predictor(run, device="cpu")(image).mask).mean() >= 0.9999
    with pytest.raises(ConfigError, match="in its graph"):
        open_checkpoint(out)


def test_an_exported_file_is_a_model_like_any_other(run: Path, tiny_shards: Path) -> None:
    opened, own = open_checkpoint(run / "export_onnx"), open_checkpoint(run)
    assert (opened.metadata, opened.provenance) == (own.metadata, own.provenance)
    assert opened.config() == own.config()
    agree(build(own), lambda images: build(opened)(torch.from_numpy(images)).numpy(), SIZES[:2])
    image = np.random.default_rng(0).integers(0, 256, (75, 118, 3), np.uint8)
    masks = [Predictor(place, device="cpu")(image).mask for place in (run, run / "export_onnx")]
    assert (masks[0] == masks[1]).mean() >= 0.9999


@pytest.mark.slow
def test_an_exported_file_scores_as_its_run(run: Path) -> None:
    own, file = (
        np.array(evaluate_checkpoint(EvaluateConfig(checkpoint=str(place))).confusion)
        for place in (run, run / "export_onnx")
    )
    assert own.sum() == file.sum() > 0
    assert np.abs(own - file).sum() <= 1e-4 * own.sum()


def test_the_certificate_says_what_was_compared(run: Path, tiny_shards: Path) -> None:
    said = json.loads((run / "export_onnx/certificate.json").read_text())
    assert said["images"] == f"val of {tiny_shards}"
    assert (said["count"], said["opset"]) == (17, 20)
    assert said["agreement"] >= 0.9999
    assert said["versions"]["onnxruntime"] == runtime.__version__
    assert len(said["sizes"]) == 7


def test_a_file_that_computes_something_else_is_refused_and_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gate.compare

    def wrong(weights: Any, model: Any, file: Any, **options: Any) -> Any:
        return whole(weights, model, lambda images: np.roll(file(images), 1, axis=1), **options)

    monkeypatch.setattr(gate, "compare", wrong)
    with pytest.raises(CheckpointError, match=r"is refused and removed: only .* at least 99.99 %") as caught:
        export(ExportConfig(checkpoint=str(run), to="onnx", output=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def hostile(kind: str, model: Any) -> None:
    """Make a model what no export is."""
    node = model.graph.node[0]
    if kind == "custom":
        node.domain = "evil"
    elif kind == "loop":
        node.op_type = "Loop"
    elif kind == "external":
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")
        tensor.ClearField("raw_data")
    elif kind == "inputs":
        model.graph.input.add(name="more")
    elif kind == "logits":
        del model.graph.node[-1]
        model.graph.node[-1].output[0] = "logits"  # of 37 channels
        model.graph.output[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize(
    "kind", ["custom", "loop", "external", "inputs", "logits", "noise", "cut", "sum", "to", "section"]
)
def test_a_hostile_folder_is_one_line(run: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(run / "export_onnx", folder)
    file = folder / "model.onnx"
    described = json.loads((folder / "config.json").read_text())
    if kind in ("noise", "cut"):
        file.write_bytes(file.read_bytes()[:1000] if kind == "cut" else bytes(range(256)) * 50)
    elif kind == "sum":
        described["exported"]["files"]["model.onnx"] = "0" * 64
    elif kind == "to":
        described["exported"]["to"] = "aoti"
    elif kind == "section":
        described["segformer"] = [1]
    else:
        model = onnx.load_model_from_string(file.read_bytes())
        hostile(kind, model)
        file.write_bytes(model.SerializeToString())
    if kind != "sum":  # a stranger writes the right sum
        described["exported"]["files"] = {"model.onnx": sha256_of(file)}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        build(open_checkpoint(folder))(torch.zeros(1, 3, 64, 64))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["to=tflite"], "to=tflite is unknown; use one of hf, onnx"),
        (["argmax=true"], "are of to=onnx"),
        (["to=onnx", "int8=true", "argmax=true"], "judged by its logits"),
        (["output=m.onnx"], r"python launch/export.py checkpoint=x to=onnx output=m"),
    ],
)
def test_a_wrong_setting_is_one_line(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(ExportConfig, "export", ["checkpoint=x", *given])


def test_a_folder_of_others_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        export(ExportConfig(checkpoint=str(run), to="onnx", output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_int8_says_what_it_loses_and_is_refused_above_its_bound(run: Path, tmp_path: Path) -> None:
    config = {"checkpoint": str(run), "to": "onnx", "int8": True, "output": str(tmp_path / "out")}
    out = export(ExportConfig(**config, calibration=4, max_miou_loss=100))
    said = json.loads((out / "certificate.json").read_text())
    own, file = (evaluate_checkpoint(EvaluateConfig(checkpoint=str(x))).miou for x in (run, out))
    assert (said["miou"], said["miou_int8"]) == pytest.approx((own, file), abs=1e-6)
    operators = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    assert "DequantizeLinear" in operators
    assert (out / "model.onnx").stat().st_size < 0.6 * (run / "export_onnx/model.onnx").stat().st_size
    monkey = ExportConfig(**config | {"output": str(tmp_path / "no")}, calibration=1, max_miou_loss=0)
    if own > file:
        with pytest.raises(CheckpointError, match=r"int8 is refused and removed: it loses .*max_miou_loss=0"):
            export(monkey)
        assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b0", "b2", "b5"])
def test_the_onnx_graph_of_a_published_size(variant: str) -> None:
    model = network(variant=variant, classes=150)
    agree(model, session(to_onnx(model)), SIZES[:2] if variant == "b5" else SIZES)
