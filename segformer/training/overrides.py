"""Overrides of the command line held against the dataclass; what is wrong is one line in a user's words.

    steps=1e3              -> steps=1e3 must be a whole number; write steps=1000
    optim.lrr=1            -> optim.lrr is not a setting; did you mean optim.lr?
    model.freeze=encoder   -> model.freeze is not a setting; model has variant, num_classes, ...

The value of a text is taken as it stands, whatever hydra's grammar has for `=`, `,`, `(` or `#`; dictionaries
take new keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from segformer.errors import ConfigError, is_main_rank, printable, reraise_as
from segformer.files import parse_yaml

# Names of before 0.2 -> of now, where the command has the new one as a plain value.
RENAMED = {"run": "checkpoint", "source": "checkpoint", "out": "output"}
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}
_QUOTED = r"'[^']*'|\"[^\"]*\""
_GRAMMAR = r"null|'.*'|\".*\"|.*\$\{.*|"  # texts that hydra reads: null, quoted ones, references


def near(word: str, known: Iterable[str]) -> str:
    """The one of `known` that `word` is probably a misspelling of; "" for none."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), "")


def kind(hint: Any) -> str:
    """A type in words: "whole number or null", "list of text"."""
    inside = get_args(hint)
    if NoneType in inside:
        return f"{kind(inside[0])} or null"
    if get_origin(hint) is dict:
        return f"dictionary of {kind(inside[1])}"
    return f"list of {kind(inside[0]).rstrip('s')}s" if inside else _KINDS.get(hint, "group")


def type_of(schema: type[Any], key: str) -> Any:
    """The type of the setting `key`; ConfigError where there is none, with the nearest or what there is."""
    found: Any = schema
    parts = key.split(".")
    for index, name in enumerate(parts):
        parent = ".".join(parts[:index])
        if dataclasses.is_dataclass(found):
            hints = get_type_hints(found)
            if name not in hints:
                raise ConfigError(_unknown(schema, parent, name, list(hints)))
            found = hints[name]
        elif get_origin(found) is dict:
            found = get_args(found)[1]
        elif found is not Any:
            raise ConfigError(f"{key} is not a setting; {parent} has one value: {parent}=...")
    return found


def _unknown(schema: type[Any], parent: str, name: str, fields: list[str]) -> str:
    key, prefix = (f"{parent}.{name}", f"{parent}.") if parent else (name, "")
    elsewhere = [other for other in _keys(schema) if other.rpartition(".")[2] == name]
    if close := near(name, fields) or " or ".join(elsewhere):
        return f"{key} is not a setting; did you mean {close if close in elsewhere else prefix + close}?"
    has = f"{parent} has {', '.join(fields)}" if parent else "--help lists all keys"
    return f"{key} is not a setting; {has}"


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, found in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(found):
            yield from _keys(found, f"{prefix}{name}.")


def renamed(schema: type[Any], argument: str) -> str:
    """An argument by the key's present name; an old one is accepted for a release, with a line about it."""
    old, equals, value = argument.partition("=")
    new = RENAMED.get(old, "")
    plain = [f.name for f in dataclasses.fields(schema) if isinstance(f.default, str)]
    if not equals or new not in plain:
        return argument
    if is_main_rank():
        print(f"{old}= is now {new}=; the old name goes with the next release", file=sys.stderr)
    return f"{new}={value}"


