"""The class layer under an explicit class map, for fine-tuning on other classes.

    class_map    target class -> class of the file whose row (weight and bias) it starts from, or None: fresh
                 {0: None, 1: 12, 2: 20}                        by index
                 {background: None, person: 12, car: "car"}     by name; the order gives the target's index

One class of the file may serve several targets; classes that no target names are left out. Fresh rows are
drawn as torch initialises the layer, uniform in +- 1 / sqrt(decoder_dim). Everything else of the model stays.

Refuses, with ConfigError: a target left out or named twice, target classes of one name, a source that the
file does not have, names where the file has none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segformer.errors import ConfigError
from segformer.models.weights.names import listed, printable

PREDICTOR = "decode_head.linear_pred"


def resolve_class_map(
    class_map: Mapping[Any, Any],
    *,
    num_classes: int,
    source_classes: Sequence[str] | None,
    target_classes: Sequence[str] | None,
) -> tuple[list[int | None], list[str] | None]:
    """A class map as (source index or None per target class, names of the target classes or None).

    Args:
        num_classes: classes of the file.
        source_classes: their names, None where the file has none.
        target_classes: names of the target classes, for a map by index, or to look its names up in.
    """
    if not isinstance(class_map, Mapping) or not class_map:
        raise ConfigError("class_map must be a mapping: target class -> class of the file, or null")
    if target_classes:
        check_distinct(target_classes, "the target")
    names: list[str] | None
    by_name = not all(isinstance(key, int) and not isinstance(key, bool) for key in class_map)
    if by_name:
        if other := [repr(key) for key in class_map if not isinstance(key, str)]:
            raise ConfigError(f"class_map: {listed(other)} is no class name; use names only or numbers only")
        targets = [str(name) for name in target_classes or class_map]
        names = targets
        by_index = {_index_of(key, targets, "the target"): value for key, value in class_map.items()}
    else:
        names = list(target_classes) if target_classes else None
        by_index = dict(class_map)
    wanted = range(len(names) if names else len(by_index))
    if missing := [str(k) for k in wanted if k not in by_index]:
        raise ConfigError(
            f"class_map leaves out target class {listed(missing)}; give each one a source or null"
        )
    if len(by_index) != len(wanted):
        raise ConfigError(f"class_map has {len(by_index)} targets, but {len(wanted)} classes are named")
    sources = [_source_of(by_index[k], num_classes, source_classes) for k in wanted]
    if names is None and source_classes:
        names = [f"class {k}" if s is None else source_classes[s] for k, s in enumerate(sources)]
    return sources, names


def check_distinct(names: Sequence[str], where: str) -> None:
    """Raise ConfigError where several classes have one name."""
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{where} has several classes named {listed(twice)}; give each its own name")


def map_classes(
    state: Mapping[str, Tensor], sources: Sequence[int | None], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The state with row k of the class layer taken from row sources[k], or drawn from `generator`."""
    out = dict(state)
    weight, bias = state[f"{PREDICTOR}.weight"], state[f"{PREDICTOR}.bias"]
    bound = 1 / math.sqrt(weight.shape[1])
    for name, rows in (("weight", weight), ("bias", bias)):
        mapped = rows.new_empty(len(sources), *rows.shape[1:]).uniform_(-bound, bound, generator=generator)
        for target, source in enumerate(sources):
            if source is not None:
                mapped[target] = rows[source]
        out[f"{PREDICTOR}.{name}"] = mapped
    return out


def _index_of(name: str, names: Sequence[str], whose: str) -> int:
    if names.count(name) > 1:
        raise ConfigError(f"class_map: {whose} has several classes named {name!r}; use numbers")
    if name not in names:
        raise ConfigError(f"class_map: {whose} has no class {name!r}; it has {_shown(names)}")
    return names.index(name)


def _source_of(value: Any, num_classes: int, classes: Sequence[str] | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        if classes is None:
            raise ConfigError(f"class_map: the file names no classes, so {value!r} is unknown; use numbers")
        return _index_of(value, classes, "the file")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
        raise ConfigError(
            f"class_map: {value!r} is no class of the file; use 0 to {num_classes - 1}, or null"
        )
    return value


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(printable, names[:8])) + more
