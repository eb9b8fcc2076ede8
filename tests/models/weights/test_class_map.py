"""Class maps: which row becomes which, and the maps that make no sense."""

import math
from typing import Any

import pytest
import torch

from segformer.errors import ConfigError
from segformer.models.weights.bundle import Arch, Weights
from segformer.models.weights.class_map import map_classes, resolve_class_map

PREDICTOR = "decode_head.linear_pred"

NAMES = ["wall", "sky", "car", "person", "car"]


def resolve(class_map: Any, source: list[str] | None = NAMES, target: list[str] | None = None) -> Any:
    return resolve_class_map(class_map, 5, source or [], target or ())


@pytest.mark.parametrize(
    ("class_map", "target", "sources", "names"),
    [
        ({0: 3, 1: 0, 2: 1, 3: 2, 4: 4}, None, [3, 0, 1, 2, 4], ["person", "wall", "sky", "car", "car"]),
        ({1: 3, 0: None}, None, [None, 3], ["class 0", "person"]),
        ({0: None, 1: "person", 2: 3}, ["other", "man", "woman"], [None, 3, 3], ["other", "man", "woman"]),
        ({"other": None, "man": "person", "air": 1}, None, [None, 3, 1], ["other", "man", "air"]),
        ({"man": 3, "other": None}, ["other", "man"], [None, 3], ["other", "man"]),
    ],
    ids=["permuted", "out of order", "one source twice", "by name", "by name in a given order"],
)
def test_targets_get_the_sources_that_the_map_says(
    class_map: dict[Any, Any], target: list[str] | None, sources: list[int | None], names: list[str]
) -> None:
    assert resolve(class_map, target=target) == (sources, names)


def test_without_names_in_the_file_a_map_by_number_gives_none() -> None:
    assert resolve({0: 1, 1: None}, source=None) == ([1, None], [])


@pytest.mark.parametrize(
    ("class_map", "options", "message"),
    [
        ({}, {}, "must be a mapping"),
        ([0, 1], {}, "must be a mapping"),
        ({0: 1, 2: 3}, {}, "leaves out target class 1"),
        ({0: 5}, {}, "5 is no class of the file; use 0 to 4, or null"),
        ({0: -1}, {}, "-1 is no class of the file"),
        ({0: True}, {}, "True is no class of the file"),
        ({0: 1.0}, {}, r"1\.0 is no class of the file"),
        ({True: 0}, {}, "True is no class name"),
        ({0: 1, "sky": 1}, {}, "0 is no class name; use names only or numbers only"),
        ({0: "tree"}, {}, "the file has no class 'tree'; it has wall, sky"),
        ({0: "car"}, {}, "the file has several classes named 'car'; use numbers"),
        ({0: "sky"}, {"source": None}, "the file names no classes"),
        ({"a": 0}, {"target": ["a", "b"]}, "leaves out target class 1"),
        ({"c": 0}, {"target": ["a", "b"]}, "the target has no class 'c'; it has a, b"),
        ({0: 1, 1: 2, 2: 3}, {"target": ["a", "b"]}, "has 3 targets, but 2 classes are named"),
        (
            {0: 0, 1: 1, 2: 2},
            {"target": ["a", "b", "a"]},
            "several classes named a; give each its own",
        ),
    ],
)
def test_maps_that_make_no_sense_are_refused(class_map: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(class_map, **options)
    assert "\n" not in str(caught.value)


def test_rows_are_copied_exactly_and_fresh_ones_drawn_as_torch_initializes_the_layer() -> None:
    state = {
        f"{PREDICTOR}.weight": torch.randn(5, 400, 1, 1),
        f"{PREDICTOR}.bias": torch.randn(5),
        "backbone.norm1.weight": torch.randn(3),
    }
    weights = Weights(state=state, arch=Arch(variant="b0", kind="segmentation", num_classes=5))
    mapped = map_classes(weights, dict(enumerate([3, None, 0, 3])), generator=torch.Generator())
    assert mapped.arch.num_classes == 4
    out = mapped.state
    weight, bias = out[f"{PREDICTOR}.weight"], out[f"{PREDICTOR}.bias"]
    for target, source in ((0, 3), (2, 0), (3, 3)):
        assert torch.equal(weight[target], state[f"{PREDICTOR}.weight"][source])
        assert torch.equal(bias[target], state[f"{PREDICTOR}.bias"][source])
    bound = 1 / math.sqrt(400)
    assert max(weight[1].abs().max(), abs(bias[1])) <= bound
    assert weight[1].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert out["backbone.norm1.weight"] is state["backbone.norm1.weight"]