def checked(schema: type[Any], names: dict[str, list[str]], override: str) -> str:
    """An override as hydra takes it; `names`: the choices of each group of conf/.

    Raises:
        ConfigError: it has no form that we know, or there is no such key or name.
    """
    given = printable(override)
    found = re.fullmatch(r"(\+{0,2}|~)(\w+(?:\.[\w-]+)*)(=?)(.*)", override, re.DOTALL)
    sign, key, equals, value = found.groups() if found else ("", "", "", "")
    if key.startswith("hydra"):
        raise ConfigError(f"{given} is refused: hydra's own settings are fixed")
    parent = key.rpartition(".")[0]
    if sign == "~" or (key, value) == ("experiment", "null"):  # which is what conf/config.yaml has
        if key != "experiment" and not (parent and get_origin(type_of(schema, parent)) is dict):
            raise ConfigError(f"{given} is refused: ~ takes an entry out of a table; leave {key} out instead")
        return f"~{key}"
    if not equals:
        raise ConfigError(f"'{given}' is not an override; write key=value (all keys: --help)")
    if key in names and not value.startswith("{"):
        if value.strip("'\"") not in names[key]:
            raise ConfigError(f"{given} does not exist; use one of {', '.join(names[key])}")
        return f"{key}='{value}'" if re.fullmatch(r"[\d.]+", value) else f"{key}={value}"
    if key == "loss.class_weights" and re.fullmatch(r"[a-z]+", value) and value != "null":
        return f"loss.class_weighting={value}"
    hint = type_of(schema, key)
    if re.search(r"\d{40}", value):
        raise ConfigError(f"{given} has a number of more digits than any setting takes")
    if hint in (str, str | None) and not re.fullmatch(_GRAMMAR, value, re.DOTALL):
        if value.startswith("~"):
            raise ConfigError(f"{given}: ~ stands for nothing here; write {key}=$HOME{value[1:]}")
        # In hydra's quotes a backslash counts before a quote only.
        value = re.sub(r"(\\*)('|$)", lambda f: f[1] * 2 + f[2].replace("'", "\\'"), value)
        return _entry(schema, key, f"'{value}'") or f"{sign}{key}='{value}'"
    # Hydra would sweep over 1,2 and range(3), and calls more functions.
    if ("," in value and value[0] not in "[{'\"") or re.search(r"\w\(", re.sub(_QUOTED, "", value)):
        inside = hint == list[str] and value.startswith("[")
        raise ConfigError((unreadable if inside else refusal)(schema, key, given))
    if entry := _entry(schema, key, value):
        return entry
    return f"++{key}={value}" if value.startswith("{") else override


