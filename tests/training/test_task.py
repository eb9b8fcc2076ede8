"""Losses and scores of both tasks against independent computations, and the settings that are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import nn

from segformer.data.loading.samples import Batch
from segformer.data.shards.format import ShardSet
from segformer.data.sources.dataset import Pixels
from segformer.distributed.world import World
from segformer.errors import ConfigError, DataError
from segformer.evaluation.drawing import LINE
from segformer.evaluation.metrics import ClassificationScores
from segformer.training.config import RunConfig, compose
from segformer.training.task import (
    Task,
    check_settings,
    check_task,
    make_task,
    normalization,
    training_crop,
)

WORLD = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
CLASSIFY = ("data=folder", "data.task=classification", "classification.size=48", "loader.workers=0")


@pytest.fixture(scope="module")
def class_shards(tmp_path_factory):
    """12 training and 11 validation pictures of three shapes."""
    return ShardSet.open(shapes.write_set(tmp_path_factory.mktemp("shapes"), {"train": 12, "val": 11}))


def configure(shards: ShardSet | Path, *overrides: str) -> RunConfig:
    place = shards.root if isinstance(shards, ShardSet) else shards
    return compose(RunConfig, "config", [*overrides, f"data.shards={place}"])


def classification(shards: ShardSet, *overrides: str) -> Task:
    return make_task(configure(shards, *CLASSIFY, *overrides), shards, WORLD)


def segmentation(shards: Path, *overrides: str) -> Task:
    cfg = configure(shards, "data=sample", "loader.workers=0", *overrides)
    return make_task(cfg, ShardSet.open(shards), WORLD)


def images(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def evaluate(task: Task, model: nn.Module, **options: Any) -> Any:
    return task.evaluate(model, WORLD, should_stop=lambda: False, on_error=pytest.fail, **options)


class Linear(nn.Module):
    """Logits (B, K) that depend on every pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = torch.randn(3, 3 * 48 * 48)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1) @ self.weight.t()


