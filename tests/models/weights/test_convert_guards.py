"""Places that can't be read or written, models of others, tensors without data, and what a model keeps."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segformer.errors import CheckpointError, ConfigError
from segformer.models.backbone import DropPath
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.card import Card
from segformer.models.weights.class_map import resolve_class_map
from segformer.models.weights.convert import Weights, read_weights
from segformer.models.weights.save import write_hf, write_pth
from segformer.models.weights.sizes import find_sizes

LONG = "x" * 300


@pytest.fixture(scope="module")
def weights() -> Weights:
    state = build_model(ModelConfig(), 3).state_dict()
    return Weights(source="", state=state, sizes=find_sizes(state), format="nvlabs", norm_profile="original")


@pytest.mark.parametrize("name", [LONG, f"{LONG}.pth", f"{LONG}/x"])
def test_a_name_that_no_file_can_have_is_one_line(weights: Weights, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="can't be read: File name too long") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"can't be (read|written): File name too long") as refused:
        write_hf(weights, tmp_path / name, section={})
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"can't be (read|written): File name too long"):
        write_pth(weights, (tmp_path / name).with_name(f"{name.replace('/', '')}.pth"), "nvlabs")
    assert not list(tmp_path.iterdir())


def test_a_shard_with_a_name_that_no_file_can_have_is_one_line(weights: Weights, tmp_path: Path) -> None:
    write_hf(weights, tmp_path, section=None)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": LONG}}))
    with pytest.raises(CheckpointError, match="can't be read: File name too long"):
        read_weights(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", [".", "model.safetensors", "config.json"])
def test_what_is_closed_to_us_is_one_line(weights: Weights, tmp_path: Path, closed: str) -> None:
    folder = tmp_path / "model"
    write_hf(weights, folder, section={})
    (folder / closed).chmod(0)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            read_weights(folder)
    finally:
        (folder / closed).chmod(0o700)


@pytest.mark.parametrize("method", ["exists", "is_dir", "is_file", "iterdir"])
def test_a_place_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, closed)
    with pytest.raises(CheckpointError, match="can't be read: Permission denied"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**7, 10**7), torch.zeros(32, device="meta"), torch.zeros(1).expand(32)],
    ids=["10**14 values", "meta", "expanded"],
)
def test_tensors_without_their_data_are_refused_before_they_are_looked_at(
    weights: Weights, tmp_path: Path, tensor: Tensor
) -> None:
    torch.save({**weights.state, "backbone.norm1.bias": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors have no data, or less.*backbone\.norm1\.bias"):
        read_weights(tmp_path / "x.pth")


def test_the_model_of_another_is_never_replaced(weights: Weights, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sections: list[dict[str, Any] | None] = [{}, None]
    for section in sections:
        with pytest.raises(ConfigError, match=r"that this project has not written \(config\.json, model"):
            write_hf(weights, tmp_path, section=section)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_our_own_directories_are_replaced_but_not_what_transformers_saved_over_them(
    weights: Weights, tmp_path: Path
) -> None:
    sections: list[dict[str, Any] | None] = [None, {}, None]
    for section in sections:
        write_hf(weights, tmp_path, section=section)
    (tmp_path / "config.json").unlink()  # a crash while it was replaced
    write_hf(weights, tmp_path, section={})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    write_hf(weights, tmp_path, section={})  # an export of an older version, by its section
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0"}))
    with pytest.raises(ConfigError, match="has not written"):
        write_hf(weights, tmp_path, section={})


def test_a_classifier_keeps_its_card(tmp_path: Path) -> None:
    model = MiTClassifier(build_encoder(ModelConfig()), 3)
    model.save_pretrained(tmp_path / "a", Card(classes=["cat", "dog", "cow"]))
    MiTClassifier.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert read_weights(tmp_path / "b").card.classes == ["cat", "dog", "cow"]


def rate_of(backbone: nn.Module) -> float:
    return max(module.rate for module in backbone.modules() if isinstance(module, DropPath))


def test_a_model_keeps_its_rates_of_dropping(tmp_path: Path) -> None:
    build_model(ModelConfig(dropout=0.3, drop_path_rate=0.23), 3).save_pretrained(tmp_path / "a")
    SegFormer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in "ab":
        model = SegFormer.from_pretrained(tmp_path / name)
        assert model.decode_head.dropout == 0.3
        assert rate_of(model.backbone) == pytest.approx(0.23)
    write_hf(read_weights(tmp_path / "b"), tmp_path / "c", section=None)
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert (config["classifier_dropout_prob"], config["drop_path_rate"]) == (0.3, 0.23)
    MiTClassifier(build_encoder(ModelConfig(drop_path_rate=0.4)), 3).save_pretrained(tmp_path / "d")
    assert rate_of(MiTClassifier.from_pretrained(tmp_path / "d").backbone) == pytest.approx(0.4)


@pytest.mark.parametrize("rate", [None, True, "0.2", 1.0, -1, float("nan")])
def test_a_rate_that_is_none_is_left_to_the_default(weights: Weights, tmp_path: Path, rate: object) -> None:
    write_hf(weights, tmp_path, section={})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "drop_path_rate": rate}))
    assert read_weights(tmp_path).config().drop_path_rate == 0.1


def test_target_classes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="the target has several classes named a; give each its own name"):
        resolve_class_map(
            {0: 0, 1: 1, 2: 2}, num_classes=3, source_classes=None, target_classes=["a", "b", "a"]
        )


def test_names_of_a_file_are_printed_without_control_characters() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_class_map({0: "z"}, num_classes=2, source_classes=["a\x1b[2J\n", "b"], target_classes=None)
    assert str(caught.value).isprintable()
