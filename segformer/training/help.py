"""The text of --help: usage, what can be chosen, the keys to begin with, then every key with value and type.

An explanation is the string below a field of the dataclass, which Python drops: it is read from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from segformer.training.overrides import kind

WIDTH = 80
_SHOWN = 48  # characters of a value
FIRST = (
    *("name", "data.shards", "data.classes", "model.pretrained", "epochs", "steps", "global_batch"),
    *("optim.lr", "augment.crop", "eval_every", "stop_at", "early_stop.patience", "engine.precision"),
    *("loader.workers", "telemetry.wandb"),
)
"""What most training runs set; shown before everything else by the commands that have them."""
FIRST_NAMES = {
    "experiment": ("scratch", "Recipe; scratch and finetune are sized from the data and the device"),
    "data": ("folder", "Data set: a file of conf/data, or of your own --conf folder"),
}
"""What most runs choose by name before any key: group -> a usual name, what it is."""


def help_text(schema: type[Any], values: dict[str, Any], usage: str, choices: dict[str, list[str]]) -> str:
    """The help of a command: `usage` first, then names by group, then the keys of `schema`."""
    for key in values.get("auto", []):  # what stands there is not what the run will have
        *groups, name = key.split(".")
        functools.reduce(dict.__getitem__, groups, values)[name] = "sized"
    lines = [usage, "", "--check looks at the settings and does nothing else."]
    lines += ["--conf <folder> adds files of your own: <folder>/data/mine.yaml is data=mine."]
    if choices:
        lines += ["", "NAMES, to be chosen by group=name"]
        for group, names in choices.items():
            lines += _wrapped(", ".join(names) or "none yet", f"  {group:<11} ", " " * 14)
    leaves = {key: (value, text) for key, value, text in _leaves(schema, values)}
    if set(FIRST) <= leaves.keys():
        lines += ["", "KEYS TO BEGIN WITH; all others follow and may stay as they are"]
        for group, (name, text) in FIRST_NAMES.items():
            lines += _wrapped(text, f"{f'  {group}={name}':30} ", " " * 31)
        for key in FIRST:
            text = re.split(r"[;:] |\. ", leaves[key][1])[0].rstrip(".")
            lines += _wrapped(text, f"{f'  {key}={leaves[key][0]}':30} ", " " * 31)
    required = [f for f in dataclasses.fields(schema) if f.default == "???"]
    if required:
        lines += ["", "REQUIRED", *_keys(schema, values, "", required)]
    lines += ["", "KEYS with their values, to be written in this form"]
    rest = [f for f in dataclasses.fields(schema) if f not in required]
    own = schema.__annotations__
    lines += _keys(schema, values, "", sorted(rest, key=lambda f: f.name not in own))
    return "\n".join(lines)


def _leaves(schema: type[Any], values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, value, explanation) of every plain key."""
    texts = explanations(schema)
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, values[name], f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", _written(values[name]), texts.get(name, "")


def _keys(
    schema: type[Any], values: dict[str, Any], prefix: str, fields: list[dataclasses.Field[Any]]
) -> Iterator[str]:
    """The plain keys of a group, then the groups in it."""
    hints, texts = get_type_hints(schema), explanations(schema)
    groups = [f for f in fields if dataclasses.is_dataclass(hints[f.name])]
    for field in fields:
        if field in groups:
            continue
        key, value = f"{prefix}{field.name}", _written(values[field.name])
        given = f"  {key}={'...' if value == '???' else value}"
        yield f"{given}   ({kind(hints[field.name])})"
        yield from _wrapped(texts.get(field.name, ""), " " * 6, " " * 6)
    for field in groups:
        group = hints[field.name]
        yield ""
        yield from _wrapped(inspect.getdoc(group).split("\n\n")[0], f"{prefix}{field.name}: ", "  ")  # type: ignore[union-attr]
        inside = list(dataclasses.fields(group))
        yield from _keys(group, values[field.name], f"{prefix}{field.name}.", inside)


def explanations(schema: type[Any]) -> dict[str, str]:
    """Field -> the string below it, of a dataclass and those that it extends."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _written(value: Any) -> str:
    """A value as the command line takes it, cut short."""
    if isinstance(value, list):
        text = "[" + ",".join(map(_written, value)) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return textwrap.shorten(text, _SHOWN, placeholder="...") if " " in text else text[:_SHOWN]


def _wrapped(text: str, first: str, then: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
