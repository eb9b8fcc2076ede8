"""Inference modes of published scores, against loops over single images that share no code with them."""

import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapes
import torch
import torch.nn.functional as F
from model_files import bundle
from torch import nn

from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.evaluation.evaluate import evaluate
from segformer.evaluation.inference_mode import (
    PROTOCOLS,
    InferenceMode,
    InferenceModeConfig,
    check_images,
    protocol,
    resized,
    settings,
    windows,
)
from segformer.inference.predictor import Predictor
from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import ModelConfig
from segformer.models.weights.bundle import Metadata
from segformer.models.weights.write import write_export
from segformer.training.config import compose

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 5
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


class Lopsided(nn.Module):
    """Logits at a quarter size that depend on the column, on far pixels, and on left and right."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, CLASSES, 7, stride=4, padding=3).double()

    def forward(self, images):
        logits = self.convolution(images)
        ramp = torch.linspace(-1, 1, logits.shape[3], dtype=logits.dtype)
        weight = torch.arange(CLASSES, dtype=logits.dtype)[:, None, None]
        return 3 * logits + ramp * weight + images.mean((1, 2, 3))[:, None, None, None] * weight.flip(0)


def pictures(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def bilinear(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def whole(model, image):
    """Logits (1, K, h, w) of an image (1, 3, h, w)."""
    return bilinear(model(image), (image.shape[2], image.shape[3]))


def slid(model, image, window, stride):
    """The same by windows, summed and counted in numpy."""
    height, width = image.shape[2:]
    total, count = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    tops = [*range(0, max(height - window[0], 0), stride[0]), max(height - window[0], 0)]
    lefts = [*range(0, max(width - window[1], 0), stride[1]), max(width - window[1], 0)]
    for top in tops:
        for left in lefts:
            crop = image[:, :, top : top + window[0], left : left + window[1]]
            logits = whole(model, crop)[0].numpy()
            total[:, top : top + logits.shape[1], left : left + logits.shape[2]] += logits
            count[top : top + logits.shape[1], left : left + logits.shape[2]] += 1
    return torch.from_numpy(total / count)[None]


def averaged(model, image, sizes, flip, forward):
    """Mean probabilities at the original size over resized images of `sizes`, and their mirror images."""
    found = []
    for size in sizes:
        scaled = bilinear(image, size)
        found.append(bilinear(forward(model, scaled), image.shape[2:]).softmax(1))
        if flip:
            mirrored = bilinear(forward(model, scaled.flip(-1)), image.shape[2:])
            found.append(mirrored.softmax(1).flip(-1))
    return torch.stack(found).mean(0)


def each(images, function):
    with torch.no_grad():
        return torch.cat([function(image[None]) for image in images])


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((96, 130), [64, 64], [48, 48]),  # the last windows move inwards
        ((70, 65), [64, 64], [64, 64]),  # one pixel left over
        ((40, 100), [64, 48], [10, 7]),  # higher than the image
        ((50, 40), [64, 64], [48, 48]),  # larger than the image
        ((100, 90), [40, 33], []),
    ],
    ids=str,
)
def test_windows_are_averaged_like_a_loop_over_them(size, window, stride):
    model, images = Lopsided(), pictures(2, 3, *size)
    found = InferenceMode(model, InferenceModeConfig(window=window, stride=stride))(images)
    used = stride or [3 * side // 4 for side in window]
    torch.testing.assert_close(found, each(images, lambda image: slid(model, image, window, used)))


def test_cityscapes_takes_three_windows_in_one_row():
    found = windows((1024, 2048), (1024, 1024), (768, 768))
    assert [(s.start, s.stop) for _, s in found] == [(0, 1024), (768, 1792), (1024, 2048)]
    assert {(s.start, s.stop) for s, _ in found} == {(0, 1024)}


@pytest.mark.parametrize(
    ("flip", "scales"), [(True, []), (False, [0.5, 1.0, 1.75]), (True, [0.5, 1.0, 1.75])], ids=str
)
@pytest.mark.parametrize("window", [[], [40, 36]], ids=str)
def test_probabilities_are_averaged_at_the_original_size(flip, scales, window):
    model, images = Lopsided(), pictures(2, 3, 66, 83)
    cfg = InferenceModeConfig(window=window, stride=[20, 30] if window else [], flip=flip, scales=scales)
    sizes = [(33, 42), (66, 83), (116, 145)] if scales else [(66, 83)]  # 41.5 -> 42, 115.5, 145.25

    def forward(model, image):
        return slid(model, image, window, [20, 30]) if window else whole(model, image)

    expected = each(images, lambda image: averaged(model, image, sizes, flip, forward))
    torch.testing.assert_close(InferenceMode(model, cfg)(images), expected)


@pytest.mark.parametrize(
    ("keys", "size", "expected"),
    [
        ({"short_side": 512}, (683, 1024), (512, 768)),  # 767.6
        ({"short_side": 512}, (256, 300), (512, 600)),
        ({"short_side": 512, "long_side": 2048}, (1024, 683), (768, 512)),
        ({"short_side": 512, "long_side": 2048}, (200, 1000), (410, 2048)),  # 409.6, 2.048 and not 2.56
        ({"short_side": 512, "long_side": 2048, "size_divisor": 32}, (200, 1000), (416, 2048)),
        ({"short_side": 512, "size_divisor": 32}, (683, 1024), (512, 768)),
        ({"size_divisor": 32}, (65, 64), (96, 64)),
        ({}, (65, 64), (65, 64)),
        # scales multiply both limits
        ({"short_side": 45, "long_side": 100, "factor": 0.75}, (60, 80), (33, 44)),  # 33 and 75 of 33.75
        ({"short_side": 45, "long_side": 100, "factor": 0.75}, (60, 300), (15, 75)),
    ],
    ids=str,
)
def test_sizes_are_those_of_mmcv(keys, size, expected):
    settings = {key: value for key, value in keys.items() if key != "factor"}
    assert resized(InferenceModeConfig(**settings), size, keys.get("factor", 1.0))[1] == expected


@pytest.mark.parametrize("divisor", [0, 32])
def test_a_resized_image_is_stretched_to_the_divisor_by_a_resize_of_its_own(divisor):
    model, images = Lopsided(), pictures(2, 3, 100, 72)
    found = InferenceMode(model, InferenceModeConfig(short_side=48, size_divisor=divisor))(images)
    size = (96, 64) if divisor else (67, 48)
    expected = each(images, lambda image: whole(model, bilinear(bilinear(image, (67, 48)), size)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("size", "side"), [((90, 70), 45), ((61, 333), 100), ((50, 50), 49), ((9, 400), 33)])
def test_a_reduction_is_that_of_sharding(size, side):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mode = InferenceMode(nn.Identity(), InferenceModeConfig(long_side=side, window=[32, 32]))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach the pixels
        found = mode(torch.from_numpy(image).float().permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    height, width = (max(1, round(length * side / max(size))) for length in size)
    expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.51  # OpenCV rounds to whole gray levels


def test_a_reduced_image_is_evaluated_as_the_image_that_sharding_made():
    model, images = Lopsided(), pictures(1, 3, 120, 90)
    small = F.adaptive_avg_pool2d(images, (40, 30))
    for keys in ({}, {"scales": [2.0]}, {"window": [32, 32]}):
        found = InferenceMode(model, InferenceModeConfig(long_side=40, **keys))(images)
        torch.testing.assert_close(found, InferenceMode(model, InferenceModeConfig(**keys))(small))


@pytest.mark.parametrize("short", [32, 140])
def test_resizing_is_that_of_opencv(short):
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.float32)
    mode = InferenceMode(nn.Identity(), InferenceModeConfig(short_side=short))
    found = mode(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    expected = cv2.resize(image, found.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_defaults_are_the_network_itself():
    model = Lopsided()
    images = pictures(2, 3, 33, 47)
    assert torch.equal(InferenceMode(model, EvaluateConfig(batch=3, split="test"))(images), model(images))
    assert settings(InferenceModeConfig()) == []


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_the_network(training):
    model = Lopsided().train(training)
    mode = InferenceMode(model, InferenceModeConfig(flip=True))
    assert mode.training is training
    mode.train(not training)
    assert model.training is not training


def test_bf16_autocast_averages_in_float32():
    model = build_model(ModelConfig(variant="b0"), CLASSES).eval()
    mode = InferenceMode(model, InferenceModeConfig(window=[64, 64], flip=True))
    images = pictures(2, 3, 80, 96).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mode(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2, 80, 96))
    torch.testing.assert_close(found, mode(images), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"short_side": -1}, "short_side=-1 must be 0 or more"),
        ({"short_side": 16}, "short_side=16 is too small"),
        (
            {"short_side": 512, "long_side": 500},
            "long_side=500 is too small; use 0, or 32 and short_side=512",
        ),
        ({"long_side": 31}, "long_side=31 is too small"),
        ({"window": [64]}, r"window=\[64\] must be"),
        ({"window": [64, 31]}, r"window=\[64, 31\] must be"),
        ({"stride": [64, 64]}, r"stride=\[64, 64\] must be .* window=\[\]"),
        ({"window": [64, 64], "stride": [48, 65]}, r"stride=\[48, 65\] must be.*leaves pixels out"),
        ({"window": [64, 64], "stride": [0, 48]}, r"stride=\[0, 48\] must be"),
        ({"scales": [1.0, 0.0]}, "0.0 is no factor"),
        ({"scales": [math.nan]}, "nan is no factor"),
    ],
    ids=str,
)
def test_contradictions_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(20, 64), (64, 31), (1, 1)])
def test_a_short_side_is_padded_for_the_network_and_cut_off_again(size):
    model, image = Lopsided(), pictures(1, 3, *size)
    sides = [max(32, side) for side in size]
    repeated = np.pad(
        image[0].numpy(), ((0, 0), *((0, b - a) for a, b in zip(size, sides, strict=True))), "edge"
    )
    expected = whole(model, torch.from_numpy(repeated)[None])[:, :, : size[0], : size[1]]
    torch.testing.assert_close(InferenceMode(model, InferenceModeConfig())(image), expected)


def test_images_of_which_nothing_would_be_left_are_refused_before_the_first():
    sizes = [(640, 480), (4, 90)]
    check_images(InferenceModeConfig(scales=[0.5, 1]), sizes)
    with pytest.raises(ConfigError, match=r"scales=\[0.05, 1\]: an image of 4 x 90 .* becomes 0 x 5; use a"):
        check_images(InferenceModeConfig(scales=[0.05, 1]), sizes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_shards):
    """A network with random weights for the classes of tiny_shards."""
    classes = list(ShardSet.open(str(tiny_shards)).classes)
    torch.manual_seed(3)
    state = build_model(ModelConfig(), len(classes)).state_dict()
    return write_model(state, classes, tmp_path_factory.mktemp("mode") / "export", tiny_shards)


def write_model(state, classes, out, shards, **extra):
    palette = [[9 * k, 0, 0] for k in range(len(classes))]
    metadata = Metadata(classes=classes, palette=palette, mean=MEAN, std=STD)
    write_export(bundle(state, metadata=metadata), out, step=7, shards=str(shards), **extra)
    return out


@pytest.mark.slow
def test_evaluate_takes_the_keys_and_prints_the_mode(exported, run_ranks):
    given = [
        "short_side=64",
        "long_side=90",
        "window=[48,64]",
        "stride=[32,48]",
        "flip=true",
        "scales=[1,1.5]",
    ]
    options = [f"checkpoint={exported}", "loader.workers=0", "precision=fp32"]
    printed, _ = run_ranks(2, "launch/evaluate.py", *options, *given)
    assert "(short side 64, long side <= 90, windows 48x64 stride 32x48, flip, scales 1/1.5)" in printed
    cfg = compose(EvaluateConfig, "evaluate", [*options, *given])
    assert settings(cfg)[-1] == "scales=[1.0, 1.5]"
    scores = evaluate_checkpoint(cfg)
    plain = evaluate_checkpoint(compose(EvaluateConfig, "evaluate", options))
    assert scores.confusion != plain.confusion
    assert np.sum(scores.confusion) == np.sum(plain.confusion) > 0
    (mean,) = [line.split() for line in printed.splitlines() if line.startswith("mean ")]
    assert f"{100 * scores.miou:.2f}" in mean
    with pytest.raises(ConfigError, match=r"^scales=\[0.0005\]: an image of "):
        evaluate_checkpoint(EvaluateConfig(checkpoint=str(exported), scales=[0.0005]))


def test_a_model_of_reduced_images_is_scored_on_larger_ones_at_their_size(tiny_shards, tmp_path, capsys):
    classes = list(ShardSet.open(str(tiny_shards)).classes)
    torch.manual_seed(3)
    state = build_model(ModelConfig(), len(classes)).state_dict()
    out = write_model(state, classes, tmp_path / "export", tiny_shards, long_side=64)
    given = {"checkpoint": str(out), "loader": LoaderConfig(workers=0), "precision": "fp32"}
    default = evaluate_checkpoint(EvaluateConfig(**given))
    assert "(whole images, long side <= 64)" in capsys.readouterr().err
    assert evaluate_checkpoint(EvaluateConfig(**given, long_side=64)).confusion == default.confusion
    whole = evaluate_checkpoint(EvaluateConfig(**given, long_side=0))
    assert "(whole images)" in capsys.readouterr().err
    assert whole.confusion != default.confusion


def test_the_counts_are_those_of_a_loop_over_the_labels(tiny_shards):
    """With the resize of `evaluate` after those of the mode."""
    shards = ShardSet.open(str(tiny_shards))
    split, classes = shards.split("val"), len(shards.classes)
    torch.manual_seed(5)
    network = build_model(ModelConfig(variant="b0"), classes).eval()
    expected, seen = np.zeros((classes, classes), np.int64), []
    failures = []

    def count(batch, _logits):
        image = Normalize(MEAN, STD)(batch.images)
        size = tuple(image.shape[2:])
        small = bilinear(image, [int(side * 72 / min(size) + 0.5) for side in size])
        logits = bilinear(whole(network, small).double(), size)
        chosen, labels = logits.argmax(1).numpy().ravel(), batch.targets.numpy().ravel().astype(int)
        np.add.at(expected, (labels[labels < classes], chosen[labels < classes]), 1)
        seen.append(size)

    scores = evaluate(
        network,
        Normalize(MEAN, STD),
        split,
        LoaderConfig(workers=0),
        World(0, 0, 1, 1, torch.device("cpu")),
        num_classes=classes,
        batch_size=1,
        bf16=False,
        should_stop=lambda: False,
        on_error=failures.append,
        mode=InferenceModeConfig(short_side=72),
        on_batch=count,
    )
    assert len(seen) == 3
    assert scores is not None
    assert not failures
    # Only pixels whose best two classes are equal but for rounding may move.
    assert np.abs(np.array(scores.confusion) - expected).sum() <= 2e-4 * expected.sum()


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """(pictures, folder of shards) of a validation split with sides below 32 pixels."""
    folder, generator = tmp_path_factory.mktemp("strips"), np.random.default_rng(7)
    found = []
    for index, size in enumerate([(64, 64), (20, 64), (64, 31), (20, 64), (3, 5)]):
        gray, mask = generator.integers(0, 256, size, np.uint8), generator.integers(0, 2, size, np.uint8)
        found.append((np.stack([gray] * 3, -1), mask))
        for kind, pixels in zip(("images", "masks"), found[-1], strict=True):
            (folder / kind / "val").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / kind / "val" / f"{index}.png"), pixels)
    cfg = DatasetConfig(name="strips", image_suffix=".png", classes=["a", "b"], splits=["val"])
    write_shards(cfg, folder, folder / "shards", seed=0, samples_per_shard=8, workers=1)
    return found, folder / "shards"


def test_small_validation_images_are_scored_as_they_are_predicted(strips, tmp_path):
    found, shards = strips
    torch.manual_seed(3)
    state = build_model(ModelConfig(), 2).state_dict()
    model = write_model(state, ["a", "b"], tmp_path / "export", shards)
    predictor, expected = Predictor(model, device="cpu"), np.zeros((2, 2), np.int64)
    for image, mask in found:
        np.add.at(expected, (mask, predictor(image).mask), 1)
    scores = evaluate_checkpoint(
        EvaluateConfig(checkpoint=str(model), batch=2, loader=LoaderConfig(workers=0))
    )
    assert scores.confusion == expected.tolist()


def test_an_error_in_an_evaluation_names_the_image(strips):
    split, failures = ShardSet.open(str(strips[1])).split("val"), []
    scores = evaluate(
        build_model(ModelConfig(variant="b0"), 1),
        Normalize(MEAN, STD),
        split,
        LoaderConfig(workers=0),
        World(0, 0, 1, 1, torch.device("cpu")),
        num_classes=1,
        batch_size=1,
        bf16=False,
        should_stop=lambda: bool(failures),
        on_error=failures.append,
    )
    assert scores is None
    (message,) = map(str, failures)
    assert re.match(r"'.*val-000000.tar', key '4': the target holds labels \[1\]", message), message


def test_a_classifier_refuses_a_mode_in_one_sentence(tmp_path):
    shards = shapes.write_set(tmp_path, {"train": 3, "val": 3})
    classes = list(ShardSet.open(str(shards)).classes)
    state = build_classifier(ModelConfig(), len(classes)).state_dict()
    out = write_model(state, classes, tmp_path / "export", shards, view=[48, 56])
    with pytest.raises(ConfigError, match=r"^short_side=64, flip=True: .* is a classifier"):
        evaluate_checkpoint(EvaluateConfig(checkpoint=str(out), short_side=64, flip=True))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "whole images"),
        ({"long_side": 512}, "whole images, long side <= 512"),
        ({"short_side": 512}, "short side 512"),
        ({"window": [1024, 1024]}, "windows 1024 stride 768 (Cityscapes protocol)"),
        ({"window": [64, 96], "stride": [64, 72]}, "windows 64x96 stride 64x72"),
        ({"flip": True, "scales": [0.5, 1, 1.75]}, "whole images, flip, scales 0.5/1/1.75"),
        ({"size_divisor": 32}, "whole images, sides multiples of 32"),
    ],
)
def test_a_protocol_is_named_by_what_is_done(given, name):
    assert protocol(InferenceModeConfig(**given)) == name


def test_a_published_protocol_is_given_by_its_name():
    cfg = InferenceModeConfig(protocol="ade20k_ms", short_side=640)
    wanted = ["short_side=640", "long_side=2048", "size_divisor=32", "flip=True"]
    assert settings(cfg) == [*wanted, "scales=[0.75, 0.875, 1.0, 1.125, 1.25]"]
    for name, mode in PROTOCOLS.items():
        found = InferenceModeConfig(protocol=name.lower())
        assert found == mode
        assert protocol(found).endswith(f"({name} protocol)")
    with pytest.raises(ConfigError, match="protocol=ade is not known; use one of ade20k, ade20k_ms, "):
        InferenceModeConfig(protocol="ade")


def test_the_commands_of_the_documentation_compose():
    found = []
    for line in (ROOT / "docs/recipes.md").read_text("utf-8").splitlines():
        command, launched, arguments = line.partition("python launch/evaluate.py ")
        if launched and not command.strip():
            found.append(compose(EvaluateConfig, "evaluate", arguments.split()))
    assert [protocol(cfg).partition("(")[2] for cfg in found] == ["ADE20K protocol)", "Cityscapes protocol)"]
    assert [settings(cfg) for cfg in found] == [
        ["short_side=512", "long_side=2048", "size_divisor=32"],
        ["window=[1024, 1024]", "stride=[768, 768]"],
    ]
