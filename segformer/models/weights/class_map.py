"""The class layer under an explicit class map, for fine-tuning on other classes.

    class_map    target class -> class of the file whose row (weight and bias) it starts from, or None: fresh
                 {0: None, 1: 12, 2: 20}                        by index
                 {background: None, person: 12, car: "car"}     by name; the order gives the target's index

One class of the file may serve several targets; classes that no target names are left out. Fresh rows are
drawn as torch initializes the layer, uniform in +- 1 / sqrt(decoder_dim). Everything else of the model stays.

Refuses, with ConfigError: a target left out or named twice, target classes of one name, a source that the
file does not have, names where the file has none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from segformer.errors import ConfigError, listed
from segformer.models.variants import HEADS
from segformer.models.weights.bundle import Weights


def map_classes(
    weights: Weights,
    class_map: Mapping[Any, Any],
    *,
    target_classes: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> Weights:
    """The model with its class layer resized by `class_map`; fresh rows are drawn from `generator`.

    `target_classes` are the names of the target classes, for a map by index, or to look its names up in.
    """
    if weights.arch.kind != "segmentation":
        raise ConfigError(f"class_map: {weights.source} has no segmentation head ({weights.arch.kind})")
    sources, names = resolve_class_map(
        class_map, weights.arch.num_classes, weights.metadata.classes, target_classes
    )
    state, layer = dict(weights.state), f"decode_head.{HEADS[weights.arch.head]}"
    bound = 1 / math.sqrt(state[f"{layer}.weight"].shape[1])
    for name in (f"{layer}.weight", f"{layer}.bias"):
        rows = state[name]
        mapped = rows.new_empty(len(sources), *rows.shape[1:]).uniform_(-bound, bound, generator=generator)
        for target, source in enumerate(sources):
            if source is not None:
                mapped[target] = rows[source]
        state[name] = mapped
    return replace(
        weights,
        state=state,
        arch=replace(weights.arch, num_classes=len(sources)),
        metadata=replace(weights.metadata, classes=names, palette=[], view=[]),
        provenance={},
    )


def resolve_class_map(
    class_map: Mapping[Any, Any], num_classes: int, source_classes: Sequence[str], targets: Sequence[str] = ()
) -> tuple[list[int | None], list[str]]:
    """A class map as (source index or None per target class, names of the target classes; [] without).

    Args:
        num_classes: classes of the file.
        source_classes: their names; empty where the file has none.
        targets: names of the target classes, or none.
    """
    if not isinstance(class_map, Mapping) or not class_map:
        raise ConfigError("class_map must be a mapping: target class -> class of the file, or null")
    check_distinct(targets, "the target")
    names, by_index = list(targets), dict(class_map)
    if not all(isinstance(key, int) and not isinstance(key, bool) for key in class_map):
        if other := [repr(key) for key in class_map if not isinstance(key, str)]:
            raise ConfigError(f"class_map: {listed(other)} is no class name; use names only or numbers only")
        names = [str(name) for name in targets or class_map]
        by_index = {_index_of(key, names, "the target"): value for key, value in class_map.items()}
    wanted = range(len(names) or len(by_index))
    if missing := [str(k) for k in wanted if k not in by_index]:
        raise ConfigError(
            f"class_map leaves out target class {listed(missing)}; give each one a source or null"
        )
    if len(by_index) != len(wanted):
        raise ConfigError(f"class_map has {len(by_index)} targets, but {len(wanted)} classes are named")
    sources = [_source_of(by_index[k], num_classes, source_classes) for k in wanted]
    if not names and source_classes:
        names = [f"class {k}" if s is None else source_classes[s] for k, s in enumerate(sources)]
    return sources, names


def check_distinct(names: Sequence[str], where: str) -> None:
    """Raise ConfigError where several classes have one name."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{where} has several classes named {listed(twice)}; give each its own name")


def _index_of(name: str, names: Sequence[str], whose: str) -> int:
    if names.count(name) > 1:
        raise ConfigError(f"class_map: {whose} has several classes named {name!r}; use numbers")
    if name not in names:
        raise ConfigError(f"class_map: {whose} has no class {name!r}; it has {listed(names)}")
    return names.index(name)


def _source_of(value: Any, num_classes: int, classes: Sequence[str]) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not classes:
            raise ConfigError(f"class_map: the file names no classes, so {value!r} is unknown; use numbers")
        return _index_of(value, classes, "the file")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
        raise ConfigError(
            f"class_map: {value!r} is no class of the file; use 0 to {num_classes - 1}, or null"
        )
    return value
