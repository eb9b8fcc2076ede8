"""Exports of labeling tools with one odd value: a line or a picture, never a traceback."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from writers import WRITERS, Item

from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.listing import find_samples
from segformer.data.sources.sample import inspect_sample

ODD = [None, True, -1, 0, 1e400, float("nan"), "", "x", "../x", [], {}, [[]], [None], 10**30, "\0", {"a": 1}]
WORDS = ["", "x", "-1", "nan", "1e400", "9" * 20, "1,2;3", "[1, 2]", "{}", "null", "../..", "²"]
FILES = [
    ("labelme", "train/a.json"),
    ("label_studio", "train.json"),
    ("supervisely", "train/ann/a.png.json"),
    ("supervisely", "meta.json"),
    ("cvat", "annotations.xml"),
    ("yolo", "data.yaml"),
    ("yolo", "labels/train/a.txt"),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(way for key, one in inner for way in places(one, (*place, key)))]


def odd(text: str, is_json: bool, rng: random.Random) -> str:
    """The text with one value exchanged, or (JSON) left out."""
    if not is_json:
        pattern = r'(?<=")[^"]*(?=")' if text.startswith("<") else r"[^\s:]+"
        found = rng.choice([*re.finditer(pattern, text)])
        return text[: found.start()] + rng.choice(WORDS) + text[found.end() :]
    content = json.loads(text)
    *way, last = rng.choice(places(content)[1:])
    at = content
    for key in way:
        at = at[key]
    at[last] = copy.deepcopy(rng.choice(ODD))
    if isinstance(at, dict) and rng.random() < 0.3:
        del at[last]
    return json.dumps(content)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_an_odd_value_is_a_defect_or_a_picture(name: str, file: str, tmp_path: Path) -> None:
    bitmap = np.zeros((9, 12), bool)
    bitmap[2:5, 3:8] = True
    item = Item("a", np.zeros((9, 12, 3), np.uint8), [("leaf", [[(1, 1), (9, 1), (1, 7)]]), ("leaf", bitmap)])
    WRITERS[name](tmp_path, {"train": [item]}, ["leaf"])
    text, rng = (tmp_path / file).read_text(), random.Random(file)
    cfg = DatasetConfig(splits=["train"], classes=["background", "leaf"], format=name)
    for _ in range(60):
        (tmp_path / file).write_text(odd(text, file.endswith(".json"), rng))
        samples, defects, _ = find_samples(cfg, tmp_path, "train")
        for sample in samples:
            defects += inspect_sample(cfg, sample)[1]
        assert all("\n" not in str(one) and len(str(one)) < 900 for one in defects)
        assert samples or defects
