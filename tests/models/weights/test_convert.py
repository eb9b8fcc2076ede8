"""Files of every format: what is found in them, and that tensors come back bit for bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SegformerModel,
)

from segformer.checkpoint.format import TrainState
from segformer.errors import CheckpointError, ConfigError
from segformer.models.segformer import MiTClassifier, build_encoder, build_model, load_strict
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.card import Card
from segformer.models.weights.convert import Weights, read_weights
from segformer.models.weights.names import from_ours
from segformer.models.weights.save import write_hf, write_pth
from segformer.models.weights.sizes import Sizes, find_sizes

NAMES = ["wall", "sky", "car"]


def hf_config(variant: str = "b0", classes: int = 3, **more: object) -> SegformerConfig:
    sizes = VARIANTS[variant]
    return SegformerConfig(
        hidden_sizes=list(sizes.embed_dims),
        depths=list(sizes.depths),
        num_attention_heads=list(sizes.num_heads),
        decoder_hidden_size=sizes.decoder_dim,
        num_labels=classes,
        **more,
    )


def randomise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values of order one everywhere, so that no two tensors agree by chance."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return state


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that transformers wrote, with class names; nothing in it is shared with our code."""
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(hf_config(id2label=dict(enumerate(NAMES)))).eval()
    randomise(model.state_dict())
    path = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """B0 for 3 classes under our names, which are those of NVlabs."""
    torch.manual_seed(1)
    return randomise(build_model(ModelConfig(), 3).state_dict())


