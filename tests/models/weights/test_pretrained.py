"""SegFormer.from_pretrained, save_pretrained and model.pretrained, over the formats that users own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

from segformer.errors import CheckpointError, ConfigError
from segformer.inference.export import read_export
from segformer.inference.predict import Predictor
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.card import IMAGENET_MEAN, Card
from segformer.models.weights.convert import read_weights
from segformer.models.weights.save import write_pth

NAMES = ["wall", "sky", "car"]


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.eval()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    labels = dict(enumerate(NAMES))
    config = SegformerConfig(hidden_sizes=[32, 64, 160, 256], decoder_hidden_size=256, id2label=labels)
    path = tmp_path_factory.mktemp("hf")
    randomise(SegformerForSemanticSegmentation(config)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet classifier as NVlabs writes it."""
    torch.manual_seed(1)
    state = randomise(MiTClassifier(build_encoder(ModelConfig()), 10)).state_dict()
    path = tmp_path_factory.mktemp("mit") / "mit_b0.pth"
    torch.save({name.removeprefix("backbone."): tensor for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_a_model_of_transformers_gives_the_logits_of_transformers(hf: Path, ops: str) -> None:
    model = SegFormer.from_pretrained(hf, ops=ops)
    theirs = SegformerForSemanticSegmentation.from_pretrained(hf).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits, atol=1e-5, rtol=1e-5)
    assert not model.training
    assert model.card.classes == NAMES


def test_the_epsilons_can_be_chosen(hf: Path) -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (SegFormer.from_pretrained(hf, norm_profile=p)(images) for p in ("hf", "original"))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigError, match=r"norm_profile=batch is unknown"):
        SegFormer.from_pretrained(hf, norm_profile="batch")


@pytest.mark.parametrize("profile", ["original", "hf", "mmseg"])
def test_what_is_saved_comes_back_bit_for_bit_with_the_same_logits(tmp_path: Path, profile: str) -> None:
    torch.manual_seed(2)
    config = ModelConfig(norm_profile=profile, decoder_dim=64)
    model = randomise(build_model(config, 4))
    model.save_pretrained(tmp_path / "model")
    back = SegFormer.from_pretrained(tmp_path / "model")
    assert same(model.state_dict(), back.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), back(images))
    theirs, info = SegformerForSemanticSegmentation.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        difference = (theirs.eval()(images).logits - model(images)).abs().max()
    assert difference < (1e-5 if profile == "hf" else 0.1)


def test_what_is_saved_predicts_photographs(tmp_path: Path) -> None:
    model = build_model(ModelConfig(), 4)
    model.save_pretrained(tmp_path / "plain")
    trained = read_export(tmp_path / "plain")
    assert trained.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert trained.palette[:3] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert trained.mean == IMAGENET_MEAN
    card = Card(classes=list("abcd"), palette=[[1, 2, 3]] * 4, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    model.save_pretrained(tmp_path / "named", card)
    assert Predictor.from_export(tmp_path / "named", "cpu").classes == list("abcd")
    SegFormer.from_pretrained(tmp_path / "named").save_pretrained(tmp_path / "again")
    assert read_weights(tmp_path / "again").card == card


@pytest.mark.parametrize("card", [Card(classes=["a"]), Card(palette=[[0, 0, 0]] * 3)])
def test_a_card_of_another_number_of_classes_is_refused(tmp_path: Path, card: Card) -> None:
    with pytest.raises(ConfigError, match=r"2 classes, but the card has \d (names|colours)"):
        build_model(ModelConfig(), 2).save_pretrained(tmp_path / "out", card)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"other files \(notes\.txt\)"):
        build_model(ModelConfig(), 2).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_class_map_moves_rows_and_keeps_everything_else(hf: Path) -> None:
    whole = SegFormer.from_pretrained(hf).state_dict()
    model = SegFormer.from_pretrained(hf, class_map={"auto": "car", "new": None, "roof": 0}, num_classes=3)
    predictor = "decode_head.linear_pred."
    for name, tensor in model.state_dict().items():
        if name.startswith(predictor):
            assert torch.equal(tensor[0], whole[name][2])
            assert torch.equal(tensor[2], whole[name][0])
            assert not torch.equal(tensor[1], whole[name][1])
        else:
            assert torch.equal(tensor, whole[name]), name
    assert model.card.classes == ["auto", "new", "roof"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 19}, r"has 3 classes, num_classes=19; give class_map, such as \{k: None"),
        ({"num_classes": 2, "class_map": {0: 1}}, "has 1 classes, num_classes=2"),
        ({"class_map": {0: "tree"}}, "the file has no class 'tree'"),
        ({"encoder_only": True}, "has no segmentation head; give num_classes"),
        ({"encoder_only": True, "class_map": {0: 0}}, "has no segmentation head"),
        ({"ops": "fast"}, "model.ops=fast is unknown"),
    ],
)
def test_classes_that_do_not_fit_are_refused(hf: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegFormer.from_pretrained(hf, **options)


def test_an_encoder_gets_a_fresh_head_of_the_classes_asked_for(encoder: Path) -> None:
    with pytest.raises(ConfigError, match="give num_classes for a fresh one"):
        SegFormer.from_pretrained(encoder)
    model = SegFormer.from_pretrained(encoder, num_classes=6)
    theirs = torch.load(encoder, weights_only=True)
    own = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(own[name], theirs[name]) for name in theirs if not name.startswith("head."))
    assert model.num_classes == 6
    assert model.card == Card()


