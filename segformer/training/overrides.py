"""What is wrong with a setting, in one line: hydra's and omegaconf's messages in the words of a user.

    steps=1e3              -> steps=1e3 must be a whole number; write steps=1000
    optim.lrr=1            -> optim.lrr is not a setting; did you mean optim.lr?
    model.freeze=encoder   -> model.freeze is not a setting; model has variant, num_classes, ...
    loss.terms.dise=1      -> loss.terms has no dise; did you mean +loss.terms.dice=1?

Works on the text of the errors, so that it needs neither package. A message that it doesn't know is kept.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

from segformer.training.losses import LOSSES

# The keys that a dictionary of the schema takes; any others take all.
ENTRIES = {"loss.terms": tuple(LOSSES)}
_WANTED = {
    "could not be converted to Integer": "a whole number",
    "could not be converted to Float": "a number",
    "is not a valid bool": "true or false",
    "to string:": "a text",
}


def explain(text: str, schema: type[Any]) -> str:
    """One line for `text`: the message of an error and, below it, that of its cause."""
    return _unknown_key(text, schema) or _wrong_value(text, schema) or _no_such_option(text) or _joined(text)


def first_line(text: str, schema: type[Any]) -> str:
    """One line for the message of one error of omegaconf."""
    if missing := re.search(r"missing mandatory value: (\S+)", text):
        return f"{missing[1]} is missing; give {missing[1]}=..."
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    where = _key(text)
    return _wrong_value(text, schema) or (f"{where}: {first}" if where not in first else first)


def near(word: str, known: Iterable[str]) -> str:
    """The one of `known` that `word` is probably a misspelling of; "" for none."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), "")


def _key(text: str) -> str:
    found = re.search(r"full_key: (\S+)", text)
    return found[1] if found else ""


def _unknown_key(text: str, schema: type[Any]) -> str:
    """A key that isn't there: the nearest of its group, else its name in another one, else what there is."""
    key = _key(text)
    if not key or not re.search(r"Key '[^']+' (?:is )?not in|Could not override '", text):
        return ""
    parent, _, name = key.rpartition(".")
    root = schema()
    group = _at(root, parent)
    if isinstance(group, dict):
        return _unknown_entry(key, text)
    fields = _names(group)
    prefix = f"{parent}." if parent else ""
    if close := near(name, fields):
        return f"{key} is not a setting; did you mean {prefix}{close}?"
    if elsewhere := [other for other in _all_keys(root) if other.rpartition(".")[2] == name]:
        return f"{key} is not a setting; did you mean {' or '.join(elsewhere)}?"
    has = f"{parent} has {', '.join(fields)}" if parent and fields else "--help lists all keys"
    return f"{key} is not a setting; {has}"


def _unknown_entry(key: str, text: str) -> str:
    """A key that a dictionary doesn't have yet: + adds it, where its name is one that is taken."""
    parent, _, name = key.rpartition(".")
    given = re.search(rf"use \+{re.escape(key)}=(\S+)", text)
    value = given[1] if given else "..."
    known = ENTRIES.get(parent, (name,))
    if name in known:
        return f"{parent} has no {name} yet; add it with +{key}={value}"
    close = near(name, known)
    return f"{parent} has no {name}; " + (
        f"did you mean +{parent}.{close}={value}?" if close else f"it takes {', '.join(known)}"
    )


def _wrong_value(text: str, schema: type[Any]) -> str:
    """A value of another type than the schema's."""
    key, override = _key(text), re.search(r"merging override \+*(.+)", text)
    if not key:
        return ""
    value = re.search(r"Value '(.*?)' (?:of type|is not)", text)
    given = f"{key}={value[1]}" if value else key
    if override:
        name = override[1].partition("=")[0]
        if name.startswith(f"{key}.") and "'{}'" in text:
            return f"{name} is not a setting; {key} has one value: {key}=..."
        given = override[1] if name == key else given
    if "is incompatible with (int)" in text:
        parent, _, name = key.rpartition(".")
        return f"{given}: its names are numbers; write {parent}={{{name}: ...}}"
    if "is not a ListConfig" in text:
        example = _example(_at(schema(), key))
        return f"{given} must be a list, such as {key}=[{example}]"
    if "is not Optional" in text:
        return f"{given} is refused: {key} can't be null"
    if "is not a subclass of" in text:
        return f"{given} is refused: {key} is a group; it has {', '.join(_names(_at(schema(), key)))}"
    wanted = next((words for said, words in _WANTED.items() if said in text), "")
    whole = value and wanted == "a whole number" and re.fullmatch(r"(-?\d+)\.0", value[1])
    return f"{given} must be {wanted}" + (f"; write {key}={whole[1]}" if whole else "") if wanted else ""


def _no_such_option(text: str) -> str:
    found = re.search(
        r"Could not find '([^']+)/([^']*)'\s+Available options in '[^']+':((?:\s+[\w.-]+)*)", text
    )
    if not found:
        return ""
    known = found[3].split("Config search path")[0].split()
    return f"{found[1]}={found[2]} does not exist; use one of {', '.join(known)}"


def _joined(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in dict.fromkeys(lines) if not re.match(r"\w+(?:: |=)\S+$", line))


def _at(root: Any, key: str) -> Any:
    """The default of the setting `key`; None where there is no such thing."""
    found = root
    for name in key.split(".") if key else ():
        found = getattr(found, name, None)
    return found


def _names(group: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else []


def _all_keys(group: Any, prefix: str = "") -> Iterable[str]:
    for name in _names(group):
        value = getattr(group, name)
        if dataclasses.is_dataclass(value):
            yield from _all_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _example(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, list) and default else "...,..."