def bare(state: dict[str, Tensor], prefix: str = "backbone.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def logits(path: Path) -> Callable[[Tensor], Tensor]:
    model, info = SegformerForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape
    return lambda images: model.eval()(images).logits


def test_hugging_face_there_and_back_is_bit_identical_and_loads_with_the_same_logits(
    hf: Path, tmp_path: Path
) -> None:
    weights = read_weights(hf)
    assert (weights.format, weights.norm_profile, weights.card.classes) == ("hf", "hf", NAMES)
    assert weights.sizes == Sizes(variant="b0", kind="segmentation", num_classes=3, decoder_dim=256)
    write_hf(weights, tmp_path / "back", section=None)
    assert same(load_file(hf / "model.safetensors"), load_file(tmp_path / "back/model.safetensors"))
    images = torch.randn(1, 3, 64, 96)
    ours = build_model(weights.config(), 3).eval()
    load_strict(ours, weights.state, source="test")
    with torch.no_grad():
        theirs = logits(tmp_path / "back")(images)
        assert torch.equal(theirs, logits(hf)(images))
        torch.testing.assert_close(ours(images), theirs, atol=1e-5, rtol=1e-5)


def test_a_converted_directory_says_classes_and_normalisation_to_transformers(
    hf: Path, tmp_path: Path
) -> None:
    weights = read_weights(hf)
    weights.card.mean, weights.card.std = [127.5, 100.0, 51.0], [51.0, 63.75, 127.5]
    write_hf(weights, tmp_path / "back", section=None)
    config = SegformerConfig.from_pretrained(tmp_path / "back")
    assert config.id2label == dict(enumerate(NAMES))
    assert json.loads((tmp_path / "back/preprocessor_config.json").read_text())["image_mean"][0] == 0.5
    again = read_weights(tmp_path / "back").card
    assert (again.mean, again.std) == (weights.card.mean, weights.card.std)
    try:
        processor = SegformerImageProcessorPil.from_pretrained(tmp_path / "back")
    except ImportError:
        pytest.skip("the rest passed; this transformers needs torchvision to prepare images, 5.23 does not")
    assert processor.image_std == (0.2, 0.25, 0.5)


@pytest.mark.parametrize(
    ("network", "kind"),
    [(SegformerForImageClassification, "classification"), (SegformerModel, "encoder")],
)
def test_classifiers_and_bare_encoders_come_back_to_transformers(
    network: type, kind: str, tmp_path: Path
) -> None:
    model = network(hf_config())
    randomise(model.state_dict())
    model.save_pretrained(tmp_path / "there")
    weights = read_weights(tmp_path / "there")
    assert (weights.sizes.kind, weights.card.classes) == (kind, None)
    write_hf(weights, tmp_path / "back", section=None)
    assert same(
        load_file(tmp_path / "there/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    )
    _, info = network.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info


def test_a_classifier_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    theirs = SegformerForImageClassification(hf_config(classes=10)).eval()
    randomise(theirs.state_dict())
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    ours = MiTClassifier(build_encoder(weights.config()), 10).eval()
    load_strict(ours, weights.state, source="test")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=1e-5)


def test_shards_of_transformers_are_read_as_one_file(hf: Path, tmp_path: Path) -> None:
    model = SegformerForSemanticSegmentation.from_pretrained(hf)
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(read_weights(tmp_path).state, read_weights(hf).state)


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_bin_files_are_read_like_safetensors(hf: Path, tmp_path: Path, shards: int) -> None:
    whole = load_file(hf / "model.safetensors")
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    if shards == 1:
        torch.save(whole, tmp_path / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-0000{k + 1}-of-00002.bin" for k in range(2)]
        weight_map = {name: files[index % 2] for index, name in enumerate(whole)}
        for file in files:
            torch.save({n: t for n, t in whole.items() if weight_map[n] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = read_weights(tmp_path)
    assert same(weights.state, read_weights(hf).state)
    assert weights.card.classes == NAMES


def test_the_state_dict_of_a_live_transformers_model_is_read_like_its_files(hf: Path, tmp_path: Path) -> None:
    live = SegformerForSemanticSegmentation.from_pretrained(hf)
    torch.save(live.state_dict(), tmp_path / "live.pth")
    weights = read_weights(tmp_path / "live.pth")
    assert (weights.format, weights.norm_profile) == ("hf5", "hf")
    assert same(weights.state, read_weights(hf).state)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_nvlabs_there_and_back_is_bit_identical_without_the_dead_parameter(
    state: dict[str, Tensor], tmp_path: Path, wrapper: str, legacy: bool
) -> None:
    dead = {
        "decode_head.conv_seg.weight": torch.ones(3, 128, 1, 1),
        "decode_head.conv_seg.bias": torch.ones(3),
    }
    shuffled = list((state | dead).items())
    random.Random(0).shuffle(shuffled)
    meta = {"CLASSES": tuple(NAMES), "PALETTE": [[0, 0, 0], [1, 2, 3], [4, 5, 6]], "epoch": 16}
    content = {"meta": meta, "state_dict": {wrapper + k: v for k, v in shuffled}, "optimizer": {"step": [1]}}
    torch.save(content, tmp_path / "there.pth", _use_new_zipfile_serialization=not legacy)
    weights = read_weights(tmp_path / "there.pth")
    assert (weights.format, weights.norm_profile) == ("nvlabs", "original")
    assert weights.card == Card(classes=NAMES, palette=[[0, 0, 0], [1, 2, 3], [4, 5, 6]])
    assert sorted(weights.dropped) == sorted(wrapper + name for name in dead)
    write_pth(weights, tmp_path / "back.pth", "nvlabs")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same(back["state_dict"], state)
    assert back["meta"]["CLASSES"] == NAMES


def test_an_imagenet_encoder_of_nvlabs_comes_back_under_its_bare_names(tmp_path: Path) -> None:
    torch.manual_seed(2)
    full = MiTClassifier(build_encoder(ModelConfig()), 7).state_dict()
    theirs = {name.removeprefix("backbone."): tensor for name, tensor in full.items()}
    torch.save(theirs, tmp_path / "mit_b0.pth")
    weights = read_weights(tmp_path / "mit_b0.pth")
    assert weights.sizes == Sizes(variant="b0", kind="classification", num_classes=7, decoder_dim=None)
    write_pth(weights, tmp_path / "back.pth", "nvlabs")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], theirs)
    encoder = read_weights(tmp_path / "mit_b0.pth", encoder_only=True)
    assert sorted(encoder.dropped) == ["head.bias", "head.weight"]
    assert encoder.sizes.kind == "encoder"


def smp_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out here: what segmentation_models_pytorch calls the tensors."""
    head = {f"linear_c{s}.proj": f"decoder.mlp_stage.{4 - s}.linear" for s in (1, 2, 3, 4)}
    head |= {"linear_fuse.conv": "decoder.fuse_stage.0", "linear_fuse.bn": "decoder.fuse_stage.1"}
    head["linear_pred"] = "segmentation_head.0"
    out = {f"encoder.{name}": tensor for name, tensor in bare(state).items()}
    for name, tensor in bare(state, "decode_head.").items():
        module, _, parameter = name.rpartition(".")
        out[f"{head[module]}.{parameter}"] = tensor
    return out


def test_smp_there_and_back_is_bit_identical(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(smp_names(state), tmp_path / "there.pth")
    weights = read_weights(tmp_path / "there.pth")
    assert (weights.format, weights.norm_profile) == ("smp", "original")
    assert same(weights.state, state)
    write_pth(weights, tmp_path / "back.pth", "smp")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), smp_names(state))


def test_a_directory_of_smp_is_read_though_its_config_is_another(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(smp_names(state), tmp_path / "model.safetensors")
    config = {"_model_class": "Segformer", "encoder_name": "mit_b0", "classes": 3, "in_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(read_weights(tmp_path).state, state)


def mmseg_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out here: what mmsegmentation 1.x calls the tensors of the encoder, and how it keeps them."""
    block = {"attn.proj": "attn.attn.out_proj", "mlp.fc1": "ffn.layers.0", "mlp.fc2": "ffn.layers.4"}
    block["mlp.dwconv.dwconv"] = "ffn.layers.1"
    out = {}
    for name, tensor in bare(state).items():
        part, *rest = name.split(".")
        stage, kind = int(part[-1]) - 1, part[:-1]
        module, parameter = ".".join(rest[1:-1]), rest[-1]
        if kind == "patch_embed":
            out[f"layers.{stage}.0.{name.split('.', 1)[1].replace('proj.', 'projection.')}"] = tensor
        elif kind == "norm":
            out[f"layers.{stage}.2.{parameter}"] = tensor
        elif module == "attn.q":
            kv = state[f"backbone.{name.replace('attn.q', 'attn.kv')}"]
            out[f"layers.{stage}.1.{rest[0]}.attn.attn.in_proj_{parameter}"] = torch.cat([tensor, kv])
        elif module != "attn.kv":
            linear = parameter == "weight" and module in ("mlp.fc1", "mlp.fc2")
            value = tensor[:, :, None, None] if linear else tensor
            out[f"layers.{stage}.1.{rest[0]}.{block.get(module, module)}.{parameter}"] = value
    return out


def test_an_mmseg_encoder_there_and_back_is_bit_identical(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(mmseg_names(state), tmp_path / "there.pth")
    weights = read_weights(tmp_path / "there.pth")
    assert (weights.format, weights.norm_profile, weights.sizes.kind) == ("mmseg", "mmseg", "encoder")
    assert same(bare(weights.state), bare(state))
    write_pth(weights, tmp_path / "back.pth", "mmseg")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert same(back, mmseg_names(state))


def test_of_a_whole_mmseg_model_the_encoder_is_taken_when_asked_for(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs = {f"backbone.{name}": tensor for name, tensor in mmseg_names(state).items()}
    theirs |= {
        "decode_head.conv_seg.weight": torch.ones(3, 256, 1, 1),
        "decode_head.conv_seg.bias": torch.ones(3),
    }
    theirs["decode_head.convs.0.conv.weight"] = torch.ones(256, 32, 1, 1)
    meta = {"dataset_meta": {"classes": NAMES}}
    torch.save({"state_dict": theirs, "meta": meta, "message_hub": {}}, tmp_path / "iter_160000.pth")
    with pytest.raises(CheckpointError, match=r"decode head \(3 tensors.*mmsegmentation.*encoder_only=true"):
        read_weights(tmp_path / "iter_160000.pth")
    weights = read_weights(tmp_path / "iter_160000.pth", encoder_only=True)
    assert same(bare(weights.state), bare(state))
    assert len(weights.dropped) == 3


@pytest.mark.parametrize("profile", ["original", "hf", "mmseg"])
def test_an_export_keeps_everything_and_its_own_epsilons(
    state: dict[str, Tensor], tmp_path: Path, profile: str
) -> None:
    card = Card(classes=NAMES, palette=[[1, 2, 3]] * 3, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    weights = Weights(
        source="test", state=state, sizes=find_sizes(state), format="ours", norm_profile=profile, card=card
    )
    write_hf(weights, tmp_path / "export", section={"step": 7})
    back = read_weights(tmp_path / "export")
    assert (back.format, back.norm_profile, back.card) == ("ours", profile, card)
    assert back.section is not None
    assert back.section["step"] == 7
    assert same(back.state, state)
    logits(tmp_path / "export")
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/weights.safetensors").write_bytes((tmp_path / "export/model.safetensors").read_bytes())
    assert read_weights(tmp_path / "lone/weights.safetensors").norm_profile == profile
    write_pth(back, tmp_path / "nvlabs.pth", "nvlabs")
    again = read_weights(tmp_path / "nvlabs.pth")
    assert (again.format, again.norm_profile, again.card) == ("nvlabs", profile, card)


def test_an_export_that_transformers_saved_again_is_read_as_theirs(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = Weights(
        source="test", state=state, sizes=find_sizes(state), format="ours", norm_profile="original"
    )
    weights.card.classes = NAMES
    write_hf(weights, tmp_path / "export", section={})
    tuned = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        tuned.decode_head.classifier.bias.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    back = read_weights(tmp_path / "tuned")
    assert (back.format, back.norm_profile, back.card.classes) == ("hf", "hf", NAMES)
    bias = "decode_head.linear_pred.bias"
    assert torch.equal(back.state[bias], state[bias] + 1)


def test_a_checkpoint_of_a_run_is_read_but_does_not_say_its_epsilons(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    older = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    moments = {"exp_avg.x": torch.zeros(1)}
    for step, tensors in ((10, older), (20, state)):
        write_checkpoint(tensors, moments, TrainState(step=step), tmp_path / "checkpoints")
    for path in (tmp_path, tmp_path / "checkpoints/step-00000020"):
        weights = read_weights(path)
        assert (weights.format, weights.norm_profile) == ("run", None)
        assert same(weights.state, state)
        with pytest.raises(CheckpointError, match="does not say its LayerNorm epsilons; give norm_profile"):
            weights.config()
        assert weights.config("hf").norm_profile == "hf"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_without_loss_and_is_said(
    state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    weights = read_weights(tmp_path / "half.pth")
    assert all(torch.equal(weights.state[name], t.float()) for name, t in half.items() if t.dtype == dtype)
    (note,) = weights.notes
    assert str(dtype).removeprefix("torch.") in note


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sizes_of_every_variant_are_found(variant: str) -> None:
    with torch.device("meta"):
        state = build_model(ModelConfig(variant=variant, decoder_dim=128), 19).state_dict()
    found = find_sizes(state)
    assert found == Sizes(variant=variant, kind="segmentation", num_classes=19, decoder_dim=128)
    weights = Weights(source="", state=state, sizes=found, format="smp", norm_profile="original")
    assert weights.config().decoder_dim == 128


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("segmentation", "mmseg", "can't hold the head of this model.*encoder_only=true"),
        ("classification", "mmseg", "can't hold the head"),
        ("classification", "smp", "its models segment"),
        ("b6", "smp", "has no encoder of b6"),
    ],
)
def test_a_target_that_cannot_hold_the_model_refuses_it(
    tmp_path: Path, kind: str, target: str, message: str
) -> None:
    variant = kind if kind in VARIANTS else "b0"
    with torch.device("meta"):
        if kind == "classification":
            state = MiTClassifier(build_encoder(ModelConfig()), 3).state_dict()
        else:
            state = build_model(ModelConfig(variant=variant), 3).state_dict()
    weights = Weights(
        source="", state=state, sizes=find_sizes(state), format="nvlabs", norm_profile="original"
    )
    with pytest.raises(ConfigError, match=message):
        write_pth(weights, tmp_path / "out.pth", target)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_parts_of_one_storage_are_written_once(tmp_path: Path) -> None:
    state = build_model(ModelConfig(), 3).state_dict()
    flat = torch.cat([t.flatten().float() for t in state.values()])
    parts = flat.split([t.numel() for t in state.values()])
    views = {name: part.view(t.shape) for (name, t), part in zip(state.items(), parts, strict=True)}
    weights = Weights(source="", state=views, sizes=find_sizes(views), format="ours", norm_profile="hf")
    write_pth(weights, tmp_path / "x.pth", "smp")
    write_hf(weights, tmp_path / "x", section=None)
    assert (tmp_path / "x.pth").stat().st_size < 1.1 * flat.nbytes
    assert (tmp_path / "x/model.safetensors").stat().st_size < 1.1 * flat.nbytes


def test_a_pth_is_never_written_over_and_needs_its_suffix(state: dict[str, Tensor], tmp_path: Path) -> None:
    weights = Weights(
        source="", state=state, sizes=find_sizes(state), format="nvlabs", norm_profile="original"
    )
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.pth exists"):
        write_pth(weights, tmp_path / "mine.pth", "nvlabs")
    with pytest.raises(ConfigError, match=r"must be the name of a \.pth file"):
        write_pth(weights, tmp_path / "folder", "nvlabs")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("mine.pth", "precious")]


def test_a_full_disk_leaves_the_older_model_as_it_was(
    state: dict[str, Tensor], hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(read_weights(hf), tmp_path, section={})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segformer.models.weights.save._write_json", full)  # after the weights
    changed = {name: tensor + 1 for name, tensor in state.items()}
    weights = Weights(source="", state=changed, sizes=find_sizes(state), format="nvlabs", norm_profile="hf")
    with pytest.raises(ConfigError, match="can't be written: No space left on device"):
        write_hf(weights, tmp_path, section={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_written_over_an_older_one_keeps_nothing_of_it(hf: Path, tmp_path: Path) -> None:
    weights = read_weights(hf)
    write_hf(weights, tmp_path, section=None)
    write_hf(weights, tmp_path, section={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_files_are_readable_by_the_group_as_the_umask_says(hf: Path, tmp_path: Path) -> None:
    write_hf(read_weights(hf), tmp_path / "out", section=None)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_names_of_a_state_that_is_written_are_those_of_our_tables(state: dict[str, Tensor]) -> None:
    assert from_ours(state, "smp").keys() == smp_names(state).keys()
