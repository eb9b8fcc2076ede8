"""Which split an image belongs to, and what is in two: scores on images that were trained on are no scores.

One pool of images becomes the splits of data.splits: the first is trained on, the second is val.

    val_share, test_share   an image is drawn by sha256(seed, key): below the first share it is of the second
                            split, from 1 - test_share on of the third. More images move no other
    fold=2/5                the second split is the second of five equal parts, the first all others; each
                            image is in one part. A third split is drawn before them, alike for all folds
    group                   no group is in two splits
    stratify                each class's share of images is alike in all splits

With the last three, whole groups are handed out one by one (`_shared_out`), so that another image may move
others. Images that a split which is trained on shares with one which is not, as files or byte for byte, are
refused but for the splits that `data.allow_duplicates` names."""

import functools
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from segformer.data.sources.content import override
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import ConfigError, DataError, listed

_SHARES = (0.2, 0.1, 0.3, 0.5)  # what is proposed: the first that leaves no split empty
_SHOWN = 3  # images in a message
_PASSES = 10  # over all groups, to find better places; 2 or 3 are the rule

Present = Callable[[Sequence[str]], Sequence[Collection[Hashable]]]
"""Keys -> the classes that each image holds."""


def divided(
    cfg: DatasetConfig,
    split: str,
    keys: set[str],
    present: Present,
    columns: Mapping[str, Mapping[str, str]] | None = None,
) -> set[str]:
    """The keys of one pool, that of all splits, that belong to `split`; DataError where none does.

    present: called with data.stratify only. columns: by name, key -> its value, for data.group.
    """
    if not cfg.is_divided or not keys:
        return keys
    if cfg.group or cfg.stratify or cfg.fold:
        places = _balanced(cfg, keys, present, columns or {})
    else:
        places = {key: _drawn(cfg, key) for key in keys}
    place = cfg.splits.index(split)
    if not (own := {key for key in keys if places[key] == place}):
        share = working_share(cfg, keys)
        do = f"set {override('data.val_share', share)}" if share else "name the images in data.split_lists"
        given = f"{'test' if place == 2 else 'val'}_share"
        raise DataError(
            f"data.{given}={getattr(cfg, given)} leaves no image for {split} of {len(keys)}; {do}"
        )
    return own


