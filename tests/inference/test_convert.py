"""launch/convert.py: what it prints and writes, and the mistakes that end with one line and code 2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from segformer.errors import CheckpointError, ConfigError
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.export import open_checkpoint
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.read import read_weights
from segformer.training.config import compose

NAMES = ["wall", "sky", "car"]


@pytest.fixture(scope="module")
def nvlabs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of NVlabs for 3 classes, with its dead parameter and class names."""
    torch.manual_seed(0)
    state = build_model(ModelConfig(), 3).state_dict()
    state["decode_head.conv_seg.weight"] = torch.ones(3, 128, 1, 1)
    state["decode_head.conv_seg.bias"] = torch.ones(3)
    path = tmp_path_factory.mktemp("nvlabs") / "segformer.b0.pth"
    torch.save({"state_dict": state, "meta": {"CLASSES": NAMES}}, path)
    return path


def run(source: Path, out: Path, to: str = "ours", **options: Any) -> list[Path]:
    return convert(ConvertConfig(checkpoint=str(source), output=str(out), to=to, **options))


def test_it_prints_what_was_found_left_out_and_written(
    nvlabs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(nvlabs, tmp_path / "out", "hf")
    printed = capsys.readouterr().out.splitlines()
    assert "left out   2 tensors: decode_head.conv_seg.bias, decode_head.conv_seg.weight" in printed
    lines = dict(line.split(maxsplit=1) for line in printed if "left out" not in line)
    assert lines["source"] == f"{nvlabs}: NVlabs"
    assert lines["model"] == "b0, segmentation, 3 classes, decoder_dim 256, 3,714,915 parameters"
    assert lines["epsilons"].startswith("original: 1e-06 in blocks, 1e-05")
    assert lines["classes"] == "wall, sky, car"
    assert lines["wrote"].startswith(f"{tmp_path}/out/model.safetensors, ")
    assert lines["note"].endswith("these weights are of profile original: outputs differ slightly")
    assert lines["use"] == f'SegformerForSemanticSegmentation.from_pretrained("{tmp_path}/out")'


def test_a_chain_through_every_format_brings_the_tensors_back_bit_for_bit(
    nvlabs: Path, tmp_path: Path
) -> None:
    run(nvlabs, tmp_path / "a", "ours")
    run(tmp_path / "a", tmp_path / "b.pth", "smp")
    run(tmp_path / "b.pth", tmp_path / "c", "hf")
    run(tmp_path / "c", tmp_path / "d.pth", "nvlabs")
    first, last = read_weights(nvlabs), read_weights(tmp_path / "d.pth")
    assert all(torch.equal(last.state[name], tensor) for name, tensor in first.state.items())
    run(tmp_path / "d.pth", tmp_path / "e.pth", "mmseg", encoder_only=True)
    encoder = read_weights(tmp_path / "e.pth").state
    assert all(torch.equal(first.state[name], tensor) for name, tensor in encoder.items())


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_a_class_map_from_a_file_resizes_the_class_layer(nvlabs: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('{\n\t"other": null, "auto": "car"}' if "json" in name else "other:\nauto: car\n")
    run(nvlabs, tmp_path / "out", class_map=str(file))
    weights = read_weights(tmp_path / "out")
    assert weights.metadata.classes == ["other", "auto"]
    source = read_weights(nvlabs).state["decode_head.linear_pred.weight"]
    assert torch.equal(weights.state["decode_head.linear_pred.weight"][1], source[2])


def test_class_names_come_from_a_list_or_a_data_config(nvlabs: Path, tmp_path: Path) -> None:
    palette = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    (tmp_path / "data.yaml").write_text(f"name: x\nclasses: [a, b, c]\npalette: {palette}\n")
    run(nvlabs, tmp_path / "one", classes=str(tmp_path / "data.yaml"))
    assert read_weights(tmp_path / "one").metadata.palette == palette
    run(nvlabs, tmp_path / "two", classes=["a", "b", "c"])
    for name in ("one", "two"):
        assert read_weights(tmp_path / name).metadata.classes == [*"abc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a"]}, "classes has 1 names, but the model has 3 classes"),
        ({"classes": "nowhere.yaml"}, "classes=nowhere.yaml can't be read"),
        ({"classes": ["a", "b", "a"]}, "classes has several classes named a; give each its own name"),
        ({"classes": [1, 2, 3]}, "classes must be a list of names"),
        ({"classes": {"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}}, "the metadata has 1 colors"),
        ({"class_map": "nowhere.yaml"}, "class_map=nowhere.yaml can't be read"),
        ({"class_map": ["a"]}, "class_map must be a mapping"),
        ({"class_map": {0: 7}}, "7 is no class of the file; use 0 to 2"),
        ({"to": "mmseg"}, "must be the name of a .pth file"),
        ({"encoder_only": True, "class_map": {0: 0}}, "has no segmentation head"),
        ({"encoder_only": True, "classes": ["a"]}, "the model has no classes"),
        ({"to": "onnx"}, "to=onnx is unknown; use one of ours, hf, nvlabs, smp, mmseg"),
        ({"seed": 10**20}, "seed=10{20} must be from 0"),
        ({"checkpoint": ""}, "checkpoint= is empty; give a file, directory or run"),
        ({"output": "  "}, "output= is empty; give a directory or .pth file"),
        ({"to": "hf", "output": "x.SAFETENSORS"}, "output=x.SAFETENSORS is the name of a file, but to=hf"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_nothing_is_written(
    nvlabs: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    places = {"checkpoint": str(nvlabs), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=message):
        convert(ConvertConfig(**places | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["class_map", "classes"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.yaml", "a: [1\nb: }"),
        ("x.yaml", "[" * 20_000),
        ("x.json", "[" * 20_000),
        ("x.yaml", "!!int ''"),
        ("x.yaml", "!!python/object/apply:os.getcwd []"),
    ],
    ids=["broken", "deep yaml", "deep json", "no number", "code"],
)
def test_a_file_that_cannot_be_meant_is_one_line(
    nvlabs: Path, tmp_path: Path, key: str, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"can't be read: .*; give a YAML or JSON file") as caught:
        run(nvlabs, tmp_path / "out", **{key: str(tmp_path / name)})
    assert str(caught.value).startswith(f"{key}={tmp_path}/{name} ")
    assert "\n" not in str(caught.value)


def test_the_source_is_never_written_over(nvlabs: Path, tmp_path: Path) -> None:
    run(nvlabs, tmp_path / "a")
    before = (tmp_path / "a/config.json").read_bytes()
    for source, out in (("a", "a"), ("a/model.safetensors", "a"), ("a", "b/../a")):
        (tmp_path / "b").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="is where the source lies"):
            run(tmp_path / source, tmp_path / out, "hf")
    assert (tmp_path / "a/config.json").read_bytes() == before


def test_a_file_with_a_hole_is_refused_by_name_and_nothing_is_written(nvlabs: Path, tmp_path: Path) -> None:
    state, file = read_weights(nvlabs).state, tmp_path / "x.pth"
    del state["backbone.block1.1.mlp.fc2.bias"]
    torch.save(state, file)
    message = (
        r"x\.pth, which is b0, does not.*1 missing: backbone\.block1\.1\.mlp.*; get the whole file again"
    )
    for to, out in (("ours", "o"), ("hf", "o"), ("nvlabs", "o.pth"), ("smp", "o.pth")):
        with pytest.raises(CheckpointError, match=message) as caught:
            run(file, tmp_path / out, to)
        assert "model.variant" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    torch.save(read_weights(nvlabs).state | {"decode_head.linear_c2.proj.weight": torch.ones(256, 65)}, file)
    run(file, tmp_path / "out", encoder_only=True)


def test_a_checkpoint_without_the_counter_and_with_a_loss_is_converted_and_both_are_said(
    nvlabs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"net.{name}": tensor for name, tensor in read_weights(nvlabs).state.items()}
    del state["net.decode_head.linear_fuse.bn.num_batches_tracked"]
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(3)}}, tmp_path / "last.ckpt")
    run(tmp_path / "last.ckpt", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert "left out   1 tensors: criterion.weight" in lines
    assert "note       the prefix 'net.' was taken off the names" in lines
    assert any(line.startswith("note       decode_head.linear_fuse.bn.num_batches_tracked") for line in lines)
    assert open_checkpoint(tmp_path / "out").state.keys() == read_weights(nvlabs).state.keys()


def test_the_command_line_takes_an_inline_class_map_and_fresh_rows_are_those_of_the_seed(
    nvlabs: Path, tmp_path: Path
) -> None:
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        places = [f"checkpoint={nvlabs}", f"output={tmp_path}/{name}", f"seed={seed}"]
        convert(compose(ConvertConfig, "convert", [*places, "class_map={new: null, big car: car, air: 1}"]))
        weights = read_weights(tmp_path / name)
        assert weights.metadata.classes == ["new", "big car", "air"]
        rows.append(weights.state["decode_head.linear_pred.weight"])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][0], rows[2][0])