def quoted_tables(schema: type[Any], overrides: list[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """(key, table) of each `key={"a (b)": c}`, whose quoted names hydra's grammar lacks; and the others."""
    tables, others = [], []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        quoted = value.startswith("{") and re.search(rf"[{{,]\s*({_QUOTED})\s*:", value)
        if not quoted or get_origin(type_of(schema, key)) is not dict:
            others.append(override)
            continue
        do = """write it as 'key={"a (b)": c}'"""
        with reraise_as(ConfigError, f"{printable(override)} can't be read", do, on=ValueError):
            tables.append((key, parse_yaml(value)))
    return tables, others


def _entry(schema: type[Any], key: str, value: str) -> str:
    """The override of a key in a table, which may be new there, as one of the table; "" for another key."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        table = ".".join(parts[:count])
        if get_origin(type_of(schema, table)) is dict:
            for name in reversed(parts[count:]):
                value = f"{{{name}: {value}}}"
            return f"++{table}={value}"
    return ""


def unquoted(overrides: list[str]) -> None:
    """Refuse a list or table that a shell has cut at its spaces.

    Raises:
        ConfigError: it gives the whole override, quoted.
    """
    for index, first in enumerate(overrides):
        whole = first
        for further in overrides[index + 1 :]:
            if not _open(whole) or re.match(r"[+~]*[\w.]+=", further):
                break
            whole = f"{whole} {further}"
        if whole != first and not _open(whole):
            quoted = shlex.quote(printable(whole))
            raise ConfigError(f"{printable(first)} is cut at a space; quote it: {quoted}")


def _open(override: str) -> bool:
    """The value is a list or table without an end."""
    value = re.sub(_QUOTED, "", override.partition("=")[2])
    return value.startswith(("[", "{")) and sum(map(value.count, "[{")) > sum(map(value.count, "]}"))


def give_way(composed: Any, given: set[str]) -> None:
    """What a recipe leaves to be worked out gives way to what the command line says."""
    for one, other in (("epochs", "steps"), ("loss.class_weighting", "loss.class_weights")):
        if {one, other} <= given:
            raise ConfigError(f"{one} and {other} decide the same; give one of them")
    if "steps" in given:
        composed.epochs = None
    if "loss.class_weights" in given:
        composed.loss.class_weighting = ""
    if "loss.class_weighting" in given:
        given = given | {"loss.class_weights"}
    composed.auto = [key for key in composed.auto if key not in given]


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables by dotted key."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_values(schema: type[Any], values: dict[str, Any]) -> None:
    """Hold composed values against the schema, each of them, also in lists and below Any.

    Raises:
        ConfigError: one has another type, is not finite or huge; it names the key.
    """
    for key, hint, value in _leaves(schema, values):
        given = f"{key}={'null' if value is None else printable(str(value))}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        most = 2**64 - 1 if isinstance(value, int) else 1e30  # so that products of two stay finite
        if number and not -most <= value <= most:
            raise ConfigError(f"{given} must be a number from -{most:g} to {most:g}")
        if hint is not Any and not (number if hint is float else type(value) is hint):
            raise ConfigError(refusal(schema, key, given))


def _leaves(hint: Any, value: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, type, value) of all that is no table or list of its type."""
    inside = get_args(hint)
    below: Iterable[tuple[str, Any, Any]]
    if NoneType in inside:
        below = [("", inside[0], value)] if value is not None else []
    elif isinstance(value, dict) and dataclasses.is_dataclass(hint):
        below = [(f".{name}", kind, value.get(name)) for name, kind in get_type_hints(hint).items()]
    elif isinstance(value, dict) and (hint is Any or get_origin(hint) is dict):
        below = [(f".{name}", inside[1] if inside else Any, item) for name, item in value.items()]
    elif isinstance(value, list) and (hint is Any or get_origin(hint) is list):
        below = [(f"[{i}]", inside[0] if inside else Any, item) for i, item in enumerate(value)]
    else:
        yield key, hint, value
        return
    for name, kind, item in below:
        yield from _leaves(kind, item, f"{key}{name}".removeprefix("."))


def unreadable(schema: type[Any], key: str, given: str) -> str:
    """Message for the override `given`, which hydra's grammar does not take."""
    value = given.partition("=")[2]
    if type_of(schema, key) == list[str] and re.fullmatch(r"\[.*\]", value):
        texts = [item.strip().strip("'\"") for item in value[1:-1].split(",")]
        fixed = ",".join(f'"{text}"' for text in texts)
        return f"{given} can't be read; write {shlex.quote(f'{key}=[{fixed}]')}"
    return f"{given} can't be read; texts with other signs than . _ - need quotes: 'key=[\"a (b)\"]'"


def refusal(schema: type[Any], key: str, given: str) -> str:
    """Message for the override `given`, whose value is none that the setting `key` takes."""
    key, value = re.sub(r"\[\d+\]", "", key), given.partition("=")[2]
    hint = type_of(schema, key)
    if value == "null":
        return f"{given} is refused: {key} can't be null"
    if dataclasses.is_dataclass(hint):
        return f"{given} is refused: {key} is a group; it has {', '.join(get_type_hints(hint))}"
    do = ""
    if get_origin(hint) is list:
        in_table = _entry(schema, key, "")  # which is empty by default
        default = [] if in_table else functools.reduce(getattr, key.split("."), schema())
        plain = re.sub(r"^\w*[\[(]|[\])]+$", "", value) if hint == list[str] else "..."
        do = f", such as {key}=[{','.join(map(str, default)) or plain or '...'}]"
    elif re.fullmatch(r"\d+(\.\d+)?e\d+|\d+\.0", value):
        do = f"; write {key}={float(value):.0f}"
    return f"{given} must be {'' if hint is bool else 'a '}{kind(hint)}{do}"