def _draw(cfg: DatasetConfig, name: str) -> float:
    """A number from 0 to 1 of a key or group."""
    drawn = hashlib.sha256(f"{cfg.val_seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(drawn[:8], "big") / 2**64


def _drawn(cfg: DatasetConfig, key: str) -> int:
    draw = _draw(cfg, key)
    return 1 if draw < cfg.val_share else 2 if draw >= 1 - cfg.test_share else 0


def working_share(cfg: DatasetConfig, keys: set[str]) -> float:
    """A usual share that leaves no split empty; 0 where none does."""
    draws = sorted(_draw(cfg, key) for key in keys)
    most = 1 - cfg.test_share
    return next((s for s in _SHARES if draws and draws[0] < s and any(s <= d < most for d in draws)), 0)


def groups_of(
    cfg: DatasetConfig, keys: Collection[str], columns: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Key -> its group by data.group, or itself."""
    if not cfg.group:
        return {key: key for key in keys}
    if cfg.group in columns:
        return {key: columns[cfg.group][key] for key in keys}
    if cfg.group != "folder" and "(" not in cfg.group:
        have = f"the columns are {listed(columns)}" if columns else "these labels have no columns"
        raise ConfigError(
            f"data.group={cfg.group!r} is no regular expression with a (group); {have}; "
            "use one, such as 'data.group=\"^(.*)_\"', or data.group=folder"
        )
    found = {key: grouped(cfg.group, key) for key in keys}
    if lost := sorted(key for key, group in found.items() if group is None):
        raise DataError(
            f"data.group={cfg.group!r} finds no group in {len(lost)} of {len(keys)} keys "
            f"({listed(lost, _SHOWN)}); {_other_group(cfg, keys)}"
        )
    return {key: group for key, group in found.items() if group is not None}


def _other_group(cfg: DatasetConfig, keys: Collection[str]) -> str:
    """What to say where data.group does not serve."""
    proposed = [group for group in proposed_groups(cfg, keys, ()) if group != cfg.group]
    do = f"such as {override('data.group', proposed[0])}" if proposed else "its first (group) is the group"
    return f"give another regular expression, {do}"


_GROUPINGS = ("folder", "^([^/]*)/", "^([^_]*)_", "^(.*)_", "^(.*[^0-9])[0-9]+$", "([^/_]*)_[^/]*$")


def proposed_groups(
    cfg: DatasetConfig, keys: Collection[str], alike: Collection[tuple[str, str]]
) -> Iterator[str]:
    """Values of data.group that suggest themselves: enough groups, fewer than images, none of which would
    leave two keys that are `alike` in two."""
    enough = max(len(cfg.splits), int(cfg.fold.partition("/")[2] or 0))
    for grouping in _GROUPINGS:
        found = {key: grouped(grouping, key) for key in keys}
        if None in found.values() or not enough <= len(set(found.values())) < len(keys):
            continue
        if all(found[first] == found[second] for first, second in alike):
            yield grouping


def grouped(grouping: str, key: str) -> str | None:
    """The group of a key by `folder` or a regular expression; None where it finds none."""
    if grouping == "folder":
        return posixpath.dirname(key)
    match = re.search(grouping, key)
    return match and match[1]


def _balanced(
    cfg: DatasetConfig, keys: set[str], present: Present, columns: Mapping[str, Mapping[str, str]]
) -> dict[str, int]:
    """The place in data.splits of each key, by groups."""
    groups = groups_of(cfg, keys, columns)
    ordered = sorted(keys, key=lambda key: (_draw(cfg, groups[key]), key))
    holds: dict[str, Counter[Hashable]] = {}
    classes = present(ordered) if cfg.stratify else [()] * len(ordered)
    for key, held in zip(ordered, classes, strict=True):
        holds.setdefault(groups[key], Counter()).update([_IMAGES, *held])
    number, count = (int(part) for part in (cfg.fold or "1/1").split("/"))
    needed = count + bool(cfg.test_share) if cfg.fold else len(cfg.splits)
    if len(holds) < needed:
        what, do = f"there are {len(holds)} images", "add images"
        if cfg.group:
            what, do = f"data.group={cfg.group!r} finds {len(holds)} groups", _other_group(cfg, keys)
        elif (most := len(holds) - needed + count) > 1:
            do = f"take fewer, such as {override('data.fold', f'1/{most}')}"
        raise DataError(f"{what}, and {needed} parts need one each; {do}")
    place = dict.fromkeys(holds, 0)
    if cfg.test_share:
        test = _shared_out([*holds.values()], [1 - cfg.test_share, cfg.test_share], [needed - 1, 1])
        place = {group: 2 * part for group, part in zip(holds, test, strict=True)}
    rest = [group for group in holds if not place[group]]
    share = cfg.val_share / (1 - cfg.test_share)
    shares = [1 / count] * count if cfg.fold else [1 - share, share]
    parts = _shared_out([holds[group] for group in rest], shares, [1] * len(shares))
    own = number - 1 if cfg.fold else 1
    place |= {group: int(part == own) for group, part in zip(rest, parts, strict=True)}
    return {key: place[groups[key]] for key in keys}


_IMAGES = None  # counted as a class that each image holds, of the weight of all others together


def _shared_out(
    holds: Sequence[Counter[Hashable]], shares: Sequence[float], least: Sequence[int]
) -> list[int]:
    """The part that each group goes to; holds: class -> images of the group that hold it. least: groups that
    each part needs.

    Greedy, the groups with the rarest classes first, then the large ones: each goes where it adds least to

        sum over parts and classes of weight (part's share of the class's images - share)^2 / share

    and goes elsewhere as long as that lowers it. Images alone are so dealt out as seats are by Sainte-Lague.
    Rarest class first: Sechidis et al., On the stratification of multi-label data, ECML PKDD 2011.
    """
    total: Counter[Hashable] = Counter()
    for held in holds:
        total.update(held)
    weight = {one: 1 / total[one] ** 2 for one in total}
    weight[_IMAGES] *= max(1, len(total) - 1)
    have: list[Counter[Hashable]] = [Counter() for _ in shares]
    groups = [0] * len(shares)

    def cost(part: int, held: Counter[Hashable]) -> float:
        added = sum(weight[one] * count * (2 * have[part][one] + count) for one, count in held.items())
        return added / shares[part]

    order = sorted(range(len(holds)), key=lambda i: (min(total[c] for c in holds[i]), -holds[i][_IMAGES]))
    places = [0] * len(holds)
    for left, index in zip(range(len(order), 0, -1), order, strict=True):
        short = [part for part, count in enumerate(groups) if count < least[part]]
        needed = sum(least[part] - groups[part] for part in short)
        place = min(short if left <= needed else range(len(shares)), key=lambda p: cost(p, holds[index]))
        have[place].update(holds[index])
        groups[place], places[index] = groups[place] + 1, place
    for _ in range(_PASSES):
        before = list(places)
        for index in order:
            held, old = holds[index], places[index]
            if groups[old] > least[old]:
                have[old].subtract(held)
                new = min(range(len(shares)), key=lambda p: cost(p, held) * (1 - 1e-9 * (p == old)))
                have[new].update(held)
                groups[old] -= 1
                groups[new] += 1
                places[index] = new
        if places == before:
            break
    return places


def same_files(cfg: DatasetConfig, images: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    """A message for each two splits that have files in common; images: (key, file) of each, by split."""
    real = functools.cache(os.path.realpath)
    folders = {split: {real(os.path.dirname(file)) for _, file in found} for split, found in images.items()}
    for first, second in pairs(images, cfg.allow_duplicates):
        if folders[first].isdisjoint(folders[second]):
            continue
        places = {split: _places(images[split], real) for split in (first, second)}
        if not (shared := places[first].keys() & places[second].keys()):
            continue
        do = "give each split a folder of its own (data.image_dir, data.split_dirs)"
        if first in cfg.split_lists or second in cfg.split_lists:
            do = "name each image in one list of data.split_lists only"
        elif len(shared) == len(places[first]) == len(places[second]):
            do = "divide the folder by lists (data.split_lists)"
            if len(cfg.splits) == 2 and (share := working_share(cfg, {places[first][f] for f in shared})):
                do = f"divide the folder: {override('data.val_share', share)}, or by lists (data.split_lists)"
        yield _in_both(first, second, "", [places[first][place] for place in sorted(shared)], do)


def _places(found: Sequence[tuple[str, str]], real: Callable[[str], str]) -> dict[str, str]:
    return {f"{real(os.path.dirname(file))}/{os.path.basename(file)}": key for key, file in found}


@dataclass(frozen=True, slots=True)
class Shared:
    """Images that two splits share. whole: all of the second."""

    first: str
    second: str
    whole: bool
    text: str


def same_bytes(
    allowed: Collection[str], images: Mapping[str, Mapping[Any, str]], train: Collection[str] | None = None
) -> Iterator[Shared]:
    """For each of the `pairs` that share images; images: what stands for its bytes -> key, by split."""
    for first, second in pairs(images, allowed, train):
        if shared := images[first].keys() & images[second].keys():
            named = sorted(f"{images[first][one]} = {images[second][one]}" for one in shared)
            text = _in_both(first, second, ", byte for byte", named, "remove them from one")
            yield Shared(first, second, len(shared) == len(images[second]), text)


EVAL_SPLIT = "val"  # that a run scores where it names no other


def is_training(split: str) -> bool:
    """True for a split that is shuffled and trimmed, by its name."""
    return not split.startswith(("val", "test"))


def pairs(
    splits: Collection[str], allowed: Collection[str], train: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Every two splits that may not share images: one is trained on, the other scored.

    train: those that are trained on; None: those whose name says so.
    """
    trained = {split for split in splits if is_training(split)} if train is None else set(train)
    for a, b in combinations(splits, 2):
        if (a in trained) != (b in trained) and a not in allowed and b not in allowed:
            yield a, b


def _in_both(first: str, second: str, how: str, names: Sequence[str], do: str) -> str:
    return (
        f"{len(names)} images are in {first} and in {second}{how} ({listed(names, _SHOWN)}): scores would be "
        f"too good; {do}; if that is meant: {override('data.allow_duplicates', [second])}"
    )
