"""Tasks: all that differs between segmentation and classification.

    Segmentation      image -> the class of every pixel    SegFormer, SegmentationLoss, scored by mIoU
    Classification    image -> its class                   MiTClassifier, cross entropy with mixed targets
                                                           (losses.py), scored by top-1

A task builds the network, turns a batch into a loss, and scores a model; the loop (loop.py) knows no more of
it. Refuses shards of another task than data.task, and settings that mean nothing for the task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from segformer.data.loading.classification import ClassificationAugment, mix
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.mixture import LabelMap, Mixture
from segformer.data.loading.photometric import Normalize
from segformer.data.loading.samples import Batch
from segformer.data.loading.workers import print_line
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.index import image_sums
from segformer.data.sources.content import Histogram, Labels, check_content, other_classes, override
from segformer.data.sources.dataset import RGB
from segformer.data.sources.division import same_bytes
from segformer.distributed.engine import check_extra, resolve_precision
from segformer.distributed.world import World
from segformer.errors import ConfigError, DataError, SegformerError, listed
from segformer.evaluation.drawing import Gallery
from segformer.evaluation.evaluate import evaluate_labels, mode_of, protocol_of
from segformer.evaluation.metrics import SCORES, Scores, SegmentationScores
from segformer.models.ops.backend import BACKENDS
from segformer.models.segformer import MiTClassifier, SegFormer, build_classifier, build_model
from segformer.models.variants import LEAST_SIDE, ModelConfig
from segformer.training.config import RunConfig
from segformer.training.losses import LossConfig, SegmentationLoss, check_terms, soft_cross_entropy
from segformer.training.partial_labels import PartialLabels, check_partial


class _Task:
    """What the tasks have in common; one object serves all steps."""

    view: ClassificationAugment | None = None
    "How images are cut for evaluation; None = whole."

    def __init__(
        self,
        cfg: RunConfig,
        shards: ShardSet | Mixture,
        world: World,
        augment: AugmentConfig | ClassificationAugment,
    ) -> None:
        self.cfg, self.shards, self.augment = cfg, shards, augment
        self.num_classes = len(shards.classes)
        self.mean, self.std = normalization(cfg, shards)
        self.normalize = Normalize(self.mean, self.std).to(world.device)

    @property
    def scored_classes(self) -> list[str]:
        """Names of the classes whose scores an evaluation has; of a mixture those of each set."""
        return self.shards.classes if isinstance(self.shards, ShardSet) else self.shards.scored_classes

    @property
    def protocol(self) -> str:
        """How an evaluation shows images to the model."""
        sets = [self.shards] if isinstance(self.shards, ShardSet) else self.shards.sets.values()
        modes = [mode_of(one.split(self.cfg.eval_split)) for one in sets]
        return ", ".join(dict.fromkeys(protocol_of(self.view, mode) for mode in modes))

    def evaluate(
        self,
        model: Any,
        world: World,
        *,
        should_stop: Callable[[], bool],
        on_error: Callable[[SegformerError], None],
        warn: Callable[[str], None] = print_line,
        pictures: int = 0,
        advance: Callable[[int], None] = lambda images: None,
    ) -> Scores | None:
        """Scores on the evaluation split, None where `should_stop` answered True; all ranks. See evaluate.py.

        pictures: validation images to draw with target and prediction (scores.pictures); segmentation only.
        advance: gets how many images more the ranks have scored.
        """
        count = pictures if world.is_main and self.view is None else 0

        def scored(split: Split, labels: LabelMap | None, palette: np.ndarray, count: int) -> Scores | None:
            gallery = Gallery(split.key, palette, count)

            def counted(batch: Batch, logits: Tensor) -> None:
                gallery.add(batch, logits)
                advance(len(batch.targets) * world.size)

            scores = evaluate_labels(
                model,
                self.normalize,
                split,
                self.cfg.loader,
                world,
                num_classes=self.num_classes,
                batch_size=self.cfg.eval_batch,
                bf16=resolve_precision(self.cfg.engine, world.device) == "bf16",
                should_stop=should_stop,
                on_error=on_error,
                view=self.view,
                labels=labels,
                ops=BACKENDS[self.cfg.model.ops],
                on_batch=counted,
                warn=warn,
            )
            if scores is not None:
                scores.pictures = gallery.pictures
            return scores

        shards, name = self.shards, self.cfg.eval_split
        if isinstance(shards, ShardSet):
            return scored(shards.split(name), None, shards.palette, count)
        found: dict[str, SegmentationScores] = {}
        for key, one in shards.sets.items():
            labels = shards.maps[key]
            each = -(-count // len(shards.sets))
            scores = scored(one.split(name), labels, shards.palette[labels.annotated], each)
            if not isinstance(scores, SegmentationScores):
                return None
            found[key] = scores
        return SegmentationScores.together(found)


class Segmentation(_Task):
    """A class for every pixel."""

    name = "segmentation"

    def __init__(self, cfg: RunConfig, shards: ShardSet | Mixture, world: World) -> None:
        super().__init__(cfg, shards, world, cfg.augment)
        criterion = SegmentationLoss(cfg.loss, self.num_classes, BACKENDS[cfg.model.ops])
        self.criterion = criterion.to(world.device)
        maps = list(shards.maps.values()) if isinstance(shards, Mixture) else []
        self.partial = PartialLabels(maps, self.num_classes).to(world.device)

    def build_model(self, network: ModelConfig) -> SegFormer:
        """The network, with random weights or those of `network.pretrained`."""
        return build_model(replace(network, in_channels=self.shards.channels), self.num_classes)

    def inputs(self, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
        """What the network gets, normalized (B, C, h, w), and what it is to say, (B, h, w) class ids."""
        return self.normalize(batch.images, batch.photometric, batch.valid), batch.targets

    def loss(self, model: Any, batch: Batch, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss with gradient, the terms of loss.terms, unweighted and without) of one micro batch.

        position: number of the micro batch, counted over all ranks and steps; it seeds what is random.
        """
        images, targets = self.inputs(batch, position)
        logits = model(images)
        if batch.sets is not None:
            logits = self.partial(logits, batch.sets, (targets.shape[1], targets.shape[2]))
        return self.criterion(logits, targets)


