"""Several shard sets as one: the mixture of a run, its common classes, and its samples.

    label map   class of a set -> the common classes that it may be, or ignored; one of the same name without
                being told. A common class belongs to one class of a set at most, so that the probabilities of
                a set's classes are sums of those of the common ones, and a prediction can be mapped back.
    annotated   the common classes that a set's map reaches; of the others its pixels say nothing
    sample id   that in the set's split + the samples of all sets before it (so in ledger and state)
    targets     in a batch: the first of the common classes that the label may be, 255 = ignored

Reads, crops, mosaics, pasted classes and corrupt samples stay inside a set and in its own labels. Refused:
classes that have no meaning in the common ones or have two, sets of other tasks, and what two sets disagree
on that a network has once.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.samples import Batch, Replacement, Samples, collate
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.storage import StorageConfig
from segformer.data.sources.content import override
from segformer.data.sources.dataset import ANY, IGNORE_INDEX, DatasetConfig, class_palette
from segformer.errors import ConfigError, listed, printable, within

IGNORE = "ignore"  # in a map: pixels of this class are left out
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}")


@dataclass(kw_only=True, slots=True)
class SetConfig:
    """One data set of a mixture."""

    shards: str = ""
    """Folder or URL of the shards of this set."""
    weight: float | None = None
    """Its samples are this many times as frequent as those of a set of weight 1; null is 1."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Class of this set -> the common classes that it may be, or [ignore]; a class that is not named stands
    for that of its name."""


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """Training on several data sets at once (docs/datasets.md); data.classes are the common classes."""

    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Name of a set -> its shards, weight and classes; empty = one data set, that of data.shards."""
    temperature: float = 0.0
    """Weights by size, samples^(1/temperature): 1 as if all were one set, above it more alike; 0 takes
    weight."""

    def __post_init__(self) -> None:
        within(self, "mixture.", temperature=(0, 1000))
        for name, one in self.sets.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"mixture.sets names {name!r}; use up to 32 letters, digits, '_' and '-'")
            if one.weight is not None and not 0 < one.weight <= 1e6:
                raise ConfigError(f"mixture.sets.{name}.weight={one.weight} must be above 0 and at most 1e6")
            if one.weight is not None and self.temperature:
                raise ConfigError(
                    f"mixture.sets.{name}.weight and mixture.temperature decide the same; give one of them"
                )

    @property
    def joint(self) -> bool:
        """A class of a set may be several of the common ones."""
        return any(len(names) > 1 for one in self.sets.values() for names in one.classes.values())

    def weights(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each set, whose training split has `sizes` samples."""
        if self.temperature:
            return {name: sizes[name] ** (1 / self.temperature) for name in self.sets}
        return {name: 1.0 if one.weight is None else one.weight for name, one in self.sets.items()}


@dataclass(frozen=True, slots=True)
class LabelMap:
    """What the labels of a set may be in the common classes: for each label some of these, () = ignored."""

    labels: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, key: str, given: Mapping[str, Sequence[str]], labels: Sequence[str], common: Sequence[str]
    ) -> "LabelMap":
        """The map `given` of a set with these labels; ConfigError names `key`, the setting that holds it."""
        if unknown := [label for label in given if label not in labels]:
            has = listed(labels, 30)
            raise ConfigError(f"{key} names {listed(unknown)}, which the set does not have; it has {has}")
        number, owner = {name: k for k, name in enumerate(common)}, dict[str, str]()
        groups: list[tuple[int, ...]] = []
        for label in labels:
            names = list(given.get(label, [label]))
            if names == [IGNORE]:
                groups.append(())
                continue
            missing = [name for name in names if name not in number]
            if missing or not names:
                what = f"{listed(missing)}, which data.classes does not have" if names else "no class"
                do = f"give {override(key, {label: [IGNORE]})}, or common classes in the place of {IGNORE}"
                raise ConfigError(f"{key}: {printable(label)} stands for {what}; {do}")
            for name in names:
                if name in owner:
                    both = f"{printable(owner[name])} and {printable(label)}"
                    raise ConfigError(f"{key}: {both} may both be {printable(name)}; give it to one of them")
                owner[name] = label
            groups.append(tuple(number[name] for name in names))
        if (left := sum(map(bool, groups))) < 2:
            raise ConfigError(
                f"{key} leaves {left} of {len(labels)} classes, which are nothing to tell apart; give others "
                "their common classes"
            )
        return cls(tuple(labels), tuple(groups))

    @property
    def annotated(self) -> list[int]:
        """The common classes of all labels."""
        return sorted(chain(*self.groups))

    def table(self, places: Sequence[int]) -> np.ndarray:
        """Label -> place among `places`, common classes, of the first class of its group; uint8 (256,)."""
        table = np.full(256, IGNORE_INDEX, np.uint8)
        for label, group in enumerate(self.groups):
            if group:
                table[label] = places.index(group[0])
        return table

    def folded(self, counts: Tensor) -> Tensor:
        """Counts of the annotated classes (A, A) as counts of the set's labels (L, L)."""
        belongs = self._belongs(counts)
        return belongs.T @ counts @ belongs

    def probabilities(self, common: Tensor) -> Tensor:
        """Probabilities of the common classes (B, K, H, W) as those of the set's labels (B, L, H, W), of
        which it has one everywhere; 0 for those that are ignored."""
        known = common[:, self.annotated]
        own = torch.einsum("bahw,al->blhw", known, self._belongs(common))
        return own / own.sum(1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)

    def known(self, target: Tensor) -> Tensor:
        """Labels (...) with IGNORE_INDEX for those that are ignored."""
        left = [label for label, group in enumerate(self.groups) if not group]
        return target.masked_fill(torch.isin(target, target.new_tensor(left)), IGNORE_INDEX)

    def _belongs(self, like: Tensor) -> Tensor:
        """1 where an annotated class is of a label, (A, L), of the type and device of `like`."""
        places, belongs = self.annotated, like.new_zeros(len(self.annotated), len(self.labels))
        for label, group in enumerate(self.groups):
            belongs[[places.index(k) for k in group], label] = 1
        return belongs


def common_classes(cfg: MixtureConfig, labels: Mapping[str, Sequence[str]]) -> list[str]:
    """What the labels of all sets are in common, as their maps say; in the order of sets and labels."""
    named = (
        name
        for key, one in cfg.sets.items()
        for label in labels[key]
        for name in one.classes.get(label, [label])
        if one.classes.get(label) != [IGNORE]
    )
    return list(dict.fromkeys(named))


class MixedSplit:
    """One split of all sets of a mixture, in place of a Split; `tables` are theirs, label -> target."""

    task = "segmentation"

    def __init__(
        self, parts: Mapping[str, Split], tables: Sequence[np.ndarray], class_pixels: np.ndarray
    ) -> None:
        self.names, self.parts = list(parts), list(parts.values())
        self.tables, self.class_pixels = tables, class_pixels
        self.first_ids = np.cumsum([0, *(part.num_samples for part in self.parts)])
        self.num_samples = int(self.first_ids[-1])
        self.heights = np.concatenate([part.heights for part in self.parts])
        self.widths = np.concatenate([part.widths for part in self.parts])
        self.tiled = any(part.tiled for part in self.parts)
        self.pixels = self.parts[0].pixels  # of every set

    @property
    def extent(self) -> str:
        """As Split.extent, of every set."""
        return ", ".join(f"{name} {part.extent}" for name, part in zip(self.names, self.parts, strict=True))

    def place(self, sample_id: int) -> tuple[int, int]:
        """(number of the set, sample id in it)."""
        index = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return index, sample_id - int(self.first_ids[index])

    def key(self, sample_id: int) -> str:
        """Set and key of a sample."""
        index, own = self.place(sample_id)
        return f"{self.names[index]}/{self.parts[index].key(own)}"

    def describe(self, sample_id: int) -> str:
        """As Split.describe."""
        index, own = self.place(sample_id)
        return self.parts[index].describe(own)

    def __reduce__(self) -> tuple[Callable[..., "MixedSplit"], tuple[Any, ...]]:
        addresses = [part.__reduce__() for part in self.parts]
        return _reopened, (self.names, addresses, self.tables, self.class_pixels)


def _reopened(names: list[str], addresses: list[Any], tables: Any, class_pixels: np.ndarray) -> MixedSplit:
    """As Split's: a worker opens the parts itself."""
    parts = {name: reopen(*address) for name, (reopen, address) in zip(names, addresses, strict=True)}
    return MixedSplit(parts, tables, class_pixels)


def _together(parts: Sequence[tuple[list[float] | None, list[float] | None]]) -> tuple[Any, Any]:
    """Mean and standard deviation of each channel over sets that count alike; None where ImageNet's are."""
    known = [(np.array(mean), np.array(std)) for mean, std in parts if mean and std]
    if len(known) < len(parts):
        return None, None
    mean = np.mean([mean for mean, _ in known], axis=0)
    variance = np.mean([std**2 + (own - mean) ** 2 for own, std in known], axis=0)
    return mean.tolist(), np.sqrt(variance).tolist()


class Mixture:
    """The sets of a mixture, opened; in place of a ShardSet. palette: uint8 (K, 3)."""

    task = "segmentation"

    def __init__(
        self, cfg: MixtureConfig, sets: Mapping[str, ShardSet], classes: Sequence[str], palette: np.ndarray
    ) -> None:
        """classes: the common ones. ConfigError where the sets do not fit them or each other."""
        self.cfg, self.sets, self.classes, self.palette = cfg, dict(sets), list(classes), palette
        for name, shards in sets.items():
            if shards.task != self.task:
                raise ConfigError(
                    f"mixture.sets.{name}: {shards.root} was sharded for {shards.task}; give shards for "
                    f"{self.task}"
                )
        held = {name: f"{one.channels} channels of {one.dtype}" for name, one in sets.items()}
        if len(set(held.values())) > 1:
            said = ", ".join(f"{name} {text}" for name, text in held.items())
            raise ConfigError(f"mixture.sets hold images that differ ({said}); shard them alike")
        self.maps = {
            name: LabelMap.of(f"mixture.sets.{name}.classes", cfg.sets[name].classes, shards.classes, classes)
            for name, shards in sets.items()
        }
        first = next(iter(sets.values()))
        self.channels, self.dtype = self.pixels = first.pixels
        self.mean, self.std = _together([(one.mean, one.std) for one in sets.values()])
        self._splits: dict[str, MixedSplit] = {}

    @classmethod
    def open(
        cls, cfg: MixtureConfig, data: DatasetConfig, storage: StorageConfig, *, verify: bool
    ) -> "Mixture":
        """As ShardSet.open; `data` has the common classes, or leaves them to the sets, and their colors."""
        sets = {name: ShardSet.open(one.shards, storage, verify=verify) for name, one in cfg.sets.items()}
        labels = {name: one.classes for name, one in sets.items()}
        data = replace(data, classes=list(data.classes) or common_classes(cfg, labels))
        return cls(cfg, sets, data.classes, class_palette(data))

    @property
    def digest(self) -> str:
        """The digest of every set by its name."""
        return " ".join(f"{name}:{shards.digest}" for name, shards in self.sets.items())

    @property
    def long_side(self) -> int:
        """Pixels that the long sides of larger images were reduced to: the most of all sets, 0 = none."""
        sides = [shards.long_side or 0 for shards in self.sets.values()]
        return 0 if 0 in sides else max(sides)

    @property
    def scored_classes(self) -> list[str]:
        """The own classes of every set, as "set: class"."""
        return [f"{name}: {label}" for name, shards in self.sets.items() for label in shards.classes]

    def unlabeled(self, allowed: Sequence[str]) -> list[str]:
        """Common classes that no set has, but for those that data.allow_unseen names."""
        found = set(chain(*(one.annotated for one in self.maps.values())))
        missing = [name for k, name in enumerate(self.classes) if k not in found]
        return [] if ANY in allowed else [name for name in missing if name not in allowed]

    def split(self, name: str) -> MixedSplit:
        """A split of every set."""
        if name not in self._splits:
            parts = {key: shards.split(name) for key, shards in self.sets.items()}
            tables = [one.table(range(len(self.classes))) for one in self.maps.values()]
            self._splits[name] = MixedSplit(parts, tables, self._pixels(parts))
        return self._splits[name]

    def _pixels(self, parts: Mapping[str, Split]) -> np.ndarray:
        """Pixels of each common class (K,) in as many samples as there are, drawn by the sets' weights."""
        sizes = {name: part.num_samples for name, part in parts.items()}
        weights, pixels = self.cfg.weights(sizes), np.zeros(len(self.classes))
        for name, part in parts.items():
            factor = weights[name] / sum(weights.values()) * sum(sizes.values()) / max(1, sizes[name])
            for group, count in zip(self.maps[name].groups, part.class_pixels, strict=True):
                if group:
                    pixels[group[0]] += factor * count
        return pixels.round().astype(np.int64)


class MixedSamples:
    """Samples of a mixture; each set has its own reader, crop and budget, and its own random numbers."""

    def __init__(
        self, split: MixedSplit, augment: AugmentConfig, *, seeds: Sequence[int], budgets: Sequence[int]
    ) -> None:
        self.split = split
        self.sets = [
            Samples(part, augment, seed=seed, budget=budget, table=table)
            for part, seed, budget, table in zip(split.parts, seeds, budgets, split.tables, strict=True)
        ]

    def batch(self, plan: list[tuple[int, int]]) -> Batch:
        """As Samples.batch; the targets are common classes."""
        places = [self.split.place(sample_id) for sample_id, _ in plan]
        for index, samples in enumerate(self.sets):
            samples.reader.fetch(own for owner, own in places if owner == index)
        batch = collate(list(self._drawn(plan, places)))
        batch.sets = torch.tensor([index for index, _ in places])
        return batch

    def _drawn(self, plan: list[tuple[int, int]], places: list[tuple[int, int]]) -> Iterator[Any]:
        for (sample_id, epoch), (index, own) in zip(plan, places, strict=True):
            sample = self.sets[index].sample(own, epoch)
            first = sample_id - own
            sample.sample_id = sample_id
            sample.replaced = [Replacement(first + one.sample_id, one.reason) for one in sample.replaced]
            yield sample