def test_the_loss_of_classification_is_the_cross_entropy_of_torch(class_shards):
    task, model = classification(class_shards, "classification.label_smoothing=0.1"), Linear()
    pixels, labels = images(4, 48), torch.tensor([0, 2, 1, 2])
    loss, parts = task.loss(model, Batch(pixels, labels, labels), 0)
    normal = (pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    expected = F.cross_entropy(model(normal), labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts.keys() == {"cross_entropy"}
    assert not parts["cross_entropy"].requires_grad


def test_mixup_blends_images_and_targets_alike_and_follows_the_position(class_shards):
    task, model = classification(class_shards, "classification.mixup=0.8"), Linear()
    pixels, labels = images(2, 48), torch.tensor([0, 2])
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, given, logits: seen.append(given[0]))
    batch = Batch(pixels, labels, labels)
    losses = [task.loss(model, batch, position)[0].item() for position in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]
    normal = (pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    other = normal.roll(1, 0)
    kept = (((seen[0] - other) * (normal - other)).sum() / (normal - other).square().sum()).item()
    assert torch.allclose(seen[0], kept * normal + (1 - kept) * other, atol=1e-4)
    target = kept * F.one_hot(labels, 3) + (1 - kept) * F.one_hot(labels.roll(1), 3)
    assert losses[0] == pytest.approx(F.cross_entropy(model(seen[0]), target).item(), rel=1e-4)


def test_the_loss_of_segmentation_is_the_cross_entropy_of_torch_over_all_pixels(tiny_shards):
    task = segmentation(tiny_shards)
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 4, stride=4)
    pixels, masks = images(2, 32), torch.randint(0, 2, (2, 32, 32), dtype=torch.uint8)
    masks[0, :5] = 255
    loss, parts = task.loss(network, Batch(pixels, masks, torch.arange(2)), 0)
    logits = network((pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1))
    enlarged = F.interpolate(logits, (32, 32), mode="bilinear")
    total = F.cross_entropy(enlarged, masks.long(), ignore_index=255, reduction="sum")
    assert loss.item() == pytest.approx(total.item() / masks.numel(), rel=1e-5)
    assert list(parts) == ["cross_entropy"]


def test_top_1_is_that_of_a_loop_over_the_pictures(class_shards, tmp_path):
    root = shapes.write_folders(tmp_path, {"train": 12, "val": 11})
    task, model = classification(class_shards, "classification.eval_resize=48", "eval_batch=4"), Linear()
    hits = dict.fromkeys(shapes.CLASSES, 0)
    for path in sorted((root / "val").rglob("*.png")):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        size = (round(width * 48 / min(height, width)), round(height * 48 / min(height, width)))
        view = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        top, left = (view.shape[0] - 48) // 2, (view.shape[1] - 48) // 2
        pixels = torch.from_numpy(view[top : top + 48, left : left + 48].astype(np.float32))
        logits = model(((pixels - MEAN) / STD).permute(2, 0, 1)[None])
        hits[path.parent.name] += int(logits.argmax()) == shapes.CLASSES.index(path.parent.name)
    scores = evaluate(task, model)
    assert isinstance(scores, ClassificationScores)
    assert [row[1] for row in scores.counts] == [hits[name] for name in shapes.CLASSES]
    assert scores.top1 == scores.score == sum(hits.values()) / 11
    assert model.training, "left as it came"


def test_three_ranks_count_as_one_does_and_make_equally_many_forwards(class_shards, run_ranks):
    """11 images: a rank alone has batches of 4, 4 and 3; three ranks have 4, 4 and 3 batches of one."""
    task = classification(class_shards, "classification.eval_resize=56", "eval_batch=4")
    torch.manual_seed(0)
    alone = evaluate(task, task.build_model(task.cfg.model)).to_dict()
    for output in run_ranks(3, "tests/evaluation/score_ranks.py", str(class_shards.root), "1"):
        assert json.loads(output.strip().splitlines()[-1])["counts"] == alone["counts"]
    assert [images for images, *_ in alone["counts"]] == [4, 4, 3]


def test_pictures_show_image_target_and_prediction_of_the_first_images(tiny_shards):
    task = segmentation(tiny_shards)
    torch.manual_seed(0)
    scores = evaluate(task, nn.Conv2d(3, 2, 4, stride=4), pictures=2)
    assert len(scores.pictures) == 2
    for key, picture in scores.pictures.items():
        source = cv2.imread(f"data_prep/sample/images/val/{key}.jpg")[..., ::-1]
        panel = (picture.shape[1] - 2 * LINE) // 3
        small = cv2.resize(source, (panel, picture.shape[0]), interpolation=cv2.INTER_AREA)
        assert np.abs(picture[:, :panel].astype(int) - small).mean() < 3
    assert evaluate(task, nn.Conv2d(3, 2, 4, stride=4)).pictures == {}


def test_a_label_that_the_model_does_not_have_is_reported_and_not_raised(class_shards):
    task = classification(class_shards)
    task.num_classes, model = 2, Linear()
    model.weight = model.weight[:2]
    errors: list[DataError] = []
    scores = task.evaluate(model, WORLD, should_stop=lambda: bool(errors), on_error=errors.append)
    assert scores is None
    assert "but the model has 2 classes" in str(errors[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=folder", "data.task=segmentation", "data.classes=[a,b,c]"], "sharded for classification"),
        ([*CLASSIFY, "loss.label_smoothing=0.1"], "use classification.label_smoothing"),
        ([*CLASSIFY, "loss.terms={dice: 1.0}"], "loss has other terms"),
        ([*CLASSIFY, "loss.class_weights=[1,2,3]"], "loss has other terms"),
    ],
)
def test_settings_of_another_task_are_refused(class_shards, overrides, message):
    def start():
        cfg = configure(class_shards, *overrides)
        check_settings(cfg)
        make_task(cfg, class_shards, WORLD)

    with pytest.raises(ConfigError, match=message):
        start()


def test_the_crop_of_each_task(class_shards, tiny_shards):
    assert training_crop(configure(class_shards, *CLASSIFY)) == (48, 48)
    assert training_crop(configure(tiny_shards, "data=sample", "augment.crop=[64,96]")) == (64, 96)


def described(channels: int, dtype: str, task: str = "segmentation") -> Any:
    """What a task asks of shards of these images, whose mean and std are 7 and 2 in every channel."""
    values = (None, None) if (channels, dtype) == (3, "uint8") else ([7.0] * channels, [2.0] * channels)
    return SimpleNamespace(
        task=task, channels=channels, pixels=Pixels(channels, dtype), mean=values[0], std=values[1]
    )


def test_the_normalization_is_that_of_the_settings_or_else_of_shards_that_are_no_colors() -> None:
    cfg = compose(RunConfig, "config", ["data.shards=x"])
    np.testing.assert_allclose(normalization(cfg, described(3, "uint8")), torch.stack([MEAN, STD]))
    for channels, dtype in ((5, "uint16"), (3, "float32"), (1, "uint8")):
        assert normalization(cfg, described(channels, dtype)) == ([7.0] * channels, [2.0] * channels)
    own = compose(RunConfig, "config", ["data.shards=x", "augment.mean=[1,2]", "augment.std=[3,4]"])
    assert normalization(own, described(2, "uint16")) == ([1.0, 2.0], [3.0, 4.0])
    with pytest.raises(ConfigError, match=r"augment\.mean has 2 values, but the images of x have 5 channels"):
        normalization(own, described(5, "uint16"))
    with pytest.raises(ConfigError, match="have 3 channels; give 3 values"):
        normalization(own, described(3, "uint8"))


def test_a_classifier_takes_colors_alone() -> None:
    cfg = compose(RunConfig, "config", ["data.shards=x", "data=folder", "data.task=classification"])
    with pytest.raises(ConfigError, match=r"images of x are 4 x uint8; a classifier is trained on 3 x uint8"):
        check_task(cfg, described(4, "uint8", "classification"))