class Classification(_Task):
    """A class for every image."""

    name = "classification"

    def __init__(self, cfg: RunConfig, shards: ShardSet | Mixture, world: World) -> None:
        super().__init__(cfg, shards, world, cfg.classification)
        self.view = cfg.classification

    def build_model(self, network: ModelConfig) -> MiTClassifier:
        """The network, as that of Segmentation."""
        return build_classifier(replace(network, in_channels=self.shards.channels), self.num_classes)

    def inputs(self, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
        """As that of Segmentation, after mixup, cutmix and label smoothing; targets are shares (B, K)."""
        images, settings = self.normalize(batch.images), self.cfg.classification
        return mix(images, batch.targets, self.num_classes, settings, self.cfg.seed, position)

    def loss(self, model: Any, batch: Batch, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As that of Segmentation."""
        images, targets = self.inputs(batch, position)
        loss = soft_cross_entropy(model(images), targets)
        return loss, {"cross_entropy": loss.detach()}


Task = Segmentation | Classification


def make_task(cfg: RunConfig, shards: ShardSet | Mixture, world: World) -> Task:
    """The task of the shards; ConfigError where `cfg` is for another one."""
    check_task(cfg, shards)
    return (Segmentation if shards.task == "segmentation" else Classification)(cfg, shards, world)


def open_shards(cfg: RunConfig, *, verify: bool = True) -> ShardSet | Mixture:
    """The shards of the run, checked against its configuration; `verify` as in ShardSet.open."""
    shards: ShardSet | Mixture
    if cfg.mixture.sets:
        shards = Mixture.open(cfg.mixture, cfg.data, cfg.loader.storage, verify=verify)
    else:
        shards = _open_set(cfg, verify)
    if cfg.model.num_classes not in (None, len(shards.classes)):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}, but {_place(cfg)} has {len(shards.classes)} "
            "classes; leave model.num_classes null"
        )
    if cfg.model.in_channels not in (None, shards.channels):
        raise ConfigError(
            f"model.in_channels={cfg.model.in_channels}, but the images of {_place(cfg)} have "
            f"{shards.channels} channels; leave model.in_channels null"
        )
    normalization(cfg, shards)
    for split in (cfg.train_split, cfg.eval_split):
        shards.split(split)
    return shards


def _place(cfg: RunConfig) -> str:
    return cfg.data.shards or "the mixture"


def normalization(cfg: RunConfig, shards: ShardSet | Mixture) -> tuple[list[float], list[float]]:
    """Mean and std of the channels: those of the settings, or of the shards where they hold other images than
    8-bit RGB and the settings have ImageNet's, which are of that."""
    group = "augment" if shards.task == "segmentation" else "classification"
    settings, usual = getattr(cfg, group), AugmentConfig()
    mean, std = list(settings.mean), list(settings.std)
    if shards.mean and shards.std and (mean, std) == (usual.mean, usual.std):
        return shards.mean, shards.std
    if len(mean) != shards.channels:
        raise ConfigError(
            f"{group}.mean has {len(mean)} values, but the images of {_place(cfg)} have "
            f"{shards.channels} channels; give {shards.channels} values of {group}.mean and {group}.std, or "
            "leave them out"
        )
    return mean, std


def _open_set(cfg: RunConfig, verify: bool) -> ShardSet:
    source = f"data={cfg.data.name or '<name>'}{'' if cfg.data.root else ' root=<folder>'}"
    shards = ShardSet.open(cfg.data.shards, cfg.loader.storage, verify=verify, source=source)
    if cfg.data.classes and list(cfg.data.classes) != list(shards.classes):
        raise ConfigError(other_classes(cfg.data.classes, shards.classes, cfg.data.shards))
    return shards


def check_task(cfg: RunConfig, shards: ShardSet | Mixture) -> None:
    """ConfigError where data.task is not that of the shards, or images and normalization don't fit."""
    if cfg.data.task != shards.task:
        raise ConfigError(
            f"data.task={cfg.data.task}, but {_place(cfg)} was sharded for {shards.task}; give the shards "
            f"of this data set, or data.task={shards.task}"
        )
    if shards.task == "classification" and shards.pixels != RGB:
        raise ConfigError(
            f"the images of {cfg.data.shards} are {shards.pixels}; a classifier is trained on {RGB} (RGB)"
        )


def _check_loss(cfg: RunConfig) -> None:
    if cfg.data.task == "segmentation":
        check_terms(cfg.loss)
        return
    terms = cfg.loss.terms in ({}, {"cross_entropy": 1})
    weighted = cfg.loss.class_weights or cfg.loss.class_weighting
    plain = terms and not weighted and cfg.loss.label_smoothing == LossConfig().label_smoothing
    if not plain:
        raise ConfigError(
            "loss has other terms, class weights or smoothing, which are of segmentation: a classifier "
            "learns by cross entropy; leave loss out, and use classification.label_smoothing"
        )


def check_data(cfg: RunConfig, shards: ShardSet | Mixture) -> None:
    """DataError where the shards hold nothing to learn, or nothing to score but what is trained on; a
    ConfigError where the loss has no meaning for the labels of a mixture."""
    if isinstance(shards, ShardSet):
        return _check_set(cfg, shards)
    check_partial(cfg.loss, list(shards.maps.values()), len(shards.classes))
    if unlabeled := shards.unlabeled(cfg.data.allow_unseen):
        raise ConfigError(
            f"data.classes has {listed(unlabeled)}, which no set of the mixture labels; leave it out, or "
            f"allow it with {override('data.allow_unseen', unlabeled)}"
        )
    for one in shards.sets.values():
        _check_set(cfg, one)


def _check_set(cfg: RunConfig, shards: ShardSet) -> None:
    labels, names = Labels.of(shards.content, cfg.data), dict.fromkeys((cfg.train_split, cfg.eval_split))
    held = {name: Histogram.of(shards.content["splits"][name]) for name in names}
    check_content(labels, held, [cfg.train_split], cfg.eval_split)
    if list(labels.image_range) != list(cfg.data.image_range):  # predict scales pictures by the run's own
        take = override("data.image_range", labels.image_range)
        raise ConfigError(f"{shards.root} was sharded with another data.image_range; give {take}")
    splits = [shards.split(name) for name in names]
    sums = [image_sums(split.records) for split in splits]
    if np.isin(sums[-1], sums[0]).all():
        keys = [dict(zip(found.tolist(), s.keys, strict=True)) for found, s in zip(sums, splits, strict=True)]
        for shared in same_bytes(
            labels.allow_duplicates, dict(zip(names, keys, strict=True)), [cfg.train_split]
        ):
            raise DataError(shared.text)


def training_crop(cfg: RunConfig) -> tuple[int, int]:
    """Height and width of what the model sees in training, pixels."""
    side = cfg.classification.size
    return (side, side) if cfg.data.task == "classification" else (cfg.augment.crop[0], cfg.augment.crop[1])


def crop_key(cfg: RunConfig) -> str:
    """The setting that decides `training_crop`."""
    return "classification.size" if cfg.data.task == "classification" else "augment.crop"


def check_settings(cfg: RunConfig) -> None:
    """What can be said of settings without data, on this machine; doctor, --check and every start ask it.

    Raises:
        ConfigError: crops that no network takes, no loss or one that a classifier can't have, a score to stop
            by that the task has not, a tracker that is not set up, keys that DeepSpeed refuses.
    """
    if min(training_crop(cfg)) < LEAST_SIDE:
        crop = training_crop(cfg)
        raise ConfigError(f"{crop_key(cfg)}: crops of {crop}; the encoder needs {LEAST_SIDE} pixels a side")
    _check_loss(cfg)
    names = SCORES[cfg.data.task].NAMES
    if cfg.early_stop.metric not in (None, *names):
        raise ConfigError(
            f"early_stop.metric={cfg.early_stop.metric} is no score of {cfg.data.task}; use one of "
            f"{', '.join(names)}"
        )
    cfg.telemetry.check_trackers()
    check_extra(cfg.engine)