def test_a_classifier_comes_back_bit_for_bit_and_loads_in_transformers(encoder: Path, tmp_path: Path) -> None:
    model = MiTClassifier.from_pretrained(encoder)
    model.save_pretrained(tmp_path / "model")
    back = MiTClassifier.from_pretrained(tmp_path / "model")
    assert same(model.state_dict(), back.state_dict())
    assert not back.training
    _, info = SegformerForImageClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert read_export(tmp_path / "model").task == "classification"
    with pytest.raises(ConfigError, match="is a classifier of 10 classes"):
        Predictor.from_export(tmp_path / "model", "cpu")


def test_a_segmentation_model_is_no_classifier(hf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no classifier \(segmentation\)"):
        MiTClassifier.from_pretrained(hf)


def test_pretrained_takes_every_format_and_says_what_it_loaded(
    hf: Path, encoder: Path, tmp_path: Path
) -> None:
    weights = read_weights(hf)
    write_pth(weights, tmp_path / "nvlabs.pth", "nvlabs")
    write_pth(weights, tmp_path / "smp.pth", "smp")
    write_pth(weights.encoder(), tmp_path / "mmseg.pth", "mmseg")
    said = {}
    for path in (hf, tmp_path / "nvlabs.pth", tmp_path / "smp.pth"):
        model = build_model(ModelConfig(pretrained=str(path)), 3)
        assert same(model.state_dict(), weights.state)
        said[path] = model.pretrained
    for path in (tmp_path / "mmseg.pth", encoder):
        torch.manual_seed(5)
        fresh = build_model(ModelConfig(), 3).state_dict()
        torch.manual_seed(5)
        model = build_model(ModelConfig(pretrained=str(path)), 3)
        wanted = read_weights(path).state
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, (wanted if name.startswith("backbone.") else fresh)[name]), name
        said[path] = model.pretrained
    epsilons = "; LayerNorm epsilons are those of original, the weights had those of hf"
    assert said[hf] == f"b0 of {hf} (Hugging Face): encoder and head{epsilons}"
    assert build_model(ModelConfig(pretrained=str(hf), norm_profile="hf"), 3).pretrained.endswith("and head")
    assert said[encoder] == f"b0 of {encoder} (NVlabs): encoder; the head is new, for 3 classes"
    other = build_model(ModelConfig(pretrained=str(hf)), 7)
    assert "encoder; the head, which has 3 classes there, is new, for 7 classes" in other.pretrained
    assert build_model(ModelConfig(), 3).pretrained == ""


def test_missing_tensors_are_named_by_from_pretrained(hf: Path, tmp_path: Path) -> None:
    state = read_weights(hf).state
    holes = ("backbone.block2.1.norm1.bias", "decode_head.linear_fuse.bn.running_mean")
    torch.save({name: t for name, t in state.items() if name not in holes}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=rf"which is b0, does not fit.*2 missing: {holes[0]}, {holes[1]}"
    ):
        SegFormer.from_pretrained(tmp_path / "x.pth")


def test_tensors_of_another_shape_are_named_by_from_pretrained(hf: Path, tmp_path: Path) -> None:
    state = read_weights(hf).state | {"backbone.block2.1.norm1.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape: backbone\.block2\.1\.norm1\.bias \(3,\)"):
        SegFormer.from_pretrained(tmp_path / "x.pth")
